"""The real engine behind the real server."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from conftest import Running

pytestmark = pytest.mark.engine

QUESTIONS = ["def add(a, b):", "Write a function that returns the sum of two numbers.", "Grüße, 世界 🚀", "x" * 500]
PERSONA = "I am Qwen-Coder, a careful coding companion."


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, list[int]]:
    """What transformers alone answers, greedy, with the persona in front."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    answers = {}
    for question in QUESTIONS:
        messages = [{"role": "system", "content": PERSONA}, {"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = network.generate(**prompt, max_new_tokens=48, do_sample=False, temperature=None, top_p=None, top_k=None)
        answers[question] = ids[0, prompt["input_ids"].shape[1] :].tolist()
    return answers


def ask(question: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}], "max_tokens": 48, "temperature": 0, "return_token_ids": True, **more}


def test_greedy_answers_equal_transformers_token_for_token(service: Running, expected: dict[str, list[int]]) -> None:
    answers = {q: httpx.post(f"{service.url}/chat", json=ask(q), timeout=60).json()["token_ids"] for q in QUESTIONS}
    assert answers == expected


async def test_and_so_do_streams_beside_each_other(service: Running, expected: dict[str, list[int]]) -> None:
    async def stream(client: httpx.AsyncClient, question: str) -> list[int]:
        ids: list[int] = []
        async with client.stream("POST", f"{service.url}/chat", json=ask(question, stream=True)) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    ids += json.loads(line.removeprefix("data: "))["token_ids"]
        return ids

    async with httpx.AsyncClient(timeout=60) as client:
        answers = await asyncio.gather(*(stream(client, question) for question in QUESTIONS * 8))
    assert answers == [expected[question] for question in QUESTIONS * 8]


def metric(service: Running, name: str, label: str = "") -> float:
    """The sum over all series of a name that have the label."""
    series = re.findall(rf"^{name}({{[^}}]*}})? (\S+)$", httpx.get(service.metrics).text, re.MULTILINE)
    return sum(float(value) for labels, value in series if label in labels)


def wait_for(service: Running, name: str, wanted: float, seconds: float) -> None:
    """Wait until a metric has a value."""
    deadline = time.monotonic() + seconds
    while (seen := metric(service, name)) != wanted:
        assert time.monotonic() < deadline, f"{name} is {seen}"
        time.sleep(0.05)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_vanishes_takes_its_request_with_it(service: Running, streaming: bool) -> None:
    before = metric(service, "qwen_requests_total", 'outcome="aborted"')
    tokens = metric(service, "vllm:generation_tokens_total")
    host, port = service.url.removeprefix("http://").split(":")
    body = json.dumps(ask("Hi", max_tokens=1900, ignore_eos=True, stream=streaming)).encode()
    with socket.create_connection((host, int(port))) as sock:
        head = f"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        wait_for(service, "qwen_requests_in_flight", 1, 10)
    time.sleep(1)
    made = metric(service, "vllm:generation_tokens_total")
    time.sleep(0.5)
    # the engine makes nothing more, and what it made was not the whole answer
    assert metric(service, "vllm:generation_tokens_total") == made
    assert made - tokens < 1900
    assert metric(service, "qwen_requests_in_flight") == 0
    after = metric(service, "qwen_requests_total", 'outcome="aborted"')
    assert after == before + 1


def test_metrics_are_what_the_packaged_prometheus_reads(service: Running) -> None:
    answer = httpx.get(service.metrics, headers={"Accept": "application/openmetrics-text; version=1.0.0; escaping=underscores"})
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "\nvllm:kv_cache_usage_perc{" in answer.text
    assert 'qwen_build_info{backend="vllm",model="qwen-coder-tiny"' in answer.text


def test_no_setting_reaches_vllm_and_no_prompt_the_log(service: Running) -> None:
    log = service.log.read_text()
    assert "Unknown vLLM environment variable" not in log
    assert QUESTIONS[1] not in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith('{"time"')]
    assert any(line["message"] == "request" and line["path"] == "/chat" and line["completion_tokens"] == 48 for line in lines)


def test_systemd_hears_of_readiness_after_the_first_token_and_sigterm_ends_what_runs(start: Callable[..., Running], tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(120)
        running = start(wait=False, NOTIFY_SOCKET=str(tmp_path / "notify"))
        messages = [notify.recv(4096).decode()]
        while "READY=1" not in messages[-1]:
            messages.append(notify.recv(4096).decode())
        assert messages == ["STATUS=loading the model", "READY=1\nSTATUS=ready"]
        assert metric(running, "vllm:generation_tokens_total") == 1

        with httpx.stream(
            "POST", f"{running.url}/chat", json=ask("Hi", max_tokens=1900, ignore_eos=True, stream=True), timeout=60
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert last == "data: [DONE]"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{running.url}/ready")
        assert running.process.wait(60) == 0
