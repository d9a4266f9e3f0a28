"""The engine by the clock: as many tokens as are asked for, one by one, through the service."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import httpx
import pytest


async def test_an_answer_has_as_many_tokens_as_are_asked_for(
    environment: dict[str, str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**environment, "QWEN_MODEL_PATH": str(model), "BENCHMARK_FIRST_MS": "20"}.items():
        monkeypatch.setenv(name, value)
    app = importlib.import_module("benchmark_paced").app
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 5,
        "seed": 10,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        answer = await client.post("/v1/chat/completions", json=body)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    words = [choice["delta"].get("content") for event in events for choice in event["choices"]]
    assert [word for word in words if word] == [" word"] * 5
    assert (events[-1]["usage"]["completion_tokens"], events[-2]["choices"][0]["finish_reason"]) == (5, "length")
