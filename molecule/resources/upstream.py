"""What stands behind a proxy in its own scenario: answers with the host's name, streams slowly, has paths nobody should reach."""

import itertools
import json
import socket
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    """Answers of a service, without an engine; `from` is the number of the connection that a request came over, `over` its kind."""

    connections = itertools.count()

    protocol_version = "HTTP/1.1"
    # an answer is there or not, and never only its head
    wbufsize = -1

    def setup(self) -> None:
        """Number the connection."""
        super().setup()
        self.number = next(self.connections)

    def address_string(self) -> str:
        """For the log; who comes to a path has no address."""
        return str(self.client_address)

    def received(self) -> bytes:
        """The request's body, whichever way it comes: what is left unread would be the next request."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def came(self) -> dict[str, object]:
        """The connection; one to a path has no address at its other end."""
        return {"from": self.number, "over": "port" if self.client_address else "socket"}

    def answer(self, body: dict[str, object], status: int = 200) -> None:
        """Send JSON."""
        data = json.dumps({"path": self.path, "host": socket.gethostname(), **self.came(), **body}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Powered-By", "a test")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        """Ready unless told otherwise by a file, at once unless told so; metrics of an engine where somebody left some."""
        self.received()
        metrics = Path("/usr/local/lib/upstream.prom")
        if self.path == "/metrics" and metrics.exists():
            data = metrics.read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return
        slow = Path("/run/upstream-slow")
        if self.path == "/ready" and slow.exists():
            time.sleep(float(slow.read_text()))
        ready = not Path("/run/upstream-unready").exists()
        self.answer({}, 200 if ready or self.path != "/ready" else 503)

    def do_POST(self) -> None:
        """Echo what arrived, or stream five events, 0.4 s apart."""
        body = json.loads(self.received() or "{}")
        if not body.get("stream"):
            self.answer({"headers": dict(self.headers), "body": body})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for index in range(body.get("events", 5)):
            data = f"data: {index}\n\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
            time.sleep(0.4)
        self.wfile.write(b"0\r\n\r\n")


class Server(ThreadingHTTPServer):
    """More waiting connections than the default of 5."""

    request_queue_size = 128


class Unix(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """The same, at a path."""

    daemon_threads = True
    request_queue_size = 128


# port, and path of a socket
if len(sys.argv) > 2:
    there = Unix(sys.argv[2], Handler)
    Path(sys.argv[2]).chmod(0o777)
    threading.Thread(target=there.serve_forever, daemon=True).start()
Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
