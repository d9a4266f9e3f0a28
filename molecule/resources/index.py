"""A package index (PEP 503) over a folder of wheels: ``index.py FOLDER PORT``. It wants a user and password.

Its path's first part says what is wrong with it: ``/good/simple/``; ``/wrong/simple/``, whose fastapi is not the one that the lock knows;
``/missing/simple/``, which has none.
"""

import base64
import hashlib
import io
import re
import sys
import zipfile
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

FOLDER, PORT = Path(sys.argv[1]), int(sys.argv[2])
ALLOWED = "Basic " + base64.b64encode(b"u:p4ss-of-the-index").decode()


def project(wheel: Path) -> str:
    return re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()


@cache
def sha256(wheel: Path) -> str:
    with wheel.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def other(wheel: Path) -> bytes:
    """A wheel with a file more."""
    content = io.BytesIO(wheel.read_bytes())
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr("fastapi/more.py", "print('not what you locked')\n")
    return content.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Pages of projects, and wheels."""

    protocol_version = "HTTP/1.1"

    def answer(self, status: int, body: bytes, kind: str = "text/html") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="index"')
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != ALLOWED:
            self.answer(401, b"who are you?")
            return
        fault, _, rest = unquote(self.path).strip("/").partition("/")
        kind, _, name = rest.partition("/")
        wheels = [wheel for wheel in FOLDER.glob("*.whl") if (project(wheel) if kind == "simple" else wheel.name) == name]
        if not wheels or (fault == "missing" and name == "fastapi"):
            self.answer(404, b"not here")
        elif kind == "files":
            replaced = fault == "wrong" and name.startswith("fastapi-")
            self.answer(200, other(wheels[0]) if replaced else wheels[0].read_bytes(), "application/octet-stream")
        else:
            # who replaces a file does not announce the hash of the old one
            marks = {wheel: "" if fault == "wrong" else f"#sha256={sha256(wheel)}" for wheel in wheels}
            links = [f'<a href="/{fault}/files/{wheel.name}{marks[wheel]}">{wheel.name}</a>' for wheel in wheels]
            self.answer(200, f"<!DOCTYPE html><html><body>{'<br>'.join(links)}</body></html>".encode())

    def log_message(self, *args: object) -> None:
        """Say nothing."""


ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
