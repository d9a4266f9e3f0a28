"""What a benchmark measures, from what is known of nodes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from reach import ssh_command

Targets = list[dict[str, Any]]


def benchmark_targets(nodes: Sequence[Mapping[str, Any]], ways: Mapping[str, Any]) -> Targets:
    """Services, and the ways to them, as benchmark_qwen.py wants them.

    Args:
        nodes: variables of the nodes (``hostvars[...]``), with the fact ``qwen_service_described``; the first gets all ways.
        ways: transformers (beside, unit or no), port (of the one beside), gateway (its URL, or none), ca, key_file, paced (whether what is
            measured by the clock takes the service's place for a while).
    """
    found: Targets = []
    for index, node in enumerate(nodes):
        said = node["qwen_service_described"]
        common = {"node": node["inventory_hostname"], "variant": said["variant"], "model": said["model"]}
        command = node.get("benchmark_direct_command")
        reach = {"prefix": shlex.split(command)} if command else {"tunnel": ssh_command(node)}
        name = "vLLM" if said["variant"] == "full" else f"vLLM {said['variant']}"
        here = {**common, "backend": "vllm", "path": "direct", "url": f"http://127.0.0.1:{said['port']}", **reach}
        found.append({**here, "name": f"{name} direct"})
        if index:
            continue
        if ways["gateway"]:
            way = {"path": "gateway", "url": ways["gateway"], "ca": ways["ca"], "key_file": ways["key_file"]}
            found.append({**common, "backend": "vllm", "name": f"{name} gateway", **way})
            if ways["paced"]:
                found.append({**here, "backend": "paced", "name": "paced direct"})
                found.append({**common, "backend": "paced", "name": "paced gateway", **way})
        if ways["transformers"] != "no":
            port = ways["port"] if ways["transformers"] == "beside" else said["port"]
            found.append({**here, "name": "transformers direct", "backend": "transformers", "url": f"http://127.0.0.1:{port}"})
    return found


def benchmark_load(
    targets: Targets, backends: Sequence[str], matrix: Mapping[str, Any], chain: Mapping[str, Any], paced: Mapping[str, Any]
) -> dict[str, Any]:
    """The part of a plan that names targets: those of some backends. The chain is measured where both ways to one node are."""
    mine = [target for target in targets if target["backend"] in backends]
    gateway = [target for target in mine if target["path"] == "gateway"]
    ways = [t["name"] for t in mine if gateway and t["node"] == gateway[0]["node"] and t["backend"] == gateway[0]["backend"]]
    by_clock = backends == ["paced"]
    return {
        "targets": mine,
        "matrix": {**matrix, "targets": [] if by_clock else [target["name"] for target in mine]},
        "chain": {**chain, "targets": [] if by_clock else ways},
        "paced": {**paced, "targets": ways if by_clock else []} if paced else {},
    }


class FilterModule:
    """Filters."""

    def filters(self) -> dict[str, Any]:
        """By their names."""
        return {"benchmark_targets": benchmark_targets, "benchmark_load": benchmark_load}
