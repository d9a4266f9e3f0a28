"""What the testinfra suites of all scenarios share."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import testinfra
import yaml
from testinfra.host import Host


@cache
def _host(name: str) -> Host:
    """Over ssh, multiplexed: quicker than an Ansible run for each command, and what the inventory says about it is resolved already."""
    instances = yaml.safe_load(Path(os.environ["MOLECULE_INSTANCE_CONFIG"]).read_text())
    at = next(instance for instance in instances if instance["instance"] == name)
    options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ConnectTimeout=60"
    return testinfra.get_host(f"ssh://{at['user']}@{at['address']}", ssh_identity_file=at["identity_file"], ssh_extra_args=options)


@pytest.fixture(scope="session")
def on() -> Callable[[str], Host]:
    """A lab host by its inventory name: ``on("node1").service("ssh")``."""
    return _host


@pytest.fixture(scope="session")
def inventory() -> Callable[[str, str], Any]:
    """The value of a variable for a host, as a playbook would see it: ``inventory("gw1", "pki_ca_dir")``."""

    @cache
    def value(host: str, name: str) -> Any:
        result = subprocess.run(
            ["ansible", "-i", Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent, host, "-m", "debug", "-a", json.dumps({"var": name})],
            env={**os.environ, "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json", "ANSIBLE_LOAD_CALLBACK_PLUGINS": "1"},
            check=True,
            capture_output=True,
            text=True,
        )
        return json.loads(result.stdout)["plays"][0]["tasks"][0]["hosts"][host][name]

    return value


# the paths at which role pki leaves a host's identity, as curl wants them
IDENTITY = "--cert /etc/qwen-pki/host.crt --key /etc/qwen-pki/host.key --cacert /etc/qwen-pki/ca.crt"


@pytest.fixture(scope="session")
def curl() -> Callable[..., tuple[int, int, str]]:
    """Call curl on a host: exit code of curl, HTTP status (0 where none came), body."""

    def call(host: Host, url: str, options: str = IDENTITY) -> tuple[int, int, str]:
        result = host.run(f"curl -sS --connect-timeout 6 -m 20 -w '\\n%{{http_code}}' {options} '{url}'")
        body, _, status = result.stdout.rpartition("\n")
        return result.rc, int(status), body

    return call


@pytest.fixture(scope="session")
def greedy() -> Callable[[Host, dict[str, object]], list[int]]:
    """Token ids that transformers alone gives for a question (messages, max_tokens), with the node's model and persona."""

    def ask(node: Host, question: dict[str, object]) -> list[int]:
        root = "/opt/qwen-coder-service"
        lines = node.file(f"{root}/current/qwen-coder.env").content_string.splitlines()
        env = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
        program = (Path(__file__).parent / "resources/greedy.py").read_text()
        node.check_output("printf '%%s' %s > /tmp/greedy.py", program)
        out = node.check_output(
            f"HF_HUB_OFFLINE=1 {root}/current/venv/bin/python /tmp/greedy.py %s %s %s 2>/dev/null",
            env["QWEN_MODEL_PATH"], json.loads(env["QWEN_PERSONA_PROMPT"]), json.dumps(question),
        )  # fmt: skip
        ids: list[int] = json.loads(out)
        return ids

    return ask


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def scan(on) -> Callable[[str | None, str], set[int]]:
    """TCP ports, of all, that an address has open for a host, or for this machine (None): ``scan("gw1", "10.90.0.21")``."""
    program = ROOT / "molecule/resources/scan.py"

    def ports(source: str | None, address: str) -> set[int]:
        if source is None:
            out = subprocess.run([sys.executable, program, address], check=True, capture_output=True, text=True).stdout
        else:
            # what is not answered is forgotten soon: several scans would fill the table of connections
            on(source).check_output("sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_syn_sent=5")
            on(source).check_output("printf '%%s' %s > /tmp/scan.py", program.read_text())
            out = on(source).check_output("python3 /tmp/scan.py %s", address)
        return set(map(int, out.split()))

    return ports


@pytest.fixture(scope="session")
def declared(inventory) -> Callable[[str | None, str], set[int]]:
    """TCP ports of a host that another, or this machine (None), may connect to, by roles/qwen/vars/main/flows.yml and the inventory."""
    flows = yaml.safe_load((ROOT / "roles/qwen/vars/main/flows.yml").read_text())["__qwen_flows"]
    defaults = {
        k: v for role in ("qwen", "firewall") for k, v in yaml.safe_load((ROOT / f"roles/{role}/defaults/main.yml").read_text()).items()
    }
    words = {"management": "firewall_management_networks", "clients": "firewall_client_networks", "engine": "qwen_engine_peers"}
    groups = {
        "gateway": "qwen_gateway_group",
        "node": "qwen_node_group",
        "worker": "qwen_worker_group",
        "monitoring": "qwen_monitoring_group",
    }

    def literal(default: Any) -> str:
        if isinstance(default, list):
            return f"[{', '.join(map(literal, default))}]"
        if isinstance(default, str) and default.startswith("{{"):
            return re.sub(r"\w+", lambda word: value(word[0]) if word[0] in defaults else word[0], default.strip("{} "))
        return json.dumps(default)

    def value(name: str) -> str:
        """A variable as Jinja, with the role's default, in which others may stand."""
        return f"({name} | default({literal(defaults.get(name))}))"

    def expression(name: str) -> str:
        return f"'{name}': {value(name)}"

    @cache
    def host(name: str) -> dict[str, Any]:
        names = [*words.values(), *groups.values(), *(flow["ports"] for flow in flows), "groups", "ansible_host", "lab_network_prefix"]
        result: dict[str, Any] = inventory(name, f"{{{', '.join(map(expression, dict.fromkeys(names)))}}}")
        return result

    def parts(name: str) -> set[str]:
        return {part for part, group in groups.items() if name in host(name)["groups"].get(host(name)[group], [])}

    def numbers(value: Any) -> set[int]:
        found: set[int] = set()
        for entry in value if isinstance(value, list) else [value]:
            first, _, last = str(entry).partition("-")
            found |= set(range(int(first), int(last or first) + 1))
        return found

    def ports(source: str | None, target: str) -> set[int]:
        here = host(target)
        address = ipaddress.ip_address(host(source)["ansible_host"] if source else here["lab_network_prefix"] + ".1")

        def admitted(who: str) -> bool:
            if who == "engine":
                return source in here[words[who]]
            if who in words:
                return any(address in ipaddress.ip_network(network) for network in here[words[who]])
            return source is not None and who in parts(source)

        mine = [flow for flow in flows if parts(target) & set(flow["to"]) and admitted(flow["from"])]
        return set().union(*(numbers(here[flow["ports"]]) for flow in mine))

    return ports
