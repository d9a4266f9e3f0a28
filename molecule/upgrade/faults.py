"""Put into the service's package by this scenario's tests: a release that goes wrong as its env file says (ROLLOUT_FAULT)."""

from __future__ import annotations

import asyncio
import os
import threading

FAULT, SECONDS = os.environ.get("ROLLOUT_FAULT", ""), float(os.environ.get("ROLLOUT_FAULT_SECONDS", "0"))
if FAULT == "import":
    raise ImportError("a package of this release is broken")
# it begins with the first question: how long a start takes does not matter
crash = threading.Timer(SECONDS, os._exit, (1,))
crash.daemon = True


def slowly(generate):
    """A backend's answer, each of whose tokens takes longer, however many come at once."""

    async def slow(*args, **kwargs):
        pieces = generate(*args, **kwargs)
        try:
            async for piece in pieces:
                await asyncio.sleep(SECONDS * len(piece.token_ids))
                yield piece
        finally:
            await pieces.aclose()

    return slow


if FAULT == "slow":
    from .backends.transformers import TransformersBackend

    TransformersBackend.generate = slowly(TransformersBackend.generate)


def wrap(app):
    """The service with the fault."""

    async def faulty(scope, receive, send):
        if scope["type"] == "http" and scope["path"] == "/chat" and not crash.is_alive():
            crash.start()
        await app(scope, receive, send)

    return faulty if FAULT == "crash" else app
