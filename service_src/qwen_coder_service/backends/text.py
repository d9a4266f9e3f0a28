"""Tokens become text as they are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Text:
    """The text of one answer: characters that span tokens come whole, and no stop string is let out, not even its beginning.

    What vLLM does: a character that the answer's end cut in two is left out.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        """Begin an answer.

        Args:
            tokenizer: of the tokenizers library; not one that another thread encodes with.
            stop: strings that end the answer and are no part of it.
        """
        self._tokenizer = tokenizer
        self._stop = [string for string in stop if string]
        self._longest = max(map(len, self._stop), default=1)
        self._decoder = self._fresh()
        self._text = ""

    @staticmethod
    def _fresh() -> Any:
        from tokenizers.decoders import DecodeStream

        return DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> bool:
        """Take the next token; True when it completes a stop string, and nothing is to be added then."""
        try:
            new = self._decoder.step(self._tokenizer, token)
        except Exception as error:
            # bytes that are no UTF-8 may change what came before, which the decoder does not forgive
            if "Invalid prefix" not in str(error):
                raise
            self._decoder = self._fresh()
            new = self._decoder.step(self._tokenizer, token)
        if not new:
            return False
        begin = max(0, len(self._text) - self._longest + 1)
        self._text += new
        found = [(at + len(string), at) for string in self._stop if (at := self._text.find(string, begin)) >= 0]
        if not found:
            return False
        # the one that was complete first
        self._text = self._text[: min(found, key=lambda match: match[0])[1]]
        self._stop = []
        return True

    def take(self) -> str:
        """What is new and certain: all but an end that a stop string may begin with."""
        held = max(map(self._overlap, self._stop), default=0)
        kept = len(self._text) - held
        new, self._text = self._text[:kept], self._text[kept:]
        return new

    def rest(self) -> str:
        """What is left when the answer ends."""
        new, self._text = self._text, ""
        return new

    def _overlap(self, string: str) -> int:
        """Characters at the text's end that the string begins with."""
        return next((n for n in range(min(len(string) - 1, len(self._text)), 0, -1) if self._text.endswith(string[:n])), 0)
