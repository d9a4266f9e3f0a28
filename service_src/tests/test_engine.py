"""The real engine behind the real server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
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


def wait_for(service: Running, condition: Callable[[], bool], seconds: float) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, service.log.read_text()[-2000:]
        time.sleep(0.05)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_vanishes_takes_its_request_with_it(service: Running, streaming: bool) -> None:
    aborted, tokens = metric(service, "qwen_requests_total", 'outcome="aborted"'), metric(service, "vllm:generation_tokens_total")
    host, port = service.url.removeprefix("http://").split(":")
    body = json.dumps(ask("Hi", max_tokens=16000, ignore_eos=True, stream=streaming)).encode()
    with socket.create_connection((host, int(port))) as sock:
        head = f"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        wait_for(service, lambda: metric(service, "vllm:generation_tokens_total") > tokens, 10)
    wait_for(service, lambda: metric(service, "qwen_requests_total", 'outcome="aborted"') == aborted + 1, 10)
    # the engine makes nothing more, and what it made was not the whole answer
    time.sleep(1)
    made = metric(service, "vllm:generation_tokens_total")
    time.sleep(0.5)
    assert metric(service, "vllm:generation_tokens_total") == made
    assert made - tokens < 16000
    assert metric(service, "qwen_requests_in_flight") == 0


def test_metrics_are_what_the_packaged_prometheus_reads(service: Running) -> None:
    answer = httpx.get(service.metrics, headers={"Accept": "application/openmetrics-text; version=1.0.0; escaping=underscores"})
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "\nvllm:kv_cache_usage_perc{" in answer.text
    assert re.search(r'qwen_build_info{backend="vllm",engine="\d[^"]+",model="qwen-coder-tiny",variant="full"', answer.text)
    assert 'qwen_model_info{dtype="float32",max_model_len="16384",model="qwen-coder-tiny",' in answer.text


def test_the_openai_client_runs_against_it(service: Running) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["qwen-coder-tiny"]
    question = {"model": "qwen-coder-tiny", "messages": [{"role": "user", "content": QUESTIONS[0]}], "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**question)  # type: ignore[call-overload]
    assert whole.usage.completion_tokens == 24
    chunks = list(client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    with pytest.raises(openai.BadRequestError, match=r"leaves \d+ of 16384"):
        client.chat.completions.create(**question | {"max_tokens": 50000})  # type: ignore[call-overload]
    with pytest.raises(openai.NotFoundError, match="this node serves 'qwen-coder-tiny'"):
        client.chat.completions.create(**question | {"model": "other"})  # type: ignore[call-overload]


def test_no_setting_reaches_vllm_and_no_prompt_the_log(service: Running) -> None:
    log = service.log.read_text()
    assert "Unknown vLLM environment variable" not in log
    assert QUESTIONS[1] not in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith('{"time"')]
    assert any(line["message"] == "request" and line["path"] == "/chat" and line["completion_tokens"] == 48 for line in lines)
