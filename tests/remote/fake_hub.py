"""A server on loopback that answers as the Hugging Face Hub does.

Routes, headers and error codes are those that `huggingface_hub` asks for and reads: the model and
data set API, trees, and `resolve` with a redirect to another address for large files.
"""

import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Smaller files are in git itself.
LARGE = 2000


@dataclasses.dataclass
class Repository:
    """What the server has under a name."""

    files: dict[str, bytes]
    revisions: dict[str, str] = dataclasses.field(default_factory=lambda: {"main": COMMIT})
    kind: str = "model"
    gated: bool = False


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by their path in it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class FakeHub:
    """Repositories by name, the log of requests, and what goes wrong."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        # Method, path, and the header Range of each request.
        self.log: list[tuple[str, str, str | None]] = []
        # Address of a blob -> bytes after which the connection is cut, once each.
        self.cuts: dict[str, list[int]] = {}
        # File -> what is sent in its place.
        self.wrong: dict[str, bytes] = {}
        self.url = ""

    def requested(self, method: str = "GET") -> list[str]:
        """Files whose content was asked for."""
        paths = [path for verb, path, _ in self.log if verb == method and "/resolve/" in path]
        return sorted(unquote(path.split("/resolve/")[1].partition("/")[2]) for path in paths)


@contextlib.contextmanager
def serve() -> Iterator[FakeHub]:
    """Runs a server until the block ends."""
    hub = FakeHub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def git_sha1(content: bytes) -> str:
    """The name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[0] == "blob":
            self._blob(parts[1], "/".join(parts[2:]))
        elif parts[0] == "api":
            self._api(parts)
        else:
            kind = "dataset" if parts[0] == "datasets" else "model"
            self._file(parts[1:] if kind == "dataset" else parts, kind)

    def _repository(self, parts: list[str], kind: str) -> tuple[str, Repository] | None:
        name = "/".join(parts[:2])
        found = self.hub.repositories.get(name)
        if found is None or found.kind != kind:
            self._refuse(404, "RepoNotFound", "Repository Not Found")
            return None
        return name, found

    def _api(self, parts: list[str]) -> None:
        kind = parts[1].removesuffix("s")
        named = self._repository(parts[2:], kind)
        if named is None:
            return
        name, repository = named
        what, revision = (parts[4], "/".join(parts[5:])) if len(parts) > 4 else ("revision", "main")
        below = ""
        if what == "tree":
            revision, _, below = revision.partition("/")
        commit = _commit(repository, revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
        elif what == "tree":
            start = f"{below}/" if below else ""
            found = (item for item in repository.files.items() if item[0].startswith(start))
            self._send_json([_entry(file, content) for file, content in found])
        else:
            siblings = [{"rfilename": file} for file in repository.files]
            self._send_json({"id": name, "sha": commit, "siblings": siblings, "tags": []})

    def _file(self, parts: list[str], kind: str) -> None:
        named = self._repository(parts, kind)
        if named is None:
            return
        name, repository = named
        revision, file = parts[3], "/".join(parts[4:])
        commit = _commit(repository, revision)
        if repository.gated and self.headers.get("Authorization") != "Bearer let-me-in":
            self._refuse(403, "GatedRepo", f"Access to model {name} is restricted")
        elif commit is None:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
        elif file not in repository.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            content = repository.files[file]
            headers = {"X-Repo-Commit": commit}
            if len(content) < LARGE:
                headers["ETag"] = f'"{git_sha1(content)}"'
                self._send(200, self.hub.wrong.get(file, content), headers)
            else:
                sha256 = hashlib.sha256(content).hexdigest()
                headers |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
                # Another host, as the Hub's store is: its library follows others by itself.
                store = self.hub.url.replace("127.0.0.1", "localhost")
                headers["Location"] = f"{store}/blob/{sha256}/{name}/{file}"
                self._send(302, b"", headers)

    def _blob(self, sha256: str, place: str) -> None:
        owner, repository, file = place.split("/", 2)
        content = self.hub.repositories[f"{owner}/{repository}"].files[file]
        content = self.hub.wrong.get(file, content)
        start, status, headers = 0, 200, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            status, content = 206, content[:end]
        cuts = self.hub.cuts.get(file, [])
        cut = cuts.pop(0) if cuts and self.command == "GET" else None
        self._send(status, content[start:], headers, cut=cut)

    def _send_json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], *, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


def _commit(repository: Repository, revision: str) -> str | None:
    return (
        revision
        if revision in repository.revisions.values()
        else repository.revisions.get(revision)
    )


def _entry(name: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
    if len(content) >= LARGE:
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return entry
