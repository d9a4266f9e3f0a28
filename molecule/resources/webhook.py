"""What stands for those who get alerts: keeps every body that is posted to it, one a line: ``webhook.py PORT FILE TOKEN``."""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PORT, FILE, TOKEN = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if allowed:
            with FILE.open("ab") as file:
                file.write(body.strip() + b"\n")
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Length", "0")
        self.end_headers()


ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
