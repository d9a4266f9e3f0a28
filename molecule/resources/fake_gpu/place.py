#!/usr/bin/env python3
"""Put a fake GPU machine into a directory: nvidia-smi, what it answers from, and the PCI bus below sys/.

    place.py DIRECTORY FIXTURE [CHANGES]

FIXTURE is a name of fixtures/; CHANGES is JSON that is laid over it, for example '{"driver": "570.124.06"}'.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# where GPUs sit on the PCI bus; after them come NVSwitches, and a bridge of somebody else's
BUSES = (0x17, 0x3B, 0x5D, 0x85, 0x9B, 0xB3, 0xCB, 0xE3)


def place(directory: str | Path, fixture: str, changes: dict[str, Any] | None = None) -> Path:
    """Make the machine anew; the path of its nvidia-smi. ``cuda_sysfs`` is the directory ``sys`` beside it.

    Args:
        directory: where to put it; what an earlier call put there is replaced.
        fixture: name of a file in ``fixtures``.
        changes: laid over the fixture, key by key.
    """
    state = json.loads((HERE / f"fixtures/{fixture}.json").read_text()) | (changes or {}) | {"buses": BUSES}
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    (target / "gpus.json").write_text(json.dumps(state))
    program = Path(shutil.copy(HERE / "nvidia-smi", target))
    devices = target / "sys/bus/pci/devices"
    shutil.rmtree(target / "sys", ignore_errors=True)
    devices.mkdir(parents=True)
    on_bus = [(bus, "0x10de", "0x030200") for bus in BUSES[: state.get("on_bus", len(state["gpus"]))]]
    on_bus += [(0xF0 + number, "0x10de", "0x068000") for number in range(state.get("nvswitches", 0))]
    for bus, vendor, kind in [*on_bus, (0x00, "0x8086", "0x060400")]:
        device = devices / f"0000:{bus:02x}:00.0"
        device.mkdir()
        (device / "vendor").write_text(vendor + "\n")
        (device / "class").write_text(kind + "\n")
    return program


if __name__ == "__main__":
    print(place(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]) if len(sys.argv) > 3 else None))
