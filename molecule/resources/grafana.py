"""What stands for Grafana: the part of its HTTP API by which dashboards are read and written: ``grafana.py PORT FILE TOKEN``.

As Grafana does, it adds a number and counts versions. What was written is kept in FILE: {uid: {"dashboard", "meta"}}.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

PORT, FILE, TOKEN = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]


class Handler(BaseHTTPRequestHandler):
    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def allowed(self):
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer(401, {"message": "Invalid API key"})
        return False

    def kept(self):
        return json.loads(FILE.read_text()) if FILE.exists() else {}

    def do_GET(self):
        if self.allowed():
            found = self.kept().get(self.path.removeprefix("/api/dashboards/uid/"))
            self.answer(200 if found else 404, found or {"message": "Dashboard not found"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.allowed() and self.path == "/api/dashboards/db":
            kept, wanted = self.kept(), body["dashboard"]
            before = kept.get(wanted["uid"])
            if before and not body.get("overwrite"):
                self.answer(412, {"status": "version-mismatch"})
                return
            version = before["dashboard"]["version"] + 1 if before else 1
            kept[wanted["uid"]] = {"dashboard": {**wanted, "id": 7, "version": version}, "meta": {"folderUid": body.get("folderUid", "")}}
            FILE.write_text(json.dumps(kept))
            self.answer(200, {"uid": wanted["uid"], "version": version, "status": "success"})


HTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
