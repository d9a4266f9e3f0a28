"""A host's part in an engine over several: it is there as long as the head is, and tells systemd so."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest

from qwen_coder_service import worker


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What systemd is told."""
    messages: list[str] = []
    monkeypatch.setattr(worker, "sd_notify", messages.append)
    monkeypatch.setattr(worker, "LOOK_S", 0.05)
    return messages


def head() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def held(port: int, ended: list[str]) -> threading.Thread:
    thread = threading.Thread(target=lambda: ended.append(worker.hold("127.0.0.1", port)), daemon=True)
    thread.start()
    return thread


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_head_is_waited_for_and_its_end_is_seen(told: list[str]) -> None:
    with head() as first:
        port = first.getsockname()[1]
    ended: list[str] = []
    thread = held(port, ended)
    until(lambda: len(told) > 3)
    assert (ended, set(told)) == ([], {"WATCHDOG=1"})  # nobody there, and nothing wrong
    with socket.create_server(("127.0.0.1", port)) as server:
        connection, _ = server.accept()
        before = len(told)
        until(lambda: len(told) > before + 4)  # a head that says nothing is no reason to be killed
        assert ended == []
        assert told.count("STATUS=computing for the head") == 1
        connection.close()
        thread.join(5)
    assert ended == ["it closed the connection"]


def test_a_head_that_is_killed_is_seen(told: list[str]) -> None:
    with head() as server:
        ended: list[str] = []
        thread = held(server.getsockname()[1], ended)
        connection, _ = server.accept()
        # before, it would be a head that could not be reached, and asked again
        until(lambda: "STATUS=computing for the head" in told)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        connection.close()  # with a reset
        thread.join(5)
    assert len(ended) == 1
    assert "reset" in ended[0]
