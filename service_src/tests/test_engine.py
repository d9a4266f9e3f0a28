"""The real engine behind the real server: what only vLLM has, and what is the same whichever engine it is. See test_contract.py too."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import httpx
import openai
import pytest
from conftest import Running

pytestmark = pytest.mark.engine

QUESTION = "Write a function that returns the sum of two numbers."


def test_metrics_are_what_the_packaged_prometheus_reads(service: Running) -> None:
    answer = httpx.get(service.metrics, headers={"Accept": "application/openmetrics-text; version=1.0.0; escaping=underscores"})
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "\nvllm:kv_cache_usage_perc{" in answer.text
    assert re.search(r'qwen_build_info{backend="vllm",engine="\d[^"]+",model="qwen-coder-tiny",variant="full"', answer.text)
    assert 'qwen_model_info{dtype="float32",max_model_len="16384",model="qwen-coder-tiny",' in answer.text


def test_the_openai_client_runs_against_it(service: Running) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["qwen-coder-tiny"]
    question = {"model": "qwen-coder-tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24, "temperature": 0}
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
    assert httpx.post(f"{service.url}/chat", json={"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 48}).is_success
    log = service.log.read_text()
    assert "Unknown vLLM environment variable" not in log
    assert QUESTION not in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith('{"time"')]
    assert any(line["message"] == "request" and line["path"] == "/chat" and line["completion_tokens"] > 0 for line in lines)


def test_vllms_processes_load_the_plugin_by_which_they_sleep_while_they_wait() -> None:
    program = (
        "from vllm.plugins import load_general_plugins; load_general_plugins(); "
        "from vllm.distributed.device_communicators import shm_broadcast; print(shm_broadcast.sched_yield.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1:] == ["qwen_coder_service.backends.vllm_plugin"], done.stderr
