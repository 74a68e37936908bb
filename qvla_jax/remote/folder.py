"""A folder that is elsewhere, of which the files that are read are fetched and checked.

What is known of it is kept in a record: the files that are there and, of those that were fetched
and checked here, size, time and SHA-256, so that they are hashed once and found without a network.
"""

import abc
import base64
import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from qvla_jax.atomic import write_json
from qvla_jax.errors import InputError, RemoteError
from qvla_jax.plain import from_plain, to_plain
from qvla_jax.progress import Progress

_BLOCK_BYTES: Final = 1 << 22
_MEGABYTE: Final = 10**6
# Of a safetensors file; that of its library.
_MAX_HEADER: Final = 100_000_000


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """What a place says about one of its files.

    Attributes:
        size: in bytes.
        digests: its checksums, by the names of `digest_of`; may be empty.
        version: changes with the content; empty where the place does not say.
    """

    size: int
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    version: str = ""


@dataclasses.dataclass(frozen=True)
class Checked:
    """A local file that was found to be as its place says.

    Attributes:
        file: what the place said.
        size: in bytes.
        modified: time of the last change, in nanoseconds.
        sha256: of the content.
    """

    file: RemoteFile
    size: int
    modified: int
    sha256: str


class RemoteFolder(abc.ABC):
    """A folder elsewhere, in one version.

    Attributes:
        source: as the user names it.
        revision: the version's name (a commit); None where the place has no versions.
        folder: where its files lie once they are fetched.
        files: all files, by their path in it.
    """

    source: str
    revision: str | None
    folder: Path
    files: Mapping[str, RemoteFile]
    # Errors of fetching say where the folder is.
    place: ClassVar[str]

    def __init__(self) -> None:
        self._checked: dict[str, Checked] = {}
        self._asked: set[str] = set()
        # Shows what is fetched where the caller of `fetch` has nothing that does.
        self.progress: Progress | None = None

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files that were asked for, by path."""
        return {name: self._checked[name].sha256 for name in sorted(self._asked)}

    @abc.abstractmethod
    def name_of(self, below: str = "") -> str:
        """The name of the folder, or of one in it, with the revision: the same files tomorrow."""

    def fetch(self, names: Iterable[str], progress: Progress | None = None) -> None:
        """Makes files be there, each as its place says.

        Args:
            names: paths of files that are there.
            progress: called with megabytes; None leaves it to the place's library to show them.

        Raises:
            RemoteError: a file cannot be fetched, or is not what its place says.
        """
        names = list(dict.fromkeys(names))
        missing = [name for name in names if not self._is_checked(name)]
        self._asked.update(names)
        if not missing:
            return
        progress = progress or self.progress
        total = sum(self.files[name].size for name in missing)
        meter = None if progress is None else Meter(progress, f"fetch {self.source} (MB)", total)
        try:
            self._transfer(missing, meter)
        finally:
            self._keep()

    @abc.abstractmethod
    def _transfer(self, names: list[str], meter: "Meter | None") -> None:
        """Fetches files and calls `_accept` for each."""

    def fetch_header(self, name: str, target: Path) -> None:
        """Writes a file that is one of safetensors up to its values, which are a hole.

        Args:
            name: path of a file that is there.
            target: what to write; as long as the file itself, but takes no room.

        Raises:
            RemoteError: it cannot be fetched, or has no such header.
        """
        size = self.files[name].size
        length = int.from_bytes(self._part(name, 0, min(8, size)), "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER):
            raise RemoteError(f"{self.source}: {name}: not a safetensors file")
        with target.open("wb") as file:
            file.write(self._part(name, 0, 8 + length))
            file.truncate(size)

    @abc.abstractmethod
    def _part(self, name: str, start: int, end: int) -> bytes:
        """Some bytes of a file, which no checksum covers.

        Raises:
            RemoteError: they cannot be fetched.
        """

    def _is_checked(self, name: str) -> bool:
        known = self._checked.get(name)
        if known is None or known.file != self.files[name]:
            return False
        try:
            found = (self.folder / name).stat()
        except OSError:
            return False
        return (found.st_size, found.st_mtime_ns) == (known.size, known.modified)

    def _accept(self, name: str, path: Path) -> None:
        """Notes a file that was fetched, if it is what its place says.

        Raises:
            RemoteError: it is not; it is gone then.
        """
        file = self.files[name]
        size = path.stat().st_size
        found = digests_of(path, {*file.digests, "sha256"}, size)
        wrong = [
            f"{kind} {found[kind]}, expected {expected}"
            for kind, expected in file.digests.items()
            if not self._agrees(name, kind, found[kind], expected)
        ]
        if size != file.size:
            wrong.insert(0, f"{size} bytes, expected {file.size}")
        if wrong:
            self._discard(name, path)
            raise RemoteError(
                f"{self.source}: {name}: not the file that {self.place} announces ({wrong[0]}); "
                "it was not kept. Fetch it again; if this stays, its source or the way from there "
                "is damaged"
            )
        self._checked[name] = Checked(file, size, path.stat().st_mtime_ns, found["sha256"])

    def _agrees(self, name: str, kind: str, found: str, expected: str) -> bool:
        """Whether a file has the checksum that was announced."""
        del name, kind
        return found == expected

    def _discard(self, name: str, path: Path) -> None:
        """Removes a file that is not what its place says."""
        del name
        path.unlink(missing_ok=True)

    @property
    @abc.abstractmethod
    def _record(self) -> Path:
        """The file that keeps what is known."""

    def _recall(self) -> dict[str, RemoteFile] | None:
        """The files as the record has them, and those that were checked; None without a record."""
        try:
            content = json.loads(self._record.read_text("utf-8"))
            files = {
                name: from_plain(RemoteFile, file, name) for name, file in content["files"].items()
            }
            self._checked = {
                name: from_plain(Checked, found, name) for name, found in content["checked"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError):
            return None  # absent or unusable: everything is asked and checked again
        return files

    def _keep(self) -> None:
        known = {"files": to_plain(self.files), "checked": to_plain(self._checked)}
        with contextlib.suppress(InputError):  # nothing is lost but time
            write_json(self._record, {"source": self.source, "revision": self.revision, **known})


class Meter:
    """Counts bytes that arrive, and reports them as megabytes."""

    def __init__(self, progress: Progress, stage: str, total: int):
        self._progress, self._stage = progress, stage
        self._done, self._total = 0, total
        self._lock = threading.Lock()
        self.add(0)

    def add(self, count: int) -> None:
        """Says that bytes have arrived, or, if negative, that some arrive again."""
        total = -(-self._total // _MEGABYTE)
        with self._lock:
            self._done += count
            self._progress(self._stage, min(-(-self._done // _MEGABYTE), total), total)


def digests_of(path: Path, kinds: Iterable[str], size: int) -> dict[str, str]:
    """Checksums of a file, from one reading.

    Args:
        path: the file.
        kinds: of "sha256", "md5" (in hexadecimal), "git-sha1" (as git names a file) and "crc32c"
            (in base64, as Google's buckets have it).
        size: of the file in bytes.
    """
    made: dict[str, Any] = {kind: _digest(kind, size) for kind in kinds}
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            for digest in made.values():
                digest.update(block)
    return {
        kind: base64.b64encode(digest.digest()).decode() if kind == "crc32c" else digest.hexdigest()
        for kind, digest in made.items()
    }


def _digest(kind: str, size: int) -> Any:
    if kind == "crc32c":
        import google_crc32c  # comes with gcsfs, whose buckets have this checksum

        return google_crc32c.Checksum()
    if kind == "git-sha1":
        return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    return hashlib.new(kind, usedforsecurity=kind == "sha256")


_OPENED: dict[tuple[str, str], RemoteFolder] = {}


def opened(kind: str, source: str, make: Callable[[], RemoteFolder]) -> RemoteFolder:
    """The folder of a name; in one process, a name means one version of it."""
    key = (kind, source)
    if key not in _OPENED:
        _OPENED[key] = make()
    return _OPENED[key]


def forget() -> None:
    """Makes names mean what they mean now."""
    _OPENED.clear()


def ensure(path: Path) -> None:
    """Fetches a file of a folder that is elsewhere, if it is one and is not here yet.

    Raises:
        RemoteError: it cannot be fetched.
    """
    for folder in _OPENED.values():
        if path.is_relative_to(folder.folder):
            name = path.relative_to(folder.folder).as_posix()
            if name in folder.files:
                folder.fetch([name])


def remote_name(path: Path) -> str | None:
    """The name of a local path that belongs to a folder that is elsewhere."""
    for folder in _OPENED.values():
        if path.is_relative_to(folder.folder):
            return folder.name_of(path.relative_to(folder.folder).as_posix().removeprefix("."))
    return None


def origins() -> list[dict[str, Any]]:
    """What this process reads from elsewhere: name, revision, and SHA-256 of each file."""
    return [
        {"source": folder.source, "revision": folder.revision, "sha256": folder.hashes}
        for folder in _OPENED.values()
        if folder.hashes
    ]
