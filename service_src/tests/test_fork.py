"""What a forked engine core has of its parent: not its clients, not its port, not its signals."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from qwen_coder_service.backends.fork import METHOD, forked_core


def tell(pipe: Connection, held: int) -> None:
    """What a child finds."""
    try:
        holds = stat.S_ISSOCK(os.fstat(held).st_mode)
    except OSError:
        holds = False
    pipe.send((os.environ.get(METHOD), holds, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, signal.set_wakeup_fd(-1)))


@pytest.fixture(params=["port", "path"])
def listening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    if request.param == "port":
        with socket.create_server(("127.0.0.1", 0)) as sock:
            yield sock
    else:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(tmp_path / "service.sock"))
            sock.listen()
            yield sock


def child(held: int) -> tuple[str | None, bool, bool, int]:
    """What a fork of this process says of itself."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=tell, args=(theirs, held))
    process.start()
    assert ours.poll(10)
    found: tuple[str | None, bool, bool, int] = ours.recv()
    process.join()
    return found


@pytest.mark.parametrize("meant", ["spawn", None])
def test_the_core_leaves_its_parent_alone(meant: str | None, listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(METHOD, meant) if meant else monkeypatch.delenv(METHOD, raising=False)
    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    mine, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    try:
        with forked_core(force=True):
            assert os.environ[METHOD] == "fork"
            assert child(listening.fileno()) == (meant, False, True, -1)
        assert os.environ.get(METHOD) == meant
        assert child(listening.fileno())[1:3] == (True, False)
        with forked_core(force=False):
            assert os.environ.get(METHOD) == meant
            assert child(listening.fileno()) == (meant, False, True, -1)
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, before)
        mine.close()
        wake.close()
    listening.getsockname()  # the parent still has it


def test_what_the_core_does_first_is_done_in_the_core_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(METHOD, raising=False)
    done: list[int] = []

    def tell_who(pipe: Connection) -> None:
        pipe.send((os.getpid(), done))

    def fork() -> tuple[int | None, int, list[int]]:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=tell_who, args=(theirs,))
        process.start()
        assert ours.poll(10)
        process.join()
        return (process.pid, *ours.recv())

    with forked_core(force=True, first=lambda: done.append(os.getpid())):
        pid, own, seen = fork()
    assert (own, seen) == (pid, [pid])
    assert done == []
    assert fork()[2] == []


CORES = len(os.sched_getaffinity(0))
THREADS = """
import torch
from qwen_coder_service.backends.vllm import limit_threads
limit_threads()
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(("meant", "threads"), [(None, max(1, CORES - 1)), (str(CORES), CORES)])
def test_what_computes_leaves_a_processor_to_the_service(meant: str | None, threads: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": meant} if meant else {}
    said = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, check=True)
    assert int(said.stdout) == threads
