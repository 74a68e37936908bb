"""Repositories of the Hugging Face Hub, in the cache that its other users share.

`huggingface_hub` does the transfers, so its environment variables hold: HF_HOME, HF_HUB_CACHE,
HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT. It checks sizes; the checksums that the Hub lists (SHA-256 of
large files, git's name of others) are checked here.
"""

import inspect
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from qvla_jax.atomic import write_text
from qvla_jax.caches import cache_folder
from qvla_jax.errors import CheckpointWarning, InputError, RemoteError, first_line
from qvla_jax.remote.folder import Meter, RemoteFile, RemoteFolder

Kind = Literal["model", "dataset"]

_NAME: Final = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?P<below>(?:/\w[\w.-]*)*)")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_DEFAULT: Final = "main"
# An error of the server, not of the request.
_SERVER_ERROR: Final = 500
# The answer has the part that was asked for.
_PARTIAL: Final = 206
# Until part of a file begins to arrive.
_SECONDS: Final = 60.0


class HubFolder(RemoteFolder):
    """A repository at one commit."""

    place = "the Hub"

    def __init__(self, source: str, kind: Kind):
        """Finds the commit of a name and lists its files.

        Args:
            source: as `split_name` reads it.
            kind: of the repository.

        Raises:
            RemoteError: there is no such repository or revision, or it may not be read, or it can
                neither be reached nor is it in the cache.
        """
        super().__init__()
        self._hub = _library(source)
        self.source, self.kind = source, kind
        self.repo, self._below, revision = split_name(source)
        self._wanted = revision or _DEFAULT
        name = f"{kind}s--{self.repo.replace('/', '--')}"
        self._cache = Path(self._hub.constants.HF_HUB_CACHE) / name
        self._prefix = f"{self._below}/" if self._below else ""
        commit = self._wanted if _COMMIT.fullmatch(self._wanted) else None
        files = None if commit is None else self._known_at(commit)
        if files is None:
            commit, files = self._ask()
        self.revision, self.files = commit, files

    def name_of(self, below: str = "") -> str:
        """As OWNER/NAME[/FOLDER]@COMMIT."""
        return f"{self.repo}/{self._prefix}{below}".strip("/") + f"@{self.revision}"

    @property
    def _record(self) -> Path:
        name = f"{self.revision}/{self._below}".strip("/").replace("/", "--")
        return cache_folder("hub") / self._cache.name / f"{name}.json"

    def _known_at(self, commit: str) -> dict[str, RemoteFile] | None:
        """The files at a commit, if they were listed before: a commit never changes."""
        self.revision, self.folder = commit, self._cache / "snapshots" / commit / self._below
        return self._recall()

    def _ask(self) -> tuple[str, dict[str, RemoteFile]]:
        if self._offline:
            return self._cached()
        api = self._hub.HfApi(endpoint=_endpoint(self._hub))
        try:
            info = api.repo_info(self.repo, revision=self._wanted, repo_type=self.kind)
            commit = str(info.sha)
            if (files := self._known_at(commit)) is None:
                tree = api.list_repo_tree(
                    self.repo,
                    self._below or None,
                    recursive=True,
                    revision=commit,
                    repo_type=self.kind,
                )
                files = {
                    entry.path.removeprefix(self._prefix): _file(entry)
                    for entry in tree
                    if hasattr(entry, "blob_id")  # folders have none
                }
        except Exception as error:  # the library's, and those of the one below it
            if self._is_answer(error):
                raise self._refused(error) from error
            return self._cached(error)
        if not files:
            raise RemoteError(f"{self.source}: {_endpoint(self._hub)} has no such folder")
        if commit != self._wanted:
            # As the library does, so that the name is known offline.
            write_text(self._cache / "refs" / self._wanted, commit)
        return commit, files

    def _cached(self, error: Exception | None = None) -> tuple[str, dict[str, RemoteFile]]:
        """What is in the cache, if the Hub was not reached."""
        commit = self._wanted
        if not _COMMIT.fullmatch(commit):
            ref = self._cache / "refs" / commit
            commit = ref.read_text().strip() if ref.is_file() else ""
        files = self._known_at(commit) if commit else None
        if commit and files is None and self.folder.is_dir():
            # Fetched by another program. Its blobs have the names of their checksums.
            found = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
            files = {str(path.relative_to(self.folder)): _blob(path) for path in found}
        if not files:
            raise RemoteError(
                f"{self.source}: there is no such file or directory here. If it is a {self.kind} "
                f"of the Hugging Face Hub: {self._unreached(error)}, and the cache "
                f"({self._cache.parent}) does not hold it; fetch it once with the network"
            ) from error
        if not self._offline:
            warnings.warn(
                f"{self.source}: {self._unreached(error)}; using what is in the cache, commit "
                f"{commit}",
                CheckpointWarning,
                stacklevel=2,
            )
        return commit, files

    def _transfer(self, names: list[str], meter: Meter | None) -> None:
        # Older releases count no bytes.
        counts = "tqdm_class" in inspect.signature(self._hub.hf_hub_download).parameters
        bars = {"tqdm_class": _bar_class(meter)} if counts and meter is not None else {}
        for name in sorted(names, key=lambda name: self.files[name].size):
            cached = (self.folder / name).is_file()
            self._accept(name, self._download(name, bars))
            if meter is not None and (cached or not counts):
                meter.add(self.files[name].size)

    def _download(self, name: str, bars: Mapping[str, Any]) -> Path:
        for again in (True, False):
            try:
                path = self._hub.hf_hub_download(
                    self.repo,
                    f"{self._prefix}{name}",
                    repo_type=self.kind,
                    revision=self.revision,
                    cache_dir=self._cache.parent,
                    endpoint=_endpoint(self._hub),
                    **bars,
                )
                return Path(path)
            except Exception as error:  # as above
                if self._is_answer(error):
                    raise self._refused(error, name) from error
                # Not every release goes on by itself after a connection breaks.
                if self._offline or not again:
                    raise RemoteError(
                        f"{self.source}: {name}: not in the cache, and {self._unreached(error)}; "
                        "the same call again keeps the files that are complete"
                    ) from error
        raise AssertionError("the second time it returns or raises")

    def _part(self, name: str, start: int, end: int) -> bytes:
        if self._offline:
            raise RemoteError(
                f"{self.source}: {name}: not in the cache, and {self._unreached(None)}"
            )
        hub, utils = self._hub, self._hub.utils
        address = hub.hf_hub_url(
            self.repo,
            f"{self._prefix}{name}",
            repo_type=self.kind,
            revision=self.revision,
            endpoint=_endpoint(hub),
        )
        headers = {**utils.build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}
        try:
            answer = utils.get_session().get(address, headers=headers, timeout=_SECONDS)
            utils.hf_raise_for_status(answer)
        except Exception as error:  # as above
            if self._is_answer(error):
                raise self._refused(error, name) from error
            raise RemoteError(f"{self.source}: {name}: {self._unreached(error)}") from error
        # Small files come whole.
        content: bytes = (
            answer.content if answer.status_code == _PARTIAL else answer.content[start:]
        )
        if len(content) < end - start:
            raise RemoteError(
                f"{self.source}: {name}: {len(content)} bytes instead of {end - start}"
            )
        return content[: end - start]

    def _discard(self, name: str, path: Path) -> None:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    @property
    def _offline(self) -> bool:
        return bool(self._hub.constants.HF_HUB_OFFLINE)

    def _is_answer(self, error: Exception) -> bool:
        """Whether the Hub answered, and not because it is out of order."""
        if not isinstance(error, self._hub.errors.HfHubHTTPError):
            return isinstance(error, self._hub.errors.HFValidationError | InputError)
        response = getattr(error, "response", None)
        return response is None or response.status_code < _SERVER_ERROR

    def _unreached(self, error: Exception | None) -> str:
        if error is None or self._offline:
            return "HF_HUB_OFFLINE is set"
        first = first_line(error)
        return f"{_endpoint(self._hub)} does not deliver ({first})"

    def _refused(self, error: Exception, name: str = "") -> Exception:
        errors, where = self._hub.errors, _endpoint(self._hub)
        if isinstance(error, InputError):
            return error
        subject = f"{self.source}: {name}" if name else self.source
        token = "HF_TOKEN (or `hf auth login`)"
        if isinstance(error, errors.GatedRepoError):
            page = f"{where}/{'datasets/' if self.kind == 'dataset' else ''}{self.repo}"
            return RemoteError(
                f"{subject}: only for those who accepted its terms: accept them at {page}, and "
                f"give a token of that account in {token}"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return RemoteError(
                f"{subject}: {where} has the {self.kind} {self.repo}, but no revision "
                f"{self._wanted!r} of it (a commit, tag or branch)"
            )
        if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
            return RemoteError(
                f"{subject}: there is no such file or directory here, and {where} shows no "
                f"{self.kind} {self.repo!r}: check the spelling; one that is private needs a token "
                f"in {token}"
            )
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            return RemoteError(
                f"{subject}: {where} refuses it (HTTP {status}): give a token that may read it in "
                f"{token}"
            )
        first = first_line(error)
        return RemoteError(f"{subject}: {where} does not give it ({first})")


def looks_like_one(source: str, kind: Kind) -> bool:
    """Whether a name may be one of the Hub: OWNER/NAME, perhaps with @REVISION.

    Of data sets it may go on with a folder: OWNER/NAME/FOLDER.
    """
    name = source.partition("@")[0]
    match = _NAME.fullmatch(name)
    return match is not None and (kind == "dataset" or not match["below"])


def split_name(source: str) -> tuple[str, str, str | None]:
    """Repository, folder in it, and revision of a name."""
    name, separator, revision = source.partition("@")
    match = _NAME.fullmatch(name)
    if match is None or (separator and not revision):
        raise RemoteError(f"{source}: expected OWNER/NAME or OWNER/NAME@REVISION")
    return match["repo"], match["below"].strip("/"), revision or None


def _library(source: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise RemoteError(
            f"{source}: there is no such file or directory here; to fetch it from the Hugging Face "
            "Hub, if it is there: pip install 'qvla-jax[hub]'"
        ) from None
    return huggingface_hub


def _endpoint(hub: Any) -> str:
    # The library looks at the variable only when it is loaded.
    return (os.environ.get("HF_ENDPOINT") or str(hub.constants.ENDPOINT)).rstrip("/")


def _file(entry: Any) -> RemoteFile:
    lfs = entry.lfs
    if lfs is None:
        return RemoteFile(entry.size, {"git-sha1": entry.blob_id})
    return RemoteFile(lfs.size, {"sha256": lfs.sha256})


def _blob(path: Path) -> RemoteFile:
    name = path.resolve().name
    kind = {40: "git-sha1", 64: "sha256"}.get(len(name))
    known = kind is not None and re.fullmatch(r"[0-9a-f]+", name) is not None
    return RemoteFile(path.stat().st_size, {str(kind): name} if known else {})


def _bar_class(meter: Meter) -> type[Any]:
    """A progress bar for the library that draws nothing and counts."""
    from huggingface_hub.utils import tqdm

    class Counting(tqdm):
        def __init__(self, *arguments: Any, **settings: Any):
            super().__init__(*arguments, **{**settings, "disable": True})

        def update(self, n: float | None = 1) -> None:
            meter.add(int(n or 0))

    return Counting
