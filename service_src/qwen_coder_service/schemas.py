"""Requests and answers of /chat."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class ChatRequest(BaseModel):
    """A question. Sampling that is left out follows the model's own generation_config."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"messages": [{"role": "user", "content": "Write a function that adds two numbers."}], "max_tokens": 128}]
        },
    )

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1, description="tokens of the answer at most; as many as fit if left out")] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=0, lt=1 << 63)] = None
    stop: Annotated[list[str] | str | None, Field(description="texts that end the answer")] = None
    stream: Annotated[bool, Field(description="send the answer as server-sent events, as it is made")] = False
    ignore_eos: Annotated[bool, Field(description="go on after the model's end, up to max_tokens (for measurements)")] = False
    return_token_ids: bool = False


class Usage(BaseModel):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswer(BaseModel):
    """A whole answer."""

    id: str
    model: str
    message: Message
    finish_reason: str | None
    usage: Usage
    token_ids: list[int] | None = None
