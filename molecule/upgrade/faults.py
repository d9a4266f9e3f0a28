# --- appended to qwen_coder_service/main.py by molecule/upgrade/tests: a release that goes wrong as its env file says ---
import asyncio as _asyncio  # noqa: E402
import threading as _threading  # noqa: E402

_fault = os.environ.get("ROLLOUT_FAULT", "")
if _fault == "import":
    raise ImportError("a package of this release is broken")
if _fault == "crash":
    _threading.Timer(float(os.environ["ROLLOUT_FAULT_SECONDS"]), os._exit, (1,)).start()
if _fault == "slow":
    _inner = app

    async def app(scope, receive, send):  # type: ignore[no-redef]
        """The same answers, each piece of them late."""

        async def late(message):
            if scope["type"] == "http" and scope["path"] == "/chat" and message["type"] == "http.response.body":
                await _asyncio.sleep(float(os.environ["ROLLOUT_FAULT_SECONDS"]))
            await send(message)

        await _inner(scope, receive, late)
