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
