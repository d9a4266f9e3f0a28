"""The service with an engine that gives each answer a token every so many milliseconds, whatever else there is to do.

What the chain costs cannot be seen beside an engine that needs the chain's processors, or that lets most requests wait for others: it is in
the service's place for a part of a benchmark (playbooks/benchmark.yml, docs/benchmark/README.md). gunicorn loads ``benchmark_paced:app``;
``BENCHMARK_FIRST_MS`` is the time to the first token, and a request's ``seed`` the milliseconds between two.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Mapping

import transformers

from qwen_coder_service import logs
from qwen_coder_service.app import create_app
from qwen_coder_service.backends.base import Piece, Sampling
from qwen_coder_service.settings import Settings, load


class Paced:
    """An engine by the clock: each answer has a clock of its own, which begins when the request comes.

    Args:
        settings: those of the service; the tokenizer is the model's.
        first_s: seconds to the first token.
    """

    def __init__(self, settings: Settings, first_s: float) -> None:
        self._first_s = first_s
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model_path)
        self.max_model_len = settings.max_model_len or 32768
        self.progress = time.monotonic()
        self.unfinished = 0

    async def start(self) -> None:
        """Nothing to load."""

    async def stop(self) -> None:
        """Nothing to free."""

    async def check(self) -> None:
        """It lives."""

    async def ping(self) -> None:
        """It has no loop of its own."""

    def kill(self) -> None:
        """Nothing to end."""

    async def abort_all(self) -> None:
        """Answers end with their clients."""

    async def generate(
        self, request_id: str, prompt: list[int], sampling: Sampling, *, stream: bool, trace: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Piece]:
        """So many times the same word, one by one."""
        at, between_s = time.monotonic() + self._first_s, (sampling.seed or 0) / 1000
        self.unfinished += 1
        try:
            for index in range(sampling.max_tokens):
                await asyncio.sleep(at - time.monotonic())
                at += between_s
                self.progress = time.monotonic()
                yield Piece(" word", [0], "length" if index == sampling.max_tokens - 1 else None)
        finally:
            self.unfinished -= 1


logs.configure()
_settings = load(os.environ)
app = create_app(_settings, Paced(_settings, float(os.environ["BENCHMARK_FIRST_MS"]) / 1000))
