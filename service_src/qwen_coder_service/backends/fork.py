"""The engine core as a fork of this process, which has imported already what it needs: 10 s of the 40 that a start takes on processors."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
"""How vLLM starts its processes: ``fork``, its own default, or ``spawn``."""

# for the next fork, if it is to be the core: the method for what it starts, and what it does first
_core: tuple[str | None, Callable[[], None] | None] | None = None


def leave_parent_alone() -> None:
    """Give up what a fork got of its parent and must not have: clients, listening sockets, the loop's way to learn of signals.

    A connection that the parent closes would stay open, a port would stay taken after it, and both would handle a signal to the fork.
    """
    signal.set_wakeup_fd(-1)
    for name in signal.valid_signals():
        if callable(signal.getsignal(name)) and name != signal.SIGINT:
            signal.signal(name, signal.SIG_DFL)
    for number in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        with contextlib.suppress(OSError):  # the folder's own has gone
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as found:
                # (pipes are sockets without a name; one with a name is the parent's, vLLM's own among them)
                named = found.family == socket.AF_UNIX and bool(found.getsockname())
                internet = found.family in (socket.AF_INET, socket.AF_INET6)
            if internet or named:
                os.close(number)


def _after_fork() -> None:
    global _core
    if _core is not None:
        (method, first), _core = _core, None
        _set_method(method)
        leave_parent_alone()
        if first is not None:
            first()


def _set_method(method: str | None) -> None:
    if method is None:
        os.environ.pop(METHOD, None)
    else:
        os.environ[METHOD] = method


@contextlib.contextmanager
def forked_core(force: bool, first: Callable[[], None] | None = None) -> Iterator[None]:
    """Within, an engine core that vLLM forks leaves its parent alone, and starts its own processes as vLLM meant to start all.

    Args:
        force: fork where vLLM would not. For processors: OpenMP in a worker has to begin with settings of its own, so vLLM starts every
            process anew, and the core, which computes nothing, with them. What vLLM itself refuses to fork, as CUDA in use, stays so.
    """
    global _core
    meant = os.environ.get(METHOD)
    _core = (meant, first)
    if force:
        os.environ[METHOD] = "fork"
    try:
        yield
    finally:
        _core = None
        if force:
            _set_method(meant)


os.register_at_fork(after_in_child=_after_fork)
