#!/usr/bin/env python3
"""Let Debian's Prometheus scrape a fleet that is not there, and say what it takes: memory, time of the rules, samples.

    scripts/prometheus_scale.py --nodes 50 --seconds 300

A server on loopback gives every simulated host the metrics that a real one gave (tests/scrapes: service, host with GPUs, gateway, recorded
in the lab under load), with values of its own that move, as many processors as a GPU host has, and every node behind each gateway. Rules,
intervals and limits are those of role prometheus; with ``--history``, the windows of the objectives are full from the start, and with
``--head``, Prometheus has in memory what it would have scraped in so many minutes (it compacts when it has three hours). The exit
status is 1 when Prometheus took more than ``--memory-mib``, a group of rules more than ``--rule-seconds``, or a scrape or rule failed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jinja2
import yaml

ROOT = Path(__file__).resolve().parent.parent
SCRAPES = ROOT / "tests/scrapes"
ROLE = ROOT / "roles/prometheus"
DEFAULTS: dict[str, Any] = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
VARS: dict[str, Any] = yaml.safe_load((ROLE / "vars/main.yml").read_text())
ENVIRONMENT: dict[str, str] = VARS["__prometheus_units"]["prometheus"]["environment"]
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(\{.*\})? (\S+)$")
# what the host of the recording is called there
RECORDED_HOST = "node1"
# what rules look at over hours and days: job -> beginnings of series; the rest needs no history
LOOKED_BACK_AT = {
    "qwen-service": (
        "qwen_time_to_first_token_seconds_count", 'qwen_time_to_first_token_seconds_bucket{le="2.0"',
        "vllm:inter_token_latency_seconds_count", "vllm:inter_token_latency_seconds_bucket",
    ),
    "qwen-host": ("node_filesystem_avail_bytes",),
    "qwen-gateway": ('haproxy_frontend_http_responses_total{proxy="kin"',),
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One line of a scrape: series, value, and whether it only rises (what a histogram has rises as one)."""

    series: str
    value: float
    rises: bool


def parse(text: str) -> list[Sample]:
    """The samples of a scrape; raise ValueError for a line that is none."""
    samples, kinds = [], {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            kinds[name] = kind
        if not line or line.startswith("#"):
            continue
        found = SAMPLE.match(line)
        if not found:
            raise ValueError(f"not a sample: {line!r}")
        name = found[1]
        family = name if name in kinds else re.sub(r"_(bucket|sum|count)$", "", name)
        samples.append(Sample(name + (found[2] or ""), float(found[3]), kinds.get(family) in ("counter", "histogram", "summary")))
    return samples


def multiplied(samples: Sequence[Sample], label: str, of: str, values: Sequence[str]) -> list[Sample]:
    """Series of one value of a label for many: those with ``label="of"`` once for each of ``values``, other values of it gone."""
    mark = re.compile(rf'(?<=[{{,]){label}="([^"]*)"')
    result = []
    for sample in samples:
        seen = mark.search(sample.series)
        if not seen:
            result.append(sample)
        elif seen[1] == of:
            result += [Sample(mark.sub(f'{label}="{value}"', sample.series), sample.value, sample.rises) for value in values]
    return result


class Fleet:
    """What simulated hosts answer.

    Args:
        nodes: their number.
        gateways: that of the gateways before them.
        cpus: processors of each host.
    """

    def __init__(self, nodes: int, gateways: int, cpus: int) -> None:
        recorded = {path.stem: parse(path.read_text()) for path in SCRAPES.glob("*.prom")}
        names = [f"node{number}" for number in range(1, nodes + 1)]
        doors = [f"gw{number}" for number in range(1, gateways + 1)]
        host = recorded["host"]
        for label, of, values in (
            ("cpu", "0", [str(cpu) for cpu in range(cpus)]),
            ("gpu", "0", [str(gpu) for gpu in range(8)]),
            ("mountpoint", "/", ["/", "/boot", "/home", "/opt", "/var"]),
        ):
            host = multiplied(host, label, of, values)
        self.jobs: dict[str, tuple[list[str], list[Sample]]] = {
            "qwen-service": (names, recorded["service"]),
            "qwen-host": (names + doors, host),
            "qwen-gateway": (doors, multiplied(recorded["gateway"], "server", RECORDED_HOST, names)),
        }
        self.began = time.time()

    def value(self, sample: Sample, number: int, at: float) -> float:
        """A series' value on a host at a time: counters and histograms grow by a tenth in a minute, gauges waver."""
        return self.course(sample, number, [at])[0]

    def course(self, sample: Sample, number: int, moments: Sequence[float]) -> list[float]:
        """The same for many moments."""
        value, began, share = sample.value, self.began, 1 + number / 100
        if "timestamp_seconds" in sample.series and "host_metrics" in sample.series:
            return list(moments)
        # what is yes or no, an id, a moment in time or infinite stays
        if value in (0, 1) or value > 1e9 or not math.isfinite(value):
            rise = 1e6 if sample.rises and value > 1e9 else 0
            return [value + (at - began) * rise for at in moments] if rise else [value] * len(moments)
        if sample.rises:
            return [value * share * (1 + (at - began) / 600) for at in moments]
        return [value * (1 + 0.05 * math.sin((at - began) / 60 + number)) for at in moments]

    def scrape(self, job: str, host: str) -> bytes:
        """What a host answers now."""
        hosts, samples = self.jobs[job]
        number, at = hosts.index(host), time.time()
        lines = [f"{sample.series} {self.value(sample, number, at)!r}\n" for sample in samples]
        # names of hosts that stand in labels; those behind a gateway have theirs
        text = "".join(lines)
        return (text if job == "qwen-gateway" else text.replace(f'"{RECORDED_HOST}"', f'"{host}"')).encode()

    def named(self, job: str, host: str) -> list[tuple[str, Sample]]:
        """The series of a host as Prometheus keeps them, and their samples of the recording."""
        own, result = f'job="{job}",instance="{host}"', []
        dropped = VARS["__prometheus_dropped"].get(job, [])
        for sample in self.jobs[job][1]:
            name, brace, labels = sample.series.partition("{")
            values = {"__name__": name, **dict(re.findall(r'(\w+)="([^"]*)"', labels))}
            if any(re.fullmatch(rule["regex"], ";".join(values.get(of, "") for of in rule["source_labels"])) for rule in dropped):
                continue
            series = f"{name}{{{own},{labels}" if brace else f"{name}{{{own}}}"
            result.append((series if job == "qwen-gateway" else series.replace(f'"{RECORDED_HOST}"', f'"{host}"'), sample))
        return result

    def history(self, hours: float, step: float, before: float) -> Iterator[str]:
        """OpenMetrics lines of what rules look back at, of so many hours until so many seconds ago."""
        end = time.time() - before - step
        steps = int(hours * 3600 / step)
        for job, (hosts, _) in self.jobs.items():
            # a series of all hosts after the other
            for series, sample in itertools.chain.from_iterable(zip(*(self.named(job, host) for host in hosts), strict=True)):
                if not sample.series.startswith(LOOKED_BACK_AT[job]) or ("inter_token" in sample.series and not _counts(sample.series)):
                    continue
                for at in range(steps):
                    # a counter that comes to its present value; a gauge that wavers
                    value = sample.value * (at / steps) if sample.rises else sample.value * (1 + 0.05 * math.sin(at))
                    yield f"{series} {value:.6g} {end - (steps - at) * step:.3f}\n"


def _counts(series: str) -> bool:
    return "_count" in series or 'le="0.1"' in series


@contextlib.contextmanager
def serving(fleet: Fleet) -> Iterator[int]:
    """Serve the fleet's metrics on a port of loopback: ``/<job>/<host>``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _, job, host = self.path.split("/")
            body = fleet.scrape(job, host)
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

        def handle_error(self, *_: object) -> None:
            """Prometheus went away, or was tired of waiting: it counts that itself."""

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()


def configuration(fleet: Fleet, port: int, own_port: int, interval: str, folder: Path) -> Path:
    """Write prometheus.yml with the role's rules, and what the inventory would say is expected."""
    expected = [
        {"record": "qwen:targets_expected", "expr": f"vector({len(hosts)})", "labels": {"job": job}}
        for job, (hosts, _) in fleet.jobs.items()
    ]
    inventory = folder / "inventory.yml"
    inventory.write_text(yaml.safe_dump({"groups": [{"name": "qwen-inventory", "rules": expected}]}))
    scrapes = [
        {
            "job_name": f"{job}/{host}",
            "metrics_path": f"/{job}/{host}",
            "static_configs": [{"targets": [f"127.0.0.1:{port}"], "labels": {"job": job, "instance": host}}],
            "metric_relabel_configs": VARS["__prometheus_dropped"].get(job, []),
        }
        for job, (hosts, _) in fleet.jobs.items()
        for host in hosts
    ]
    scrapes.append({
        "job_name": "prometheus",
        "static_configs": [{"targets": [f"127.0.0.1:{own_port}"], "labels": {"job": "prometheus", "instance": "mon1"}}],
    })  # fmt: skip
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump({
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": [*map(str, sorted((ROLE / "files/rules").glob("*.yml"))), str(inventory)],
        "scrape_configs": scrapes,
    }))  # fmt: skip
    return file


def environment(nodes: int) -> dict[str, str]:
    """What the role sets for a fleet of so many nodes."""
    values = {"prometheus_nodes": [""] * nodes}
    values["prometheus_memory_high_mib"] = jinja2.Template(DEFAULTS["prometheus_memory_high_mib"]).render(values)
    return {name: jinja2.Template(value).render(values) for name, value in ENVIRONMENT.items()}


@dataclass
class Seen:
    """What Prometheus took: bytes at most (and of them what is no mapped file), seconds at most for one evaluation of a group of rules, for
    all of them, and their median; when the slowest was seen.
    """

    series: int = 0
    samples_per_second: float = 0.0
    memory_bytes: int = 0
    heap_bytes: int = 0
    compactions: int = 0
    slowest_group: str = ""
    slowest_group_seconds: float = 0.0
    slowest_group_at: str = ""
    all_groups_seconds: float = 0.0
    usual_all_groups_seconds: float = 0.0
    slowest_scrape_seconds: float = 0.0
    cpu_cores: float = 0.0
    disk_bytes: int = 0
    evaluations: int = 0
    firing: int = 0
    failures: int = 0


class Prometheus:
    """The packaged Prometheus, in a folder of its own, from entering until leaving the context."""

    def __init__(self, fleet: Fleet, port: int, interval: str, folder: Path, idle: bool = False, cgroup: Path | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.data, self.log = folder / "data", folder / "log"
        self.file = configuration(fleet, port, self.port, interval, folder)
        self.wanted = self.file.read_text()
        if idle:
            self.file.write_text("{}")
        self.command = [
            str(ROOT / "scripts/prometheus"),
            f"--config.file={self.file}",
            *(["--web.enable-remote-write-receiver"] if idle else []),
            f"--web.listen-address=127.0.0.1:{self.port}",
            f"--storage.tsdb.path={self.data}",
            f"--storage.tsdb.retention.time={DEFAULTS['prometheus_retention_time']}",
            f"--storage.tsdb.retention.size={DEFAULTS['prometheus_retention_size']}",
            f"--query.max-samples={DEFAULTS['prometheus_query_max_samples']}",
        ]
        self.environment = {**os.environ, **environment(len(fleet.jobs["qwen-service"][0]))}
        self.cgroup = cgroup
        self.seen = Seen()
        self.sums: list[float] = []

    def __enter__(self) -> Prometheus:
        """Start it and wait until it answers; raise RuntimeError with its log if it does not."""
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log)
        if self.cgroup:
            (self.cgroup / "cgroup.procs").write_text(str(self.process.pid))
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=5).close()
                return self
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise RuntimeError(f"Prometheus did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self.process.terminate()
        self.process.wait()

    def begin(self) -> None:
        """Begin to scrape and to evaluate, where it was started idle; what memory that took before does not count."""
        self.file.write_text(self.wanted)
        self.process.send_signal(signal.SIGHUP)
        while not self.ask("targets", state="active")["activeTargets"]:
            time.sleep(0.2)
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")  # VmHWM is what is there now

    def ask(self, path: str, **parameters: str) -> Any:
        """The API's answer."""
        address = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(address, timeout=60) as answer:
            return json.load(answer)["data"]

    def own(self) -> dict[str, float]:
        """Its own metrics, summed over labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            samples = parse(answer.read().decode())
        sums: dict[str, float] = {}
        for sample in samples:
            name = sample.series.partition("{")[0]
            sums[name] = sums.get(name, 0) + sample.value
        return sums

    def whole(self) -> bool:
        """Whether every target was scraped and every group of rules was evaluated."""
        targets, groups = self.ask("targets", state="active")["activeTargets"], self.ask("rules")["groups"]
        # (it is ready before it has any of them)
        known = all(target["health"] != "unknown" for target in targets) and all(group["evaluationTime"] for group in groups)
        return bool(targets and groups) and known

    def look(self) -> None:
        """Take down what is there now, where it is more than what was seen before."""
        seen = self.seen
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        seen.memory_bytes, heap = (int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) * 1024 for name in ("VmHWM", "RssAnon"))
        seen.heap_bytes = max(seen.heap_bytes, heap)
        groups = {group["name"]: group["evaluationTime"] for group in self.ask("rules")["groups"]}
        slowest = max(groups, key=lambda name: groups[name])
        if groups[slowest] > seen.slowest_group_seconds:
            seen.slowest_group, seen.slowest_group_seconds, seen.slowest_group_at = slowest, groups[slowest], time.strftime("%H:%M:%S")
        if all(groups.values()):
            self.sums.append(sum(groups.values()))
            seen.all_groups_seconds, seen.usual_all_groups_seconds = max(self.sums), statistics.median(self.sums)

    def sum_up(self, before: dict[str, float], seconds: float) -> Seen:
        """What was seen, with what Prometheus counted itself since ``before``, so many seconds ago."""
        seen, now = self.seen, self.own()
        rules = [rule for group in self.ask("rules")["groups"] for rule in group["rules"]]
        targets = self.ask("targets", state="active")["activeTargets"]
        seen.failures = sum(rule["health"] == "err" for rule in rules) + sum(target["health"] == "down" for target in targets)
        seen.failures += int(now["prometheus_rule_group_iterations_missed_total"])
        seen.slowest_scrape_seconds = max(target["lastScrapeDuration"] for target in targets)
        seen.series = int(now["prometheus_tsdb_head_series"])
        seen.evaluations = int(now["prometheus_rule_group_iterations_total"])
        counted = "prometheus_tsdb_head_samples_appended_total", "process_cpu_seconds_total"
        seen.samples_per_second, seen.cpu_cores = ((now.get(name, 0) - before.get(name, 0)) / seconds for name in counted)
        seen.firing = len({alert["labels"]["alertname"] for alert in self.ask("alerts")["alerts"] if alert["state"] == "firing"})
        seen.compactions = int(now["prometheus_tsdb_compactions_total"])
        seen.disk_bytes = sum(file.stat().st_size for file in self.data.rglob("*") if file.is_file())
        return seen


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    result = bytearray()
    while number > 0x7F:
        result.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(result) + bytes([number])


def field(number: int, content: bytes) -> bytes:
    """A field with a length, as protobuf writes it."""
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def written(series: Sequence[tuple[bytes, Sequence[float]]], moments: Sequence[float]) -> bytes:
    """A request of the remote-write protocol (version 1): labels, and for each its values at these moments in seconds.

    Snappy's block format needs no compression: the whole is one literal.
    """
    ends = [b"\x10" + varint(round(at * 1000)) for at in moments]
    begins = [bytes([2 << 3 | 2]) + varint(9 + len(end)) + b"\x09" for end in ends]
    around = list(zip(begins, ends, strict=True))
    double = struct.Struct("<d").pack
    parts = [
        field(1, labels + b"".join([begin + double(value) + end for (begin, end), value in zip(around, values, strict=True)]))
        for labels, values in series
    ]
    request = b"".join(parts)
    return varint(len(request)) + b"\xfc" + struct.pack("<I", len(request) - 1) + request


def labels_of(series: str) -> bytes:
    """A series' labels in the order that the protocol wants."""
    name, _, rest = series.partition("{")
    pairs = [("__name__", name), *re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', rest)]
    return b"".join(
        field(1, field(1, key.encode()) + field(2, re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), value).encode()))
        for key, value in sorted(pairs)
    )


def catch_up(fleet: Fleet, port: int, minutes: float, step: float) -> None:
    """Write to Prometheus, in the order of time, what it would have scraped since so many minutes ago."""
    hosts = [(job, number, host) for job, (names, _) in fleet.jobs.items() for number, host in enumerate(names)]
    known = {(job, host): [(labels_of(series), sample) for series, sample in fleet.named(job, host)] for job, _, host in hosts}
    at = time.time() - minutes * 60
    while (steps := min(40, int((time.time() - at) / step))) > 0:
        moments = [at + step * index for index in range(steps)]
        for job, number, host in hosts:
            body = written([(labels, fleet.course(sample, number, moments)) for labels, sample in known[job, host]], moments)
            head = {"Content-Encoding": "snappy", "Content-Type": "application/x-protobuf", "X-Prometheus-Remote-Write-Version": "0.1.0"}
            urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/api/v1/write", body, head), timeout=120).close()
        at = moments[-1] + step


def remember(fleet: Fleet, hours: float, before: float, folder: Path) -> None:
    """Fill the storage with what rules look back at, until so many seconds ago."""
    told = folder / "history"
    with told.open("w") as file:
        file.writelines(fleet.history(hours, 15, before))
        file.write("# EOF\n")
    # as large as Prometheus would have compacted them by now
    tool = [ROOT / "scripts/promtool", "tsdb", "create-blocks-from", "openmetrics", "--max-block-duration=54h", "--quiet"]
    subprocess.run([*map(str, tool), str(told), str(folder / "data")], check=True)
    told.unlink()
    # what promtool left in the page cache would be on no account of Prometheus'
    for block in (folder / "data").rglob("*"):
        if block.is_file():
            with block.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(options: argparse.Namespace) -> Seen:
    """Run the fleet and Prometheus for a while."""
    fleet = Fleet(options.nodes, options.gateways, options.cpus)
    fleet.began -= options.head * 60
    with tempfile.TemporaryDirectory(prefix="prometheus-scale-") as name, serving(fleet) as port:
        folder = Path(name)
        if options.history:
            remember(fleet, options.history, options.head * 60, folder)
        with Prometheus(fleet, port, options.interval, folder, idle=options.head > 0, cgroup=options.cgroup) as prometheus:
            if options.head:
                catch_up(fleet, prometheus.port, options.head, 15)
                prometheus.begin()
            began, half = time.monotonic(), options.seconds / 2
            before, after = prometheus.own(), 0.0
            # at least until every host was scraped once
            while (passed := time.monotonic() - began) < options.seconds or (not prometheus.whole() and passed < options.seconds + 60):
                # rates of the second half: in the first one series are made
                if not after and passed > half:
                    before, after = prometheus.own(), passed
                time.sleep(1)
                prometheus.look()
            return prometheus.sum_up(before, time.monotonic() - began - after)


def wrong(seen: Seen, options: argparse.Namespace) -> list[str]:
    """A sentence for each limit that was crossed."""
    memory = seen.memory_bytes / 2**20
    limits = [
        (memory > options.memory_mib, f"Prometheus took {memory:.0f} MiB of memory; {options.memory_mib} are allowed."),
        (
            seen.slowest_group_seconds > options.rule_seconds,
            f"Rules of {seen.slowest_group} took {seen.slowest_group_seconds:.2f} s; {options.rule_seconds:g} are allowed.",
        ),
        (seen.failures > 0, f"{seen.failures} scrapes or rules failed, or evaluations were left out."),
        (seen.evaluations == 0, "No rule was evaluated: give it more seconds."),
    ]
    return [sentence for crossed, sentence in limits if crossed]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=50, help="nodes (default: %(default)s)")
    parser.add_argument("--gateways", type=int, default=2, help="gateways (default: %(default)s)")
    parser.add_argument("--cpus", type=int, default=128, help="processors of each host (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=300, help="how long at least (default: %(default)s)")
    parser.add_argument("--history", type=float, default=0, metavar="HOURS", help="fill the rules' windows of so many hours before")
    parser.add_argument("--head", type=float, default=0, metavar="MINUTES", help="begin with so many minutes in memory")
    parser.add_argument("--cgroup", type=Path, help="put Prometheus there: a directory that was made with a limit of memory")
    parser.add_argument("--interval", default=DEFAULTS["prometheus_scrape_interval"], help="of scrapes and rules (default: %(default)s)")
    parser.add_argument("--memory-mib", type=int, default=1024, help="what Prometheus may take (default: %(default)s)")
    parser.add_argument("--rule-seconds", type=float, default=1, help="what a group of rules may take (default: %(default)s)")
    options = parser.parse_args(argv)

    seen = measure(options)
    told = {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(seen).items()}
    print(json.dumps({"nodes": options.nodes, "interval": options.interval, "seconds": options.seconds, **told}, indent=1))
    sentences = wrong(seen, options)
    print("\n".join(sentences) or f"Within {options.memory_mib} MiB and {options.rule_seconds:g} s.")
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
