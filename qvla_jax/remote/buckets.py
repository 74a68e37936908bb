"""Folders of a store that fsspec reaches (gs://, s3://, ...), in a cache of our own.

A file is written under another name, goes on where it stopped if it was interrupted, and gets its
name when its size and the checksums that the store lists are right. Without a network, or with
HF_HUB_OFFLINE, what is in the cache is used.
"""

import base64
import concurrent.futures
import fcntl
import hashlib
import os
import re
import threading
import time
import urllib.parse
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from qvla_jax.caches import cache_folder
from qvla_jax.errors import CheckpointWarning, RemoteError, first_line
from qvla_jax.remote.folder import Meter, RemoteFile, RemoteFolder

_BLOCK_BYTES: Final = 1 << 24
_FILES_AT_ONCE: Final = 8
# Waits in seconds before a block is asked for again.
_WAITS: Final = (0.5, 2.0, 5.0)
_MD5: Final = re.compile(r"[0-9a-f]{32}")


class BucketFolder(RemoteFolder):
    """A folder of a store."""

    place = "the store"

    def __init__(self, source: str):
        """Lists a folder.

        Args:
            source: its address.

        Raises:
            RemoteError: there is nothing, or it may not be read, or it can neither be reached nor
                is it in the cache; or the package that reaches it is missing.
        """
        super().__init__()
        self.source, self.revision = source.rstrip("/"), None
        protocol, _, rest = self.source.partition("://")
        parts = [urllib.parse.quote(part, safe="@:+=,") for part in (protocol, *rest.split("/"))]
        if any(part in ("", ".", "..") for part in parts):
            raise RemoteError(f"{source}: not an address; expected PROTOCOL://BUCKET/FOLDER")
        self._cache = cache_folder("buckets")
        self.folder = self._cache.joinpath("files", *parts)
        self._record_path = self._cache.joinpath("records", *parts[:-1], f"{parts[-1]}.json")
        known = self._recall()
        self._store: Any = None
        self._root = ""
        self.files = self._listed(known)

    @property
    def _record(self) -> Path:
        return self._record_path

    def name_of(self, below: str = "") -> str:
        """The address: a store has no revisions."""
        return f"{self.source}/{below}".strip("/")

    def _listed(self, known: Mapping[str, RemoteFile] | None) -> Mapping[str, RemoteFile]:
        if _offline():
            if known is None:
                raise RemoteError(
                    f"{self.source}: HF_HUB_OFFLINE is set, and the cache ({self._cache}) does not "
                    "hold it; fetch it once with the network, or name a folder"
                )
            return known
        try:
            files = self._asked_for()
        except RemoteError:
            raise
        except Exception as error:  # the store's, and those of its network
            first = first_line(error)
            if known is None or isinstance(error, PermissionError | FileNotFoundError):
                raise RemoteError(f"{self.source}: cannot be listed ({first})") from error
            warnings.warn(
                f"{self.source}: cannot be listed ({first}); using what is in the cache",
                CheckpointWarning,
                stacklevel=2,
            )
            return known
        if not files:
            raise RemoteError(f"{self.source}: there is nothing at this address")
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise RemoteError(f"{self.source}: {name}: a file outside of the folder")
        return files

    def _asked_for(self) -> dict[str, RemoteFile]:
        """The files that the store lists now."""
        self._open()
        self._store.invalidate_cache()
        return {
            self._below(path): _file(info, s3=hasattr(self._store, "call_s3"))
            for path, info in self._store.find(self._root, detail=True).items()
            if not path.endswith("/")
        }

    def _open(self) -> None:
        if self._store is not None:
            return
        try:
            import fsspec

            self._store, self._root = fsspec.core.url_to_fs(self.source)
        except (ImportError, ValueError) as error:  # an unknown protocol is a ValueError
            first = first_line(error)
            raise RemoteError(
                f"{self.source}: cannot be fetched ({first}): gs:// and s3:// need pip install "
                "'qvla-jax[buckets]'"
            ) from error

    def _below(self, path: str) -> str:
        """The path of a file in the folder, from that in the store."""
        return path.removeprefix(self._root).lstrip("/")

    def _reach(self, names: list[str]) -> None:
        if _offline():
            raise RemoteError(
                f"{self.source}: {names[0]}: HF_HUB_OFFLINE is set, and the cache "
                f"({self._cache}) does not hold this file ({len(names)} are missing)"
            )
        self._open()

    def _part(self, name: str, start: int, end: int) -> bytes:
        self._reach([name])
        return self._block(name, start, end)

    def _transfer(self, names: list[str], meter: Meter | None) -> None:
        self._reach(names)
        stop = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
            pending = [threads.submit(self._fetch_one, name, meter, stop) for name in names]
            try:
                for done in concurrent.futures.as_completed(pending):
                    done.result()
            except BaseException:
                stop.set()
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        if unsure := [name for name in names if not self.files[name].digests]:
            self._check_unchanged(unsure)

    def _check_unchanged(self, names: list[str]) -> None:
        """Whether files are still those that were listed: without a checksum, nothing else tells.

        Raises:
            RemoteError: one has changed, perhaps when half of it was here; it is gone then.
        """
        try:
            now = self._asked_for()
        except Exception as error:  # the store's, and those of its network
            changed, reason = names, f"cannot be listed again ({first_line(error)})"
        else:
            changed = [name for name in names if now.get(name) != self.files[name]]
            reason = "changed there while it was fetched"
        for name in changed:
            self._checked.pop(name, None)
            (self.folder / name).unlink(missing_ok=True)
        if changed:
            raise RemoteError(f"{self.source}: {changed[0]}: {reason}; fetch it again")

    def _fetch_one(self, name: str, meter: Meter | None, stop: threading.Event) -> None:
        target, file = self.folder / name, self.files[name]
        version = hashlib.sha256(repr(file).encode()).hexdigest()[:12]
        part = target.with_name(f".{target.name}.{version}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("ab") as out:
                fcntl.flock(out, fcntl.LOCK_EX)  # of another process that fetches the same
                if not part.exists():  # which was faster
                    if meter is not None:
                        meter.add(file.size)
                    self._accept(name, target)
                    return
                start = out.tell()
                if start > file.size:
                    out.truncate(start := 0)
                if meter is not None:
                    meter.add(start)
                while start < file.size:
                    if stop.is_set():
                        return
                    block = self._block(name, start, min(start + _BLOCK_BYTES, file.size))
                    out.write(block)
                    start += len(block)
                    if meter is not None:
                        meter.add(len(block))
                out.flush()
                os.fsync(out.fileno())
                self._accept(name, part)
                part.replace(target)
        except OSError as error:
            raise RemoteError(
                f"{self.source}: {name}: cannot be written to {self._cache} "
                f"({error.strerror or error}); QVLA_CACHE names another place"
            ) from error

    def _block(self, name: str, start: int, end: int) -> bytes:
        """Part of a file, asked for again if the connection breaks."""
        path = f"{self._root.rstrip('/')}/{name}"
        failure = "nothing came"
        for wait in (*_WAITS, None):
            try:
                block: bytes = self._store.cat_file(path, start=start, end=end)
                if len(block) == end - start:
                    return block
                failure = f"{len(block)} bytes in place of {end - start}"
            except Exception as error:  # the store's, and those of its network
                failure = first_line(error)
                if isinstance(error, PermissionError | FileNotFoundError):
                    break
            if wait is not None:
                time.sleep(wait)
        raise RemoteError(
            f"{self.source}: {name}: the transfer failed at byte {start} ({failure}); the same "
            "call again goes on there"
        )

    def _agrees(self, name: str, kind: str, found: str, expected: str) -> bool:
        if found == expected or kind != "md5" or not hasattr(self._store, "call_s3"):
            return found == expected
        # Where S3 encrypts with a key of its own, which no listing says, the ETag is no checksum.
        bucket, _, key = f"{self._root.strip('/')}/{name}".partition("/")
        head = self._store.call_s3("head_object", Bucket=bucket, Key=key)
        encrypted = str(head.get("ServerSideEncryption", "")).startswith("aws:kms")
        return encrypted and str(head.get("ETag", "")).strip('"') == expected


def _file(info: Mapping[str, Any], *, s3: bool) -> RemoteFile:
    """What a store's listing says about a file: the names are those of gcsfs and s3fs."""
    digests = {}
    if isinstance(md5 := info.get("md5Hash"), str):
        digests["md5"] = base64.b64decode(md5).hex()
    elif isinstance(crc := info.get("crc32c"), str):  # of files that were put together
        digests["crc32c"] = crc
    etag = str(info.get("ETag", "")).strip('"')
    if s3 and _MD5.fullmatch(etag):  # of files that were not put together
        digests["md5"] = etag
    marks = (info.get(key) for key in ("generation", "etag", "ETag", "mtime", "created"))
    version = next((str(mark) for mark in marks if mark is not None), "")
    return RemoteFile(int(info["size"]), digests, version)


def _offline() -> bool:
    """Whether the user asked for no network, with the variable that the Hub's library has."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
