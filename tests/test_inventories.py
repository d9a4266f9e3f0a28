"""Wrong inventories stop before any host is touched, with one sentence that says what to set.

The hosts of these inventories have addresses of the documentation range (RFC 5737): nobody answers there, and a run that tried to
reach one would say so in its recap.
"""

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from plugins import load

from playbooks import ROOT, ansible_playbook

GOOD: dict[str, Any] = {
    "all": {
        "vars": {
            "qwen_gpu_tier": "cpu-lab",
            "pki_ca_passphrase": "twelve characters",
            "gateway_clients": [{"name": "demo", "key_sha256": "0" * 64}],
            "firewall_management_networks": ["192.0.2.0/29"],
        },
        "children": {
            "gateways": {"hosts": {"gw1": {"ansible_host": "192.0.2.11"}}},
            "qwen_nodes": {"hosts": {"node1": {"ansible_host": "192.0.2.21"}, "node2": {"ansible_host": "192.0.2.22"}}},
            "monitoring": {"hosts": {"mon1": {"ansible_host": "192.0.2.31"}}},
        },
    }
}


def run(inventory: Path, playbook: str, *options: str) -> subprocess.CompletedProcess[str]:
    return ansible_playbook("-i", inventory, f"playbooks/{playbook}.yml", *options)


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "hosts.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def no_gateway(inventory: dict[str, Any]) -> None:
    inventory["all"]["children"]["gateways"]["hosts"] = {}


def no_node(inventory: dict[str, Any]) -> None:
    del inventory["all"]["children"]["qwen_nodes"]


def unknown_tier(inventory: dict[str, Any]) -> None:
    inventory["all"]["children"]["qwen_nodes"]["hosts"]["node2"]["qwen_gpu_tier"] = "quad-80gb"


def port_twice(inventory: dict[str, Any]) -> None:
    inventory["all"]["children"]["qwen_nodes"]["hosts"]["node1"]["qwen_metrics_port"] = 8080


def no_port(inventory: dict[str, Any]) -> None:
    inventory["all"]["children"]["gateways"]["hosts"]["gw1"]["qwen_gateway_port"] = 70000


def no_passphrase(inventory: dict[str, Any]) -> None:
    for group in ("qwen_nodes", "monitoring"):
        for host in inventory["all"]["children"][group]["hosts"].values():
            host["pki_ca_passphrase"] = "twelve characters"
    del inventory["all"]["vars"]["pki_ca_passphrase"]


def no_management(inventory: dict[str, Any]) -> None:
    inventory["all"]["children"]["gateways"]["hosts"]["gw1"]["firewall_management_networks"] = []


def no_vault(inventory: dict[str, Any]) -> None:
    inventory["all"]["vars"]["gateway_clients"] = "{{ vault_gateway_clients }}"


def spanned(hosts: Any, **of_worker: Any) -> Any:
    """A worker beside the nodes, and what node1 and it say of their engine."""

    def spoil(inventory: dict[str, Any]) -> None:
        children = inventory["all"]["children"]
        children["qwen_workers"] = {"hosts": {"worker1": {"ansible_host": "192.0.2.24"}}}
        for host in (children["qwen_nodes"]["hosts"]["node1"], children["qwen_workers"]["hosts"]["worker1"]):
            host |= {"qwen_engine_hosts": hosts} if hosts is not None else {}
        children["qwen_workers"]["hosts"]["worker1"] |= of_worker

    return spoil


CASES = {
    no_gateway: "The inventory has no gateway: group 'gateways' is empty; put at least one host into 'gateways', "
    "or set qwen_gateway_group to the group that holds them.",
    no_node: "The inventory has no node: group 'qwen_nodes' is empty; put at least one host into 'qwen_nodes', "
    "or set qwen_node_group to the group that holds them.",
    unknown_tier: "node2: qwen_gpu_tier is 'quad-80gb', which no tier is named; "
    "set it to one of cpu-lab, dual-80gb, single-48gb-awq, single-80gb.",
    port_twice: "node1: qwen_node_port and qwen_metrics_port are both 8080; "
    "set qwen_metrics_port to a port that is not in use on this host.",
    no_port: "gw1: qwen_gateway_port is '70000', which is no port; set it to a number from 1 to 65535.",
    no_passphrase: "gw1: pki_ca_passphrase is not set; "
    "set it to the passphrase that encrypts the key of the project's CA (keep it in ansible-vault).",
    no_management: "gw1: firewall_management_networks is not set; "
    "set it to the networks from which Ansible and operators reach ssh, for example [192.0.2.0/28].",
    no_vault: "gw1: gateway_clients is not set ('vault_gateway_clients' is undefined); "
    "set it to the list of kin clients, each {name: ..., key_sha256: ...}.",
}


PROBLEMS: Any = load("roles/qwen/filter_plugins/qwen_inventory.py")
SPANNED = [
    (spanned(["node1", "worker1"]), []),
    (
        spanned(None),
        [
            "worker1: qwen_engine_hosts is not set, and 'qwen_workers' are hosts that compute for a node; set it to the names of "
            "the engine's "
            "hosts, the node first, on each of them, for example [node1, worker1]."
        ],
    ),
    (
        spanned("node1"),
        [f"{name}: qwen_engine_hosts is 'node1'; set it to a list of names, the node first." for name in ("node1", "worker1")],
    ),
    (
        spanned(["node1"]),
        ["worker1: qwen_engine_hosts is [node1]; set it to each of the engine's hosts once, worker1 among them."],
    ),
    (
        spanned(["worker1", "node1"]),
        [
            f"{name}: qwen_engine_hosts is [worker1, node1], and worker1 is in no group 'qwen_nodes'; put that host first which answers."
            for name in ("node1", "worker1")
        ],
    ),
    (
        spanned(["node1", "node2", "worker1"]),
        [
            f"{name}: qwen_engine_hosts is [node1, node2, worker1], and node2 is not in group 'qwen_workers' alone; put it there, "
            "or take it out."
            for name in ("node1", "worker1")
        ],
    ),
    (
        spanned(["node1", "worker1"], qwen_engine_hosts=["node2", "worker1"]),
        [
            "node1: qwen_engine_hosts is [node1, worker1], and another on worker1; set it to the same on all of them, best in a "
            "group that they "
            "share.",
            "worker1: qwen_engine_hosts is [node2, worker1], and another on node2; set it to the same on all of them, best in a "
            "group that they "
            "share.",
        ],
    ),
    (
        spanned(["node1", "worker1"], qwen_engine_address="worker1.example.org"),
        [
            "worker1: qwen_engine_address is 'worker1.example.org', which is no IP address; set it to the one at which the "
            "engine's hosts find it."
        ],
    ),
    (
        spanned(["node1", "worker1"], qwen_gpu_tier="single-80gb"),
        ["worker1: qwen_gpu_tier is 'single-80gb', and 'cpu-lab' on node1, the head of its engine; set it to the same."],
    ),
]


@pytest.mark.parametrize(("spoil", "sentences"), SPANNED)
def test_what_is_said_of_an_engine_over_several_hosts(spoil: Any, sentences: list[str]) -> None:
    inventory = copy.deepcopy(GOOD)
    spoil(inventory)
    children = inventory["all"]["children"]
    hostvars = {name: {**inventory["all"]["vars"], **own} for group in children.values() for name, own in group["hosts"].items()}
    words = {
        "qwen_gateway_group": "gateways", "qwen_node_group": "qwen_nodes", "qwen_worker_group": "qwen_workers",
        "qwen_monitoring_group": "monitoring", "qwen_gpu_tier": "dual-80gb",
        "tiers": ["cpu-lab", "single-80gb"], "ports": {}, "required": {},
    }  # fmt: skip
    assert PROBLEMS.qwen_inventory_problems(hostvars, {name: list(group["hosts"]) for name, group in children.items()}, words) == sentences


@pytest.mark.parametrize("spoil", CASES, ids=lambda case: case.__name__)
def test_a_wrong_inventory_stops_before_any_host(spoil: Any, tmp_path: Path) -> None:
    inventory = copy.deepcopy(GOOD)
    spoil(inventory)
    result = run(write(tmp_path, inventory), "site")
    assert result.returncode != 0
    messages = re.findall(r'"msg": "(.*)"', result.stdout + result.stderr)
    assert messages == [CASES[spoil]]
    recap = result.stdout.split("PLAY RECAP")[1]
    assert re.findall(r"^(\S+)\s+:", recap, re.MULTILINE) == ["localhost"]
    assert "changed=0" in recap


def test_all_problems_come_together(tmp_path: Path) -> None:
    inventory = copy.deepcopy(GOOD)
    for spoil in (unknown_tier, port_twice, no_vault):
        spoil(inventory)
    result = run(write(tmp_path, inventory), "preflight")
    assert [CASES[spoil] in result.stdout + result.stderr for spoil in (unknown_tier, port_twice, no_vault)] == [True] * 3


def test_a_good_inventory_passes(tmp_path: Path) -> None:
    """Its nodes are this machine: preflight looks at them too."""
    result = run(write(tmp_path, GOOD), "preflight", "-eansible_connection=local", f"-epreflight_report={tmp_path}/report.md")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 gateways, 2 nodes, 1 monitoring hosts" in result.stdout
    assert "2 nodes can start what is declared for them" in result.stdout


def test_the_example_names_what_its_vault_lacks() -> None:
    result = run(ROOT / "inventories/example", "preflight")
    assert (
        "gw1: pki_ca_passphrase is not set ('vault_pki_ca_passphrase' is undefined); set it to the passphrase"
        in result.stdout + result.stderr
    )
