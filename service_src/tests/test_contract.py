"""What every backend must do the same, asked of the real service over HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import MAX_MODEL_LEN, Running

pytestmark = pytest.mark.engine

QUESTIONS = ["def add(a, b):", "Write a function that returns the sum of two numbers.", "Grüße, 世界 🚀", "x" * 500, "Thanks"]
PERSONA = "I am Qwen-Coder, a careful coding companion."
SEQUENCES = 32  # what the service was started for (max_num_seqs)
TOP_K = 20  # what the model's generation_config says


@pytest.fixture(scope="session", params=["vllm", "transformers"])
def backend(request: pytest.FixtureRequest, start: Callable[..., Running]) -> Running:
    """The real service, once with each engine."""
    if request.param == "vllm":
        running: Running = request.getfixturevalue("service")
        return running
    return start(QWEN_BACKEND=request.param)


class Reference:
    """What transformers alone answers, with the persona in front."""

    def __init__(self, model: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.ends = set(self.network.generation_config.eos_token_id)
        self.greedy = {question: self.answer(question) for question in QUESTIONS}

    def prompt(self, question: str) -> Any:
        messages = [{"role": "system", "content": PERSONA}, {"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def answer(self, question: str, **options: Any) -> list[int]:
        prompt = self.prompt(question)
        options = {"max_new_tokens": 48, "do_sample": False, "temperature": None, "top_p": None, "top_k": None, **options}
        ids: list[int] = self.network.generate(**prompt, **options)[0, prompt["input_ids"].shape[1] :].tolist()
        return ids

    def text(self, ids: list[int]) -> str:
        """The text of an answer; a character that its end cuts in two is left out."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.rstrip("\ufffd")


@pytest.fixture(scope="session")
def reference(model: Path) -> Reference:
    return Reference(model)


@dataclass
class Answer:
    """An answer, whole or put together from its events."""

    text: str
    ids: list[int]
    finish_reason: str
    usage: dict[str, int]
    pieces: list[str]


def question(content: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 48, "return_token_ids": True, **more}


async def whole(client: httpx.AsyncClient, body: dict[str, object]) -> Answer:
    answer = (await client.post("/chat", json=body)).json()
    text = answer["message"]["content"]
    return Answer(text, answer["token_ids"], answer["finish_reason"], answer["usage"], [text])


async def streamed(client: httpx.AsyncClient, body: dict[str, object]) -> Answer:
    async with client.stream("POST", "/chat", json=body | {"stream": True}) as answer:
        events = [json.loads(line.removeprefix("data: ")) async for line in answer.aiter_lines() if line.startswith("data: {")]
    pieces = [event["delta"]["content"] for event in events]
    ids = [token for event in events for token in event["token_ids"]]
    return Answer("".join(pieces), ids, events[-1]["finish_reason"], events[-1]["usage"], pieces)


Ask = Callable[[httpx.AsyncClient, dict[str, object]], Coroutine[Any, Any, Answer]]
both_ways = pytest.mark.parametrize("ask", [whole, streamed])


@pytest.fixture
async def client(backend: Running) -> Any:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=backend.url, timeout=60, limits=limits) as client:
        yield client


@both_ways
async def test_greedy_answers_are_the_librarys_token_for_token(client: httpx.AsyncClient, reference: Reference, ask: Ask) -> None:
    for content, ids in reference.greedy.items():
        answer = await ask(client, question(content, temperature=0))
        assert answer.ids == ids
        assert answer.text == reference.text(ids)
        assert answer.finish_reason == ("stop" if ids[-1] in reference.ends else "length")
        prompt = reference.prompt(content)["input_ids"].shape[1]
        assert answer.usage == {"prompt_tokens": prompt, "completion_tokens": len(ids), "total_tokens": prompt + len(ids)}
    # some end by themselves, and the penalty of the model's generation_config counts
    assert {ids[-1] in reference.ends for ids in reference.greedy.values()} == {True, False}
    assert reference.answer(QUESTIONS[1], repetition_penalty=1.0) != reference.greedy[QUESTIONS[1]]


async def test_and_so_do_answers_beside_each_other(client: httpx.AsyncClient, reference: Reference) -> None:
    asked = [(ask, content) for content in QUESTIONS for ask in (whole, streamed) * 2]
    answers = await asyncio.gather(*(ask(client, question(content, temperature=0)) for ask, content in asked))
    assert [answer.ids for answer in answers] == [reference.greedy[content] for _, content in asked]
    assert [answer.text for answer in answers] == [reference.text(reference.greedy[content]) for _, content in asked]


@both_ways
async def test_ignore_eos_goes_on_to_max_tokens(client: httpx.AsyncClient, reference: Reference, ask: Ask) -> None:
    content = next(content for content, ids in reference.greedy.items() if ids[-1] in reference.ends)
    answer = await ask(client, question(content, temperature=0, ignore_eos=True, max_tokens=60))
    assert answer.ids == reference.answer(content, eos_token_id=-1, max_new_tokens=60)
    assert (answer.finish_reason, answer.usage["completion_tokens"]) == ("length", 60)


@both_ways
async def test_max_tokens(client: httpx.AsyncClient, reference: Reference, ask: Ask) -> None:
    answer = await ask(client, question(QUESTIONS[1], temperature=0, max_tokens=7))
    assert (answer.ids, answer.finish_reason) == (reference.greedy[QUESTIONS[1]][:7], "length")


@both_ways
async def test_a_stop_string_ends_an_answer_and_is_cut(client: httpx.AsyncClient, reference: Reference, ask: Ask) -> None:
    ids, decode = reference.greedy[QUESTIONS[1]], reference.tokenizer.decode
    # the end of one token and the whole of the next: nothing of it may be sent before it is known
    for at in range(8, 40):
        first, second = decode(ids[at]), decode(ids[at + 1])
        before, stop = decode(ids[:at]) + first[:-1], first[-1] + second
        if re.fullmatch("[ -~]{2,}", stop) and decode(ids).index(stop) == len(before):
            break
    else:
        pytest.fail("the answer has no such place")
    answer = await ask(client, question(QUESTIONS[1], temperature=0, stop=["never", stop]))
    assert (answer.text, answer.ids, answer.finish_reason) == (before, ids[: at + 2], "stop")


@both_ways
async def test_the_beginning_of_a_stop_string_is_sent_at_the_end(client: httpx.AsyncClient, reference: Reference, ask: Ask) -> None:
    ids = reference.greedy[QUESTIONS[1]]
    text = reference.text(ids)
    answer = await ask(client, question(QUESTIONS[1], temperature=0, stop=[text[-3:] + "never"]))
    assert (answer.text, answer.ids, answer.finish_reason) == (text, ids, "length")


async def test_a_seed_repeats_an_answer_and_another_does_not(client: httpx.AsyncClient) -> None:
    body = question(QUESTIONS[1], temperature=1)
    first, other = await whole(client, body | {"seed": 7}), await whole(client, body | {"seed": 8})
    again = await asyncio.gather(*(ask(client, body | {"seed": seed}) for seed in (1, 7, 2, 7) for ask in (whole, streamed)))
    assert [answer.ids for answer in again[2:4] + again[6:8]] == [first.ids] * 4
    assert other.ids != first.ids
    free = await asyncio.gather(*(whole(client, body) for _ in range(3)))
    assert len({tuple(answer.ids) for answer in free}) > 1


async def test_a_tiny_top_p_leaves_the_best_token(client: httpx.AsyncClient, reference: Reference) -> None:
    answer = await whole(client, question(QUESTIONS[1], temperature=1, top_p=1e-6))
    assert answer.ids == reference.greedy[QUESTIONS[1]]


async def test_what_is_left_out_follows_the_models_generation_config(client: httpx.AsyncClient, reference: Reference) -> None:
    silent = await whole(client, question(QUESTIONS[1], seed=3))
    assert silent.ids == (await whole(client, question(QUESTIONS[1], seed=3, temperature=0.7, top_p=0.8))).ids
    assert silent.ids != (await whole(client, question(QUESTIONS[1], seed=3, temperature=1.2, top_p=0.8))).ids
    assert silent.ids != (await whole(client, question(QUESTIONS[1], seed=3, temperature=0.7, top_p=1))).ids
    # nobody can ask for another top_k
    prompt = reference.prompt(QUESTIONS[1])
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    outcome = reference.network.generate(**prompt, **greedy, max_new_tokens=1, output_scores=True, return_dict_in_generate=True)
    likely = set(outcome.scores[0][0].topk(TOP_K).indices.tolist())
    wild = question(QUESTIONS[1], temperature=2, top_p=1, max_tokens=1)
    answers = await asyncio.gather(*(whole(client, wild | {"seed": seed}) for seed in range(100)))
    drawn = {answer.ids[0] for answer in answers}
    assert drawn <= likely
    assert len(drawn) > TOP_K // 2


async def test_streams_of_any_bytes_are_the_whole_text(client: httpx.AsyncClient, reference: Reference) -> None:
    bodies = [question("Grüße 🚀", temperature=2, top_p=1, seed=seed, max_tokens=64) for seed in range(12)]
    wholes = await asyncio.gather(*(whole(client, body) for body in bodies))
    streams = await asyncio.gather(*(streamed(client, body) for body in bodies))
    assert [answer.ids for answer in streams] == [answer.ids for answer in wholes]
    assert [answer.text for answer in streams] == [answer.text for answer in wholes]
    assert [answer.text for answer in wholes] == [reference.text(answer.ids) for answer in wholes]
    assert any(len(character.encode()) > 1 for answer in wholes for character in answer.text)
    # a character is sent when it is whole: none ends as something else
    assert not any(piece.endswith("\ufffd") for answer in streams for piece in answer.pieces)


def metric(backend: Running, name: str, label: str = "") -> float:
    """The sum over all series of a name that have the label."""
    series = re.findall(rf"^{name}({{[^}}]*}})? (\S+)$", httpx.get(backend.metrics).text, re.MULTILINE)
    return sum(float(value) for labels, value in series if label in labels)


@pytest.mark.parametrize("streaming", [True, False])
async def test_clients_that_vanish_take_their_requests_with_them(client: httpx.AsyncClient, backend: Running, streaming: bool) -> None:
    aborted = metric(backend, "qwen_requests_total", 'outcome="aborted"')
    begun = asyncio.Semaphore(0)

    async def hold() -> None:
        # minutes of work, unless it is ended
        async with client.stream("POST", "/chat", json=question("Hi", max_tokens=16000, ignore_eos=True, stream=streaming)) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            begun.release()
            await asyncio.sleep(60)

    held = [asyncio.create_task(hold()) for _ in range(SEQUENCES)]
    if streaming:
        for _ in held:
            await asyncio.wait_for(begun.acquire(), 20)
    deadline = time.monotonic() + 20
    while metric(backend, "qwen_requests_in_flight") < SEQUENCES:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.3)
    # the engine is full now: who comes waits until somebody goes
    late = asyncio.create_task(whole(client, question("Hi", max_tokens=1)))
    await asyncio.sleep(0.3)
    assert not late.done()
    for task in held:
        task.cancel()
    await asyncio.wait(held)
    await asyncio.wait_for(late, 1)
    while metric(backend, "qwen_requests_in_flight"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    assert metric(backend, "qwen_requests_total", 'outcome="aborted"') == aborted + SEQUENCES


async def test_a_prompt_without_room_is_refused(client: httpx.AsyncClient) -> None:
    long = await client.post("/chat", json=question("🚀" * MAX_MODEL_LEN))
    assert long.status_code == 400
    assert re.search(rf"The prompt has \d+ tokens; this model takes {MAX_MODEL_LEN - 1} at most", long.json()["error"]["message"])
    much = await client.post("/chat", json=question("Hi", max_tokens=MAX_MODEL_LEN))
    assert re.search(rf"leaves \d+ of {MAX_MODEL_LEN}", much.json()["error"]["message"])
