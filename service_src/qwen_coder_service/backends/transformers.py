"""The transformers library in this process: slower than vLLM, and there where vLLM is not.

Its own continuous batching is not used: its cache is one tensor on one device, so that a model cannot be spread over GPUs within one
process; without flash attention every query is masked against the cache of all requests; and it has no seeds, no repetition penalty
of a request's own and no stop strings. Here one thread goes step by step: requests come and go between two steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import random
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..persona import Tokenizer
from ..settings import Settings
from .base import BackendDead, Piece, Sampling
from .text import Text

if TYPE_CHECKING:
    from .packed import Network, Part, Row

log = logging.getLogger(__name__)

# tokens of one prompt in a step at most: what others wait for their next token
_CHUNK = 2048
_STOP_TIMEOUT_S = 10.0
# of a generation_config, what vLLM applies and we do too; and what we do not
_APPLIED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_NOT_APPLIED = ("presence_penalty", "frequency_penalty")


class _Request:
    """A request between the loop that reads its answer and the thread that makes it. The backend's lock guards what both change."""

    def __init__(self, row: Row, text: Text, max_tokens: int, ends: frozenset[int], stream: bool) -> None:
        self.row, self.text, self.left, self.ends, self.stream = row, text, max_tokens, ends, stream
        self.ready = asyncio.Event()
        self.new: list[int] = []
        self.finish_reason: str | None = None
        self.dropped = False

    def add(self, token: int) -> None:
        """The next token; it may be the last."""
        self.new.append(token)
        self.left -= 1
        if token in self.ends:
            # told, but no part of the text
            self.finish_reason = "stop"
            return
        self.row.ids.append(token)
        if self.text.add(token):
            self.finish_reason = "stop"
        elif not self.left:
            self.finish_reason = "length"

    def take(self) -> Piece:
        """All that is new: a slow reader gets larger pieces."""
        text = self.text.take() if self.finish_reason is None else self.text.rest()
        piece, self.new = Piece(text, self.new, self.finish_reason), []
        return piece


class TransformersBackend:
    """A model, one thread that computes, and requests that come and go between its steps."""

    tokenizer: Tokenizer
    max_model_len: int
    progress: float

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.progress = time.monotonic()
        self._wake = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._pings: list[asyncio.Future[None]] = []
        self._dead: str | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None

    @property
    def unfinished(self) -> int:
        """Requests whose last token is not made yet."""
        with self._wake:
            return sum(request.finish_reason is None and not request.dropped for request in self._requests())

    async def start(self) -> None:
        """Load the model, in a thread: the loop answers meanwhile."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._load)
        self.progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    def _load(self) -> None:
        import transformers

        from .packed import Network

        tokenizer = transformers.AutoTokenizer.from_pretrained(self._settings.model_path)
        self.tokenizer = tokenizer
        # a copy of the thread's own: the library's tokenizers do not like to be used by two
        self._decoder = copy.deepcopy(tokenizer.backend_tokenizer)
        self._network: Network = Network(self._settings)
        self.max_model_len = self._network.max_model_len
        defaults = self._network.defaults
        self._defaults = {name: defaults[name] for name in _APPLIED if defaults.get(name) is not None}
        for name in _NOT_APPLIED:
            if defaults.get(name):
                log.warning("generation_config.json has %s, which this backend does not apply", name)
        ends = defaults.get("eos_token_id")
        ends = [ends] if isinstance(ends, int) else ends or []
        self._ends = frozenset(end for end in (*ends, tokenizer.eos_token_id) if end is not None)
        self._slots = list(range(self._settings.max_num_seqs))

    async def stop(self) -> None:
        """Free everything. A thread that does not come back within seconds is left to the end of the process."""
        await self.abort_all()
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, _STOP_TIMEOUT_S)
            if not self._thread.is_alive():
                self._network.close()
            self._thread = None

    async def check(self) -> None:
        """Look whether the thread lives.

        Raises:
            BackendDead: it does not.
        """
        if self._dead is None and (self._thread is None or not self._thread.is_alive()):
            self._die("the generation thread is gone")
        if self._dead is not None:
            raise BackendDead(self._dead)

    async def ping(self) -> None:
        """Once through the thread's loop.

        Raises:
            BackendDead: the thread is dead.
        """
        await self.check()
        future = self._loop.create_future()
        with self._wake:
            self._pings.append(future)
            self._wake.notify()
            if self._dead is not None:
                self._answer_pings(BackendDead(self._dead))
        await future

    def kill(self) -> None:
        """Be dead: whoever waits for an answer hears of it now, even if the thread hangs."""
        self._die("the engine was ended")

    async def abort_all(self) -> None:
        """End all that runs, from outside of the thread: it may hang."""
        with self._wake:
            aborted = [request for request in self._requests() if request.finish_reason is None]
            for request in aborted:
                request.finish_reason = "abort"
                request.ready.set()

    async def generate(
        self, request_id: str, prompt: list[int], sampling: Sampling, *, stream: bool, trace: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Piece]:
        """Answer a prompt.

        Raises:
            BackendDead: the engine died meanwhile.
            ValueError: the prompt leaves no room for an answer.
        """
        await self.check()
        request = self._request(prompt, sampling, stream)
        with self._wake:
            if self._dead is not None:
                raise BackendDead(self._dead)
            self._waiting.append(request)
            self._wake.notify()
        try:
            while True:
                await request.ready.wait()
                request.ready.clear()
                with self._wake:
                    if self._dead is not None and request.finish_reason is None:
                        raise BackendDead(self._dead)
                    piece = request.take()
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            with self._wake:
                request.dropped = True
                self._wake.notify()

    def _request(self, prompt: list[int], sampling: Sampling, stream: bool) -> _Request:
        from .packed import Drawing, Row

        room = self.max_model_len - len(prompt)
        if room < 1 or not prompt:
            raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room in {self.max_model_len}")
        asked = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        drawing = Drawing(**{**self._defaults, **{name: value for name, value in asked.items() if value is not None}})
        return _Request(
            Row(list(prompt), drawing, random.Random(sampling.seed)),
            Text(self._decoder, sampling.stop),
            min(sampling.max_tokens, room),
            frozenset() if sampling.ignore_eos else self._ends,
            stream,
        )

    def _requests(self) -> list[_Request]:
        return [*self._running, *self._waiting]

    def _notify(self, requests: Iterable[_Request]) -> None:
        """Let readers know, from any thread."""

        def notify(requests: list[_Request]) -> None:
            for request in requests:
                request.ready.set()

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads
            self._loop.call_soon_threadsafe(notify, list(requests))

    def _answer_pings(self, error: BackendDead | None = None) -> None:
        def answer(pings: list[asyncio.Future[None]]) -> None:
            for ping in pings:
                if not ping.done():
                    ping.set_exception(error) if error else ping.set_result(None)

        if self._pings:
            pings, self._pings = self._pings, []
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(answer, pings)

    def _die(self, reason: str) -> None:
        with self._wake:
            if self._dead is None:
                self._dead = reason
            self._answer_pings(BackendDead(self._dead))
            self._notify(self._requests())
            self._wake.notify()

    # what follows is the thread's

    def _run(self) -> None:
        try:
            while self._dead is None:
                with self._wake:
                    self._answer_pings()
                    self._clear()
                    if self._stopping:
                        return
                    if not self._requests():
                        self._wake.wait()
                        continue
                    parts = self._plan()
                made = self._network.step(parts)
                self.progress = time.monotonic()
                with self._wake:
                    self._deliver(made)
        except Exception as error:
            log.exception("the generation thread died")
            self._die(f"the generation thread died: {error!r}")

    def _clear(self) -> None:
        """Let go of those that are finished or that nobody reads any more."""
        for request in [request for request in self._requests() if request.dropped or request.finish_reason is not None]:
            if request in self._running:
                self._running.remove(request)
                self._leave(request)
            else:
                self._waiting.remove(request)

    def _leave(self, request: _Request) -> None:
        self._slots.append(request.row.slot)
        request.row.forget()

    def _plan(self) -> list[Part]:
        """The next step: a token of every answer, and as much of prompts as its budget lets in, first come first served."""
        from .packed import Part

        budget = max(self._settings.max_batch_tokens, len(self._running))
        budget -= sum(request.row.pending == 1 for request in self._running)
        counts: dict[_Request, int] = {}
        for request in self._running:
            pending = request.row.pending
            counts[request] = 1 if pending == 1 else min(pending, _CHUNK, budget)
            budget -= counts[request] if pending > 1 else 0
        # the memory that this step needs; who came last gives way, and is computed again later
        while (used := sum(map(self._held, self._running, counts.values()))) > self._network.capacity and len(self._running) > 1:
            request = self._running.pop()
            del counts[request]
            self._leave(request)
            self._waiting.appendleft(request)
        while self._waiting and self._slots and budget > 0:
            request = self._waiting[0]
            whole = self._network.needs(len(request.row.ids) + 1)
            if self._running and used + whole > self._network.capacity:
                break
            used += whole
            self._waiting.popleft()
            self._network.place(request.row, self._slots.pop())
            self._running.append(request)
            counts[request] = min(request.row.pending, _CHUNK, budget)
            budget -= counts[request]
        return [Part(request.row, count) for request, count in counts.items() if count]

    def _held(self, request: _Request, count: int) -> int:
        """Tokens of memory that a request has after a step: what its whole prompt takes is its own from the beginning."""
        row = request.row
        end = max(row.done + count, len(row.ids) + 1 if row.pending > 1 else 0)
        return max(row.capacity, self._network.needs(end) if end > row.capacity else 0)

    def _deliver(self, made: list[tuple[Any, int]]) -> None:
        requests = {id(request.row): request for request in self._running}
        ready = []
        for row, token in made:
            request = requests[id(row)]
            if request.finish_reason is None:
                request.add(token)
                if request.stream or request.finish_reason is not None:
                    ready.append(request)
        self._notify(ready)
