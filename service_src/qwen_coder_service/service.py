"""What stands between routes and engine: who is admitted, how a question becomes a prompt, what becomes of those who wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import jinja2

from . import metrics, persona
from .backends.base import Backend, BackendDead, Piece, Sampling
from .errors import ApiError, broken, invalid, unavailable
from .formats import Format, sse
from .lifecycle import EX_SOFTWARE, End, Ends, State, sd_notify
from .schemas import Sampled
from .settings import Settings

log = logging.getLogger("qwen_coder_service")

# prompts up to this many characters are rendered in the loop; for longer ones a thread costs less than the wait of everybody else
_RENDER_INLINE_CHARACTERS = 16_384
# seconds that requests get to end after their engine is gone or told to stop
_LAST_WORDS_S = 5.0


@dataclass(slots=True)
class Question:
    """What a client asks, whichever API it speaks."""

    conversation: list[persona.Turn]
    sampled: Sampled
    max_tokens: int | None
    tools: list[dict[str, Any]] | None = None


class Service:
    """The state that routes share.

    Args:
        settings: what it runs with.
        backend: the engine.
        leave: ends the process with a status.
    """

    def __init__(self, settings: Settings, backend: Backend, leave: Callable[[int], object]) -> None:
        self.settings, self.backend, self._leave = settings, backend, leave
        self.state = State.STARTING
        self.since = int(time.time())
        self.in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.ends = Ends(settings.cache_dir)
        self._ending: asyncio.Task[None] | None = None
        for reason, count in self.ends.counts.items():
            metrics.ENDS.labels(reason).inc(count)

    def set_state(self, state: State) -> None:
        """Move on in the service's life, and let the metrics say so."""
        self.state = state
        metrics.READY.set(state is State.READY)

    async def warm_up(self) -> None:
        """Answer one prompt for real; only then is the service ready."""
        prompt = persona.render(self.backend.tokenizer, [{"role": "user", "content": "Hello"}], self.settings.persona_prompt)
        async for _ in self.backend.generate("warm-up", prompt, Sampling(max_tokens=1), stream=False):
            pass

    def admit(self) -> None:
        """Take one more request, or say why not.

        Raises:
            ApiError: 503; the service is not ready, is stopping, or has as many requests as it may.
        """
        if self.state is not State.READY:
            metrics.REFUSALS.labels(self.state.value).inc()
            raise unavailable(f"This node is {self.state.value}.", retry_after=5)
        limit = self.settings.max_num_seqs + self.settings.max_queued_requests
        if self.in_flight >= limit:
            metrics.REFUSALS.labels("full").inc()
            raise unavailable(f"This node has {self.in_flight} requests, and takes {limit}.", retry_after=1)
        self.in_flight += 1
        self.idle.clear()
        metrics.IN_FLIGHT.set(self.in_flight)

    def release(self) -> None:
        """A request that was admitted is over."""
        self.in_flight -= 1
        if not self.in_flight:
            self.idle.set()
        metrics.IN_FLIGHT.set(self.in_flight)

    async def prompt(self, question: Question) -> list[int]:
        """Token ids of a question's prompt.

        Raises:
            ApiError: 400; the template cannot render it, or it leaves no room for an answer, or less than was asked for.
        """
        arguments = (self.backend.tokenizer, question.conversation, self.settings.persona_prompt, question.tools)
        try:
            if sum(len(turn["content"]) for turn in question.conversation) > _RENDER_INLINE_CHARACTERS:
                ids = await asyncio.to_thread(persona.render, *arguments)
            else:
                ids = persona.render(*arguments)
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise invalid(f"The model's chat template cannot render this conversation: {error}.", param="messages") from error
        room = self.backend.max_model_len - len(ids)
        if room < 1:
            raise invalid(f"The prompt has {len(ids)} tokens; this model takes {self.backend.max_model_len - 1} at most.", param="messages")
        if question.max_tokens is not None and question.max_tokens > room:
            raise invalid(
                f"max_tokens is {question.max_tokens}; a prompt of {len(ids)} tokens leaves {room} of {self.backend.max_model_len}.",
                param="max_tokens",
            )
        return ids

    def sampling(self, question: Question, prompt: list[int]) -> Sampling:
        """How the answer is drawn."""
        asked = question.sampled
        return Sampling(
            max_tokens=question.max_tokens or self.backend.max_model_len - len(prompt),
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=asked.seed,
            stop=(asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ()),
            ignore_eos=asked.ignore_eos,
        )

    async def whole(self, form: Format, pieces: AsyncGenerator[Piece], scope: MutableMapping[str, Any]) -> dict[str, Any]:
        """An answer in one piece.

        Raises:
            ApiError: 503; the engine died, or the service stops and could not wait longer.
        """
        last = Piece("")
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    last = piece
        except BackendDead as error:
            scope["outcome"] = "dead"
            raise self.dead(error) from error
        if last.finish_reason == "abort":
            scope["outcome"] = "cut"
            raise _cut()
        scope["details"]["completion_tokens"] = len(last.token_ids)
        return form.whole(last)

    async def events(self, form: Format, pieces: AsyncGenerator[Piece], scope: MutableMapping[str, Any]) -> AsyncGenerator[bytes]:
        """The events of a streamed answer; whatever ends it, ``scope`` says how, and the engine is told."""
        tokens, head = 0, form.begin()
        scope["outcome"] = "aborted"
        try:
            async for piece in pieces:
                tokens += len(piece.token_ids)
                if piece.finish_reason == "abort":
                    scope["outcome"] = "cut"
                    yield head + sse(_cut().body(scope["request_id"]))
                    return
                if piece.finish_reason is not None:
                    scope["outcome"] = "ok"
                yield head + form.part(piece, tokens)
                head = b""
        except BackendDead as error:
            scope["outcome"] = "dead"
            yield sse(self.dead(error).body(scope["request_id"]))
        except Exception:  # whatever it is, the client is told; the status has left long ago
            log.exception("request %s failed", scope["request_id"])
            scope["outcome"] = "error"
            yield sse(broken().body(scope["request_id"]))
        finally:
            scope["details"]["completion_tokens"] = tokens
            with contextlib.suppress(BackendDead):
                await pieces.aclose()

    def dead(self, error: BackendDead) -> ApiError:
        """The engine is gone: what its client is told."""
        self.ended(End.DIED, str(error))
        return unavailable("The engine of this node died.", retry_after=30)

    def ended(self, end: End, seen: str) -> None:
        """The engine died or stalled: nothing more is taken, those who wait are told, and the process ends to be started anew."""
        if self._ending is not None:
            return
        log.error("engine %s: %s", end.value, seen)
        self.set_state(State.DEAD)
        self.ends.add(end)
        metrics.ENDS.labels(end.value).inc()
        sd_notify(f"STATUS=engine {end.value}: {seen}")
        if end is End.STALLED:
            self.backend.kill()
        self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.idle.wait(), _LAST_WORDS_S)
        await asyncio.sleep(0.2)  # what was said leaves the process
        self._leave(EX_SOFTWARE)

    async def drain(self) -> None:
        """Take nothing more, and return when what runs has ended, or was cut after ``QWEN_DRAIN_TIMEOUT_S``."""
        if self.state is State.DEAD:
            return
        self.set_state(State.DRAINING)
        sd_notify("STOPPING=1\nSTATUS=draining")
        try:
            await asyncio.wait_for(self.idle.wait(), self.settings.drain_timeout_s)
        except TimeoutError:
            log.warning("%d requests did not end within %d s and are cut", self.in_flight, self.settings.drain_timeout_s)
            await self.backend.abort_all()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.idle.wait(), _LAST_WORDS_S)


def _cut() -> ApiError:
    return unavailable("This node stops, and could not wait for the end of this answer.", retry_after=5)
