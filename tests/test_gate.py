"""The gate against a service that is as it should be, or not: each way to be unfit is said in a sentence."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from plugins import load

gate = load("roles/qwen_service/library/qwen_gate.py")
PERSONA = "I am careful."
GOLDEN: dict[str, Any] = {
    "model": "m",
    "persona": PERSONA,
    "prompts": {name: {"messages": [{"role": "user", "content": name}], "max_tokens": 3, "token_ids": [1, 2, 3]} for name in "abcde"},
}
RUNS = {"InvocationID": "1", "NRestarts": "0", "ActiveState": "active"}


class Handler(BaseHTTPRequestHandler):
    """The few paths that the gate asks."""

    server: Server

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def answer(self, status: int, body: bytes) -> None:
        """Whole."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """Whether it is ready."""
        self.answer(200 if self.server.is_ready else 503, b"{}")

    def do_POST(self) -> None:
        """An answer as the server's fault has it."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked += 1
        fault = self.server.fault
        if fault == "error":
            self.answer(500, b"the engine died")
        elif not asked.get("stream"):
            ids = {"nonsense": [1, 9, 3], "empty": [], "moody": [self.server.asked]}.get(fault, [1, 2, 3])
            self.answer(200, json.dumps({"token_ids": ids}).encode())
        else:
            self.send_response(200)
            self.end_headers()
            for _ in range(asked["max_tokens"]):
                time.sleep(self.server.token_s)
                self.wfile.write(b'data: {"delta": {"content": "x"}}\n\n')
                self.wfile.flush()
            self.wfile.write(b"" if fault == "cut" else b"data: [DONE]\n\n")


class Server(ThreadingHTTPServer):
    """On a free port."""

    daemon_threads = True
    fault, is_ready, token_s, asked = "", True, 0.0, 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def server() -> Iterator[Server]:
    """A server in a thread."""
    with Server() as result:
        thread = threading.Thread(target=result.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield result
        result.shutdown()
        thread.join()


@pytest.fixture
def prove(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Prove the server: (figures, sentences)."""
    lives = [RUNS]
    monkeypatch.setattr(gate, "life", lambda _: lives.pop(0) if len(lives) > 1 else lives[0])
    env = tmp_path / "q.env"
    env.write_text(f"X=1\nQWEN_PERSONA_PROMPT={json.dumps(PERSONA)}\n")

    def run(*later: dict[str, str], **options: Any) -> Any:
        lives.extend(later)
        given = {
            "unit": "q.service", "env_file": str(env), "golden": GOLDEN, "golden_share": 1.0, "requests": 3, "tokens": 4, "reference": {},
            "slower": 1.5, "watch_seconds": 0,
        }  # fmt: skip
        service = gate.Service(f"http://127.0.0.1:{server.server_address[1]}", 2)
        return gate.prove(service, {**given, **options})

    return run


def test_what_is_fit_is_proved_with_figures(prove: Any, server: Server) -> None:
    server.token_s = 0.01
    measured, lines = prove()
    assert measured["token_ms"] >= 10 and measured["ttft_ms"] >= 10
    assert lines[0] == "5 of 5 golden answers are right"
    assert lines[-1] == "it stayed up for 0 s"


@pytest.mark.parametrize(
    ("fault", "golden", "sentence"),
    [
        ("nonsense", GOLDEN, "0 of 5 golden answers are right; wrong are 'a' from token 1 on, 'b' from token 1 on, 'c' from token 1 on "
         "and others"),
        ("empty", {}, "an answer is empty"),
        ("moody", {}, "the same question has two different greedy answers"),
        ("error", {}, "/chat is answered with 500: the engine died"),
        ("cut", {}, "a stream is not whole: it ended with 'data: {\"delta\": {\"content\": \"x\"}}'"),
    ],
)  # fmt: skip
def test_what_is_unfit_is_refused_with_a_sentence(prove: Any, server: Server, fault: str, golden: Any, sentence: str) -> None:
    server.fault = fault
    with pytest.raises(gate.GateError) as refused:
        prove(golden=golden)
    assert str(refused.value) == sentence


def test_some_golden_answers_may_differ_where_that_is_allowed(prove: Any, server: Server) -> None:
    server.fault = "nonsense"
    golden = {**GOLDEN, "prompts": {**GOLDEN["prompts"], "f": {**GOLDEN["prompts"]["a"], "token_ids": [1, 9, 3]}}}
    assert prove(golden=golden, golden_share=0.1)[1][0] == "1 of 6 golden answers are right"


def test_a_golden_set_of_another_persona_says_nothing(prove: Any) -> None:
    assert prove(golden={**GOLDEN, "persona": "another"})[1][0] == (
        "the golden set is of another persona and says nothing about its answers"
    )
    assert prove(golden={})[1][0] == "there is no golden set of its model"


def test_slower_than_before_is_refused_and_a_slow_moment_is_not(prove: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token_s = 0.03
    with pytest.raises(gate.GateError, match=r"^a token takes \d+ ms, \d\.\d times the 10 ms of the release before; at most 1.5 times"):
        prove(reference={"ttft_ms": 30, "token_ms": 10})
    server.asked = 0
    measured, _ = prove(reference={"ttft_ms": 30, "token_ms": 30})
    assert measured["token_ms"] < 45
    assert server.asked == 5 + 2 + 3
    windows = [{"ttft_ms": 10.0, "token_ms": 99.0}, {"ttft_ms": 10.0, "token_ms": 10.0}]
    monkeypatch.setattr(gate.Service, "window", lambda *_: windows.pop(0))
    assert prove(reference={"ttft_ms": 10, "token_ms": 10})[0]["token_ms"] == 10


def test_what_is_slow_for_a_part_of_the_watch_is_not_refused(prove: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_until = time.monotonic() + 0.5

    def window(*_: object) -> dict[str, float]:
        time.sleep(0.05)
        return {"ttft_ms": 10.0, "token_ms": 20.0 if time.monotonic() < slow_until else 11.0}

    monkeypatch.setattr(gate.Service, "window", window)
    assert prove(reference={"ttft_ms": 10, "token_ms": 10}, watch_seconds=2)[0]["token_ms"] == 11
    slow_until = time.monotonic() + 60
    with pytest.raises(gate.GateError, match=r"^a token takes 20 ms, 2\.0 times the 10 ms"):
        prove(reference={"ttft_ms": 10, "token_ms": 10}, watch_seconds=1)


def test_what_is_measured_are_usual_moments(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [{"ttft_ms": 10.0, "token_ms": 9.0}, {"ttft_ms": 70.0, "token_ms": 40.0}, {"ttft_ms": 20.0, "token_ms": 8.0}]
    monkeypatch.setattr(gate.Service, "window", lambda *_: windows.pop(0))
    service = gate.Service(f"http://127.0.0.1:{server.server_address[1]}", 2)
    assert gate.measure(service, {"requests": 3, "tokens": 4}) == {"ttft_ms": 20.0, "token_ms": 9.0}
    server.fault = "error"
    with pytest.raises(gate.GateError, match=r"^/chat is answered with 500"):
        gate.measure(service, {"requests": 3, "tokens": 4})


def test_what_is_fast_anyhow_is_not_slower(prove: Any) -> None:
    prove(reference={"ttft_ms": 0.1, "token_ms": 0.01})


@pytest.mark.parametrize("later", [{"InvocationID": "2"}, {"NRestarts": "1"}, {"ActiveState": "activating"}])
def test_a_service_that_ends_meanwhile_is_refused(prove: Any, later: dict[str, str]) -> None:
    with pytest.raises(gate.GateError, match=r"^q\.service ended 1 s after it was ready$"):
        prove(RUNS, {**RUNS, **later}, watch_seconds=10)


def test_a_service_that_stops_being_ready_is_refused(prove: Any, server: Server) -> None:
    threading.Timer(0.5, lambda: setattr(server, "is_ready", False)).start()
    with pytest.raises(gate.GateError, match=r"^the service stopped being ready \d s after it was$"):
        prove(watch_seconds=10)


def test_that_it_ended_is_said_before_what_that_did_to_a_request(prove: Any, server: Server) -> None:
    server.fault = "error"
    with pytest.raises(gate.GateError, match=r"^q\.service ended 0 s after it was ready$"):
        prove({**RUNS, "ActiveState": "failed"})


def test_nobody_there(prove: Any, server: Server) -> None:
    service = gate.Service("http://127.0.0.1:1", 2)
    assert not service.ready()
    with pytest.raises(gate.GateError, match=r"^/chat is not answered: "):
        service.window(1, 1)
