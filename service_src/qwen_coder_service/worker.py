"""A host's part in an engine that spans several: it computes and answers nobody. ``gunicorn_conf`` starts it on all hosts but the head.

When the head's engine ends, so does this process, and systemd starts it anew for the next one.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time

from . import logs
from .lifecycle import EX_SOFTWARE, sd_notify
from .settings import Settings, claim, load

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Seconds between two messages to systemd's watchdog, and between two attempts to reach the head."""


def hold(host: str, port: int) -> str:
    """Wait until the head is there, and then until it is gone. Nothing else tells: the engine's own connections wait for ever.

    Args:
        host: an address of the head.
        port: where the engine's first process listens as long as it lives (torch's TCPStore); it says nothing to who says nothing.

    Returns:
        How the head ended.
    """
    while True:
        sd_notify("WATCHDOG=1")
        try:
            connection = socket.create_connection((host, port), timeout=LOOK_S)
            break
        except OSError:
            time.sleep(LOOK_S)
    with connection:
        # a host that lost its power sends no reset
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 5)):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        log.info("the head is there")
        sd_notify("STATUS=computing for the head")
        while True:
            sd_notify("WATCHDOG=1")
            try:
                if not connection.recv(4096):
                    return "it closed the connection"
            except TimeoutError as error:
                if error.errno:  # by keepalive; else nothing was said for a second
                    return str(error)
            except OSError as error:
                return str(error)


def _end_with_head(settings: Settings) -> None:
    ended = hold(str(settings.engine_hosts[0]), settings.engine_port)
    log.error("the head's engine is gone (%s), and this part of it with it", ended)
    os._exit(EX_SOFTWARE)


def work(settings: Settings) -> None:
    """Compute for the head until a process that computes ends; where the head ends, this process does at once."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    from .backends.vllm import engine_arguments, offload_gib

    config = AsyncEngineArgs(**engine_arguments(settings, offload_gib(settings))).create_engine_config(
        UsageContext.ENGINE_CONTEXT, headless=True
    )
    executor = MultiprocExecutor(config, monitor_workers=False)
    executor.start_worker_monitor(inline=True)


def main() -> int:
    """Run until the engine ends.

    Returns:
        The exit status of an engine that ended.

    Raises:
        SettingsError: as ``load`` and ``place``; ``gunicorn_conf`` has said so before.
    """
    logs.configure()
    settings = load(os.environ)
    claim(settings, os.environ)
    # as ready as it gets by itself: the head's start waits for this one, and not the other way round
    sd_notify("READY=1")
    sd_notify("STATUS=waiting for the head")
    threading.Thread(target=_end_with_head, args=(settings,), daemon=True, name="head").start()
    work(settings)
    return EX_SOFTWARE


if __name__ == "__main__":
    sys.exit(main())
