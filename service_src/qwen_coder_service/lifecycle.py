"""What systemd and the load balancer are told: starting, ready, draining, dead."""

from __future__ import annotations

import enum
import logging
import os
import signal
import socket

log = logging.getLogger(__name__)


class State(enum.Enum):
    """Where the service stands in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


def sd_notify(message: str) -> None:
    """Tell systemd (sd_notify(3)). Does nothing when systemd did not start this process.

    gunicorn would report readiness as soon as its arbiter runs, minutes before the model is loaded; ``gunicorn_conf`` therefore
    moves the socket's name to a variable of ours.
    """
    address = os.environ.get("QWEN_NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # abstract namespace
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect(address)
            sock.sendall(message.encode())
    except OSError as error:
        log.warning("systemd cannot be told %r: %s", message, error)


def end_process() -> None:
    """Stop the whole service in good order, for systemd to start it anew. Without gunicorn (tests) there is nobody to stop."""
    arbiter = os.environ.get("QWEN_ARBITER_PID")
    if arbiter:
        os.kill(int(arbiter), signal.SIGTERM)
