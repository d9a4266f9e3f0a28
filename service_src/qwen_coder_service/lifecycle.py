"""What systemd and the load balancer are told: starting, ready, draining, dead; and who finds out."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import gc
import json
import logging
import mmap
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn, Self

from .backends.base import Backend, BackendDead

log = logging.getLogger(__name__)

EX_SOFTWARE = 70
"""Exit status of a service whose engine died or stalled (sysexits.h); systemd starts it anew."""

exit_status = mmap.mmap(-1, 1)
"""What the service ended with by itself, else 0. Made before gunicorn forks, and so seen by its arbiter, which is told no status."""


def leave(status: int) -> NoReturn:
    """End this process at once; the arbiter ends with the same status."""
    exit_status[0] = status
    os._exit(status)


class State(enum.Enum):
    """Where the service stands in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class End(enum.Enum):
    """Why a service ended that nobody had stopped."""

    DIED = "died"
    STALLED = "stalled"


def sd_notify(message: str) -> None:
    """Tell systemd (sd_notify(3)). Does nothing when systemd did not start this process.

    gunicorn would report readiness as soon as its arbiter runs, minutes before the model is loaded; ``gunicorn_conf`` therefore
    moves the socket's name to a variable of ours. A manager that does not read must not stop the service: its queue is short, and a full
    one is waited for 5 s where the state of the service changes, and not at all by the watchdog, which comes again.
    """
    address = os.environ.get("QWEN_NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # abstract namespace
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(0 if message == "WATCHDOG=1" else 5)
            sock.connect(address)
            sock.sendall(message.encode())
    except OSError as error:
        log.warning("systemd cannot be told %r: %s", message, error)


class Sigterm:
    """SIGTERM, taken before the server gets it: the server would stop listening at once, and clients would be refused without a word.

    Args:
        called: what to do instead; ``proceed`` passes the signal on when that is done.
    """

    def __init__(self, called: Callable[[], None]) -> None:
        self._called = called

    def __enter__(self) -> Self:
        """Stand before the server."""
        self._server = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Step aside."""
        signal.signal(signal.SIGTERM, self._server)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._called()

    def proceed(self) -> None:
        """Let the server stop."""
        signal.signal(signal.SIGTERM, self._server)
        signal.raise_signal(signal.SIGTERM)


class Ends:
    """Counts, over restarts, how often the service ended by itself.

    A counter in memory dies with the process that it counts the death of, before anybody scrapes it; these are kept in a file.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / "ends.json"
        self.counts = dict.fromkeys((end.value for end in End), 0)
        with contextlib.suppress(OSError, ValueError):  # none yet, or cut off while it was written
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            self.counts |= {name: int(kept[name]) for name in self.counts if name in kept}

    def add(self, end: End) -> None:
        """Count one more."""
        self.counts[end.value] += 1
        try:
            self._file.with_suffix(".new").write_text(json.dumps(self.counts), encoding="utf-8")
            self._file.with_suffix(".new").replace(self._file)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._file, error)


COLLECTIONS = (700, 2, 200)
"""``gc.set_threshold`` of a service that answers: the young are looked at in small steps, all objects rarely."""


async def collect_when_idle(idle: asyncio.Event, every_s: float = 10.0) -> None:
    """Have Python look at all objects, as often as it would by itself, while nobody waits for an answer.

    With 256 streams that takes 60 ms, in which none of them gets a token (measured, docs/decisions.md).

    Args:
        idle: set while there is no request.
        every_s: seconds between two looks.
    """
    while True:
        await asyncio.sleep(every_s)
        if idle.is_set() and gc.get_count()[2] > 10:
            gc.collect()


class Watch:
    """Sees that the engine moves, and pets systemd's watchdog while it does.

    Three things are no stall: an idle engine, a busy one that is slow, and this process not getting the processor for a while.

    Args:
        backend: the engine.
        stall_s: seconds without a turn of the engine's loop, or without progress while requests run, that make a stall.
        ended: what is told, once, that the engine died or stalled, and how that was seen.
    """

    INTERVAL_S = 1.0
    """Seconds between two looks."""
    LATE_S = 2.0
    """A look that comes this late says that this process was held up, and then nothing about the engine."""

    def __init__(self, backend: Backend, stall_s: float, ended: Callable[[End, str], None]) -> None:
        self._backend, self._stall_s, self._ended = backend, stall_s, ended
        self._turned = self._idle = time.monotonic()

    async def run(self) -> None:
        """Look, until the engine's end."""
        pinging = asyncio.create_task(self._ping())
        try:
            due = time.monotonic()
            while True:
                due += self.INTERVAL_S
                await asyncio.sleep(due - time.monotonic())
                now = time.monotonic()
                if now - due > self.LATE_S:
                    due = self._turned = self._idle = now
                await self._backend.check()
                if pinging.done():
                    pinging.result()
                if (seen := self._stalled(now)) is not None:
                    self._ended(End.STALLED, seen)
                    return
                sd_notify("WATCHDOG=1")
        except BackendDead as error:
            self._ended(End.DIED, str(error))
        except Exception as error:  # an engine that answers with anything else is no engine to go on with, unwatched
            log.exception("the watch over the engine failed")
            self._ended(End.DIED, repr(error))
        finally:
            pinging.cancel()

    async def _ping(self) -> None:
        while True:
            await self._backend.ping()
            self._turned = time.monotonic()
            await asyncio.sleep(self.INTERVAL_S)

    def _stalled(self, now: float) -> str | None:
        """How a stall shows; None while there is none."""
        running = self._backend.unfinished
        if not running:
            self._idle = now
        if now - self._turned > self._stall_s:
            return f"the engine's loop has not turned for {now - self._turned:.0f} s"
        still = now - max(self._backend.progress, self._idle)
        if still > self._stall_s:
            return f"{running} requests run and no token has moved for {still:.0f} s"
        return None
