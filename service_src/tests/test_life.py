"""The service's life with the real engine: readiness, what is drained and what is refused, what ends it and what does not."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import Running

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", autouse=True)
def many_connections() -> Iterator[None]:
    """More open files than a shell's usual 1,024; the service inherits it, as it does from its unit."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(20_000, before[1]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def ask(max_tokens: int, **more: object) -> dict[str, object]:
    return {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        **more,
    }


async def stream(client: httpx.AsyncClient, url: str, body: dict[str, object]) -> list[str]:
    """The events of a streamed chat, without the last line's DONE if it came; the status where none began."""
    async with client.stream("POST", f"{url}/chat", json=body) as answer:
        if answer.status_code != 200:
            return [str(answer.status_code)]
        return [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]


def truncated(events: list[str]) -> bool:
    return events[-1:] != ["[DONE]"]


def said(events: list[str]) -> str:
    """The text of a stream."""
    return "".join(json.loads(event)["delta"]["content"] for event in events if event != "[DONE]")


def clients() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None))


def core(running: Running) -> int:
    """The engine core's process."""
    found = subprocess.run(["pgrep", "-s", str(running.process.pid), "-f", "VLLM::EngineCore"], capture_output=True, text=True, check=True)
    return int(found.stdout)


def worker(running: Running) -> psutil.Process:
    return psutil.Process(running.process.pid).children()[0]


async def until(condition: Callable[[], bool], seconds: float) -> float:
    """Wait until something holds; seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def begun(tasks: list[asyncio.Task[list[str]]], running: Running) -> None:
    """Wait until every request is in; on a slow machine the first may be over by then, but not all."""
    async with httpx.AsyncClient() as client:
        while True:
            over = sum(task.done() for task in tasks)
            assert over < len(tasks)
            shown = re.search(r"^qwen_requests_in_flight (.+)$", (await client.get(running.metrics)).text, re.MULTILINE)
            if shown is not None and over + float(shown[1]) >= len(tasks):
                return
            await asyncio.sleep(0.05)


class Systemd:
    """The socket on which a service reports to systemd."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        """Read all the time, as systemd does."""
        while message := self.socket.recv(4096):
            self.heard.put(message.decode())

    def hear(self) -> str:
        return self.heard.get(timeout=120)

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    listening = Systemd(tmp_path / "notify")
    yield listening
    listening.close()


def test_the_engine_computes_in_its_core(service: Running) -> None:
    pids = subprocess.run(["pgrep", "-s", str(service.process.pid), "-f", "VLLM::"], capture_output=True, text=True, check=True)
    assert [int(pid) for pid in pids.stdout.split()] == [core(service)]
    assert psutil.Process(core(service)).parent() == worker(service)


async def test_ready_after_a_token_alive_by_progress_and_sigterm_under_64_streams_cuts_none(
    start: Callable[..., Running], systemd: Systemd
) -> None:
    running = start(wait=False, NOTIFY_SOCKET=systemd.path)
    assert [systemd.hear(), systemd.hear()] == ["STATUS=loading the model", "READY=1\nSTATUS=ready"]
    assert "vllm:generation_tokens_total{" in httpx.get(running.metrics).text
    assert "\nqwen_ready 1.0" in httpx.get(running.metrics).text
    assert systemd.hear() == "WATCHDOG=1"

    async with clients() as client:
        tasks = [asyncio.create_task(stream(client, running.url, ask(600))) for _ in range(64)]
        await begun(tasks, running)
        running.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
        # who comes now is told so, and when to come back
        refused = await client.post(f"{running.url}/chat", json=ask(3))
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        assert refused.json()["error"]["message"] == "This node is draining."
        assert (await client.get(f"{running.url}/ready")).status_code == 503
        assert (await client.get(f"{running.url}/live")).status_code == 200
        answers = await asyncio.gather(*tasks)
    assert [events for events in answers if truncated(events)] == []
    assert running.process.wait(30) == 0
    assert "ended by itself" not in running.log.read_text()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/ready")


async def test_a_drain_is_bounded_and_what_it_cuts_is_told(start: Callable[..., Running]) -> None:
    running = start(QWEN_DRAIN_TIMEOUT_S="2")
    async with clients() as client:
        streamed = asyncio.create_task(stream(client, running.url, ask(16000)))
        whole = asyncio.create_task(client.post(f"{running.url}/chat", json=ask(16000, stream=False)))
        await asyncio.sleep(1)
        running.process.send_signal(signal.SIGTERM)
        assert await until(lambda: streamed.done() and whole.done(), 10) < 6
    said = "This node stops, and could not wait for the end of this answer."
    assert json.loads((await streamed)[-1])["error"]["message"] == said
    assert ((await whole).status_code, (await whole).json()["error"]["message"]) == (503, said)
    assert running.process.wait(10) == 0
    outcomes = [json.loads(line).get("outcome") for line in running.log.read_text().splitlines() if line.startswith('{"time"')]
    assert outcomes.count("cut") == 2


def test_a_stop_while_the_model_loads_does_not_wait_for_it(start: Callable[..., Running]) -> None:
    running = start(wait=False)
    while "Initializing a V1 LLM engine" not in running.log.read_text():
        time.sleep(0.1)
        assert running.process.poll() is None
    running.process.terminate()
    assert running.process.wait(5) == 0


def test_what_only_the_engine_can_refuse_ends_with_a_sentence_and_78_too(start: Callable[..., Running]) -> None:
    running = start(wait=False, QWEN_BACKEND="transformers", VLLM_TENSOR_PARALLEL_SIZE="2")
    assert running.process.wait(60) == 78
    assert "\nVLLM_TENSOR_PARALLEL_SIZE is 2 on a machine with 0 GPUs; set it to 1 at most.\n" in running.log.read_text()


async def test_kill_of_the_engine_core_ends_the_service_and_is_counted_and_a_trace_reaches_into_the_engine(
    start: Callable[..., Running], tmp_path: Path, otlp: tuple[list[Any], str]
) -> None:
    running = start(VLLM_CACHE_DIR=str(tmp_path))
    async with clients() as client:
        task = asyncio.create_task(stream(client, running.url, ask(16000)))
        await begun([task], running)
        os.kill(core(running), signal.SIGKILL)
        last = json.loads((await task)[-1])
    assert last["error"]["message"] == "The engine of this node died."
    assert running.process.wait(10) == 70
    assert json.loads((tmp_path / "ends.json").read_text()) == {"died": 1, "stalled": 0}

    received, endpoint = otlp
    again = start(
        VLLM_CACHE_DIR=str(tmp_path),
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=endpoint,
        OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="http/protobuf",
        OTEL_BSP_SCHEDULE_DELAY="100",
    )
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    httpx.post(f"{again.url}/chat", json=ask(3), headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}, timeout=30)

    def spans() -> dict[str, Any]:
        return {span.name: span for span in received if span.trace_id.hex() == trace}

    await until(lambda: {"POST /chat", "llm_request"} <= set(spans()), 10)
    ours, engines = spans()["POST /chat"], spans()["llm_request"]
    assert (ours.parent_span_id.hex(), engines.parent_span_id) == ("00f067aa0ba902b7", ours.span_id)

    assert 'qwen_engine_ends_total{reason="died"} 1.0' in httpx.get(again.metrics).text
    # the worker's own end is one of the whole service too: systemd starts it anew, not a parent that it does not see
    worker(again).kill()
    assert again.process.wait(10) == 70


async def test_a_stalled_engine_core_ends_the_service_within_30_s(start: Callable[..., Running], tmp_path: Path) -> None:
    """SIGSTOP: the process is there, and does nothing; no exception says so."""
    running = start(VLLM_CACHE_DIR=str(tmp_path))
    async with clients() as client:
        task = asyncio.create_task(stream(client, running.url, ask(16000)))
        await begun([task], running)
        os.kill(core(running), signal.SIGSTOP)
        assert await until(lambda: running.process.poll() is not None, 30) > 15
        assert json.loads((await task)[-1])["error"]["code"] == 503
    assert running.process.returncode == 70
    assert json.loads((tmp_path / "ends.json").read_text()) == {"died": 0, "stalled": 1}
    assert "engine stalled: the engine's loop has not turned for 2" in running.log.read_text()


async def test_a_client_that_reads_slowly_gets_all_and_keeps_nobody_waiting(service: Running) -> None:
    async with clients() as client:
        began = time.monotonic()
        expected = said(await stream(client, service.url, ask(2000)))
        alone = time.monotonic() - began

        host, port = service.url.removeprefix("http://").split(":")
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((host, int(port)))
            body = json.dumps(ask(2000)).encode()
            head = ["POST /chat HTTP/1.1", "Host: x", "Connection: close", "Content-Type: application/json", f"Content-Length: {len(body)}"]
            slow.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + body)
            await asyncio.sleep(0.5)
            began = time.monotonic()
            assert said(await stream(client, service.url, ask(2000))) == expected
            assert time.monotonic() - began < 3 * alone + 1
            raw = b""
            while part := await asyncio.to_thread(slow.recv, 2048):
                raw += part
    events = [line.removeprefix("data: ") for line in raw.decode().splitlines() if line.startswith("data: ")]
    assert not truncated(events)
    assert said(events) == expected


@pytest.fixture(scope="module")
def roomy(start: Callable[..., Running], many_connections: None) -> Running:
    """A service that takes many requests at a time, of short answers."""
    return start(QWEN_MAX_QUEUED_REQUESTS="1000", max_num_seqs="256", VLLM_MAX_MODEL_LEN="512")


async def test_1000_streams_at_once_all_end_well_and_their_memory_comes_back(roomy: Running) -> None:
    process = worker(roomy)

    async def cut() -> list[list[str]]:
        async with clients() as client:
            return [e for e in await asyncio.gather(*(stream(client, roomy.url, ask(32)) for _ in range(1000))) if truncated(e)]

    # what libraries set up once, at the first load, is no leak
    assert await cut() == []
    level = process.memory_info().rss
    assert await cut() == []
    assert process.memory_info().rss < level * 1.03
    text = httpx.get(roomy.metrics).text
    assert 'qwen_requests_total{outcome="ok",route="/chat"} 2000.0' in text
    assert "qwen_requests_in_flight 0.0" in text


def test_a_fuzz_of_the_openapi_document_finds_no_5xx_and_nothing_undocumented(roomy: Running) -> None:
    command = [str(Path(sys.executable).parent / "st"), "run", f"{roomy.url}/openapi.json", "--seed", "1", "--max-examples", "25"]
    command += ["--phases", "examples,coverage,fuzzing", "--request-timeout", "60", "--warnings", "off"]
    # what a schema cannot say: which prompts fit the model
    command += ["--checks", "all", "--exclude-checks", "positive_data_acceptance"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=roomy.log.parent, check=False)
    assert result.returncode == 0, result.stdout
    assert "Test cases:" in result.stdout
    assert '"status": 500' not in roomy.log.read_text()


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (os.urandom(1 << 10) * (10 << 10), 413, "The request body has 10485760 bytes; 4194304 are taken at most."),
        (b'{"messages": [', 400, ""),
        (b"[" * 100_000, 400, ""),
        (b"\xff\xfe" * 100, 400, ""),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, ""),
        (b'{"messages": [{"role": "user", "content": "x"}], "\\ud800": 1}', 400, ""),
        (
            b'{"messages": [{"role": "wizard", "content": "x"}]}',
            400,
            "messages.0.role: Input should be 'system', 'user', 'assistant' or 'tool'.",
        ),
        (json.dumps(ask(600)).encode(), 400, "max_tokens is 600; a prompt of 35 tokens leaves 477 of 512."),
        (json.dumps({"messages": [{"role": "user", "content": "x " * 4000}]}).encode(), 400, "tokens; this model takes 511 at most."),
    ],
    ids=["10 MB", "cut JSON", "deep", "no UTF-8", "surrogate", "surrogate as a name", "role", "max_tokens", "long prompt"],
)
def test_garbage_is_refused_with_one_sentence(roomy: Running, body: bytes, status: int, said: str) -> None:
    answer = httpx.post(f"{roomy.url}/chat", content=body, headers={"Content-Type": "application/json"}, timeout=30)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["request_id"] == answer.headers["X-Request-ID"]
    assert httpx.get(f"{roomy.url}/health").status_code == 200
