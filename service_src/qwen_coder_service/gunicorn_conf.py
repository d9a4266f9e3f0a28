"""gunicorn's configuration: ``gunicorn --config python:qwen_coder_service.gunicorn_conf``. What the unit says stands in the unit."""

from __future__ import annotations

import os
import sys
from typing import Any

from .settings import EX_CONFIG, SettingsError, load

# gunicorn reports readiness when its arbiter runs; the service does it itself, after the first token
if "NOTIFY_SOCKET" in os.environ:
    os.environ["QWEN_NOTIFY_SOCKET"] = os.environ.pop("NOTIFY_SOCKET")

# whom to stop when the engine is gone: a new worker under the same arbiter would be hidden from systemd
os.environ["QWEN_ARBITER_PID"] = str(os.getpid())

try:
    _settings = load(os.environ)
except SettingsError as error:
    print(error, file=sys.stderr)
    sys.exit(EX_CONFIG)

# loading a model takes minutes, and a stalled engine is systemd's to find, not gunicorn's
timeout = 0
graceful_timeout = max(1, _settings.drain_timeout_s)
# connections that the terminator keeps are few
keepalive = 75
accesslog = None
control_socket_disable = True
# the worker's heartbeat file: memory, not the disk
worker_tmp_dir = "/dev/shm"


def on_starting(server: Any) -> None:
    """Refuse what would load the model twice."""
    if server.cfg.workers != 1:
        print(f"--workers is {server.cfg.workers}; set it to 1, as every worker would load the model again.", file=sys.stderr)
        sys.exit(EX_CONFIG)
