"""A fake engine for what needs none, and the real service, started as systemd starts it, for what does."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from qwen_coder_service import tiny_model
from qwen_coder_service.app import create_app
from qwen_coder_service.backends.base import BackendDead, Piece, Sampling
from qwen_coder_service.settings import load

MAX_MODEL_LEN = 16384

# the config.json of Qwen2.5-Coder-32B-Instruct, as far as it is read: the catalogue's
CATALOGUE = Path(__file__).resolve().parents[2] / "roles/qwen/vars/main/models.yml"
QWEN_32B: dict[str, Any] = {
    **yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))["__qwen_models"]["Qwen/Qwen2.5-Coder-32B-Instruct"]["config"],
    "architectures": ["Qwen2ForCausalLM"],
    "torch_dtype": "bfloat16",
}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, made for more tokens than usual: an answer that takes half a minute leaves time to interrupt it."""
    target = tmp_path_factory.mktemp("models") / "tiny"
    assert tiny_model.main([str(target), "--max-position", str(MAX_MODEL_LEN)]) == 0
    return target


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Settings of a service that needs no engine."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 2048, "rope_theta": 1000000.0, "num_attention_heads": 4}')
    return {
        "QWEN_MODEL_PATH": str(tmp_path / "model"),
        "QWEN_MODEL_NAME": "fake",
        "QWEN_METRICS_BIND": f"127.0.0.1:{free_port()}",
        "QWEN_PERSONA_PROMPT": "I am a test.",
        "VLLM_CACHE_DIR": str(tmp_path),
        "QWEN_MAX_QUEUED_REQUESTS": "1",
        "max_num_seqs": "2",
        "QWEN_MAX_BODY_BYTES": "2000",
    }


class FakeTokenizer:
    """A token a character, with the roles in front, so that a test can read what was rendered."""

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> list[int]:
        tools = "".join(f"tool:{tool['function']['name']}\n" for tool in options.get("tools", []))
        return [ord(c) for c in tools + "".join(f"{turn['role']}:{turn['content']}\n" for turn in conversation)]


@dataclass
class FakeBackend:
    """Answers with the letters of the alphabet, as long as nothing stops it."""

    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    max_model_len: int = 200
    delay: float = 0.0
    alive: bool = True
    broken: bool = False
    stuck: bool = False
    progress: float = field(default_factory=time.monotonic)
    unfinished: int = 0
    killed: bool = False
    aborting: bool = False
    prompts: list[str] = field(default_factory=list)
    samplings: list[Sampling] = field(default_factory=list)
    aborted: int = 0

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def check(self) -> None:
        if not self.alive:
            raise BackendDead("dead")

    async def ping(self) -> None:
        if self.broken:
            raise RuntimeError("a bug")
        while self.stuck:
            await asyncio.sleep(0.01)

    def kill(self) -> None:
        self.killed, self.alive, self.stuck = True, False, False

    async def abort_all(self) -> None:
        self.aborting = True

    async def generate(
        self, request_id: str, prompt: list[int], sampling: Sampling, *, stream: bool, trace: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Piece]:
        self.prompts.append("".join(map(chr, prompt)))
        self.samplings.append(sampling)
        text = "abcdefghijklmnopqrstuvwxyz"[: sampling.max_tokens]
        done = False
        self.unfinished += 1
        try:
            for index, letter in enumerate(text):
                await asyncio.sleep(self.delay)
                while self.stuck:
                    await asyncio.sleep(0.01)
                if self.broken:
                    raise RuntimeError("a bug")
                if not self.alive:
                    raise BackendDead("died")
                if self.aborting:
                    done = True
                    yield Piece("", [], "abort")
                    return
                self.progress = time.monotonic()
                last = index == len(text) - 1
                if stream:
                    done = last
                    yield Piece(letter, [ord(letter)], "length" if last else None)
            if not stream:
                done = True
                yield Piece(text, [ord(c) for c in text], "length")
        finally:
            self.unfinished -= 1
            self.aborted += not done


@pytest.fixture
async def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def client(environment: dict[str, str], backend: FakeBackend) -> AsyncGenerator[httpx.AsyncClient]:
    """A client of the application with the fake engine, ready."""
    left: list[int] = []
    app = create_app(load(environment), backend, left.append)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        backend.prompts.clear()
        backend.samplings.clear()
        client.app, client.left = app, left  # type: ignore[attr-defined]
        yield client


@dataclass
class Running:
    """The real service."""

    url: str
    metrics: str
    process: subprocess.Popen[bytes]
    log: Path
    environment: dict[str, str]


@pytest.fixture(scope="session")
def start(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """Start the service with the tiny model, the way its unit does; everything that was started ends with the tests."""
    started: list[Running] = []
    # what vLLM knows of a kind of model; it asks a process of its own, which imports everything once more, where its cache does not say
    known = tmp_path_factory.mktemp("modelinfos")

    def launch(wait: bool = True, **settings: str) -> Running:
        folder = tmp_path_factory.mktemp("service")
        port, metrics = free_port(), free_port()
        environment = {
            "PATH": os.environ["PATH"],
            "QWEN_MODEL_PATH": str(model),
            "QWEN_MODEL_NAME": "qwen-coder-tiny",
            "QWEN_DTYPE": "float32",
            "QWEN_METRICS_BIND": f"127.0.0.1:{metrics}",
            "QWEN_KV_CACHE_MEMORY_BYTES": str(32 << 20),
            "QWEN_ENFORCE_EAGER": "true",
            "QWEN_DRAIN_TIMEOUT_S": "60",
            "VLLM_MAX_MODEL_LEN": str(MAX_MODEL_LEN),
            "VLLM_CACHE_DIR": str(folder),
            "max_num_seqs": "32",
            **settings,
        }
        infos = Path(environment["VLLM_CACHE_DIR"], "vllm/modelinfos")
        infos.parent.mkdir(exist_ok=True)
        if not infos.exists():
            infos.symlink_to(known)
        log = folder / "log"
        command = ["gunicorn", "--config", "python:qwen_coder_service.gunicorn_conf", "--workers", "1"]
        command += ["--worker-class", "uvicorn_worker.UvicornWorker", "--bind", f"127.0.0.1:{port}", "qwen_coder_service.main:app"]
        command[0] = str(Path(sys.executable).parent / command[0])
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=folder, start_new_session=True)
        running = Running(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}/metrics", process, log, environment)
        started.append(running)
        deadline = time.monotonic() + 180
        while wait:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                if httpx.get(f"{running.url}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        return running

    yield launch
    for running in started:
        if running.process.poll() is None:
            running.process.terminate()
            running.process.wait(90)
        # what a killed engine left behind; systemd ends it with the unit
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def service(start: Callable[..., Running]) -> Running:
    """One real service for all tests that leave it as it was."""
    return start()


@pytest.fixture
def otlp() -> Iterator[tuple[list[Any], str]]:
    """An OTLP receiver (http/protobuf): the spans that arrived, and its URL."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            request = ExportTraceServiceRequest.FromString(body)
            spans.extend(span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield spans, f"http://127.0.0.1:{server.server_port}/v1/traces"
    server.shutdown()
