"""Errors as clients see them: one JSON shape, the one that clients of the OpenAI API know, with the request's id."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response


class ApiError(Exception):
    """An answer that is no answer.

    Attributes:
        status: HTTP status.
        type: kind of error, as in the OpenAI API.
        param: the field of the request that is wrong, if one is.
        retry_after: seconds after which asking again makes sense, sent as ``Retry-After``.
    """

    def __init__(self, status: int, type: str, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.type, self.message, self.param, self.retry_after = status, type, message, param, retry_after

    def body(self, request_id: str) -> dict[str, Any]:
        """The JSON that the client gets."""
        error = {"message": self.message, "type": self.type, "code": self.status, "param": self.param, "request_id": request_id}
        return {"error": error}

    def response(self, request_id: str) -> Response:
        """The answer that the client gets. Plain ASCII: a message may quote what no UTF-8 can say."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after is not None else None
        return Response(json.dumps(self.body(request_id)), self.status, headers, "application/json")


def invalid(message: str, *, param: str | None = None, status: int = 400) -> ApiError:
    """The request is wrong, and stays wrong if it is sent again."""
    return ApiError(status, "invalid_request_error", message, param=param)


def unavailable(message: str, *, retry_after: int) -> ApiError:
    """The service cannot take the request now; another node, or this one later, can."""
    return ApiError(503, "overloaded_error", message, retry_after=retry_after)


def broken() -> ApiError:
    """The service itself failed."""
    return ApiError(500, "api_error", "The service failed; its log says how.")
