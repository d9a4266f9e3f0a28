#!/usr/bin/env python3
"""What stands for DCGM exporter: one metric, at the address that it is told."""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

METRICS = b'# HELP DCGM_FI_DEV_GPU_TEMP GPU temperature (in C).\n# TYPE DCGM_FI_DEV_GPU_TEMP gauge\nDCGM_FI_DEV_GPU_TEMP{gpu="0"} 31\n'


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/metrics" else 404)
        self.end_headers()
        self.wfile.write(METRICS if self.path == "/metrics" else b"")


host, _, port = sys.argv[sys.argv.index("--address") + 1].rpartition(":")
ThreadingHTTPServer((host, int(port)), Handler).serve_forever()
