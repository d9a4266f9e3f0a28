"""Role firewall: what the inventory declares is admitted and nothing else, and whoever locks themselves out is let in again."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
HOSTS = ("gw1", "node1", "mon1")
KEPT = "/etc/qwen-firewall/firewall.nft"


def play(*options, **variables):
    """The scenario's playbook, as an operator would run it, with other values of variables."""
    inventory = Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent
    return subprocess.run(
        ["ansible-playbook", "-i", inventory, *options, "-e", json.dumps(variables), ROOT / "molecule/firewall/converge.yml"],
        env={**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_CALLBACK_RESULT_FORMAT": "json"},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def changed(result):
    """How much a run changed on each host."""
    assert result.returncode == 0, result.stdout + result.stderr
    recap = result.stdout.split("PLAY RECAP")[1]
    return {host: int(number) for host, number in re.findall(r"^(\S+)\s+: ok=\d+\s+changed=(\d+)", recap, re.MULTILINE)}


def ruleset(host):
    """All tables, without what counters count."""
    return host.check_output("nft -s list ruleset")


def listing(host, table):
    return host.check_output(f"nft -s list table inet {table}")


@pytest.fixture(params=HOSTS)
def host(request, on):
    return on(request.param)


def test_unit(host):
    assert host.service("qwen-firewall").is_enabled
    assert host.service("qwen-firewall").is_running
    assert host.run("systemd-analyze security --threshold=20 qwen-firewall.service").rc == 0
    assert host.check_output("systemctl is-system-running") == "running"


def test_rules_that_are_loaded_are_those_that_are_kept(host):
    assert host.check_output("qwen-firewall status") == "same"


def test_no_trial_is_under_way(host):
    assert host.check_output("systemctl list-units --all --plain --no-legend 'qwen-firewall-*'") == ""


def test_both_tables_are_there_after_a_reboot(on):
    """side_effect.yml rebooted this one."""
    node = on("node1")
    assert "tcp dport 7777 counter drop" in listing(node, "other")
    assert node.check_output("qwen-firewall status") == "same"


def test_firewall_is_loaded_before_the_network(on):
    order = on("node1").check_output("systemctl show -p Before --value qwen-firewall.service").split()
    assert "network-pre.target" in order


PAIRS = [(source, target) for source in (None, *HOSTS) for target in HOSTS if source != target]


def test_all_ports_of_all_hosts_from_everywhere(scan, declared, inventory, on):
    """Each host listens on more than is declared, so that what is closed shows too."""
    for target in HOSTS:
        listening = {int(line.split()[3].rpartition(":")[2]) for line in on(target).check_output("ss -Hltn").splitlines()}
        assert listening - {port for source in (None, *HOSTS) if source != target for port in declared(source, target)}
    with ThreadPoolExecutor(2) as pool:
        seen = pool.map(lambda pair: scan(pair[0], inventory(pair[1], "ansible_host")), PAIRS)
        assert dict(zip(PAIRS, seen, strict=True)) == {pair: declared(*pair) for pair in PAIRS}
    assert declared("gw1", "node1") == {8080}
    assert declared("mon1", "node1") == {9090, 9100}
    assert declared(None, "gw1") == {22, 443}


@pytest.mark.parametrize(("source", "target"), [("gw1", "node1"), ("mon1", "node1"), ("node1", "gw1"), ("gw1", "mon1")])
def test_all_ports_over_ipv6(scan, declared, inventory, source, target):
    assert scan(source, inventory(target, "qwen_source_addresses")[0]) == declared(source, target)


@pytest.mark.parametrize("option", ["-4", "-6"])
def test_hosts_answer_a_ping(on, inventory, option):
    address = inventory("node1", "ansible_host") if option == "-4" else inventory("node1", "qwen_source_addresses")[0]
    assert on("mon1").run(f"ping {option} -c 1 -W 3 {address}").rc == 0


class Watch:
    """When ssh's port of an address could be reached anew, looked at twice a second."""

    def __init__(self, address):
        self.address, self.stop, self.seen = address, threading.Event(), []
        self.thread = threading.Thread(target=self.look)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()

    def look(self):
        while not self.stop.wait(0.5):
            began = time.monotonic()
            try:
                socket.create_connection((self.address, 22), 0.5).close()
                self.seen.append((began, True))
            except OSError:
                self.seen.append((began, False))

    def cut(self):
        """Seconds from the last time that it could be reached before the cut to the first time after it."""
        away = [at for at, reached in self.seen if not reached]
        assert away
        before = max(at for at, reached in self.seen if reached and at < away[0])
        after = min(at for at, reached in self.seen if reached and at > away[-1])
        return after - before


@pytest.mark.parametrize(
    ("statement", "seconds"), [("tcp dport 22 drop", 45), ("ct state new tcp dport 22 drop", 20)], ids=["all of ssh", "new connections"]
)
def test_rules_that_cut_ssh_undo_themselves_within_a_minute(on, inventory, statement, seconds):
    node = on("node1")
    before, kept = ruleset(node), node.check_output(f"cat {KEPT}")
    with Watch(inventory("node1", "ansible_host")) as watch:
        result = play("--limit", "node1", firewall_extra_statements=[statement], firewall_rollback_seconds=seconds)
        time.sleep(1)
    assert seconds - 10 < watch.cut() < 60
    assert result.returncode == 2
    assert [json.loads(f'"{text}"') for text in re.findall(r'"msg": "(node1: .*)"', result.stdout)] == [
        "node1: the new rules were not kept (no new ssh connection came through them in time), and the host has its previous ones again; "
        f"set firewall_management_networks (now {inventory('node1', 'lab_network_prefix')}.1) and firewall_ssh_port (now 22) so that ssh "
        "is admitted, and see that firewall_extra_statements does not drop it."
    ]
    assert ruleset(node) == before
    assert node.check_output(f"cat {KEPT}") == kept
    assert node.check_output("systemctl list-units --all --plain --no-legend 'qwen-firewall-*'") == ""


def test_an_old_connection_proves_nothing(on):
    """What is asked over a connection that was open before the rules came is no sign that a new one would be admitted."""
    node = on("node1")
    before = ruleset(node)
    node.check_output(f"cp {KEPT} /run/qwen-firewall/candidate.nft")
    refused = node.run("qwen-firewall try 20 && sleep 4 && qwen-firewall keep")
    assert (refused.rc, refused.stderr.strip()) == (1, "the connection is older than they are, and proves nothing")
    assert node.run("qwen-firewall undo").rc == 0
    assert ruleset(node) == before
    late = node.run("qwen-firewall keep")
    assert (late.rc, late.stderr.strip()) == (1, "no new ssh connection came through them in time")


def test_rules_on_trial_are_not_there_after_a_boot(on):
    """What is loaded at boot is kept alone, so that a host which is switched off and on during a trial comes back as it was."""
    node = on("node1")
    unit = node.check_output("systemctl cat qwen-firewall.service")
    assert re.findall(r"^ExecStart=.*$", unit, re.MULTILINE) == [f"ExecStart=/usr/sbin/nft -f {KEPT}"]


def test_one_more_flow_changes_that_and_nothing_else(on, scan, declared, inventory):
    flow = {"firewall_extra_flows": [{"from": "monitoring", "ports": [29500, "45001-45002"]}]}
    node = on("node1")
    before, kept = {name: ruleset(on(name)) for name in HOSTS}, node.check_output(f"cat {KEPT}")
    address, address6 = inventory("mon1", "ansible_host"), inventory("mon1", "qwen_source_addresses")[0]
    more = [
        f'    ip saddr {{ {address} }} tcp dport {{ 29500, 45001-45002 }} accept comment "monitoring"',
        f'    ip6 saddr {{ {address6} }} tcp dport {{ 29500, 45001-45002 }} accept comment "monitoring"',
    ]

    dry = play("--limit", "node1", "--check", "--diff", **flow)
    assert changed(dry) == {"node1": 1}
    assert re.findall(r"^[-+](?![-+])(.*)$", dry.stdout, re.MULTILINE) == more
    assert {name: ruleset(on(name)) for name in HOSTS} == before

    assert changed(play("--limit", "node1", **flow))["node1"] > 0
    assert [line for line in node.check_output(f"cat {KEPT}").splitlines() if line not in kept.splitlines()] == more
    assert [line for line in kept.splitlines() if line not in node.check_output(f"cat {KEPT}").splitlines()] == []
    assert listing(node, "other") in before["node1"]
    assert scan("mon1", inventory("node1", "ansible_host")) == declared("mon1", "node1") | {29500, 45001}
    assert changed(play("--limit", "node1", **flow)) == {"node1": 0}

    play("--limit", "node1")
    assert {name: ruleset(on(name)) for name in HOSTS} == before


def test_a_table_that_somebody_flushed_comes_back(on):
    gateway = on("gw1")
    before = ruleset(gateway)
    gateway.check_output("nft delete table inet qwen")
    assert gateway.check_output("qwen-firewall status") == "different"
    assert changed(play("--limit", "gw1"))["gw1"] > 0
    assert ruleset(gateway) == before


def test_removal_removes_what_is_ours_alone(on, scan, inventory):
    """Last, as it leaves mon1 open."""
    host = on("mon1")
    other = listing(host, "other")
    dry = play("--limit", "mon1", "--check", firewall_enabled=False)
    assert changed(dry)["mon1"] > 0
    assert host.check_output("qwen-firewall status") == "same"

    assert changed(play("--limit", "mon1", firewall_enabled=False))["mon1"] > 0
    assert ruleset(host) == other
    assert host.check_output("find / -xdev -name '*qwen-firewall*' -not -path '/proc/*' -not -path '/var/log/*'") == ""
    assert host.check_output("systemctl list-units --all --plain --no-legend 'qwen-firewall*'") == ""
    assert host.package("nftables").is_installed
    assert {22, 3000} <= scan("gw1", inventory("mon1", "ansible_host"))
    assert changed(play("--limit", "mon1", firewall_enabled=False)) == {"mon1": 0}
