"""A proxy in front of a real service that breaks one thing at a time, as proxies, client libraries and releases do."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any, Literal

import httpx
import uvicorn
from conftest import free_port

Break = Literal["nothing", "persona", "token", "slow", "buffered", "cancel"]


class BreakingProxy:
    """An HTTP proxy in a thread; ``breaks`` says what is broken now."""

    def __init__(self, upstream: str) -> None:
        self.upstream, self.breaks, self.running = upstream, "nothing", 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.held: list[int] = []  # how many events there were in each answer that it buffered
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(uvicorn.Config(self, host="127.0.0.1", port=self.port, lifespan="off", log_config=None))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> BreakingProxy:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, and its answer back."""
        content, more = b"", True
        while more:
            message = await receive()
            content, more = content + message.get("body", b""), message.get("more_body", False)
        if self.breaks == "persona" and scope["path"] == "/chat":
            content = self._other_persona(content)
        if self.breaks == "slow":
            await asyncio.sleep(0.2)
        headers = [(k, v) for k, v in scope["headers"] if k not in (b"host", b"content-length")]
        pieces: asyncio.Queue[Any] = asyncio.Queue()
        work = asyncio.create_task(self._upstream(scope, content, headers, pieces))
        self.tasks.add(work)
        gone = asyncio.create_task(self._gone(receive))
        try:
            while not gone.done():
                piece = asyncio.create_task(pieces.get())
                await asyncio.wait({piece, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not piece.done():
                    piece.cancel()
                    break
                if piece.result() is None:
                    break
                await send(piece.result())
        finally:
            gone.cancel()
            if self.breaks != "cancel":
                work.cancel()

    async def _gone(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _upstream(self, scope: Any, content: bytes, headers: Any, pieces: asyncio.Queue[Any]) -> None:
        self.running += 1
        loaded = self.running > 1
        try:
            async with (
                httpx.AsyncClient(timeout=120) as http,
                http.stream(scope["method"], self.upstream + scope["path"], content=content or None, headers=headers) as answer,
            ):
                kept = [(k, v) for k, v in answer.headers.raw if k.lower() not in (b"content-length", b"transfer-encoding")]
                await pieces.put({"type": "http.response.start", "status": answer.status_code, "headers": kept})
                async for piece in self._pieces(answer, loaded):
                    await pieces.put({"type": "http.response.body", "body": piece, "more_body": True})
            await pieces.put({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.running -= 1
            await pieces.put(None)

    async def _pieces(self, answer: httpx.Response, loaded: bool) -> AsyncIterator[bytes]:
        if self.breaks == "buffered":
            held = await answer.aread()
            self.held.append(sum(line.startswith(b"data: ") and line != b"data: [DONE]" for line in held.splitlines()))
            yield held
        elif self.breaks == "token" and loaded and answer.headers["content-type"] == "application/json":
            body = json.loads(await answer.aread())
            if len(body.get("token_ids", [])) > 7:
                body["token_ids"][7] += 1
            yield json.dumps(body).encode()
        else:
            async for piece in answer.aiter_raw():
                yield piece

    @staticmethod
    def _other_persona(content: bytes) -> bytes:
        """What client libraries do that know better: a system message of their own."""
        try:
            body = json.loads(content)
            if body["messages"][0]["role"] != "system":
                body["messages"].insert(0, {"role": "system", "content": "You are a helpful assistant."})
            return json.dumps(body).encode()
        except (ValueError, LookupError):
            return content
