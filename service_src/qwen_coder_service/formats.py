"""How answers look on the wire: /chat's own form, and the OpenAI API's."""

from __future__ import annotations

import json
import time
from json.encoder import encode_basestring  # a text as JSON, by C code alone
from typing import Any, Protocol

from .backends.base import Piece

DONE = b"data: [DONE]\n\n"


def sse(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Tokens that a request took."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens}


class Format(Protocol):
    """The wire form of one answer. ``prompt``, the token ids that the engine gets, is set before the first piece."""

    prompt: list[int]

    def whole(self, piece: Piece) -> dict[str, Any]:
        """An answer that is not streamed."""

    def begin(self) -> bytes:
        """What a stream begins with, sent together with the first piece."""

    def part(self, piece: Piece, tokens: int) -> bytes:
        """A piece of a stream; ``tokens`` are all so far. The last piece, which has a finish_reason, ends the stream."""


class ChatFormat:
    """/chat."""

    def __init__(self, request_id: str, model: str, token_ids: bool) -> None:
        self.request_id, self.model, self.token_ids = request_id, model, token_ids
        self.prompt: list[int] = []

    def whole(self, piece: Piece) -> dict[str, Any]:
        """An answer that is not streamed."""
        return {
            "id": self.request_id,
            "model": self.model,
            "message": {"role": "assistant", "content": piece.text},
            "finish_reason": piece.finish_reason,
            "usage": usage(len(self.prompt), len(piece.token_ids)),
            **({"prompt_token_ids": self.prompt, "token_ids": piece.token_ids} if self.token_ids else {}),
        }

    def begin(self) -> bytes:
        """Nothing: every event stands for itself."""
        return b""

    def part(self, piece: Piece, tokens: int) -> bytes:
        """A piece of a stream."""
        event: dict[str, Any] = {"id": self.request_id, "delta": {"content": piece.text}}
        if self.token_ids:
            event["token_ids"] = piece.token_ids
        if piece.finish_reason is None:
            return sse(event)
        event |= {"model": self.model, "finish_reason": piece.finish_reason, "usage": usage(len(self.prompt), tokens)}
        return sse(event) + DONE


class OpenAIFormat:
    """/v1/chat/completions."""

    def __init__(self, request_id: str, model: str, include_usage: bool) -> None:
        self.include_usage = include_usage
        self.prompt: list[int] = []
        self.head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": model}
        # all pieces but the last differ in their text only
        self.before, self.after = (half.encode() for half in self._chunk({"content": ""}).decode().rsplit('""', 1))

    def whole(self, piece: Piece) -> dict[str, Any]:
        """An answer that is not streamed."""
        message = {"role": "assistant", "content": piece.text}
        return {
            **self.head,
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "finish_reason": piece.finish_reason, "logprobs": None}],
            "usage": usage(len(self.prompt), len(piece.token_ids)),
        }

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return sse({**self.head, "object": "chat.completion.chunk", "choices": [choice]})

    def begin(self) -> bytes:
        """The role, before any text."""
        return self._chunk({"role": "assistant", "content": ""})

    def part(self, piece: Piece, tokens: int) -> bytes:
        """A piece of a stream."""
        text = b""
        if piece.text or piece.finish_reason is None:
            text = self.before + encode_basestring(piece.text).encode() + self.after
        if piece.finish_reason is None:
            return text
        text += self._chunk({}, piece.finish_reason)
        if self.include_usage:
            text += sse({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage(len(self.prompt), tokens)})
        return text + DONE
