#!/usr/bin/env python3
"""Count what clients lose while something is done to the fleet: an upgrade, a rotation of certificates, a reload, a power cut.

Clients keep asking through the gateway, each with requests of its own, until the command after ``--`` has ended; every request is kept
with its outcome. The report says how many failed or were truncated and shows the timeline; the exit status is 1 if any was.

    scripts/count_lost_requests.py --url https://gateway/api/qwen --ca ca.crt --key-file key -- \\
        ansible-playbook -i inventories/yours playbooks/rotate_certificates.yml -e pki_rotate=ca

No request is tried again: what a client with retries would not notice is counted too.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx

Verdict = Literal["complete", "failed", "truncated"]
# a client that was refused does not ask again at once
PAUSE_AFTER_FAILURE_S = 0.2


@dataclass(frozen=True)
class Kind:
    """A sort of request: how many clients send it, one after the other.

    ``tokens`` is what each answer must have, to the token; with ``streaming`` it comes as server-sent events. Between an answer and its
    next request a client waits ``pause_s`` seconds.
    """

    clients: int
    tokens: int
    streaming: bool = True
    pause_s: float = 0


@dataclass
class Outcome:
    """One request as its client saw it; times are seconds since the load began."""

    client: int
    kind: Kind
    asked: float
    first: float | None = None
    ended: float = 0.0
    tokens: int = 0
    verdict: Verdict = "failed"
    detail: str = ""
    request_id: str = ""


@dataclass
class Report:
    """What was counted; ``str()`` is the form for people."""

    outcomes: list[Outcome]
    marks: list[tuple[float, str]] = field(default_factory=list)

    def of(self, *verdicts: Verdict) -> list[Outcome]:
        """The requests with one of these verdicts."""
        return [outcome for outcome in self.outcomes if outcome.verdict in verdicts]

    @property
    def lost(self) -> list[Outcome]:
        """What failed or was truncated."""
        return self.of("failed", "truncated")

    @property
    def running(self) -> int:
        """The largest number of requests that were being answered at the same time."""
        moves = sorted([(o.asked, 1) for o in self.outcomes] + [(o.ended, -1) for o in self.outcomes])
        return max(itertools.accumulate((step for _, step in moves)), default=0)

    def first_token_s(self, share: float) -> float | None:
        """The time to the first token in seconds that this share (0..1) of the complete streams had, or less."""
        times = sorted(o.first - o.asked for o in self.of("complete") if o.first is not None)
        return times[min(len(times) - 1, int(share * len(times)))] if times else None

    def timeline(self, rows: int = 40) -> list[dict[str, Any]]:
        """At most ``rows`` slices of equal length, and what was done at what time.

        A slice counts what ended in it by verdict, and the slowest first token in seconds.
        """
        end = max((o.ended for o in self.outcomes), default=0.0)
        step = max(1.0, end / rows)
        result: list[dict[str, Any]] = []
        for index in range(int(end // step) + 1):
            start, stop = index * step, (index + 1) * step
            ended = [o for o in self.outcomes if start <= o.ended < stop]
            counts = Counter(o.verdict for o in ended)
            result.append({
                "from_s": round(start, 1),
                "complete": counts["complete"], "failed": counts["failed"], "truncated": counts["truncated"],
                "slowest_first_token_s": max((round(o.first - o.asked, 2) for o in ended if o.first is not None), default=None),
                "marks": [text for at, text in self.marks if start <= at < stop],
            })  # fmt: skip
        return result

    def as_dict(self) -> dict[str, Any]:
        """The form for machines."""
        return {
            "requests": len(self.outcomes), "complete": len(self.of("complete")), "failed": len(self.of("failed")),
            "truncated": len(self.of("truncated")), "most_at_once": self.running,
            "first_token_s": {"p50": self.first_token_s(0.5), "p95": self.first_token_s(0.95), "p99": self.first_token_s(0.99)},
            "longest_request_s": max((round(o.ended - o.asked, 2) for o in self.outcomes), default=None),
            "timeline": self.timeline(), "lost": [asdict(outcome) for outcome in self.lost],
        }  # fmt: skip

    def __str__(self) -> str:
        """A table over time, what was lost, and one sentence."""
        lines = [f"{'second':>8} {'complete':>9} {'failed':>7} {'truncated':>10} {'slowest TTFT':>13}"]
        for row in self.timeline():
            slowest = f"{row['slowest_first_token_s']:.2f} s" if row["slowest_first_token_s"] is not None else "-"
            line = f"{row['from_s']:>8} {row['complete']:>9} {row['failed']:>7} {row['truncated']:>10} {slowest:>13}"
            lines.append("  ".join([line, *row["marks"]]))
        for outcome in self.lost[:20]:
            lines.append(
                f"{outcome.verdict} at {outcome.ended:.2f} s, asked at {outcome.asked:.2f} s: {outcome.detail} {outcome.request_id}"
            )
        if len(self.lost) > 20:
            lines.append(f"... and {len(self.lost) - 20} more")
        lines.append(
            f"{len(self.outcomes)} requests, {self.running} at once: {len(self.of('failed'))} failed, "
            f"{len(self.of('truncated'))} truncated."
        )
        return "\n".join(lines)


class Load:
    """Clients that keep asking, in a thread of their own, from entering until leaving the context.

    ``url`` is what stands before ``/v1/chat/completions``; ``timeout_s`` bounds the silence that a client bears. The file ``ca`` is read
    again when it changes: clients must trust another CA before a rotation brings it to the gateway.
    """

    def __init__(self, url: str, key: str, kinds: Iterable[Kind], ca: str | None = None, timeout_s: float = 60) -> None:
        self.url, self.key, self.ca, self.timeout_s = url.rstrip("/"), key, ca, timeout_s
        self.kinds = [kind for kind in kinds for _ in range(kind.clients)]
        self.outcomes: list[Outcome] = []
        self.marks: list[tuple[float, str]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")
        self._began, self._ca_read = 0.0, 0.0
        self._tls = ssl.create_default_context() if ca is None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def __enter__(self) -> Load:
        """Begin."""
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Let every request end, and no new one begin."""
        self._stop.set()
        self._thread.join()

    @property
    def now(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self._began

    def mark(self, text: str) -> None:
        """Write into the timeline what is done now."""
        self.marks.append((self.now, text))

    def wait_for(self, complete: int, timeout_s: float = 300) -> None:
        """Return when this many requests are complete; raise TimeoutError if they are not in time."""
        deadline = time.monotonic() + timeout_s
        while sum(o.verdict == "complete" for o in list(self.outcomes)) < complete:
            if time.monotonic() > deadline or not self._thread.is_alive():
                raise TimeoutError(f"{complete} requests were not complete after {timeout_s} s:\n{self.report}")
            time.sleep(0.1)

    @property
    def report(self) -> Report:
        """What was counted so far; whole after leaving the context."""
        return Report([outcome for outcome in list(self.outcomes) if outcome.ended], list(self.marks))

    async def _run(self) -> None:
        self._follow_ca()
        limits = httpx.Limits(max_connections=len(self.kinds), max_keepalive_connections=len(self.kinds))
        headers = {"Authorization": f"Bearer {self.key}"}
        async with httpx.AsyncClient(verify=self._tls, headers=headers, limits=limits, timeout=self.timeout_s) as http:
            await asyncio.gather(*(self._client(http, index, kind) for index, kind in enumerate(self.kinds)))

    def _follow_ca(self) -> None:
        if self.ca and (changed := Path(self.ca).stat().st_mtime) != self._ca_read:
            self._tls.load_verify_locations(self.ca)
            self._ca_read = changed

    async def _client(self, http: httpx.AsyncClient, index: int, kind: Kind) -> None:
        while not self._stop.is_set():
            outcome = Outcome(index, kind, self.now)
            self.outcomes.append(outcome)
            self._follow_ca()
            try:
                await self._ask(http, outcome)
            except httpx.HTTPError as error:
                outcome.verdict = "failed" if outcome.first is None else "truncated"
                outcome.detail = repr(error)
            outcome.ended = self.now
            await self._wait(kind.pause_s if outcome.verdict == "complete" else max(kind.pause_s, PAUSE_AFTER_FAILURE_S))

    async def _wait(self, seconds: float) -> None:
        """Wait, and no longer than the load lasts."""
        until = self.now + seconds
        while (left := until - self.now) > 0 and not self._stop.is_set():
            await asyncio.sleep(min(left, 0.2))

    async def _ask(self, http: httpx.AsyncClient, outcome: Outcome) -> None:
        kind = outcome.kind
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": f"Write a function that adds {outcome.client} to a number."}],
            "max_tokens": kind.tokens, "ignore_eos": True, "temperature": 0, "stream": kind.streaming,
        }  # fmt: skip
        if kind.streaming:
            body["stream_options"] = {"include_usage": True}
        async with http.stream("POST", f"{self.url}/v1/chat/completions", json=body) as answer:
            outcome.request_id = answer.headers.get("x-request-id", "")
            if answer.status_code != 200:
                outcome.detail = f"{answer.status_code} {(await answer.aread()).decode(errors='replace')[:300]}"
                return
            finish, last = None, ""
            async for line in answer.aiter_lines() if kind.streaming else _whole(answer):
                if not line.removeprefix("data: ").startswith("{"):
                    last = line or last
                    continue
                event = json.loads(line.removeprefix("data: "))
                if event.get("choices"):
                    outcome.first = outcome.first if outcome.first is not None or not kind.streaming else self.now
                    finish = event["choices"][0].get("finish_reason") or finish
                outcome.tokens = (event.get("usage") or {}).get("completion_tokens", outcome.tokens)
                last = line
        if finish == "length" and outcome.tokens == kind.tokens and (last == "data: [DONE]" or not kind.streaming):
            outcome.verdict = "complete"
        else:
            outcome.verdict = "truncated"
            outcome.detail = f"{outcome.tokens} of {kind.tokens} tokens, finish_reason {finish}, ended with {last[:300]!r}"


async def _whole(answer: httpx.Response) -> Any:
    """The answer as one line, if it is not streamed."""
    yield (await answer.aread()).decode()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command under load, or the load alone for ``--seconds``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", required=True, help="the bridge, for example https://gateway/api/qwen")
    parser.add_argument("--key-file", type=Path, required=True, help="file with a kin client's API key")
    parser.add_argument("--ca", help="file with the CA of the gateway's certificate (default: the system's)")
    parser.add_argument("--clients", type=int, default=32, help="clients that stream (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each of their answers (default: %(default)s)")
    parser.add_argument("--long-clients", type=int, default=0, help="clients more, whose streams are long (default: %(default)s)")
    parser.add_argument("--long-tokens", type=int, default=1024, help="tokens of each long answer (default: %(default)s)")
    parser.add_argument(
        "--pause", type=float, default=0, help="seconds that a client waits between an answer and its next request (default: %(default)s)"
    )
    parser.add_argument("--settle", type=float, default=3, help="seconds of load before and after the command (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="length of the load if there is no command (default: %(default)s)")
    parser.add_argument("--at-least", type=int, default=1, help="go on until so many requests are complete (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the report as JSON there")
    parser.add_argument("command", nargs="*", help="what to do meanwhile, after --")
    options = parser.parse_args(argv)

    kinds = [
        Kind(options.clients, options.tokens, pause_s=options.pause),
        Kind(options.long_clients, options.long_tokens, pause_s=options.pause),
    ]
    status = 0
    with Load(options.url, options.key_file.read_text(encoding="utf-8").strip(), kinds, options.ca) as load:
        time.sleep(options.settle if options.command else options.seconds)
        if options.command:
            load.mark(f"begins: {' '.join(options.command)}")
            status = subprocess.run(options.command, check=False).returncode
            load.mark(f"ended with {status}")
            time.sleep(options.settle)
        load.wait_for(options.at_least)
    report = load.report
    if options.output:
        options.output.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    print(report)
    if status:
        print(f"The command ended with {status}.", file=sys.stderr)
    return 1 if report.lost or status else 0


if __name__ == "__main__":
    sys.exit(main())
