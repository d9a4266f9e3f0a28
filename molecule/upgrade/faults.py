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


def wrap(app):
    """The service with the fault."""

    async def faulty(scope, receive, send):
        chat = scope["type"] == "http" and scope["path"] == "/chat"
        if chat and FAULT == "crash" and not crash.is_alive():
            crash.start()

        async def late(message):
            if chat and FAULT == "slow" and message["type"] == "http.response.body":
                await asyncio.sleep(SECONDS)
            await send(message)

        await app(scope, receive, late)

    return faulty if FAULT in ("slow", "crash") else app
