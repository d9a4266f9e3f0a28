"""Requests and answers: /chat, and the part of the OpenAI API that is served."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

StopText = Annotated[str, Field(min_length=1, max_length=256)]
StopTexts = Annotated[list[StopText], Field(max_length=16)]


class Sampled(BaseModel):
    """What both APIs say about how an answer is drawn. What is left out follows the model's own generation_config."""

    model_config = ConfigDict(strict=True)  # the text "false" is no switch

    max_tokens: Annotated[int | None, Field(ge=1, description="tokens of the answer at most; as many as fit if left out")] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=0, lt=1 << 63)] = None
    stop: Annotated[StopTexts | StopText | None, Field(description="texts that end the answer")] = None
    stream: Annotated[bool, Field(description="send the answer as server-sent events, as it is made")] = False
    ignore_eos: Annotated[bool, Field(description="go on after the model's end, up to max_tokens (for measurements)")] = False


class ErrorDetail(BaseModel):
    """What went wrong, as the OpenAI API says it, with the request's id."""

    message: str
    type: str
    code: int
    param: Annotated[str | None, Field(description="the field of the request that is wrong, if one is")]
    request_id: Annotated[str, Field(description="stands in the log and in the header X-Request-ID too")]


class ErrorAnswer(BaseModel):
    """Every error looks like this."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "message": "max_tokens is 500; a prompt of 28 tokens leaves 172 of 200.",
                        "type": "invalid_request_error",
                        "code": 400,
                        "param": "max_tokens",
                        "request_id": "4f1c",
                    }
                }
            ]
        }
    )

    error: ErrorDetail


class Health(BaseModel):
    """A node's own word about itself."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "ready"}]})

    status: Annotated[str, Field(description="ok, live, ready, starting, draining or dead")]
    model: str | None = None


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class ChatRequest(Sampled):
    """A question."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"messages": [{"role": "user", "content": "Write a function that adds two numbers."}], "max_tokens": 128}]
        },
    )

    messages: Annotated[list[Message], Field(min_length=1)]
    return_token_ids: Annotated[bool, Field(description="give the answer's token ids, and of a whole answer the prompt's too")] = False


class Usage(BaseModel):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswer(BaseModel):
    """A whole answer."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "4f1c",
                    "model": "Qwen/Qwen2.5-Coder-32B-Instruct",
                    "message": {"role": "assistant", "content": "def add(a, b):\n    return a + b"},
                    "finish_reason": "stop",
                    "usage": {"prompt_tokens": 30, "completion_tokens": 14, "total_tokens": 44},
                }
            ]
        }
    )

    id: str
    model: str
    message: Message
    finish_reason: str | None
    usage: Usage
    prompt_token_ids: Annotated[list[int] | None, Field(description="the prompt as the chat template rendered it, persona included")] = None
    token_ids: list[int] | None = None


class TextPart(BaseModel):
    """A part of a message; this model reads text only."""

    type: Literal["text"]
    text: str


class OpenAIMessage(BaseModel):
    """One turn, as clients of the OpenAI API send it; what the template may know beyond role and content is kept."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    def turn(self) -> dict[str, Any]:
        """As a chat template gets it."""
        content = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""
        role = "system" if self.role == "developer" else self.role  # the newer name of the same thing
        return {**(self.model_extra or {}), "role": role, "content": content}


class StreamOptions(BaseModel):
    """What a stream carries beside the answer."""

    include_usage: bool = False


class CompletionRequest(Sampled):
    """A request to /v1/chat/completions. Fields that are not listed are ignored, as other servers of this API do."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "qwen", "messages": [{"role": "user", "content": "def add(a, b):"}], "max_tokens": 64}]}
    )

    model: str | None = None
    messages: Annotated[list[OpenAIMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, description="the newer name of max_tokens")] = None
    n: Annotated[int, Field(ge=1, le=1, description="one answer a request")] = 1
    stream_options: StreamOptions | None = None
    tools: Annotated[list[dict[str, Any]] | None, Field(description="passed to the model's chat template")] = None


class Choice(BaseModel):
    """The one answer."""

    index: int
    message: Message
    finish_reason: str | None
    logprobs: None


class Completion(BaseModel):
    """A whole answer, as the OpenAI API has it."""

    id: str
    created: int
    model: str
    object: Literal["chat.completion"]
    choices: list[Choice]
    usage: Usage


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: Annotated[int, Field(description="tokens of prompt and answer together")]


class Models(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[Model]
