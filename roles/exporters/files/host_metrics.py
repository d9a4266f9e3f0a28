#!/usr/bin/env python3
"""Metrics of the release that runs on this host, and of its GPUs, for node exporter's textfile collector."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

# nvidia-smi's field -> metric, meaning, factor to the unit in the name
GAUGES = {
    "temperature.gpu": ("temperature_celsius", "Temperature of the GPU.", 1),
    "power.draw": ("power_watts", "Power that the card draws.", 1),
    "power.limit": ("power_limit_watts", "Power that the card may draw.", 1),
    "utilization.gpu": ("utilization_ratio", "Share of time in which a kernel ran.", 0.01),
    "memory.used": ("memory_used_bytes", "Memory in use.", 1 << 20),
    "memory.total": ("memory_total_bytes", "Memory of the card.", 1 << 20),
    "ecc.errors.uncorrected.volatile.total": (
        "ecc_uncorrected_errors",
        "Errors that ECC could not correct, since the driver was loaded.",
        1,
    ),
}
# why the card is slower than it could be
THROTTLING = ("hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown", "sw_power_cap")
FIELDS = ("index", "name", *GAUGES, *(f"clocks_throttle_reasons.{reason}" for reason in THROTTLING))
# NVRM: Xid (PCI:0000:17:00): 79, pid='<unknown>', ...
XID = re.compile(r"NVRM: Xid \(PCI:(?P<pci>[^)]+)\): (?P<xid>\d+)")


class Exposition:
    """Prometheus' text format, series by series."""

    def __init__(self) -> None:
        self._families: dict[str, list[str]] = {}

    def add(self, name: str, meaning: str, value: float, labels: Mapping[str, object] | None = None) -> None:
        """Add a series.

        Args:
            name: of the metric, a gauge.
            meaning: its HELP text.
            value: now.
            labels: the series' labels.
        """
        lines = self._families.setdefault(name, [f"# HELP {name} {meaning}", f"# TYPE {name} gauge"])
        pairs = ",".join(f"{key}={json.dumps(str(label), ensure_ascii=False)}" for key, label in (labels or {}).items())
        lines.append(f"{name}{{{pairs}}} {value:.15g}" if pairs else f"{name} {value:.15g}")

    def text(self) -> str:
        """All of it."""
        return "".join(f"{line}\n" for lines in self._families.values() for line in lines)


def _number(text: str) -> float | None:
    """A figure of nvidia-smi; None for [N/A] and the like."""
    try:
        return float(text)
    except ValueError:
        return None


def gpus(program: str) -> tuple[bool, list[dict[str, str]]]:
    """Whether nvidia-smi was content, and the GPUs that answered, by the names of ``FIELDS``."""
    try:
        done = subprocess.run(
            [program, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False, []
    # beside the GPUs that answer, it writes a sentence for each that does not
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return done.returncode == 0, [dict(zip(FIELDS, row, strict=True)) for row in rows if len(row) == len(FIELDS)]


def xids(lines: Iterable[str]) -> dict[tuple[str, str], tuple[int, float]]:
    """Driver errors of the journal (JSON lines): (PCI address, Xid) -> how many, and when the last one was."""
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for line in lines:
        entry = json.loads(line)
        match = XID.search(entry["MESSAGE"]) if isinstance(entry["MESSAGE"], str) else None
        if match:
            count, last = found.get((match["pci"], match["xid"]), (0, 0.0))
            found[match["pci"], match["xid"]] = (count + 1, max(last, int(entry["__REALTIME_TIMESTAMP"]) / 1e6))
    return found


def kernel_log() -> list[str]:
    """What the driver said since the boot, as JSON lines."""
    command = ["journalctl", "--dmesg", "--boot", "--grep", "NVRM: Xid", "--output", "json", "--output-fields", "MESSAGE", "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.splitlines()


def describe_gpus(out: Exposition, expected: int, program: str, log: Iterable[str]) -> bool:
    """What the GPUs say about themselves, against what the inventory says.

    Args:
        out: where it goes.
        expected: GPUs that the host must have.
        program: nvidia-smi.
        log: the kernel's log, as JSON lines.

    Returns:
        whether nvidia-smi ended without an error.
    """
    content, found = gpus(program)
    out.add("qwen_gpu_expected", "GPUs that this host has by the inventory.", expected)
    out.add("qwen_gpu_present", "GPUs that answer.", len(found))
    out.add("qwen_gpu_driver_ok", "1 when nvidia-smi ended without an error.", content)
    for gpu in found:
        labels = {"gpu": gpu["index"]}
        out.add("qwen_gpu_info", "Always 1; labels say what it is.", 1, labels | {"name": gpu["name"]})
        for field, (name, meaning, factor) in GAUGES.items():
            value = _number(gpu[field])
            if value is not None:
                out.add(f"qwen_gpu_{name}", meaning, value * factor, labels)
        for reason in THROTTLING:
            active = gpu[f"clocks_throttle_reasons.{reason}"] == "Active"
            out.add(
                "qwen_gpu_throttled", "1 while the card is slower than it could be, by what holds it.", active, labels | {"reason": reason}
            )
    for (pci, xid), (count, last) in xids(log).items():
        labels = {"pci": pci, "xid": xid}
        out.add("qwen_gpu_xid_errors", "Errors that the driver logged since the boot.", count, labels)
        out.add("qwen_gpu_xid_last_timestamp_seconds", "When the driver logged such an error last.", last, labels)
    return content


def describe_release(out: Exposition, root: Path, tier: str, profile: str) -> None:
    """Which release runs, or would at the next start; nothing where none is installed.

    Args:
        out: where it goes.
        root: the service's directory, with ``current`` and ``releases``.
        tier: GPU tier of the host.
        profile: runtime profile of the host.
    """
    current = root / "current"
    if current.exists():
        labels = {"release": current.resolve().name, "tier": tier, "profile": profile}
        out.add("qwen_release_info", "Always 1; labels say what is installed here.", 1, labels)
        out.add("qwen_release_since_timestamp_seconds", "When this release was switched to.", current.lstat().st_mtime)


def write(target: Path, text: str) -> None:
    """Whole or not at all: node exporter may read at any time."""
    new = target.with_suffix(".new")
    new.write_text(text)
    new.replace(target)


def look(options: argparse.Namespace) -> bool:
    """Write down what is there now.

    Args:
        options: the command line's.

    Returns:
        False where there are GPUs to watch, and nvidia-smi ended with an error.
    """
    out = Exposition()
    content = True
    describe_release(out, options.root, options.tier, options.profile)
    if options.gpus:
        content = describe_gpus(out, options.gpus, options.nvidia_smi, kernel_log())
    out.add("qwen_host_metrics_timestamp_seconds", "When this was written.", time.time())
    write(options.directory / "qwen_host.prom", out.text())
    return content


def main() -> None:
    """Look once, or until it is stopped or nvidia-smi fails.

    Which devices a unit may use is settled as it starts: one that started before the driver was there must start again.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="of the textfile collector")
    parser.add_argument("--root", type=Path, required=True, help="the service's directory")
    parser.add_argument("--tier", required=True)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that the host must have; 0: it has none to watch")
    parser.add_argument("--nvidia-smi", default="nvidia-smi")
    parser.add_argument("--interval", type=int, default=0, help="seconds from one look to the next; 0: look once")
    options = parser.parse_args()
    os.umask(0o022)
    while look(options) and options.interval:
        time.sleep(options.interval)


if __name__ == "__main__":
    main()
