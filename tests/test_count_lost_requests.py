"""The counting harness against a server that loses requests on purpose: what it says must be what was done."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import count_lost_requests as counting
import pytest

TOKENS = 4


class Handler(BaseHTTPRequestHandler):
    """Streams TOKENS tokens; the server's ``fault`` says what goes wrong, ``faults`` how often."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def chunk(self, data: str) -> None:
        """One piece of the answer."""
        raw = data.encode()
        self.wfile.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")
        self.wfile.flush()

    def do_POST(self) -> None:
        """Answer, or fail."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.server.next_fault()
        if fault in ("refuse", "reset"):
            if fault == "reset":
                self.close_connection = True
                return
            self.send_response(503)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"full")
            return
        if not asked["stream"]:
            choices = [{"finish_reason": "length", "message": {"content": "x"}}]
            body = json.dumps({"choices": choices, "usage": {"completion_tokens": asked["max_tokens"]}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        tokens = TOKENS - 1 if fault == "short" else TOKENS
        for index in range(tokens):
            time.sleep(0.005)
            finish = "length" if index == tokens - 1 else None
            self.chunk("data: " + json.dumps({"choices": [{"delta": {"content": "x"}, "finish_reason": finish}]}) + "\n\n")
            if fault == "cut" and index == 1:
                self.close_connection = True
                return
            if fault == "error" and index == 1:
                self.chunk("data: " + json.dumps({"error": {"message": "the engine died"}}) + "\n\n")
                self.chunk("")
                return
        self.chunk("data: " + json.dumps({"choices": [], "usage": {"completion_tokens": tokens}}) + "\n\n")
        if fault != "no end":
            self.chunk("data: [DONE]\n\n")
        self.chunk("")


class Server(ThreadingHTTPServer):
    """On a free port."""

    request_queue_size = 64
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.faults, self.lock = "", 0, threading.Lock()

    def next_fault(self) -> str:
        """What this request meets."""
        with self.lock:
            if not self.faults:
                return ""
            self.faults -= 1
            return self.fault

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server() -> Iterator[Server]:
    """A server in a thread."""
    with Server() as result:
        thread = threading.Thread(target=result.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield result
        result.shutdown()
        thread.join()


def load(server: Server) -> counting.Load:
    """Some clients of both kinds."""
    return counting.Load(server.url, "key", [counting.Kind(4, TOKENS), counting.Kind(2, TOKENS, streaming=False)], timeout_s=2)


def test_nothing_is_lost_where_nothing_fails(server: Server) -> None:
    with load(server) as clients:
        clients.wait_for(100)
    report = clients.report
    assert report.lost == []
    assert report.running == 6
    assert {(o.kind.streaming, o.tokens) for o in report.outcomes} == {(True, TOKENS), (False, TOKENS)}
    assert str(report).splitlines()[-1] == f"{len(report.outcomes)} requests, 6 at once: 0 failed, 0 truncated."


def test_a_client_pauses_between_its_requests_and_not_at_the_end(server: Server) -> None:
    kinds = [counting.Kind(2, TOKENS, pause_s=0.3), counting.Kind(1, TOKENS, pause_s=60)]
    with counting.Load(server.url, "key", kinds, timeout_s=2) as clients:
        clients.wait_for(7)
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert clients.report.lost == []
    for client in (0, 1):
        mine = [o for o in clients.outcomes if o.client == client]
        assert all(after.asked - before.ended >= 0.3 for before, after in itertools.pairwise(mine))
    assert len([o for o in clients.outcomes if o.client == 2]) == 1


@pytest.mark.parametrize(
    ("fault", "verdict", "detail"),
    [
        ("refuse", "failed", "503 full"),
        ("reset", "failed", "RemoteProtocolError"),
        ("cut", "truncated", "RemoteProtocolError"),
        ("error", "truncated", "the engine died"),
        ("no end", "truncated", "finish_reason length, ended with"),
        ("short", "truncated", f"{TOKENS - 1} of {TOKENS} tokens"),
    ],
)
def test_every_loss_is_counted_once(server: Server, fault: str, verdict: str, detail: str) -> None:
    clients = counting.Load(server.url, "key", [counting.Kind(4, TOKENS)], timeout_s=2)
    with clients:
        clients.wait_for(20)
        clients.mark("faults")
        server.fault, server.faults = fault, 3
        clients.wait_for(60)
    lost = clients.report.lost
    assert [o.verdict for o in lost] == [verdict] * 3
    assert all(detail in o.detail for o in lost), [o.detail for o in lost]
    rows = clients.report.timeline()
    assert sum(row["failed"] + row["truncated"] for row in rows) == 3
    assert sum(row["complete"] for row in rows) == len(clients.report.of("complete"))
    assert [mark for row in rows for mark in row["marks"]] == ["faults"]


def test_the_command_runs_under_load_and_its_status_counts(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, output = tmp_path / "key", tmp_path / "report.json"
    key.write_text("key\n")
    common = [
        "--url",
        server.url,
        "--key-file",
        str(key),
        "--clients",
        "4",
        "--tokens",
        str(TOKENS),
        "--settle",
        "0.2",
        "--pause",
        "0.01",
        "--output",
        str(output),
    ]
    assert counting.main([*common, "--", sys.executable, "-c", "pass"]) == 0
    counted = json.loads(output.read_text())
    assert counted["requests"] == counted["complete"] > 4
    assert "0 failed, 0 truncated." in capsys.readouterr().out
    assert counting.main([*common, "--", sys.executable, "-c", "raise SystemExit(3)"]) == 1
    assert "The command ended with 3." in capsys.readouterr().err
    server.fault, server.faults = "cut", 1
    assert counting.main([*common, "--", sys.executable, "-c", "pass"]) == 1
