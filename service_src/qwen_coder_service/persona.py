"""The persona: the system message "I am ..." in front of every chat that brings none, rendered by the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from .schemas import Message


class Tokenizer(Protocol):
    """What is used of a tokenizer of the transformers library."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> list[int]:
        """Render a conversation."""


def with_persona(messages: Sequence[Message], persona_prompt: str) -> list[dict[str, str]]:
    """The conversation as the template gets it; a system message of the client's own stays the only one."""
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    if conversation[0]["role"] == "system":
        return conversation
    return [{"role": "system", "content": persona_prompt}, *conversation]


def render(tokenizer: Tokenizer, messages: Sequence[Message], persona_prompt: str) -> list[int]:
    """Token ids of the prompt, up to where the answer begins. Both backends get exactly these."""
    return tokenizer.apply_chat_template(
        with_persona(messages, persona_prompt), add_generation_prompt=True, tokenize=True, return_dict=False
    )
