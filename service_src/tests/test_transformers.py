"""The transformers backend in this process: what no request over HTTP can show."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from qwen_coder_service import tiny_model
from qwen_coder_service.backends.base import BackendDead, Piece, Sampling
from qwen_coder_service.backends.transformers import TransformersBackend
from qwen_coder_service.settings import load

pytestmark = pytest.mark.engine

GREEDY = Sampling(max_tokens=24, temperature=0, ignore_eos=True)
LONG = Sampling(max_tokens=16000, temperature=0, ignore_eos=True)

Start = Callable[..., Coroutine[Any, Any, TransformersBackend]]


@pytest.fixture
async def start(model: Path) -> AsyncGenerator[Start]:
    """Start a backend; what was started ends with the test."""
    started = []

    async def launch(**settings: str) -> TransformersBackend:
        environment = {"QWEN_MODEL_PATH": str(model), "QWEN_BACKEND": "transformers", "QWEN_KV_CACHE_MEMORY_BYTES": str(32 << 20)}
        backend = TransformersBackend(load(environment | settings))
        await backend.start()
        started.append(backend)
        return backend

    yield launch
    for backend in started:
        await backend.stop()


@pytest.fixture
async def backend(start: Start) -> TransformersBackend:
    return await start()


def prompt(backend: TransformersBackend, text: str) -> list[int]:
    tokenizer: Any = backend.tokenizer
    ids: list[int] = tokenizer.encode(text)
    return ids


async def answer(backend: TransformersBackend, ids: list[int], sampling: Sampling = GREEDY) -> Piece:
    """A whole answer."""
    pieces = [piece async for piece in backend.generate("", ids, sampling, stream=False)]
    assert len(pieces) == 1
    return pieces[0]


async def begun(backend: TransformersBackend, sampling: Sampling = LONG) -> tuple[AsyncGenerator[Piece], asyncio.Task[list[Piece]]]:
    """A stream of which the first piece was read, and a task that reads the rest."""
    stream = backend.generate("", prompt(backend, "Hi"), sampling, stream=True)
    await anext(stream)

    async def rest() -> list[Piece]:
        return [piece async for piece in stream]

    return stream, asyncio.create_task(rest())


def reference(path: Path, prompts: list[list[int]], **config: Any) -> list[list[int]]:
    """What transformers alone answers, greedy."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    changed = AutoConfig.from_pretrained(path)
    changed.update(config)
    network = AutoModelForCausalLM.from_pretrained(path, config=changed)
    options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "eos_token_id": -1}
    return [network.generate(torch.tensor([ids]), max_new_tokens=24, **options)[0, len(ids) :].tolist() for ids in prompts]


async def test_long_prompts_are_read_in_parts_and_answers_go_on_meanwhile(start: Start, model: Path) -> None:
    backend = await start(max_batch_tokens="512")
    prompts = [prompt(backend, text) for text in ("a", "def f(x): " * 300, "b " * 700, "c")]
    assert len(prompts[1]) > 1500
    answers = await asyncio.gather(*(answer(backend, ids) for ids in prompts))
    assert [piece.token_ids for piece in answers] == reference(model, prompts)


async def test_who_came_last_gives_way_when_memory_is_short_and_is_answered_all_the_same(start: Start, model: Path) -> None:
    # a token takes a KiB: 2048 tokens
    backend = await start(QWEN_KV_CACHE_MEMORY_BYTES=str(2 << 20), VLLM_MAX_MODEL_LEN="2048")
    prompts = [prompt(backend, letter * 2) + prompt(backend, "x y " * 110) for letter in "abcdef"]
    left = []
    leave = backend._leave
    backend._leave = lambda request: (left.append(request.finish_reason), leave(request))[1]  # type: ignore[method-assign]
    sampling = Sampling(max_tokens=400, temperature=0, ignore_eos=True)
    answers = await asyncio.gather(*(answer(backend, ids, sampling) for ids in prompts))
    assert None in left
    assert [piece.token_ids[:24] for piece in answers] == reference(model, prompts)
    alone = [await answer(backend, ids, sampling) for ids in prompts]
    assert answers == alone


async def test_more_memory_than_there_is_is_refused(start: Start) -> None:
    with pytest.raises(ValueError, match=r"^VLLM_MAX_MODEL_LEN is 4096; set it to 2048 at most"):
        await start(QWEN_KV_CACHE_MEMORY_BYTES=str(2 << 20), VLLM_MAX_MODEL_LEN="4096")


async def test_more_gpus_than_there_are_are_refused(start: Start) -> None:
    with pytest.raises(ValueError, match=r"^VLLM_TENSOR_PARALLEL_SIZE is 4 on a machine with \d GPUs; set it to"):
        await start(VLLM_TENSOR_PARALLEL_SIZE="4")


async def test_beyond_the_native_length_it_is_yarn(start: Start, tmp_path: Path) -> None:
    assert tiny_model.main([str(tmp_path / "short"), "--max-position", "512"]) == 0
    backend = await start(QWEN_MODEL_PATH=str(tmp_path / "short"), VLLM_MAX_MODEL_LEN="2048")
    ids = prompt(backend, "x y " * 400)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1000000.0}
    expected = reference(tmp_path / "short", [ids], max_position_embeddings=2048, rope_parameters=rope)
    assert [(await answer(backend, ids)).token_ids] == expected
    assert expected != reference(tmp_path / "short", [ids])


async def test_a_prompt_without_room_is_refused(backend: TransformersBackend) -> None:
    with pytest.raises(ValueError, match="leaves no room"):
        await answer(backend, [1] * backend.max_model_len)
    last = await answer(backend, [1] * (backend.max_model_len - 2), Sampling(max_tokens=9, ignore_eos=True))
    assert (len(last.token_ids), last.finish_reason) == (2, "length")


async def test_progress_and_ping_follow_the_thread(backend: TransformersBackend) -> None:
    await asyncio.wait_for(backend.ping(), 1)
    before = backend.progress
    stream, rest = await begun(backend)
    await asyncio.wait_for(backend.ping(), 5)
    assert backend.progress > before
    assert backend.unfinished == 1
    rest.cancel()
    await asyncio.wait({rest})
    await stream.aclose()
    assert backend.unfinished == 0
    # nothing is done for nobody
    await backend.ping()
    before = backend.progress
    await asyncio.sleep(0.1)
    assert backend.progress == before


async def test_abort_ends_what_runs_and_nothing_else(backend: TransformersBackend) -> None:
    _, rest = await begun(backend)
    whole = asyncio.create_task(answer(backend, prompt(backend, "Hi"), LONG))
    await asyncio.sleep(0.05)
    await backend.abort_all()
    pieces, piece = await asyncio.wait_for(asyncio.gather(rest, whole), 5)
    assert pieces[-1].finish_reason == piece.finish_reason == "abort"
    assert (await answer(backend, prompt(backend, "Hi"))).finish_reason == "length"
    await backend.check()


@pytest.fixture
async def stuck(backend: TransformersBackend) -> AsyncGenerator[TransformersBackend]:
    """A backend whose thread hangs in a step from its tenth on."""
    step, release, hangs, count = backend._network.step, threading.Event(), threading.Event(), 0

    def hang(parts: list[Any]) -> list[Any]:
        nonlocal count
        count += 1
        if count == 10:
            hangs.set()
            release.wait(30)
        return step(parts)

    backend._network.step = hang  # type: ignore[method-assign]
    backend.hangs = hangs  # type: ignore[attr-defined]
    yield backend
    release.set()


async def test_killed_while_its_thread_hangs_everybody_hears_of_it_at_once(stuck: TransformersBackend) -> None:
    _, rest = await begun(stuck)
    await asyncio.to_thread(stuck.hangs.wait, 10)  # type: ignore[attr-defined]
    whole = asyncio.create_task(answer(stuck, prompt(stuck, "Hi")))
    ping = asyncio.create_task(stuck.ping())
    await asyncio.sleep(0.2)
    assert not ping.done()
    await stuck.check()
    began = time.monotonic()
    stuck.kill()
    for task in (rest, whole, ping):
        with pytest.raises(BackendDead):
            await asyncio.wait_for(task, 5)
    assert time.monotonic() - began < 0.5
    for late in (stuck.check(), stuck.ping(), answer(stuck, [1])):
        with pytest.raises(BackendDead):
            await late


async def test_aborted_while_its_thread_hangs_everybody_hears_of_it_at_once(stuck: TransformersBackend) -> None:
    _, rest = await begun(stuck)
    await asyncio.to_thread(stuck.hangs.wait, 10)  # type: ignore[attr-defined]
    await stuck.abort_all()
    assert (await asyncio.wait_for(rest, 1))[-1].finish_reason == "abort"


async def test_an_error_in_the_thread_is_the_end(backend: TransformersBackend) -> None:
    _, rest = await begun(backend)

    def fail(parts: list[Any]) -> list[Any]:
        raise RuntimeError("out of something")

    backend._network.step = fail  # type: ignore[method-assign]
    with pytest.raises(BackendDead, match="out of something"):
        await asyncio.wait_for(rest, 5)
    with pytest.raises(BackendDead, match="out of something"):
        await backend.check()


async def test_a_slow_reader_holds_nobody_up_and_gets_larger_pieces(backend: TransformersBackend) -> None:
    sampling = Sampling(max_tokens=200, temperature=0, ignore_eos=True)
    ids = prompt(backend, "Hi")
    stream = backend.generate("", ids, sampling, stream=True)
    first = await anext(stream)
    fast = await asyncio.wait_for(answer(backend, ids, sampling), 10)
    await asyncio.sleep(0.2)
    rest = [piece async for piece in stream]
    assert len(rest) <= 2
    assert [*first.token_ids, *(token for piece in rest for token in piece.token_ids)] == fast.token_ids
    assert first.text + "".join(piece.text for piece in rest) == fast.text


def chances(drawing: dict[str, float], logits: Any, ids: list[int]) -> Any:
    """The distribution that the transformers library draws from."""
    import torch
    from transformers import generation

    scores = generation.RepetitionPenaltyLogitsProcessor(drawing["repetition_penalty"])(torch.tensor([ids]), logits.clone())
    scores = generation.TemperatureLogitsWarper(drawing["temperature"])(None, scores)
    if "top_k" in drawing:
        scores = generation.TopKLogitsWarper(int(drawing["top_k"]))(None, scores)
    if "top_p" in drawing:
        scores = generation.TopPLogitsWarper(drawing["top_p"])(None, scores)
    if "min_p" in drawing:
        scores = generation.MinPLogitsWarper(drawing["min_p"])(None, scores)
    return scores.softmax(-1)[0]


def test_tokens_are_drawn_as_transformers_draws_them_each_row_in_its_own_way() -> None:
    import torch

    from qwen_coder_service.backends.packed import Drawing, draw

    torch.manual_seed(3)
    logits, draws = torch.randn(1, 40) * 2, 4000
    ids = [*logits[0].topk(3).indices.tolist(), *logits[0].topk(3, largest=False).indices.tolist()]
    ways: list[dict[str, float]] = [
        {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.3},
        {"temperature": 1.5, "repetition_penalty": 1.0},
        {"temperature": 1.0, "top_p": 0.5, "repetition_penalty": 1.05},
        {"temperature": 1.0, "min_p": 0.2, "repetition_penalty": 1.05},
    ]
    drawings = [Drawing(**way) for way in ways for _ in range(draws)]  # type: ignore[arg-type]
    seen = torch.zeros(1, 40, dtype=torch.bool)
    seen[0, ids] = True
    source = random.Random(0)
    rows = len(drawings)
    tokens = draw(logits.expand(rows, -1), seen.expand(rows, -1), drawings, [source] * rows)
    for index, way in enumerate(ways):
        found = torch.bincount(tokens[index * draws : (index + 1) * draws], minlength=40) / draws
        expected = chances(way, logits, ids)
        assert not found[expected == 0].any()
        assert (found - expected).abs().max() < 0.03
