"""The HTTP contract, with a fake engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from conftest import FakeBackend

HELLO = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}


async def test_chat_answers_whole(client: httpx.AsyncClient) -> None:
    answer = await client.post("/chat", json=HELLO | {"return_token_ids": True})
    assert answer.status_code == 200
    body = answer.json()
    assert body.pop("id") == answer.headers["X-Request-ID"]
    assert body == {
        "model": "fake",
        "message": {"role": "assistant", "content": "abc"},
        "finish_reason": "length",
        "usage": {"prompt_tokens": 28, "completion_tokens": 3, "total_tokens": 31},
        "prompt_token_ids": [ord(character) for character in "system:I am a test.\nuser:Hi\n"],
        "token_ids": [97, 98, 99],
    }


async def test_chat_streams_what_it_would_answer(client: httpx.AsyncClient) -> None:
    answer = await client.post("/chat", json=HELLO | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    parsed = [json.loads(event) for event in events]
    assert "".join(event["delta"]["content"] for event in parsed) == "abc"
    assert [event.get("finish_reason") for event in parsed] == [None, None, "length"]
    assert parsed[-1]["usage"] == {"prompt_tokens": 28, "completion_tokens": 3, "total_tokens": 31}


async def test_persona_stands_in_front_of_chats_that_bring_none(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    await client.post("/chat", json=HELLO)
    await client.post("/chat", json={"messages": [{"role": "system", "content": "I am yours."}, *HELLO["messages"]]})  # type: ignore[misc]
    assert backend.prompts == ["system:I am a test.\nuser:Hi\n", "system:I am yours.\nuser:Hi\n"]


async def test_sampling_is_passed_on_and_what_is_left_out_is_not_set(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    await client.post("/chat", json=HELLO | {"temperature": 0, "top_p": 0.5, "seed": 7, "stop": "x", "ignore_eos": True})
    await client.post("/chat", json={"messages": HELLO["messages"]})
    first, second = backend.samplings
    assert (first.temperature, first.top_p, first.seed, first.stop, first.ignore_eos) == (0, 0.5, 7, ("x",), True)
    assert (second.temperature, second.top_p, second.seed, second.stop, second.max_tokens) == (None, None, None, (), 200 - 28)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", "1"),
        (b"[]", "body"),
        (b"{}", "messages"),
        (b'{"messages": []}', "messages"),
        (b'{"messages": [{"role": "wizard", "content": "x"}]}', "messages.0.role"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', "max_tokens"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 3}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tempurature": 1}', "tempurature"),
    ],
)
async def test_wrong_requests_are_named(client: httpx.AsyncClient, body: bytes, param: str) -> None:
    answer = await client.post("/chat", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, 400)
    assert error["request_id"] == answer.headers["X-Request-ID"]


async def test_limits_say_the_limit_and_the_value_seen(client: httpx.AsyncClient) -> None:
    long = await client.post("/chat", json={"messages": [{"role": "user", "content": "x" * 300}]})
    assert (long.status_code, long.json()["error"]["message"]) == (400, "The prompt has 326 tokens; this model takes 199 at most.")
    many = await client.post("/chat", json=HELLO | {"max_tokens": 500})
    assert many.json()["error"]["message"] == "max_tokens is 500; a prompt of 28 tokens leaves 172 of 200."
    big = await client.post("/chat", content=b"x" * 2001)
    assert (big.status_code, big.json()["error"]["message"]) == (413, "The request body has 2001 bytes; 2000 are taken at most.")


async def test_a_body_without_a_length_is_limited_too(client: httpx.AsyncClient) -> None:
    async def chunks() -> Any:
        for _ in range(30):
            yield b"x" * 100

    answer = await client.post("/chat", content=chunks())
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        413,
        "The request body has more than 2000 bytes; 2000 are taken at most.",
    )


@pytest.mark.parametrize(("sent", "kept"), [("kin-42.a_B", True), ("", False), ("a b", False), ("x" * 129, False), ('"', False)])
async def test_a_sane_request_id_is_kept(client: httpx.AsyncClient, sent: str, kept: bool) -> None:
    answer = await client.get("/live", headers={"X-Request-ID": sent})
    assert (answer.headers["X-Request-ID"] == sent) is kept


async def test_a_full_queue_is_refused_with_the_time_to_come_back(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.delay = 0.2
    answers = await asyncio.gather(*(client.post("/chat", json=HELLO) for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 503, 503]
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.headers["Retry-After"] == "1"
    assert refused.json()["error"]["message"] == "This node has 3 requests, and takes 3."
    assert (await client.post("/chat", json=HELLO)).status_code == 200


async def test_a_dead_engine_is_neither_healthy_nor_ready(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    assert [(await client.get(path)).status_code for path in ("/live", "/ready", "/health")] == [200, 200, 200]
    backend.alive = False
    assert (await client.post("/chat", json=HELLO)).status_code == 503
    assert [(await client.get(path)).status_code for path in ("/live", "/ready", "/health")] == [200, 503, 503]


async def test_an_engine_that_dies_in_a_stream_is_said_in_the_stream(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.delay = 0.05
    task = asyncio.create_task(client.post("/chat", json=HELLO | {"max_tokens": 26, "stream": True}))
    await asyncio.sleep(0.3)
    backend.alive = False
    last = [line for line in (await task).text.splitlines() if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503


@pytest.mark.parametrize("stream", [True, False])
async def test_a_bug_is_said_to_its_client_and_hurts_no_other(client: httpx.AsyncClient, backend: FakeBackend, stream: bool) -> None:
    backend.broken = True
    answer = await client.post("/chat", json=HELLO | {"stream": stream})
    assert answer.status_code == (200 if stream else 500)
    error = json.loads([line for line in answer.text.splitlines() if line][-1].removeprefix("data: "))["error"]
    assert error == {
        "message": "The service failed; its log says how.",
        "type": "api_error",
        "code": 500,
        "param": None,
        "request_id": answer.headers["X-Request-ID"],
    }
    backend.broken = False
    assert (await client.post("/chat", json=HELLO)).status_code == 200


async def test_unknown_paths_and_methods_answer_in_the_same_shape(client: httpx.AsyncClient) -> None:
    for answer, status in ((await client.get("/nope"), 404), (await client.get("/chat"), 405)):
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == status


async def test_nothing_is_left_in_flight(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for body in (HELLO, HELLO | {"stream": True}, HELLO | {"max_tokens": 500}):
        await client.post("/chat", json=body)
    assert client.app.state.service.in_flight == 0  # type: ignore[attr-defined]


OPENAI = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}


async def test_openai_answers_whole(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json=OPENAI)
    body = answer.json()
    assert body.pop("id") == f"chatcmpl-{answer.headers['X-Request-ID']}"
    assert body.pop("created") > 0
    assert body == {
        "object": "chat.completion",
        "model": "fake",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "abc"}, "finish_reason": "length", "logprobs": None}],
        "usage": {"prompt_tokens": 28, "completion_tokens": 3, "total_tokens": 31},
    }


async def test_openai_streams_role_text_end_and_usage(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json=OPENAI | {"stream": True, "stream_options": {"include_usage": True}})
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": "b"},
        {"content": "c"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * 4 + ["length"]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["total_tokens"]) == ([], 31)


async def test_openai_without_usage_sends_none(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json=OPENAI | {"stream": True})
    assert "usage" not in answer.text


async def test_openai_forms_of_messages(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    body = {"messages": messages, "tools": tools, "max_completion_tokens": 2, "max_tokens": 9, "user": "ignored"}
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert backend.prompts == ["tool:add\nsystem:Be brief.\nuser:ab\nassistant:\ntool:4\n"]
    assert backend.samplings[0].max_tokens == 2


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "gpt"}, 404, "model"),
        ({"n": 2}, 400, "n"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, None),
    ],
)
async def test_openai_says_what_is_not_served(client: httpx.AsyncClient, change: dict[str, Any], status: int, param: str | None) -> None:
    answer = await client.post("/v1/chat/completions", json=OPENAI | change)
    assert answer.status_code == status
    if param:
        assert answer.json()["error"]["param"] == param


async def test_models_lists_the_one(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/models")).json()
    assert [(model["id"], model["object"], model["max_model_len"]) for model in body["data"]] == [("fake", "model", 200)]
