#!/usr/bin/python
"""Ansible module: whether a service that just started is fit for clients, asked on the host itself before it gets any."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

DOCUMENTATION = """
module: qwen_gate
short_description: Prove a service before clients get to it, or measure it
description:
  - Asks the service on loopback for the answers of a golden set, for the same answer twice, and for short streams whose speed is compared
    with what was measured before. Meanwhile, and for as long as it is told, the service must neither end nor stop being ready.
options:
  state:
    description: C(proved) judges; C(measured) only measures, and a service that does not answer has no figures.
    choices: [proved, measured]
    default: proved
  url:
    description: Where the service listens.
    type: str
    default: http://127.0.0.1:8080
  env_file:
    description: The env file of the release, for the persona.
    type: path
    required: true
  golden:
    description: A golden set (docs/validation.md), or an empty dictionary.
    type: dict
    default: {}
  golden_share:
    description: The share of the golden set's answers that must be right, to the token.
    type: float
    default: 1.0
  requests:
    description: Streams in a window, of which there are several; its figures are their medians.
    type: int
    default: 12
  tokens:
    description: Tokens of each stream.
    type: int
    default: 16
  reference:
    description: What C(measured) returned before; without, speed is not judged.
    type: dict
    default: {}
  slower:
    description: How many times as long as before a first token, or the tokens after it, may take.
    type: float
    default: 1.5
  watch_seconds:
    description: How long the service is watched at least.
    type: int
    default: 30
  timeout:
    description: Seconds that an answer may take.
    type: int
    default: 120
  unit:
    description: The unit that runs it.
    type: str
    default: qwen-coder.service
author: the project
"""

RETURN = """
measured:
  description: Medians in milliseconds, C(ttft_ms) to the first token and C(token_ms) from one token to the next.
lines:
  description: What was found, in sentences.
"""

# below these, a difference is what else a machine does, and not a slower release
LEAST = {"ttft_ms": 40.0, "token_ms": 5.0}
NAMES = {"ttft_ms": "the first token", "token_ms": "a token"}
# a window or two may fall into what else a machine does: the figures of a release are the medians of so many, and a release is slower than
# one before if it is so in every window of as many, and of all the time for which it is watched
WINDOWS = 3
QUESTION = "Write a function that returns the sum of two numbers."


class GateError(Exception):
    """What is wrong with the service, in a sentence."""


class Service:
    """A service by its address."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        # loopback, whatever proxy the host's environment names
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer to a request.

        Raises:
            GateError: there is none, or it is an error.
        """
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            return self.opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            raise GateError(f"{path} is answered with {error.code}: {error.read(300).decode(errors='replace')}") from error
        except OSError as error:
            raise GateError(f"{path} is not answered: {error}") from error

    def ready(self) -> bool:
        """Whether it says that it is."""
        try:
            with self.open("/ready"):
                return True
        except GateError:
            return False

    def ask(self, messages: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
        """The greedy answer, whole, with token ids.

        Raises:
            GateError: there is none.
        """
        body = {"messages": messages, "max_tokens": tokens, "temperature": 0, "seed": 0, "return_token_ids": True}
        try:
            with self.open("/chat", body) as answer:
                whole: dict[str, Any] = json.load(answer)
        except (OSError, ValueError) as error:
            raise GateError(f"an answer broke off: {error}") from error
        return whole

    def stream(self, number: int, tokens: int) -> tuple[float, float]:
        """Milliseconds to the first token, and from one to the next, of a stream.

        Raises:
            GateError: it is not whole.
        """
        body = {
            "messages": [{"role": "user", "content": f"{QUESTION} {number}"}],
            "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        began, first, last = time.monotonic(), None, ""
        try:
            with self.open("/chat", body) as answer:
                for line in answer:
                    if line.startswith(b"data: "):
                        last = line.decode().strip()
                        first = time.monotonic() if first is None else first
        except (OSError, ValueError) as error:
            raise GateError(f"a stream broke off: {error}") from error
        if first is None or last != "data: [DONE]":
            raise GateError(f"a stream is not whole: it ended with {last[:200]!r}")
        ended = time.monotonic()
        return (first - began) * 1000, (ended - first) * 1000 / max(tokens - 1, 1)

    def window(self, requests: int, tokens: int) -> dict[str, float]:
        """The medians of some streams, one after the other.

        Raises:
            GateError: one failed.
        """
        seen = [self.stream(number, tokens) for number in range(requests)]
        return {
            "ttft_ms": round(statistics.median(ttft for ttft, _ in seen), 2),
            "token_ms": round(statistics.median(token for _, token in seen), 2),
        }


def persona_of(env_file: Path) -> str:
    """The persona that a release is given."""
    for line in env_file.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition("=")
        if name == "QWEN_PERSONA_PROMPT":
            return str(json.loads(value)) if value.startswith('"') else value
    return ""


def golden_problem(service: Service, golden: dict[str, Any], share: float) -> tuple[str, str]:
    """(What is wrong with its answers to a golden set, what was found)."""
    right, wrong = 0, []
    for name, entry in golden["prompts"].items():
        ids, expected = service.ask(entry["messages"], entry["max_tokens"]).get("token_ids", []), entry["token_ids"]
        if ids == expected:
            right += 1
            continue
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, expected, strict=False))
        wrong.append(f"'{name}' from token {len(list(same))} on")
    total = right + len(wrong)
    found = f"{right} of {total} golden answers are right"
    if total and right < share * total:
        return f"{found}; wrong are {', '.join(wrong[:3])}{' and others' if len(wrong) > 3 else ''}", found
    return "", found


def slower_than(measured: dict[str, float], reference: dict[str, Any], slower: float) -> list[str]:
    """What took longer than it may, in sentences."""
    found = []
    for name, what in NAMES.items():
        if name not in reference:
            continue
        before, now = float(reference[name]), measured[name]
        if now > slower * max(before, LEAST[name]):
            found.append(f"{what} takes {now:.0f} ms, {now / max(before, 0.01):.1f} times the {before:.0f} ms of the release before")
    return found


def fastest(windows: list[dict[str, float]]) -> dict[str, float]:
    """Of some windows, the best of each figure: chance makes a window slower, never faster."""
    return {name: min(window[name] for window in windows) for name in windows[0]}


def measure(service: Service, options: dict[str, Any]) -> dict[str, float]:
    """What a service takes in its usual moments: of some windows, the median of each figure.

    Raises:
        GateError: it does not answer.
    """
    service.stream(0, options["tokens"])  # what the first request after a pause costs is not its pace
    windows = [service.window(options["requests"], options["tokens"]) for _ in range(WINDOWS)]
    return {name: statistics.median(window[name] for window in windows) for name in windows[0]}


def life(unit: str) -> dict[str, str]:
    """Which run of a unit this is, and how often systemd had to start it anew."""
    out = subprocess.run(
        ["systemctl", "show", "--property=InvocationID,NRestarts,ActiveState", unit], capture_output=True, text=True, check=False
    ).stdout
    return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)


def prove(service: Service, options: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    """(Figures, what was found).

    Raises:
        GateError: it is not fit for clients.
    """
    began, at_first, lines = time.monotonic(), life(options["unit"]), []

    def check() -> None:
        now, seconds = life(options["unit"]), time.monotonic() - began
        if now != at_first or now.get("ActiveState") != "active":
            raise GateError(f"{options['unit']} ended {seconds:.0f} s after it was ready")
        if not service.ready():
            raise GateError(f"the service stopped being ready {seconds:.0f} s after it was")

    try:
        persona, golden = persona_of(Path(options["env_file"])), options["golden"]
        if not golden.get("prompts"):
            lines.append("there is no golden set of its model")
        elif golden.get("persona") != persona:
            lines.append("the golden set is of another persona and says nothing about its answers")
        else:
            problem, found = golden_problem(service, golden, options["golden_share"])
            if problem:
                raise GateError(problem)
            lines.append(found)
        first, second = (service.ask([{"role": "user", "content": QUESTION}], 2 * options["tokens"]) for _ in range(2))
        if not first.get("token_ids"):
            raise GateError("an answer is empty")
        if first["token_ids"] != second.get("token_ids"):
            raise GateError("the same question has two different greedy answers")
        windows: list[dict[str, float]] = []
        problems: list[str] = []
        while True:
            windows.append(service.window(options["requests"], options["tokens"]))
            problems = slower_than(fastest(windows), options["reference"], options["slower"])
            if not problems or (len(windows) >= WINDOWS and time.monotonic() - began >= options["watch_seconds"]):
                break
            check()
        measured = fastest(windows)
        if problems:
            raise GateError(f"{' and '.join(problems)}; at most {options['slower']:g} times is allowed")
    except GateError:
        check()  # a service that ended says more than a request that failed
        raise
    lines.append(f"the first token takes {measured['ttft_ms']:.0f} ms, each after it {measured['token_ms']:.1f} ms")
    while True:
        check()
        if (left := began + options["watch_seconds"] - time.monotonic()) <= 0:
            break
        time.sleep(min(1.0, left))
    lines.append(f"it stayed up for {time.monotonic() - began:.0f} s")
    return measured, lines


def main() -> None:
    """Run as a module."""
    from ansible.module_utils.basic import AnsibleModule

    module = AnsibleModule(
        argument_spec={
            "state": {"choices": ["proved", "measured"], "default": "proved"},
            "url": {"type": "str", "default": "http://127.0.0.1:8080"},
            "env_file": {"type": "path", "required": True},
            "golden": {"type": "dict", "default": {}},
            "golden_share": {"type": "float", "default": 1.0},
            "requests": {"type": "int", "default": 12},
            "tokens": {"type": "int", "default": 16},
            "reference": {"type": "dict", "default": {}},
            "slower": {"type": "float", "default": 1.5},
            "watch_seconds": {"type": "int", "default": 30},
            "timeout": {"type": "int", "default": 120},
            "unit": {"type": "str", "default": "qwen-coder.service"},
        },
        supports_check_mode=True,
    )
    options: dict[str, Any] = module.params
    service = Service(options["url"], options["timeout"])
    if options["state"] == "measured":
        try:
            module.exit_json(changed=False, measured=measure(service, options), lines=[])
        except GateError as error:
            module.exit_json(changed=False, measured={}, lines=[str(error)])
    try:
        measured, lines = prove(service, options)
    except GateError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, measured=measured, lines=lines)


if __name__ == "__main__":
    main()
