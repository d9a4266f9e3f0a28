#!/usr/bin/env python3
"""Validate a service that runs: persona, determinism, latency, streaming, cancel, limits and errors, as workflows say (docs/validation.md).

A workflow is a file of validation/workflows: which check, and with what. Answers that are known beforehand are a golden set, a file of
validation/golden. It prints a line for each case; the exit status is 0 if none failed, 1 if one did, 2 if it could not begin.

    validate_qwen_workflows.py --url https://gateway/api/qwen --ca ca.crt --key-file key --golden validation/golden/qwen-coder-tiny.json
    validate_qwen_workflows.py --url http://127.0.0.1:8080 --metrics http://127.0.0.1:9090/metrics --model-path /opt/.../models/...

On a node it runs with the Python of a release, and also renders prompts by itself (--model-path); elsewhere httpx and PyYAML will do.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import re
import shlex
import ssl
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import h11
import httpx
import yaml

Verdict = Literal["pass", "fail", "skip"]
Turns = list[dict[str, Any]]
VALIDATION = Path(__file__).resolve().parent.parent / "validation"
PERCENTILES = (50, 95, 99)
_TICK_S = 0.01


class Unusable(ValueError):
    """A file or an option that nothing can be validated with; the message names it, the value seen and the value to set."""


class Broken(Exception):
    """A case that failed; the message says what is wrong with the service."""


@dataclass
class Result:
    """One case. ``line`` is for people; ``figures`` are what was measured, in the units that their names say."""

    workflow: str
    case: str
    verdict: Verdict
    line: str
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


# --- workflows: the parameters of each check, as their files give them ---


@dataclass(frozen=True, kw_only=True)
class Workflow:
    """What all have. ``at`` says which subjects it is for: gateway, node, or both."""

    about: str
    at: Sequence[str] = ("gateway", "node")


@dataclass(frozen=True, kw_only=True)
class Persona(Workflow):
    """The rendered prompt of conversations: [{name, messages}]."""

    conversations: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Deterministic(Workflow):
    """Greedy answers of prompts, [{name, messages, max_tokens, expect}]: alone, ``repeat`` times, and ``concurrency`` at a time."""

    prompts: list[dict[str, Any]]
    repeat: int = 3
    concurrency: int = 16
    rounds: int = 2


@dataclass(frozen=True, kw_only=True)
class Latency(Workflow):
    """Streams of ``tokens`` tokens, ``concurrency`` at a time; the targets are the inventory's, by the workflow's name."""

    prompt: str
    tokens: int
    requests: int
    concurrency: int = 1


@dataclass(frozen=True, kw_only=True)
class Streaming(Workflow):
    """A stream of ``tokens`` tokens: when its events arrive, looked at for ``within_s``, and that it says what the whole answer says."""

    prompt: str
    tokens: int
    within_s: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Cancel(Workflow):
    """``streams`` streams and one whole answer whose clients go away: the engine has dropped them ``within_s`` seconds later."""

    prompt: str
    streams: int = 2
    within_s: float = 5.0


@dataclass(frozen=True, kw_only=True)
class Requests(Workflow):
    """Requests and what comes back: [{name, at, method, path, headers, body, pad_bytes, expect: {status, type, param, headers}}]."""

    cases: list[dict[str, Any]]


# --- what is validated ---


@dataclass
class Subject:
    """A service, and what is known of it beforehand."""

    name: str
    kind: Literal["gateway", "node"]
    url: str
    key: str | None
    persona: str | None
    golden: dict[str, Any]
    targets: dict[str, Any]
    metrics: list[str]
    metrics_commands: list[str]
    model_path: Path | None
    max_body_bytes: int
    http: httpx.AsyncClient
    tls: ssl.SSLContext | None
    # what renders prompts beside the service, by name; filled where there is a model's directory
    renderers: dict[str, Callable[[Turns], list[int]]] = field(default_factory=dict)
    tokenizer: Any = None
    max_model_len: int = 0

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask, and have a whole answer.

        Raises:
            Broken: there is none.
        """
        try:
            answer = await self.http.post(self.url + path, json=body)
        except httpx.HTTPError as error:
            raise Broken(f"no answer to POST {path}: {error!r}") from error
        if answer.status_code != 200:
            raise Broken(f"POST {path} was answered with {answer.status_code}: {answer.text[:200]}")
        whole: dict[str, Any] = answer.json()
        return whole

    async def ask(self, messages: Turns, max_tokens: int) -> dict[str, Any]:
        """The greedy answer to a conversation, with token ids."""
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "seed": 0, "return_token_ids": True}
        answer = await self.post("/chat", body)
        if "prompt_token_ids" not in answer:
            raise Broken("/chat gives no prompt_token_ids: the service is older than this validation; upgrade it")
        return answer

    def text(self, ids: Sequence[int]) -> str:
        """Tokens for people."""
        return repr(self.tokenizer.decode(list(ids))) if self.tokenizer is not None else f"token {' '.join(map(str, ids))}"

    async def counts(self) -> Counts:
        """The nodes' metrics, added up."""

        async def by_url(url: str) -> str:
            return (await self.http.get(url)).text

        async def by_command(command: str) -> str:
            process = await asyncio.create_subprocess_exec(
                *shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
            )
            out, err = await process.communicate()
            if process.returncode:
                raise Broken(f"metrics cannot be read: '{command}' ended with {process.returncode}: {err.decode()[:200]}")
            return out.decode()

        texts = await asyncio.gather(*map(by_url, self.metrics), *map(by_command, self.metrics_commands))
        return Counts.read(texts)


@dataclass
class Counts:
    """What is read of metrics. ``running`` are the engine's requests, waiting ones included."""

    running: float = 0
    aborted: float = 0

    @classmethod
    def read(cls, texts: Iterable[str]) -> Counts:
        """From expositions in text format 0.0.4."""
        found = cls()
        for text in texts:
            # the transformers backend has none of vLLM's metrics; its requests are those of the service
            engine = [float(v) for v in re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", text, re.M)]
            service = [float(v) for v in re.findall(r"^qwen_requests_in_flight (\S+)$", text, re.M)]
            found.running += sum(engine or service)
            found.aborted += sum(float(v) for v in re.findall(r'^qwen_requests_total\{.*outcome="aborted".*\} (\S+)$', text, re.M))
        return found


# --- checks ---


def _first_difference(seen: Sequence[int], expected: Sequence[int]) -> int:
    pairs = enumerate(zip(seen, expected, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(seen), len(expected)))


def _contains(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(list(ids[i : i + len(part)]) == list(part) for i in range(len(ids) - len(part) + 1))


def _golden(subject: Subject, workflow: str, name: str, messages: Turns) -> dict[str, Any] | None:
    """A prompt's entry of the golden set."""
    entry: dict[str, Any] | None = subject.golden.get("prompts", {}).get(f"{workflow}/{name}")
    if entry is not None and entry["messages"] != messages:
        raise Broken("the golden set has another conversation under this name: make it anew (docs/validation.md)")
    return entry


async def check_persona(subject: Subject, name: str, workflow: Persona, report: Reporter) -> None:
    """The prompt that the service gave to its engine against those that others render."""
    for conversation in workflow.conversations:
        messages = conversation["messages"]
        with report.case(conversation["name"]) as case:
            expected = {who: render(messages) for who, render in subject.renderers.items()}
            golden = _golden(subject, name, conversation["name"], messages)
            if golden is not None:
                expected["the golden set"] = golden["prompt_token_ids"]
            if not expected:
                case.skip("nothing to compare with: neither a golden set of this model nor --model-path")
                continue
            seen = (await subject.ask(messages, 1))["prompt_token_ids"]
            own = [turn["content"] for turn in messages if turn["role"] == "system"]
            said = own[0] if own else subject.persona
            for who, ids in expected.items():
                if ids == seen:
                    continue
                at = _first_difference(seen, ids)
                there = f"from token {at} on: {subject.text(seen[at : at + 6])} instead of {subject.text(ids[at : at + 6])}"
                marks = golden.get("system_token_ids") if golden else None
                if subject.tokenizer is not None and said is not None:
                    present = said in subject.tokenizer.decode(seen)
                else:
                    present = marks is None or _contains(seen, marks)
                if not present:
                    what = "the client's own system message" if own else "the persona"
                    raise Broken(f"{what} is not in the prompt, which differs from that of {who} {there}")
                raise Broken(f"the chat template renders otherwise than {who}, {there}")
            case.passed(f"{len(seen)} tokens, the same by the service, {', '.join(expected)}", prompt_tokens=len(seen))


def _judge_same(subject: Subject, when: str, seen: list[tuple[str, list[int]]], first: dict[str, list[int]]) -> tuple[float, str]:
    """The share of answers that equal the first, and where one did not."""
    different = [(name, ids) for name, ids in seen if ids != first[name]]
    share = 1 - len(different) / len(seen)
    if not different:
        return share, f"{len(seen)} answers {when}, all the same"
    name, ids = different[0]
    at = _first_difference(ids, first[name])
    return share, (
        f"{len(different)} of {len(seen)} answers {when} differ from those before; '{name}' has {subject.text(ids[at : at + 1])} "
        f"instead of {subject.text(first[name][at : at + 1])} as token {at}"
    )


async def check_deterministic(subject: Subject, name: str, workflow: Deterministic, report: Reporter) -> None:
    """Greedy answers: as expected alone, the same again, the same while others are answered. Each is reported apart."""
    first: dict[str, list[int]] = {}
    for prompt in workflow.prompts:
        with report.case(f"alone: {prompt['name']}") as case:
            answer = await subject.ask(prompt["messages"], prompt["max_tokens"])
            ids = first[prompt["name"]] = answer["token_ids"]
            text = answer["message"]["content"]
            golden = _golden(subject, name, prompt["name"], prompt["messages"])
            if golden is not None:
                if ids != golden["token_ids"]:
                    at = _first_difference(ids, golden["token_ids"])
                    raise Broken(
                        f"the answer differs from the golden set's from token {at} on: {text[:60]!r} instead of {golden['text'][:60]!r}"
                    )
                case.passed(f"{len(ids)} tokens, equal to the golden set's")
            elif not prompt.get("expect"):
                case.skip("no golden set of this model, and nothing expected")
            elif not re.search(prompt["expect"], text):
                raise Broken(f"the answer does not match '{prompt['expect']}': {text[:80]!r}")
            else:
                case.passed(f"the answer matches '{prompt['expect']}'; no golden set of this model")
    known = [prompt for prompt in workflow.prompts if prompt["name"] in first]

    async def again(prompt: dict[str, Any]) -> tuple[str, list[int]]:
        return prompt["name"], (await subject.ask(prompt["messages"], prompt["max_tokens"]))["token_ids"]

    with report.case("repeated") as case:
        seen = [await again(prompt) for prompt in known for _ in range(workflow.repeat)]
        share, line = _judge_same(subject, "one after the other", seen, first)
        if share < _target(subject, name, "same_repeated", 1.0):
            raise Broken(line)
        case.passed(line, share=share)
    with report.case("under load") as case:
        some = (known * workflow.concurrency)[: workflow.concurrency]
        seen = [pair for _ in range(workflow.rounds) for pair in await asyncio.gather(*map(again, some))]
        share, line = _judge_same(subject, f"with {workflow.concurrency} at a time", seen, first)
        wanted = _target(subject, name, "same_under_load", 1.0)
        if share < wanted:
            raise Broken(f"{line} (at least {wanted:.0%} are to be the same)")
        case.passed(line, share=share)


@dataclass
class Stream:
    """A streamed answer: when its client saw what, in seconds since it asked, and for how long the client itself could not look."""

    arrivals: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    text: str = ""
    done: bool = False
    seconds: float = 0.0
    held_up: float = 0.0

    async def watch_client(self) -> None:
        """Add up by how much this program comes too late to what it wants to do: what came meanwhile lay in the socket."""
        while True:
            began = time.perf_counter()
            try:
                await asyncio.sleep(_TICK_S)
            finally:
                self.held_up += max(0.0, time.perf_counter() - began - _TICK_S)


async def _stream(subject: Subject, prompt: str, tokens: int, leave_after: int | None = None) -> Stream:
    """Have an answer streamed; with ``leave_after``, go away after so many events."""
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    stream, rest, began = Stream(), b"", time.perf_counter()
    watch = asyncio.create_task(stream.watch_client())
    try:
        async with subject.http.stream("POST", subject.url + "/chat", json=body) as answer:
            if answer.status_code != 200:
                raise Broken(f"a stream was refused with {answer.status_code}: {(await answer.aread()).decode()[:200]}")
            async for data in answer.aiter_raw():
                now = time.perf_counter() - began
                stream.reads.append(now)
                *events, rest = (rest + data).split(b"\n\n")
                for event in events:
                    line = event.removeprefix(b"data: ")
                    if line == b"[DONE]":
                        stream.done = True
                        continue
                    value = json.loads(line)
                    if "error" in value:
                        raise Broken(f"a stream ended with an error: {value['error'].get('message')}")
                    stream.arrivals.append(now)
                    stream.text += value["delta"]["content"]
                if leave_after is not None and len(stream.arrivals) >= leave_after:
                    return stream
    except httpx.HTTPError as error:
        raise Broken(f"a stream broke off after {len(stream.arrivals)} events: {error!r}") from error
    finally:
        watch.cancel()
        await asyncio.wait([watch])
    if not stream.done:
        raise Broken(f"a stream ended after {len(stream.arrivals)} events without [DONE]")
    stream.seconds = time.perf_counter() - began
    return stream


def percentile(values: Sequence[float], p: float) -> float:
    """Of all values, the smallest that at least p % do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)]


def _target(subject: Subject, workflow: str, name: str, default: Any = None) -> Any:
    return subject.targets.get(workflow, {}).get(name, default)


async def check_latency(subject: Subject, name: str, workflow: Latency, report: Reporter) -> None:
    """Time to the first token, between tokens, and in all, against the inventory's targets."""
    streams: list[Stream] = []
    with report.case("streams") as case:
        limit = asyncio.Semaphore(workflow.concurrency)

        async def one(index: int) -> None:
            async with limit:
                # an own beginning each: prompts that are known already would be quicker
                streams.append(await _stream(subject, f"{index}. {workflow.prompt}", workflow.tokens))

        await one(-1)
        streams.clear()
        await asyncio.gather(*map(one, range(workflow.requests)))
        case.passed(f"{len(streams)} streams of {workflow.tokens} tokens, {workflow.concurrency} at a time, all complete")
    if len(streams) < workflow.requests:
        return
    seen = {
        "ttft_ms": [s.arrivals[0] * 1000 for s in streams],
        "itl_ms": [(b - a) * 1000 for s in streams for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)],
        "total_ms": [s.seconds * 1000 for s in streams],
    }
    meaning = {"ttft_ms": "time to first token", "itl_ms": "time between tokens", "total_ms": "whole answer"}
    for metric, values in seen.items():
        with report.case(metric.removesuffix("_ms")) as case:
            found = {f"p{p}": round(percentile(values, p), 2) for p in PERCENTILES}
            targets: dict[str, float] = _target(subject, name, metric, {})
            case.figures.update({f"{metric}_{p}": v for p, v in found.items()})
            over = [
                f"{p} is {found[p]:.0f} ms, the target {target:g} ms" for p, target in targets.items() if p in found and found[p] > target
            ]
            shown = " / ".join(f"{v:.1f}" for v in found.values())
            if over:
                raise Broken(f"{meaning[metric]}: {'; '.join(over)} (p50/p95/p99 {shown} ms, {workflow.concurrency} at a time)")
            if not targets:
                case.skip(f"{meaning[metric]}, p50/p95/p99: {shown} ms; no target in validate_targets.{name}.{metric}")
            else:
                case.passed(f"{meaning[metric]}, p50/p95/p99: {shown} ms; targets {'/'.join(f'{t:g}' for t in targets.values())}")


async def check_streaming(subject: Subject, name: str, workflow: Streaming, report: Reporter) -> None:
    """Events come as they are made, and say what the whole answer says."""
    with report.case("not buffered") as case:
        # of three, the best counts; one whose client was held up says nothing, as it reads what has come in the meantime at once
        seen: list[tuple[float, float, Stream]] = []
        asked, until = 0, time.perf_counter() + workflow.within_s
        while len(seen) < 3 and (asked < 3 or time.perf_counter() < until):
            asked += 1
            stream = await _stream(subject, workflow.prompt, workflow.tokens)
            spread = (stream.reads[-1] - stream.reads[0]) / stream.seconds
            worth = min(spread / 0.5, len(stream.reads) / len(stream.arrivals) / 0.25)
            if worth < 1 and stream.held_up > 0.25 * stream.seconds:
                await asyncio.sleep(0.2)
                continue
            seen.append((worth, spread, stream))
            if worth >= 1:
                break
        if not seen:
            case.skip(
                f"this client was held up itself in each of {asked} streams, in the last for {stream.held_up:.2f} of its "
                f"{stream.seconds:.2f} s: its machine is too busy"
            )
            return
        worth, spread, stream = max(seen, key=lambda entry: entry[0])
        line = (
            f"{len(stream.arrivals)} events in {len(stream.reads)} reads, spread over {spread:.0%} of the answer's {stream.seconds:.2f} s"
        )
        case.figures.update(events=len(stream.arrivals), reads=len(stream.reads), spread=round(spread, 3))
        if worth < 1:
            raise Broken(f"the stream is buffered on its way: {line}")
        case.passed(line)
    with report.case("equal to the whole answer") as case:
        body = {"messages": [{"role": "user", "content": workflow.prompt}], "max_tokens": workflow.tokens, "temperature": 0}
        text = (await subject.post("/chat", {**body, "ignore_eos": True}))["message"]["content"]
        streamed = (await _stream(subject, workflow.prompt, workflow.tokens)).text
        if text != streamed:
            at = next((i for i, (a, b) in enumerate(zip(text, streamed, strict=False)) if a != b), min(len(text), len(streamed)))
            raise Broken(f"streamed and whole answer differ at character {at}: {streamed[at : at + 30]!r}, {text[at : at + 30]!r}")
        case.passed(f"{len(text)} characters")


async def check_cancel(subject: Subject, name: str, workflow: Cancel, report: Reporter) -> None:
    """A client that goes away takes its request out of the engine."""
    with report.case("engine stops") as case:
        if not subject.metrics and not subject.metrics_commands:
            case.skip("no metrics to see it in: set --metrics or --metrics-command")
            return
        before = await subject.counts()
        tokens = subject.max_model_len - 128
        body = {"messages": [{"role": "user", "content": workflow.prompt}], "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        whole = asyncio.create_task(subject.http.post(subject.url + "/chat", json=body))
        await asyncio.gather(*(_stream(subject, workflow.prompt, tokens, leave_after=2) for _ in range(workflow.streams)))
        whole.cancel()
        await asyncio.wait([whole])
        left, gone = workflow.streams + 1, time.perf_counter()
        while True:
            now = await subject.counts()
            took = time.perf_counter() - gone
            aborted = now.aborted - before.aborted
            # in a fleet that serves, others' requests run on
            if aborted >= left and (before.running or not now.running):
                break
            if took > workflow.within_s:
                raise Broken(
                    f"cancel does not reach the engine: {workflow.within_s:g} s after {left} clients had gone, {aborted:.0f} of their "
                    f"requests were dropped and {now.running:.0f} still run"
                )
            await asyncio.sleep(0.1)
        case.passed(f"{left} requests were out of the engine {took:.1f} s after their clients had gone", seconds_to_stop=round(took, 2))


def _filled(value: Any, words: Mapping[str, int]) -> Any:
    """``$max_model_len`` and its like, replaced by what this service has."""
    if isinstance(value, dict):
        return {k: _filled(v, words) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, words) for v in value]
    return words[value[1:]] if isinstance(value, str) and value.startswith("$") else value


async def _post_expecting(subject: Subject, path: str, content: bytes, headers: dict[str, str]) -> httpx.Response:
    """Ask before a large body is sent (``Expect: 100-continue``), as curl does.

    A server that refuses a body by its length, and has the connection reset by what it has not read, takes its own answer away.
    """
    url = httpx.URL(subject.url + path)
    tls = subject.tls if url.scheme == "https" else None
    reader, writer = await asyncio.open_connection(url.host, url.port or (443 if tls else 80), ssl=tls)
    try:
        given = {"Host": url.netloc.decode(), "Content-Length": str(len(content)), "Expect": "100-continue", "Connection": "close"}
        given |= ({"Authorization": f"Bearer {subject.key}"} if subject.key else {}) | headers
        parser, answer, said = h11.Connection(h11.CLIENT), None, b""
        writer.write(parser.send(h11.Request(method="POST", target=url.raw_path, headers=list(given.items()))) or b"")
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                parser.receive_data(await asyncio.wait_for(reader.read(65536), subject.http.timeout.read))
            elif isinstance(event, h11.InformationalResponse):
                writer.write((parser.send(h11.Data(data=content)) or b"") + (parser.send(h11.EndOfMessage()) or b""))
            elif isinstance(event, h11.Response):
                answer = event
            elif isinstance(event, h11.Data):
                said += event.data
            elif answer is not None:
                kept = [(name, value) for name, value in answer.headers.raw_items() if name.lower() != b"transfer-encoding"]
                return httpx.Response(answer.status_code, headers=kept, content=said)
            else:
                raise httpx.RemoteProtocolError("the connection was closed without an answer")
    except h11.RemoteProtocolError as error:
        raise httpx.RemoteProtocolError(str(error)) from error
    finally:
        writer.close()


async def check_requests(subject: Subject, name: str, workflow: Requests, report: Reporter) -> None:
    """What is refused, and how the refusal looks."""
    words = {"max_model_len": subject.max_model_len, "max_body_bytes": subject.max_body_bytes}
    for entry in workflow.cases:
        if subject.kind not in entry.get("at", workflow.at):
            continue
        with report.case(entry["name"]) as case:
            filled, expect = _filled(entry, words), entry["expect"]
            content = entry["raw"].encode() if "raw" in entry else b""
            if "body" in filled:
                content = json.dumps(filled["body"]).encode()
            if "pad_bytes" in filled:  # spaces around JSON mean nothing
                content += b" " * max(0, int(filled["pad_bytes"]) + 1 - len(content))
            headers = {"Content-Type": "application/json", "X-Request-ID": "validate-1", **entry.get("headers", {})}
            if entry.get("without_key"):
                headers["Authorization"] = ""
            try:
                if "pad_bytes" in filled:
                    answer = await _post_expecting(subject, entry["path"], content, headers)
                else:
                    answer = await subject.http.request(
                        entry.get("method", "POST"), subject.url + entry["path"], content=content or None, headers=headers
                    )
            except (httpx.HTTPError, OSError, EOFError) as error:
                raise Broken(f"no answer: {error!r}") from error
            problems = []
            if answer.status_code != expect["status"]:
                problems.append(f"status {answer.status_code} instead of {expect['status']}")
            try:
                said = answer.json().get("error", {})
            except (ValueError, AttributeError):
                said = {}
            if answer.status_code >= 400:
                for key in ("type", "param"):
                    if key in expect and said.get(key) != expect[key]:
                        problems.append(f"error.{key} {said.get(key)!r} instead of {expect[key]!r}")
                if not said.get("message") or not said.get("request_id") or said.get("code") != answer.status_code:
                    problems.append("the body is no error with message, code and request_id")
            if "x-request-id" not in answer.headers:
                problems.append("no X-Request-ID")
            problems += [f"no header {header}" for header in expect.get("headers", []) if header.lower() not in answer.headers]
            if problems:
                raise Broken(f"{'; '.join(problems)}: {answer.text[:120]!r}")
            case.passed(f"{answer.status_code} {said.get('type', '')}".strip())


Check = Callable[[Subject, str, Any, Any], Coroutine[Any, Any, None]]
CHECKS: dict[str, tuple[type[Workflow], Check]] = {
    "persona": (Persona, check_persona),
    "deterministic": (Deterministic, check_deterministic),
    "latency": (Latency, check_latency),
    "streaming": (Streaming, check_streaming),
    "cancel": (Cancel, check_cancel),
    "requests": (Requests, check_requests),
}


# --- results ---


class Case:
    """One case while it is looked at."""

    def __init__(self, reporter: Reporter, workflow: str, name: str) -> None:
        self._reporter, self.figures = reporter, dict[str, Any]()
        self._result = Result(workflow, name, "fail", "it said nothing")

    def passed(self, line: str, **figures: Any) -> None:
        """It is as it should be."""
        self._result.verdict, self._result.line = "pass", line
        self.figures.update(figures)

    def skip(self, line: str) -> None:
        """It cannot be said."""
        self._result.verdict, self._result.line = "skip", line

    def __enter__(self) -> Case:
        """Begin."""
        self._began = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        """Keep the result, and show it; what a broken service answers may break a check in any way."""
        if error is not None and not isinstance(error, Exception):
            return False
        if error is not None:
            self._result.verdict = "fail"
            self._result.line = str(error) if isinstance(error, Broken) else f"the answer cannot be read: {error!r}"
        self._result.figures, self._result.seconds = self.figures, round(time.perf_counter() - self._began, 3)
        self._reporter.add(self._result)
        return True


class Reporter:
    """Results of a subject: shown as they come, and written down."""

    def __init__(self, subject: str, show: Callable[[str], None] = print) -> None:
        self.subject, self.results, self._show, self._workflow = subject, list[Result](), show, ""

    def begin(self, workflow: str) -> None:
        """The cases that follow are of this workflow."""
        self._workflow = workflow

    def case(self, name: str) -> Case:
        """A case, as a context."""
        return Case(self, self._workflow, name)

    def add(self, result: Result) -> None:
        """Keep a result."""
        self.results.append(result)
        self._show(f"{result.verdict.upper():<5} {result.workflow + ' / ' + result.case:<46} {result.line}")

    @property
    def failed(self) -> list[Result]:
        """What failed."""
        return [result for result in self.results if result.verdict == "fail"]

    @property
    def verdict(self) -> str:
        """One sentence."""
        skipped = sum(result.verdict == "skip" for result in self.results)
        failed = f"{len(self.failed)} FAILED" if self.failed else "none failed"
        return f"{self.subject}: {len(self.results)} cases, {failed}" + (f", {skipped} could not be judged" if skipped else "")

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return {"subject": self.subject, "passed": not self.failed, "results": [dataclasses.asdict(result) for result in self.results]}

    def junit(self) -> str:
        """The form that CI systems read."""
        suite = ET.Element(
            "testsuite",
            name=self.subject,
            tests=str(len(self.results)),
            failures=str(len(self.failed)),
            skipped=str(sum(result.verdict == "skip" for result in self.results)),
            time=str(round(sum(result.seconds for result in self.results), 3)),
        )
        for result in self.results:
            case = ET.SubElement(
                suite, "testcase", classname=f"{self.subject}.{result.workflow}", name=result.case, time=str(result.seconds)
            )
            if result.verdict == "pass":
                ET.SubElement(case, "system-out").text = result.line
            else:
                ET.SubElement(case, "failure" if result.verdict == "fail" else "skipped", message=result.line)
        ET.indent(suite)
        return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


# --- what is given ---


def load_workflows(directories: Iterable[Path]) -> dict[str, tuple[Workflow, Check]]:
    """Read workflows, by name (the file's).

    Raises:
        Unusable: a file is not what its check wants.
    """
    found: dict[str, tuple[Workflow, Check]] = {}
    for directory in directories:
        files = sorted(directory.glob("*.yml"))
        if not files:
            raise Unusable(f"--workflows is '{directory}', which holds no *.yml; set it to a directory of workflows.")
        for path in files:
            try:
                data = yaml.safe_load(path.read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                raise Unusable(f"{path.name} is no YAML: {' '.join(str(error).split())}.") from error
            kind = data.pop("check", None) if isinstance(data, dict) else None
            if kind not in CHECKS:
                raise Unusable(f"{path.name}: check is '{kind}'; set it to one of {', '.join(CHECKS)}.")
            spec, check = CHECKS[kind]
            known = {f.name: f for f in dataclasses.fields(spec)}
            for key in data:
                if key not in known:
                    raise Unusable(f"{path.name}: {key} is nothing that {kind} knows; set one of {', '.join(known)}.")
            for key, entry in known.items():
                if key not in data and entry.default is dataclasses.MISSING:
                    raise Unusable(f"{path.name}: {key} is not set, and {kind} wants it.")
            found[path.stem] = (spec(**data), check)
    return found


def load_golden(paths: Sequence[Path], model: str, persona: str | None) -> dict[str, Any]:
    """Read a golden set: the first that is there, in a directory the one of the model; empty where there is none.

    Raises:
        Unusable: it is of another model or persona.
    """
    files = [path / f"{model.replace('/', '--')}.json" if path.is_dir() else path for path in paths]
    path = next((path for path in files if path.is_file()), None)
    if path is None:
        return {}
    golden: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key, seen in (("model", model), ("persona", persona)):
        if seen is not None and golden[key] != seen:
            raise Unusable(f"--golden is '{path}', made of {key} '{golden[key]}'; this is '{seen}'. Make it anew (--make-golden).")
    return golden


def load_renderers(subject: Subject) -> None:
    """What renders prompts beside the service: the tokenizer alone, and what each backend has for one, where it is installed."""
    from transformers import AutoTokenizer

    path, said = str(subject.model_path), subject.persona or ""
    tokenizer = subject.tokenizer = AutoTokenizer.from_pretrained(path)

    def alone(messages: Turns) -> list[int]:
        turns = messages if messages[0]["role"] == "system" else [{"role": "system", "content": said}, *messages]
        ids: list[int] = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        return ids

    subject.renderers["the tokenizer alone"] = alone
    try:
        from qwen_coder_service import persona
    except ImportError:
        return
    subject.renderers["the transformers backend"] = lambda messages: persona.render(tokenizer, messages, said)
    try:
        from vllm.tokenizers import get_tokenizer
    except ImportError:
        return
    of_vllm = get_tokenizer(path)
    subject.renderers["the vllm backend"] = lambda messages: persona.render(of_vllm, messages, said)


# --- golden sets ---


def _prompts(workflows: Mapping[str, tuple[Workflow, Check]]) -> list[tuple[str, Turns, int]]:
    prompts: list[tuple[str, Turns, int]] = []
    for name, (workflow, _) in workflows.items():
        if isinstance(workflow, Persona):
            prompts += [(f"{name}/{entry['name']}", entry["messages"], 1) for entry in workflow.conversations]
        elif isinstance(workflow, Deterministic):
            prompts += [(f"{name}/{entry['name']}", entry["messages"], entry["max_tokens"]) for entry in workflow.prompts]
    return prompts


async def make_golden(subject: Subject, model: str, prompts: list[tuple[str, Turns, int]], by_transformers: bool) -> dict[str, Any]:
    """Answers to keep: of the service, or of transformers alone (needs --model-path, and memory for the weights)."""
    made: dict[str, Any] = {}
    if by_transformers:
        import torch
        from transformers import AutoModelForCausalLM

        network = AutoModelForCausalLM.from_pretrained(str(subject.model_path), dtype=torch.float32)
    for name, messages, max_tokens in prompts:
        entry: dict[str, Any] = {"messages": messages, "max_tokens": max_tokens}
        if by_transformers:
            prompt = subject.renderers["the tokenizer alone"](messages)
            ids = torch.tensor([prompt])
            # the penalty of the model's own generation_config applies to both sides
            greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            out = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, **greedy)
            answer = out[0, len(prompt) :].tolist()
            text = subject.tokenizer.decode(answer, skip_special_tokens=True)
        else:
            whole = await subject.ask(messages, max_tokens)
            prompt, answer, text = whole["prompt_token_ids"], whole["token_ids"], whole["message"]["content"]
        entry |= {"prompt_token_ids": prompt, "token_ids": answer, "text": text}
        if subject.tokenizer is not None:
            said = messages[0]["content"] if messages[0]["role"] == "system" else subject.persona
            entry["system_token_ids"] = subject.tokenizer.encode(said, add_special_tokens=False)
        made[name] = entry
    return {"model": model, "persona": subject.persona, "by": "transformers" if by_transformers else "the service", "prompts": made}


def dump_golden(golden: dict[str, Any]) -> str:
    """A golden set as its file has it: a prompt's lists stay on one line each."""
    prompts = ",\n".join(
        f"    {json.dumps(name)}: {{\n"
        + ",\n".join(f"      {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in entry.items())
        + "\n    }"
        for name, entry in golden["prompts"].items()
    )
    head = "".join(f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)},\n" for k, v in golden.items() if k != "prompts")
    return f'{{\n{head}  "prompts": {{\n{prompts}\n  }}\n}}\n'


# --- the whole ---


async def validate(subject: Subject, workflows: Mapping[str, tuple[Workflow, Check]], reporter: Reporter) -> None:
    """Run workflows, one after the other."""
    for name, (workflow, check) in workflows.items():
        if subject.kind in workflow.at:
            reporter.begin(name)
            await check(subject, name, workflow, reporter)


async def connect(subject: Subject) -> str:
    """Find out what is served.

    Raises:
        Unusable: nobody answers.
    """
    try:
        answer = await subject.http.get(f"{subject.url}/v1/models")
        model = answer.json()["data"][0]
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise Unusable(f"--url is '{subject.url}', and GET /v1/models there gives no model ({error!r}); set it to a service.") from error
    subject.max_model_len = model["max_model_len"]
    return str(model["id"])


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="what stands before /chat")
    parser.add_argument("--name", help="of the subject, in results (default: the URL)")
    parser.add_argument("--kind", choices=["gateway", "node"], help="whose workflows (default: gateway with --key-file, else node)")
    parser.add_argument("--ca", help="file with the CA of the certificate")
    parser.add_argument("--key-file", type=Path, help="file with a kin client's API key")
    parser.add_argument("--workflows", type=Path, action="append", help="directory of workflows (default: the project's; more than once)")
    parser.add_argument("--only", action="append", default=[], help="this workflow alone (more than once)")
    parser.add_argument(
        "--golden",
        type=Path,
        action="append",
        default=[],
        help="golden set, or a directory with <model>.json (more than once: the first that is there); without, answers are compared with "
        "each other, and with what workflows expect",
    )
    parser.add_argument("--persona", help="the persona that the service was given (default: the golden set's)")
    parser.add_argument("--targets", default="{}", help="JSON: workflow -> {ttft_ms: {p50: ...}, same_under_load: 0..1}")
    parser.add_argument("--metrics", action="append", default=[], help="URL of a node's metrics (more than once)")
    parser.add_argument("--metrics-command", action="append", default=[], help="command that prints a node's metrics (more than once)")
    parser.add_argument("--model-path", type=Path, help="the model's directory, to render prompts here too")
    parser.add_argument("--max-body-bytes", type=int, default=4 << 20, help="largest body that the service takes")
    parser.add_argument("--timeout", type=float, default=120, help="seconds of silence that are borne")
    parser.add_argument("--json", type=Path, help="write results there")
    parser.add_argument("--junit", type=Path, help="write results as JUnit XML there")
    parser.add_argument("--make-golden", type=Path, help="write a golden set of what is answered now, and validate nothing")
    parser.add_argument("--by-transformers", action="store_true", help="with --make-golden: let transformers answer, not the service")
    return parser.parse_args(argv)


async def main_async(given: argparse.Namespace) -> int:
    """Validate, or make a golden set."""
    workflows = load_workflows(given.workflows or [VALIDATION / "workflows"])
    for name in given.only:
        if name not in workflows:
            raise Unusable(f"--only is '{name}'; set it to one of {', '.join(workflows)}.")
    workflows = {name: workflow for name, workflow in workflows.items() if not given.only or name in given.only}
    key = given.key_file.read_text(encoding="utf-8").strip() if given.key_file else None
    tls = ssl.create_default_context(cafile=given.ca) if given.url.startswith("https") else None
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(verify=tls or False, headers=headers, timeout=given.timeout, limits=limits, trust_env=False) as http:
        subject = Subject(
            name=given.name or given.url, kind=given.kind or ("gateway" if key else "node"), url=given.url.rstrip("/"), key=key,
            persona=given.persona, golden={}, targets=json.loads(given.targets), metrics=given.metrics,
            metrics_commands=given.metrics_command, model_path=given.model_path, max_body_bytes=given.max_body_bytes, http=http, tls=tls,
        )  # fmt: skip
        model = await connect(subject)
        if given.make_golden is None:
            subject.golden = load_golden(given.golden, model, given.persona)
            subject.persona = subject.persona or subject.golden.get("persona")
        if subject.model_path is not None:
            if subject.persona is None:
                raise Unusable("--persona is not set, and no golden set says it; set it to the service's persona.")
            load_renderers(subject)
        if given.make_golden is not None:
            golden = await make_golden(subject, model, _prompts(workflows), given.by_transformers)
            given.make_golden.write_text(dump_golden(golden), encoding="utf-8")
            print(f"{given.make_golden}: {len(golden['prompts'])} prompts of {model}, answered by {golden['by']}")
            return 0
        reporter = Reporter(subject.name, lambda line: print(line, flush=True))
        await validate(subject, workflows, reporter)
    if given.json:
        given.json.write_text(json.dumps(reporter.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if given.junit:
        given.junit.write_text(reporter.junit(), encoding="utf-8")
    print(reporter.verdict)
    return 1 if reporter.failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    given = options(argv)
    try:
        return asyncio.run(main_async(given))
    except (Unusable, OSError, json.JSONDecodeError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
