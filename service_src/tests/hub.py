"""A stand-in for a model hub: one model at one commit, in the hub's protocol, with the ways in which a hub fails.

For the tests, and as a program for a lab host: ``hub.py MODEL_DIRECTORY OWNER/NAME COMMIT PORT``. ``GET /control`` gives the requests so
far; ``POST /control`` with a JSON object sets attributes. That it is close enough to the hub is shown by huggingface_hub, which downloads
from it.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")  # what the hub keeps in its store of large files


@dataclass
class Hub:
    """What is served, and how; see ``Handler``."""

    model: str
    revision: str
    files: dict[str, bytes]
    prefix: str = ""
    tokens: list[str] = field(default_factory=list)
    """Those that are valid; where there are none, everybody may read."""
    without_access: list[str] = field(default_factory=list)
    """Valid ones whose account may not read this model."""
    statuses: list[int] = field(default_factory=list)
    """Answers to the next requests."""
    always: int = 0
    """Answer to every request for a file."""
    retry_after: str = ""
    cut_after: int = 0
    """Bytes of a large file after which the connection breaks."""
    cuts: int = -1
    """How often; -1 without end."""
    then: int = 0
    """Answer to every request for a large file after the last cut."""
    broken: bool = False
    """Whether that was."""
    slow_s: float = 0.0
    """Seconds between two pieces of a large file."""
    ranges: bool = True
    spoiled: list[str] = field(default_factory=list)
    """Files that come with another first byte."""
    short: list[str] = field(default_factory=list)
    """Files whose end is missing, and that are said to be so short."""
    requests: list[dict[str, Any]] = field(default_factory=list)

    def start(self, address: str = "127.0.0.1", port: int = 0) -> str:
        """Serve, and say where. The store of large files has another port, and so is another origin."""
        self.servers = []
        for number in (port, port and port + 1):
            handler = type("Bound", (Handler,), {"hub": self})
            server = Server((address, number), handler)
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
            self.servers.append(server)
        self.store = f"http://{address}:{self.servers[1].server_port}"
        return f"http://{address}:{self.servers[0].server_port}{self.prefix}"

    def stop(self) -> None:
        """Serve no more."""
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def asked(self, name: str) -> list[str]:
        """The ranges of a file that its store was asked for; empty for all of it."""
        return [entry["range"] for entry in self.requests if entry["path"].startswith("/store/") and entry["path"].endswith(name)]


class Server(ThreadingHTTPServer):
    """Clients that hang up are no news."""

    def handle_error(self, *_: Any) -> None:
        """Nothing."""


class Handler(BaseHTTPRequestHandler):
    """Both servers' requests."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        self._json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message} if code or message else {})

    def do_POST(self) -> None:
        """Change how it serves."""
        for name, value in json.loads(self.rfile.read(int(self.headers["Content-Length"]))).items():
            setattr(self.hub, name, value)
        self._json({})

    def do_HEAD(self) -> None:
        """As GET, without the body."""
        self.do_GET()

    def do_GET(self) -> None:
        """The hub's paths, and the store's."""
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        if path == "/control":
            self._json(hub.requests)
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        hub.requests.append(
            {
                "method": self.command,
                "path": path,
                "query": urlsplit(self.path).query,
                "range": self.headers.get("Range", ""),
                "token": token,
            }
        )
        if hub.statuses:
            self._busy(hub.statuses.pop(0))
        elif path.startswith("/store/"):
            self._store(path.rsplit("/store/", 1)[1])
        elif path == f"{hub.prefix}/api/whoami-v2":
            self._json({"name": "lab"}) if token in hub.tokens else self._refuse(401, message="Invalid credentials in Authorization header")
        elif hub.tokens and token and token not in hub.tokens:
            self._refuse(401, message="Invalid credentials in Authorization header")
        elif hub.tokens and not token:
            self._refuse(401, "GatedRepo", "Access to this model is restricted. You must be authenticated to access it.")
        elif token and token in hub.without_access:
            self._refuse(403, "GatedRepo", "Access to this model is restricted and you are not in the authorized list.")
        elif path.startswith(f"{hub.prefix}/api/resolve-cache/"):
            self._small(path.rsplit("/", 1)[1])
        elif path.startswith(f"{hub.prefix}/api/models/"):
            self._list(path.removeprefix(f"{hub.prefix}/api/models/"))
        else:
            self._resolve(path.removeprefix(f"{hub.prefix}/"))

    def _busy(self, status: int) -> None:
        self._answer(status, b"", {"Retry-After": self.hub.retry_after} if self.hub.retry_after else {})

    def _list(self, path: str) -> None:
        hub = self.hub
        tree = "/tree/" in path
        model, _, revision = path.partition("/tree/" if tree else "/revision/")
        if model != hub.model:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif revision != hub.revision:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif tree:
            self._json([self._entry(name, self._blob(name, data)) for name, data in hub.files.items()])
        else:
            blobs = "blobs=true" in self.path.lower()
            siblings = [{"rfilename": name, **(self._blob(name, data) if blobs else {})} for name, data in hub.files.items()]
            self._json({"_id": "1", "id": hub.model, "modelId": hub.model, "sha": hub.revision, "tags": [], "siblings": siblings})

    def _blob(self, name: str, data: bytes) -> dict[str, Any]:
        if not name.endswith(LARGE):
            return {"size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        large = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 135}
        return {"size": len(data), "blobId": "0" * 40, "lfs": large}

    def _entry(self, name: str, blob: dict[str, Any]) -> dict[str, Any]:
        large = {"lfs": {"oid": blob["lfs"]["sha256"], "size": blob["size"], "pointerSize": 135}} if "lfs" in blob else {}
        return {"type": "file", "path": name, "oid": blob["blobId"], "size": blob["size"], **large}

    def _resolve(self, path: str) -> None:
        hub = self.hub
        head, _, name = path.partition(f"/resolve/{hub.revision}/")
        if head != hub.model or name not in hub.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        if status := hub.always or (hub.broken and name.endswith(LARGE) and hub.then):
            self._busy(status)
        elif name.endswith(LARGE):
            data = hub.files[name]
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"'}
            self._answer(302, b"", {"X-Repo-Commit": hub.revision, "Location": f"{hub.store}/store/{name}"} | linked)
        else:
            self._answer(307, b"", {"Location": f"{hub.prefix}/api/resolve-cache/models/{hub.model}/{hub.revision}/{name}"})

    def _small(self, name: str) -> None:
        data = self.hub.files[name]
        self._file(name, data, {"X-Repo-Commit": self.hub.revision, "ETag": f'"{self._blob(name, data)["blobId"]}"'})

    def _store(self, name: str) -> None:
        self._file(name, self.hub.files[name], {"ETag": '"of the store"', "Accept-Ranges": "bytes"})

    def _file(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        hub = self.hub
        if name in hub.spoiled:
            data = bytes([data[0] ^ 1]) + data[1:]
        if name in hub.short:
            data = data[:-1]
        begin = int(self.headers["Range"].removeprefix("bytes=").split("-")[0]) if self.headers.get("Range") and hub.ranges else 0
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        part = data[begin:]
        self.send_response(206 if begin else 200)
        for key, value in (headers | {"Content-Length": str(len(part))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = hub.cut_after if name.endswith(LARGE) and hub.cuts else 0
        with suppress(ConnectionError):
            for start in range(0, len(part), 1 << 16):
                piece = part[start : start + (1 << 16)]
                if cut and start + len(piece) > cut:
                    hub.cuts -= hub.cuts > 0
                    hub.broken = not hub.cuts
                    self.wfile.write(piece[: cut - start])
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                self.wfile.write(piece)
                if hub.slow_s and name.endswith(LARGE):
                    time.sleep(hub.slow_s)


def read(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


if __name__ == "__main__":
    print(Hub(sys.argv[2], sys.argv[3], read(Path(sys.argv[1]))).start(port=int(sys.argv[4])), flush=True)
    threading.Event().wait()
