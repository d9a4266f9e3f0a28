"""What counts as a stall, and what does not."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import socket
import threading
import time
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from conftest import FakeBackend

from qwen_coder_service.lifecycle import COLLECTIONS, End, Ends, Watch, collect_when_idle, sd_notify

STALL_S = 0.4


@pytest.fixture
async def ended(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[tuple[End, str]]]:
    """What the watch said of a backend, which it looks at every hundredth of a second."""
    monkeypatch.setattr(Watch, "INTERVAL_S", 0.01)
    monkeypatch.setattr(Watch, "LATE_S", 0.1)
    found: list[tuple[End, str]] = []
    task = asyncio.create_task(Watch(backend, STALL_S, lambda end, seen: found.append((end, re.sub(r"\d+ s$", "N s", seen)))).run())
    yield found
    task.cancel()


async def first(ended: list[tuple[End, str]]) -> list[tuple[End, str]]:
    """What it said, as soon as it said something: on a busy machine that is later than when it was due."""
    deadline = time.monotonic() + 20
    while not ended and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    return ended


async def test_an_idle_engine_is_left_alone(ended: list[tuple[End, str]]) -> None:
    await asyncio.sleep(2 * STALL_S)
    assert ended == []


async def test_a_busy_one_is_left_alone_as_long_as_it_moves(ended: list[tuple[End, str]], backend: FakeBackend) -> None:
    backend.unfinished = 1000
    for _ in range(8):
        backend.progress = time.monotonic()
        await asyncio.sleep(STALL_S / 3)
    assert ended == []


async def test_requests_without_progress_are_a_stall(ended: list[tuple[End, str]], backend: FakeBackend) -> None:
    backend.unfinished, backend.progress = 3, time.monotonic()
    await asyncio.sleep(STALL_S / 2)
    assert ended == []
    assert await first(ended) == [(End.STALLED, "3 requests run and no token has moved for N s")]


async def test_work_that_begins_after_a_long_rest_has_its_time(ended: list[tuple[End, str]], backend: FakeBackend) -> None:
    backend.progress = time.monotonic() - 3600
    await asyncio.sleep(0.1)
    backend.unfinished = 1
    await asyncio.sleep(STALL_S / 2)
    assert ended == []


async def test_an_idle_engine_whose_loop_hangs_is_a_stall(ended: list[tuple[End, str]], backend: FakeBackend) -> None:
    backend.stuck = True
    assert await first(ended) == [(End.STALLED, "the engine's loop has not turned for N s")]


async def test_a_dead_engine_is_found_without_a_request(ended: list[tuple[End, str]], backend: FakeBackend) -> None:
    backend.alive = False
    assert await first(ended) == [(End.DIED, "dead")]


async def test_an_engine_that_cannot_be_watched_is_no_engine(ended: list[tuple[End, str]], backend: FakeBackend) -> None:
    backend.broken = True
    assert await first(ended) == [(End.DIED, "RuntimeError('a bug')")]


async def test_that_this_process_was_held_up_says_nothing_about_the_engine(ended: list[tuple[End, str]], backend: FakeBackend) -> None:
    await asyncio.sleep(0.05)
    backend.unfinished, backend.progress = 1, time.monotonic()
    time.sleep(2 * STALL_S)
    await asyncio.sleep(STALL_S / 4)
    assert ended == []


async def test_a_stall_is_told_to_who_waits_and_ends_the_process(client: httpx.AsyncClient, backend: FakeBackend, tmp_path: Path) -> None:
    service = client.app.state.service  # type: ignore[attr-defined]
    question = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 26}
    backend.delay = 0.1
    whole = asyncio.create_task(client.post("/chat", json=question))
    streamed = asyncio.create_task(client.post("/chat", json=question | {"stream": True}))
    await asyncio.sleep(0.3)
    backend.stuck = True
    service.ended(End.STALLED, "seen")
    answers = await asyncio.wait_for(asyncio.gather(whole, streamed), 5)
    assert backend.killed
    assert (answers[0].status_code, answers[0].headers["Retry-After"]) == (503, "30")
    assert json.loads([line for line in answers[1].text.splitlines() if line][-1].removeprefix("data: "))["error"]["code"] == 503
    assert (await client.post("/chat", json=question)).json()["error"]["message"] == "This node is dead."
    await asyncio.sleep(0.5)
    assert client.left == [70]  # type: ignore[attr-defined]
    assert Ends(tmp_path).counts == {"died": 0, "stalled": 1}


def test_ends_are_counted_over_restarts_and_a_broken_file_is_no_reason_not_to_start(tmp_path: Path) -> None:
    Ends(tmp_path).add(End.DIED)
    Ends(tmp_path).add(End.DIED)
    assert Ends(tmp_path).counts == {"died": 2, "stalled": 0}
    (tmp_path / "ends.json").write_text("{")
    assert Ends(tmp_path).counts == {"died": 0, "stalled": 0}


def test_a_manager_that_does_not_read_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QWEN_NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        manager.bind(str(tmp_path / "notify"))
        other.connect(str(tmp_path / "notify"))
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                other.send(b"STATUS=full")
        began = time.monotonic()
        sd_notify("WATCHDOG=1")
        assert time.monotonic() - began < 2
        assert "systemd cannot be told 'WATCHDOG=1'" in caplog.text
        # a change of state waits for its turn
        reader = threading.Timer(0.5, manager.recv, [4096])
        reader.start()
        sd_notify("READY=1")
        reader.join()
        manager.setblocking(False)
        heard = []
        with pytest.raises(BlockingIOError):
            while True:
                heard.append(manager.recv(4096))
        assert heard[-1] == b"READY=1"


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


async def test_all_objects_are_looked_at_while_nobody_waits() -> None:
    cycle = Cycle()
    gone = weakref.ref(cycle)
    gc.collect()  # it is one of the old objects from here on
    del cycle
    for _ in range(11):
        gc.collect(1)
    idle = asyncio.Event()
    task = asyncio.create_task(collect_when_idle(idle, 0.01))
    await asyncio.sleep(0.1)
    assert gone() is not None
    idle.set()
    await asyncio.sleep(0.1)
    assert gone() is None
    task.cancel()


async def test_what_was_loaded_is_never_looked_at_and_all_the_rest_rarely(client: httpx.AsyncClient) -> None:
    assert gc.get_freeze_count() > 100_000
    assert gc.get_threshold() == COLLECTIONS
