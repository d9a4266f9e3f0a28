"""gunicorn's configuration: ``gunicorn --config python:qwen_coder_service.gunicorn_conf``. What the unit says stands in the unit."""

from __future__ import annotations

import os
import sys
from typing import Any

from gunicorn.errors import HaltServer

from .lifecycle import EX_SOFTWARE, exit_status
from .settings import EX_CONFIG, SettingsError, load, place

# gunicorn reports readiness when its arbiter runs; the service does it itself, after the first token
if "NOTIFY_SOCKET" in os.environ:
    os.environ["QWEN_NOTIFY_SOCKET"] = os.environ.pop("NOTIFY_SOCKET")

try:
    _settings = load(os.environ)
except SettingsError as error:
    print(error, file=sys.stderr)
    sys.exit(EX_CONFIG)

try:
    if place(_settings)[0] > 0:
        # of an engine over several hosts, its head serves; the unit is the same on all
        os.execv(sys.executable, [sys.executable, "-m", "qwen_coder_service.worker"])
except SettingsError as error:  # an address may come later
    print(error, file=sys.stderr)
    sys.exit(EX_SOFTWARE)

# loading a model takes minutes, and a stalled engine is systemd's to find, not gunicorn's
timeout = 0
# the worker keeps the bound of a drain by itself; this is for one that does not
graceful_timeout = _settings.drain_timeout_s + 15
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


def child_exit(server: Any, worker: Any) -> None:
    """End with a worker that ended by itself: one that took its place would be hidden from systemd, which counts and delays restarts."""
    if server.LISTENERS:  # closed when the arbiter itself is to stop
        raise HaltServer("the service ended by itself", exit_status[0] or EX_SOFTWARE)
