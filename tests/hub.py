"""A hub of models on this machine that misbehaves on purpose, for the real client library.

    with Hub() as hub:
        hub.publish("tester/tiny", {"a.safetensors": b"..."})
        hub.misbehave("a.safetensors", cut(1000), status(503))      # one fault a request, then it behaves
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)

It answers what the library asks: the listing of a revision (with sizes, LFS digests and git ids), and
`/REPO/resolve/REVISION/FILE`, which for large files is a redirect to where the bytes lie. It listens on the
loopback interface only, and notes every request.
"""

import hashlib
import json
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

SMALL_BYTES = 1000  # below, a file is kept by git itself: no LFS digest, no redirect
Fault = Callable[["Handler", bytes, int], None]


@dataclass
class Asked:
    """One request: `name` is the file's path in its repository, or "api"."""

    method: str
    name: str
    path: str
    headers: dict[str, str]

    @property
    def start(self) -> int:
        """The first byte that was asked for."""
        wanted = self.headers.get("range", "bytes=0-")
        return int(wanted.removeprefix("bytes=").split("-")[0])


@dataclass
class Repository:
    """Files at one commit; `token` is needed to read it, if there is one."""

    files: dict[str, bytes]
    commit: str
    token: str | None = None
    listing: list[dict[str, Any]] | None = None  # instead of the true one
    old: dict[str, dict[str, bytes]] = field(default_factory=dict)  # earlier commits


class Server(ThreadingHTTPServer):
    """A client that hangs up is what these tests are about: no traceback of it among a test's output."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Hub:
    """A server thread with repositories; a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[Asked] = []
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.cdn = ""  # where redirects point: "" is relative, else the address of this or another server
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def publish(self, repository: str, files: dict[str, bytes], token: str | None = None) -> str:
        """Make `files` the newest commit of `repository`; returns its id. Older commits stay readable."""
        content = b"".join(name.encode() + data for name, data in sorted(files.items()))
        commit = hashlib.sha1(content).hexdigest()
        before = self.repositories.get(repository)
        old = {} if before is None else before.old | {before.commit: before.files}
        self.repositories[repository] = Repository(dict(files), commit, token, old=old)
        return commit

    def misbehave(self, name: str, *faults: Fault) -> None:
        """The next requests for the bytes of `name` (or for "api") each meet one of `faults`."""
        self.faults[name].extend(faults)

    def bodies(self, name: str | None = None) -> list[Asked]:
        """Requests that got bytes of files (not listings, not redirects), of one file or of all."""
        wanted = [one for one in self.asked if one.path.startswith("/cdn/") or "/resolve/" in one.path]
        large = {one.name for one in wanted if one.path.startswith("/cdn/")}
        wanted = [one for one in wanted if one.path.startswith("/cdn/") or one.name not in large]
        return [one for one in wanted if name in (None, one.name)]


class Handler(BaseHTTPRequestHandler):
    """Routes; one for each connection."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:
        return None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.split("/")[1:]]
        if parts[:2] == ["api", "models"]:
            self._note("api")
            self._listing("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main")
        elif parts[0] == "cdn":
            name = "/".join(parts[4:])
            self._note(name)
            files = self._files("/".join(parts[1:3]), parts[3])
            if files is not None:
                self._bytes(name, files[name])
        elif parts[2:3] == ["resolve"]:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.answer(404)

    def _note(self, name: str) -> None:
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.hub.asked.append(Asked(self.command, name, urlsplit(self.path).path, headers))

    def _files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        """The files of a revision; answers and returns None where there is none."""
        found = self.hub.repositories.get(repository)
        if found is None:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
            return None
        if revision in ("main", found.commit):
            return found.files
        if revision in found.old:
            return found.old[revision]
        self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        return None

    def _refused(self, repository: str) -> bool:
        found = self.hub.repositories.get(repository)
        if found is None or found.token is None:
            return False
        given = self.headers.get("Authorization")
        if given == f"Bearer {found.token}":
            return False
        if given is None:
            self.answer(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        else:
            self.answer(403, {"X-Error-Message": "You are not in the authorized list."})
        return True

    def _listing(self, repository: str, revision: str) -> None:
        if self._fault("api", b"") or self._refused(repository):
            return
        files = self._files(repository, revision)
        if files is None:
            return
        found = self.hub.repositories[repository]
        commit = revision if revision in found.old else found.commit
        siblings = found.listing or [_sibling(name, data) for name, data in sorted(files.items())]
        body = {"_id": "1", "id": repository, "modelId": repository, "sha": commit, "siblings": siblings}
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def _resolve(self, repository: str, revision: str, name: str) -> None:
        self._note(name)
        if self._refused(repository):
            return
        files = self._files(repository, revision)
        if files is None:
            return
        if name not in files:
            self.answer(404, {"X-Error-Code": "EntryNotFound"})
            return
        data, commit = files[name], self.hub.repositories[repository].commit
        common = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if len(data) < SMALL_BYTES:
            self._bytes(name, data, common)
            return
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": common["ETag"]}
        location = f"{self.hub.cdn}/cdn/{repository}/{revision}/{name}"
        self.answer(302, common | linked | {"Location": location})

    def _bytes(self, name: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        if not self._fault(name, data):
            self.send_range(data, self.start(), headers)

    def _fault(self, name: str, data: bytes) -> bool:
        queue = self.hub.faults[name]
        if not queue or self.command == "HEAD":
            return False
        queue.popleft()(self, data, self.start())
        return True

    # ------------------------------------------------------------------------------ what faults are made of

    def start(self) -> int:
        """The first byte that is asked for."""
        return int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        """A whole answer."""
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_range(self, data: bytes, start: int, headers: dict[str, str] | None = None) -> None:
        """`data` from `start` on, as 200 or 206."""
        if start >= len(data) > 0:
            self.answer(416, {"Content-Range": f"bytes */{len(data)}"})
            return
        extra = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.answer(206 if start else 200, (headers or {}) | extra, data[start:])

    def begin(self, data: bytes, start: int) -> None:
        """The head of an answer that promises all of `data` from `start` on."""
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()

    def hang_up(self) -> None:
        """Close the connection in the middle of whatever it is in."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git}
    if len(data) >= SMALL_BYTES:
        digest = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
    return entry


# ----------------------------------------------------------------------------------------------------- faults


def cut(after: int) -> Fault:
    """Promise everything, send `after` bytes, hang up."""

    def fault(handler: Handler, data: bytes, start: int) -> None:
        handler.begin(data, start)
        handler.wfile.write(data[start : start + after])
        handler.hang_up()

    return fault


def short(length: int) -> Fault:
    """Say and send `length` bytes, as if that were all."""

    def fault(handler: Handler, data: bytes, start: int) -> None:
        handler.send_range(data[: start + length], start)

    return fault


def longer(extra: int) -> Fault:
    """Say and send more than there is."""
    return lambda handler, data, start: handler.send_range(data + bytes(range(extra)), start)


def wrong(offset: int) -> Fault:
    """Send one bit, at `offset` from where the answer begins, the other way round."""

    def fault(handler: Handler, data: bytes, start: int) -> None:
        bad = bytearray(data)
        bad[start + offset] ^= 0x10
        handler.send_range(bytes(bad), start)

    return fault


def slow(piece: int, pause: float) -> Fault:
    """Send pieces with pauses between them; the reader may leave at any time."""

    def fault(handler: Handler, data: bytes, start: int) -> None:
        handler.begin(data, start)
        try:
            for at in range(start, len(data), piece):
                handler.wfile.write(data[at : at + piece])
                handler.wfile.flush()
                time.sleep(pause)
        except OSError:  # a reader that was killed
            handler.close_connection = True

    return fault


def stall(seconds: float) -> Fault:
    """Send the head and a byte, then nothing."""

    def fault(handler: Handler, data: bytes, start: int) -> None:
        handler.begin(data, start)
        handler.wfile.write(data[start : start + 1])
        handler.wfile.flush()
        time.sleep(seconds)
        handler.hang_up()

    return fault


def status(code: int, **headers: str) -> Fault:
    """An error; `headers` with underscores for hyphens."""
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return lambda handler, data, start: handler.answer(code, named, b"no")


def whole() -> Fault:
    """Everything from the first byte, whatever range was asked for."""
    return lambda handler, data, start: handler.answer(200, {}, data)


def other_range() -> Fault:
    """A range that begins at another byte than the one asked for."""
    return lambda handler, data, start: handler.send_range(data, start + 7)


def redirect(location: str) -> Fault:
    """Send the reader somewhere else."""
    return lambda handler, data, start: handler.answer(302, {"Location": location})


def text(body: bytes) -> Fault:
    """An answer of another kind, as a captive portal gives it."""
    return lambda handler, data, start: handler.answer(200, {"Content-Type": "text/html"}, body)
