#!/usr/bin/python3
"""What NVIDIA's driver says about a host's GPUs, and what the PCI bus says, in one round trip."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: cuda_facts
short_description: GPUs of a host, their memory and how they are joined
description:
  - Asks C(nvidia-smi) and the PCI bus. Changes nothing; a host without a driver is an answer, not an error.
options:
  nvidia_smi:
    description: The program, by its name or path.
    type: str
    default: nvidia-smi
  sysfs:
    description: Where the kernel shows its devices.
    type: str
    default: /sys
author: the qwen-coder-hosting maintainers
"""
RETURN = r"""
cuda:
  description: >-
    C(found), whether a GPU answers; C(state) and C(why), a sentence, where none does; C(driver), C(branch), C(cuda); C(gpus); C(lost), bus
    addresses of GPUs that ceased to answer; C(on_bus), GPUs that the PCI bus shows; C(links) between two GPUs; C(nvlink_groups), GPUs that
    NVLink joins; C(nvswitch); C(raw), what was read.
  returned: always
  type: dict
"""

# a GPU that hangs makes nvidia-smi hang; without persistence the driver takes some seconds for each GPU
PATIENCE_SECONDS = 90
FIELDS = [
    "index",
    "name",
    "uuid",
    "pci.bus_id",
    "memory.total",
    "memory.free",
    "driver_version",
    "mig.mode.current",
    "ecc.mode.current",
    "persistence_mode",
    "compute_cap",
]
# exit status of nvidia-smi -> state, and a sentence's middle
FAILURES = {
    6: ("no_devices", "nvidia-smi finds no GPU"),
    9: ("unreachable", "nvidia-smi does not reach the NVIDIA driver"),
    18: ("mismatch", "the NVIDIA module that is loaded is of another version than the libraries that are installed"),
    127: ("missing", "there is no nvidia-smi"),
    124: ("hangs", f"nvidia-smi has not answered within {PATIENCE_SECONDS} s"),
}


def parse_versions(text: str) -> tuple[str, str]:
    """Driver and newest CUDA that it runs, from the head of nvidia-smi's table; empty where it does not say.

    Newer drivers call them "KMD Version" and "CUDA UMD Version".
    """
    driver = re.search(r"(?:Driver|KMD) Version: *([0-9.]+)", text)
    cuda = re.search(r"CUDA (?:UMD )?Version: *([0-9.]+)", text)
    return (driver.group(1) if driver else "", cuda.group(1) if cuda else "")


def parse_lost(text: str) -> list[str]:
    """PCI addresses, such as 0000:3B:00.0, of GPUs whose handle the driver no longer has."""
    found = re.findall(r"device handle for gpu ?(?:\d+: *)?([0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f])", text, re.IGNORECASE)
    return list(dict.fromkeys(address.upper()[-12:] for address in found))


def _mode(value: str) -> str:
    return value.lower() if value.lower() in ("enabled", "disabled") else "unsupported"


def _number(value: str) -> int:
    return int(value) if value.isdigit() else 0


def parse_gpus(text: str, fields: list[str]) -> list[dict[str, Any]]:
    """GPUs from a query with ``csv,noheader,nounits``; lines that are something else are left out. Memory is MiB."""
    gpus = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(fields) or not values[0].isdigit():
            continue
        row = dict(zip(fields, values, strict=True))
        gpus.append(
            {
                "index": int(row["index"]),
                "name": row["name"],
                "uuid": row["uuid"],
                "bus_id": row["pci.bus_id"].upper()[-12:],
                "memory_total_mib": _number(row["memory.total"]),
                "memory_free_mib": _number(row["memory.free"]),
                "driver": row["driver_version"],
                "mig": _mode(row.get("mig.mode.current", "")),
                "ecc": _mode(row.get("ecc.mode.current", "")),
                "persistence": _mode(row.get("persistence_mode", "")) == "enabled",
                "compute_capability": row.get("compute_cap", ""),
            }
        )
    return gpus


def parse_links(topology: str) -> dict[str, str]:
    """How each two GPUs are joined, such as ``{"0-1": "NV12"}``, from ``nvidia-smi topo -m``."""
    links: dict[str, str] = {}
    columns: list[str] = []
    for line in topology.splitlines():
        cells = [cell.strip() for cell in line.split("\t")]
        if not columns and "GPU0" in cells:
            columns = cells
        elif columns and re.fullmatch(r"GPU\d+", cells[0]):
            for column, cell in zip(columns, cells, strict=False):
                if re.fullmatch(r"GPU\d+", column) and int(cells[0][3:]) < int(column[3:]):
                    links[f"{cells[0][3:]}-{column[3:]}"] = cell
    return links


def nvlink_groups(links: dict[str, str]) -> list[list[int]]:
    """GPUs that NVLink joins, directly or by way of others; GPUs without NVLink are in none."""
    groups: list[set[int]] = []
    for pair, link in links.items():
        if not link.startswith("NV"):
            continue
        joined = {int(index) for index in pair.split("-")}
        for group in [group for group in groups if group & joined]:
            groups.remove(group)
            joined |= group
        groups.append(joined)
    return sorted(sorted(group) for group in groups)


def pci_devices(sysfs: str) -> tuple[int, int]:
    """Count NVIDIA's GPUs and NVSwitches on the PCI bus; virtual functions of a GPU are not counted."""
    gpus = switches = 0
    for device in sorted(Path(sysfs, "bus/pci/devices").glob("*")):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue  # it went away meanwhile
        if vendor == "0x10de" and not (device / "physfn").exists():
            gpus += kind.startswith("0x03")
            switches += kind.startswith("0x0680")
    return gpus, switches


def ask(program: str, *arguments: str) -> tuple[int, str]:
    """Exit status and output of nvidia-smi, without the codes with which it underlines."""
    with subprocess.Popen(
        [program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "LC_ALL": "C"}
    ) as process:
        try:
            output = process.communicate(timeout=PATIENCE_SECONDS)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            return 124, ""
    return process.returncode, re.sub(r"\x1b\[[0-9;]*m", "", output)


def query(program: str, *chosen: str) -> tuple[str, list[str]]:
    """What a query answers, and the fields asked for: those that an older driver does not know are left out."""
    fields = list(FIELDS)
    while True:
        _, text = ask(program, *chosen, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
        unknown = re.search(r'Field "([^"]+)" is not a valid field', text)
        if not unknown or unknown.group(1) not in fields:
            return text, fields
        fields.remove(unknown.group(1))


def facts(program: str | None, sysfs: str) -> dict[str, Any]:
    """All that the module returns; ``program`` is the path of nvidia-smi, None where there is none."""
    on_bus, switches = pci_devices(sysfs)
    result: dict[str, Any] = {
        "found": False, "state": "ok", "why": "", "driver": "", "branch": 0, "cuda": "", "gpus": [], "lost": [], "on_bus": on_bus,
        "links": {}, "nvlink_groups": [], "nvswitch": switches > 0, "raw": {"list": "", "topology": ""},
    }  # fmt: skip
    status, listing = ask(program, "-L") if program else (127, "")
    listed = re.findall(r"^GPU (\d+): ", listing, re.MULTILINE)
    if not program or (not listed and not parse_lost(listing)):
        first = (listing.strip().splitlines() or ["nothing"])[0]
        state, why = FAILURES.get(status, ("error", f"nvidia-smi ends with {status} and says: {first}"))
        return {**result, "state": state, "why": why}

    table = ask(program)[1]
    text, fields = query(program)
    gpus = parse_gpus(text, fields)
    lost = parse_lost("\n".join([listing, table, text]))
    if lost and not gpus:  # one that is lost can silence the others
        gpus = [gpu for index in listed for gpu in parse_gpus(*query(program, "-i", index))]
        table = ask(program, "-i", listed[0])[1] if listed else table
    driver, cuda = parse_versions(table)
    driver = next((gpu["driver"] for gpu in gpus), driver)
    topology = ask(program, "topo", "-m")[1]
    links = parse_links(topology)
    for gpu in gpus:
        del gpu["driver"]
    return {
        **result, "found": True, "driver": driver, "branch": int(driver.split(".")[0] or 0), "cuda": cuda, "gpus": gpus, "lost": lost,
        "links": links, "nvlink_groups": nvlink_groups(links), "raw": {"list": listing, "topology": topology},
    }  # fmt: skip


def main() -> None:
    """Answer Ansible."""
    module = AnsibleModule(
        argument_spec={"nvidia_smi": {"type": "str", "default": "nvidia-smi"}, "sysfs": {"type": "str", "default": "/sys"}},
        supports_check_mode=True,
    )
    module.exit_json(changed=False, cuda=facts(module.get_bin_path(module.params["nvidia_smi"]), module.params["sysfs"]))


if __name__ == "__main__":
    main()
