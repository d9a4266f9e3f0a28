"""The persona: the system message "I am ..." in front of every chat that brings none, rendered by the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Turn = dict[str, Any]
"""One message as a chat template gets it: role, content, and whatever else the template knows."""


class Tokenizer(Protocol):
    """What is used of a tokenizer of the transformers library."""

    def apply_chat_template(self, conversation: list[Turn], **options: Any) -> list[int]:
        """Render a conversation."""


def with_persona(conversation: Sequence[Turn], persona_prompt: str) -> list[Turn]:
    """The conversation as the template gets it; a system message of the client's own stays the only one."""
    if conversation[0]["role"] == "system":
        return list(conversation)
    return [{"role": "system", "content": persona_prompt}, *conversation]


def render(tokenizer: Tokenizer, conversation: Sequence[Turn], persona_prompt: str, tools: list[dict[str, Any]] | None = None) -> list[int]:
    """Token ids of the prompt, up to where the answer begins. Both backends get exactly these.

    Args:
        tokenizer: the model's own.
        conversation: what the client sent.
        persona_prompt: the system message of conversations that bring none.
        tools: descriptions of functions, for templates that know them; others leave them out.
    """
    options = {"tools": tools} if tools else {}
    return tokenizer.apply_chat_template(
        with_persona(conversation, persona_prompt), add_generation_prompt=True, tokenize=True, return_dict=False, **options
    )
