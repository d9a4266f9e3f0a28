"""What the service asks of an engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ..persona import Tokenizer


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn; None leaves a value to the model's generation_config."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(slots=True)
class Piece:
    """A part of an answer: what is new since the last one. ``finish_reason`` is set on the last."""

    text: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class BackendDead(Exception):
    """The engine is gone and does not come back within this process."""


class Backend(Protocol):
    """An engine with one model. Only ``generate`` is called concurrently."""

    tokenizer: Tokenizer
    max_model_len: int
    progress: float
    """``time.monotonic()`` of the last sign that the engine did work for some request (a token, a part of a prompt)."""

    @property
    def unfinished(self) -> int:
        """Requests that the engine still has to work for; those whose client only reads slowly are none."""

    async def start(self) -> None:
        """Load the model; returns when prompts can be taken."""

    async def stop(self) -> None:
        """Free everything; what still runs is aborted."""

    async def check(self) -> None:
        """Look whether the engine lives.

        Raises:
            BackendDead: it does not.
        """

    async def ping(self) -> None:
        """Go once through the engine's own loop. It takes as long as that loop needs for a turn, and for ever if it hangs."""

    def kill(self) -> None:
        """End the engine at once, whatever it does: every running ``generate`` then raises BackendDead."""

    async def abort_all(self) -> None:
        """Give up what runs: every running ``generate`` ends with a piece whose finish_reason is ``abort``."""

    def generate(
        self, request_id: str, prompt: list[int], sampling: Sampling, *, stream: bool, trace: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Piece]:
        """Answer a prompt: piece by piece, or in a single one. Closing the iterator early aborts the request in the engine.

        Args:
            request_id: the engine's name for the request; unique among those that run.
            prompt: token ids.
            sampling: how the answer is drawn.
            stream: yield what is new as it is made; else one piece, at the end.
            trace: W3C trace context of the request (``traceparent``), for engines that trace.

        Raises:
            BackendDead: the engine died meanwhile.
        """
