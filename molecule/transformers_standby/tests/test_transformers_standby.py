"""The standby: cold until it is wanted, then in the service's place, and nobody's request is lost on the way there and back.

The tests go on from each other, in this order: an engine's start takes half a minute.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from count_lost_requests import Kind, Load
from fleet import nothing_lost

PROJECT = Path(__file__).resolve().parents[3]
ROOT, STANDBY_ROOT = "/opt/qwen-coder-service", "/opt/qwen-coder-transformers"
PRIMARY, STANDBY = "qwen-coder.service", "qwen-coder-transformers.service"
NODES = ("node1", "node2")
QUESTION = {"messages": [{"role": "user", "content": "Write a function that adds two numbers."}], "max_tokens": 24, "temperature": 0}
first = {}
"""What is compared with later on."""


def ask(node):
    """The ids of a greedy answer, from whichever of the two serves."""
    body = json.dumps({**QUESTION, "return_token_ids": True})
    out = node.check_output("curl -fsS -m 60 -H 'Content-Type: application/json' -d %s http://127.0.0.1:8080/chat", body)
    return json.loads(out)["token_ids"]


def serves(node):
    """The unit of the two that runs; the other does not, and is not to at the next boot."""
    active = [unit for unit in (PRIMARY, STANDBY) if node.run(f"systemctl is-active {unit}").stdout.strip() == "active"]
    enabled = [unit for unit in (PRIMARY, STANDBY) if node.run(f"systemctl is-enabled {unit}").stdout.strip() == "enabled"]
    assert active == enabled
    assert len(active) == 1
    return active[0]


def run(playbook, *options):
    """A playbook as an operator would run it: its exit status, what it printed, and how many tasks changed something, by host."""
    inventory = Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent
    result = subprocess.run(
        ["ansible-playbook", "-i", inventory, *options, PROJECT / playbook],
        env={**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}, cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    output = result.stdout + result.stderr
    recap = result.stdout.partition("PLAY RECAP")[2]
    changed = {host: int(number) for host, number in re.findall(r"^(\S+)\s+: ok=\d+\s+changed=(\d+)", recap, re.MULTILINE)}
    return result.returncode, " ".join(output.split()), changed


def switch(to, *options):
    status, output, _ = run("playbooks/standby.yml", "-e", f"standby={to}", *options)
    assert status == 0, output
    return output


@pytest.fixture(scope="module")
def load(inventory):
    """Clients that keep asking through the gateway, half of them streaming: ``with load(8) as clients``."""
    url, ca = f"https://{inventory('gw1', 'ansible_host')}/api/qwen", inventory("gw1", "pki_ca_dir") + "/ca.crt"
    key = Path(inventory("gw1", "lab_client_key_file")).read_text().strip()

    def clients(number):
        return Load(url, key, [Kind(number // 2, 32), Kind(number - number // 2, 32, streaming=False)], ca)

    return clients


@pytest.mark.parametrize("name", NODES)
def test_it_is_there_and_cold(on, name):
    node = on(name)
    assert serves(node) == PRIMARY
    assert node.check_output(f"systemctl show --value -p LoadState,ActiveState,UnitFileState {STANDBY}").split() == [
        "loaded", "inactive", "disabled",
    ]  # fmt: skip
    assert node.check_output(f"systemctl show --value -p ExecMainStartTimestamp {STANDBY}") == ""
    assert node.service(STANDBY).is_valid
    first[name] = ask(node)


def test_the_unit_is_the_services_but_for_what_makes_it_the_standby(on):
    node = on("node1")
    primary = node.file(f"/etc/systemd/system/{PRIMARY}").content_string.splitlines()
    standby = node.file(f"/etc/systemd/system/{STANDBY}").content_string.replace(STANDBY_ROOT, ROOT).splitlines()
    different = [line for line in difflib.ndiff(primary, standby) if line[0] in "+-"]
    assert different == [
        "- Description=Qwen coder service",
        "+ Description=Qwen coder service, the standby",
        "+ # one of the two at a time: whichever starts stops the other first",
        f"+ Conflicts={PRIMARY}",
        f"+ After={PRIMARY}",
    ]
    assert node.run(f"systemd-analyze security --threshold=20 {STANDBY}").rc == 0


def test_the_settings_are_the_services_but_for_the_backend(on):
    node = on("node1")
    primary, standby = (
        set(node.file(f"{root}/current/qwen-coder.env").content_string.splitlines()) for root in (ROOT, STANDBY_ROOT)
    )  # fmt: skip
    assert primary - standby == {"QWEN_BACKEND=vllm", f"VLLM_CACHE_DIR={ROOT}/cache"}
    assert standby - primary == {"QWEN_BACKEND=transformers", f"VLLM_CACHE_DIR={STANDBY_ROOT}/cache"}


def test_its_environment_is_its_own_and_its_packages_take_no_room_twice(on):
    node = on("node1")
    found = [
        node.check_output(f"stat -L -c '%i %h' $(readlink -f {root}/current/venv)/lib/python3*/site-packages/torch/version.py").split()
        for root in (ROOT, STANDBY_ROOT)
    ]
    assert node.check_output(f"readlink -f {STANDBY_ROOT}/current/venv").startswith(f"{STANDBY_ROOT}/environments/")
    assert found[0] == found[1]
    assert int(found[0][1]) >= 3
    assert not node.file(f"{STANDBY_ROOT}/wheelhouse").exists
    assert not node.file(f"{STANDBY_ROOT}/models").exists


def test_both_nodes_to_the_standby_under_load_cost_no_request(on, load):
    with load(8) as clients:
        clients.wait_for(16)
        output = switch("activate")
        clients.wait_for(len(clients.outcomes) + 16)
    nothing_lost(on, clients.report)
    for name in NODES:
        assert f"{name}: {STANDBY} serves, and does so after a reboot." in output
        assert serves(on(name)) == STANDBY
    assert "No other node took requests" not in output


@pytest.mark.parametrize("name", NODES)
def test_its_greedy_answer_is_the_services_token_for_token(on, greedy, name):
    assert ask(on(name)) == first[name]
    assert first[name] == greedy(on(name), QUESTION)
    assert 'backend="transformers"' in on(name).check_output("curl -fsS http://127.0.0.1:9090/metrics")


def test_it_runs_without_vllm(on):
    node = on("node1")
    main = node.check_output(f"systemctl show --value -p MainPID {STANDBY}")
    assert node.run(f"cat /proc/{main}/maps /proc/$(pgrep -P {main} | head -n 1)/maps | grep -q site-packages/vllm").rc == 1
    assert node.check_output(f"readlink /proc/{main}/exe")
    assert node.run("pgrep -f ^VLLM").rc == 1


def test_once_more_changes_nothing(on):
    status, output, changed = run("playbooks/standby.yml", "-e", "standby=activate")
    assert status == 0, output
    assert set(changed.values()) == {0}
    assert f"node1: {STANDBY} served already." in output


def test_a_run_of_the_site_puts_a_release_in_place_and_leaves_the_standby_alone(on):
    node = on("node1")
    began, before = node.check_output(f"systemctl show --value -p InvocationID {STANDBY}"), node.file(f"{ROOT}/current").linked_to
    # what the site does on a node, with another value
    status, output, _ = run("molecule/transformers_standby/converge.yml", "-e", "qwen_service_max_num_seqs=24", "--limit", "node1")
    assert status == 0, output
    assert node.file(f"{ROOT}/current").linked_to != before
    assert f"node1: {STANDBY} serves, and goes on; release {Path(node.file(f'{ROOT}/current').linked_to).name} is in place" in output
    assert serves(node) == STANDBY
    assert node.check_output(f"systemctl show --value -p InvocationID {STANDBY}") == began
    status, output, changed = run("molecule/transformers_standby/converge.yml", "-e", "qwen_service_max_num_seqs=24", "--limit", "node1")
    assert (status, set(changed.values())) == (0, {0}), output


def test_both_nodes_back_under_load_cost_no_request(on, load):
    with load(8) as clients:
        clients.wait_for(16)
        switch("deactivate")
        clients.wait_for(len(clients.outcomes) + 16)
    nothing_lost(on, clients.report)
    for name in NODES:
        assert serves(on(name)) == PRIMARY
        assert ask(on(name)) == first[name]
    # and it is the release that was put in place meanwhile
    node = on("node1")
    assert "max_num_seqs=24" in node.file(f"{ROOT}/current/qwen-coder.env").content_string
    began = node.check_output(f'date -d "$(systemctl show --value -p ExecMainStartTimestamp {PRIMARY})" +%s')
    assert int(began) > int(node.check_output(f"stat -c %Y {ROOT}/current"))


def test_a_standby_that_does_not_start_leaves_the_service_where_it_was(on, load):
    node = on("node1")
    env = f"{STANDBY_ROOT}/current/qwen-coder.env"
    node.check_output(f"cp -p $(readlink -f {env}) /root/kept.env && echo QWEN_BACKEND=none >> {env}")
    try:
        with load(8) as clients:
            clients.wait_for(16)
            status, output, _ = run("playbooks/standby.yml", "-e", "standby=activate")
            clients.wait_for(len(clients.outcomes) + 16)
    finally:
        node.check_output(f"cp -p /root/kept.env $(readlink -f {env})")
    assert status != 0
    assert f"node1: {STANDBY} did not take over: " in output
    assert f"{PRIMARY}, which ran before, serves again; nodes after this one are as they were." in output
    nothing_lost(on, clients.report)
    for name in NODES:
        assert serves(on(name)) == PRIMARY
    # node2 was not looked at, and node1 is in rotation
    assert "node2: " not in output
    assert gateway_states(on) == {"node1": "UP", "node2": "UP"}


def gateway_states(on):
    """The state of each node at the gateway."""
    program = (
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/qwen-gateway/admin.sock'); "
        "s.send(b'show stat\\n'); print(s.makefile().read())"
    )
    rows = [line.split(",") for line in on("gw1").check_output("python3 -c %s", program).splitlines() if line.startswith("nodes,node")]
    return {row[1]: row[17] for row in rows}


def test_a_service_that_fails_to_start_is_given_up_for_the_standby_after_the_declared_number(on):
    node = on("node2")
    status, output, changed = run(
        "molecule/transformers_standby/converge.yml", "-e", "transformers_standby_after_failed_starts=2", "--limit", "node2"
    )
    assert (status, changed["node2"]) == (0, 2), output  # the drop-in and its directory
    shown = node.check_output(f"systemctl show -p Restart,StartLimitBurst,StartLimitIntervalUSec,OnFailure {PRIMARY}").splitlines()
    assert set(shown) == {"Restart=always", "StartLimitBurst=2", "StartLimitIntervalUSec=infinity", f"OnFailure={STANDBY}"}
    assert serves(node) == PRIMARY

    broken = f"/run/systemd/system/{PRIMARY}.d"
    since = node.check_output("date '+%Y-%m-%d %H:%M:%S'")
    node.check_output(f"mkdir -p {broken} && printf '[Service]\\nExecStartPre=/bin/false\\n' > {broken}/broken.conf")
    node.check_output(
        f"systemctl daemon-reload; systemctl stop {PRIMARY}; systemctl reset-failed {PRIMARY}; systemctl start {PRIMARY}; true"
    )
    deadline = time.monotonic() + 90
    while node.run(f"systemctl is-active {STANDBY}").rc:
        assert time.monotonic() < deadline, node.check_output("journalctl -u 'qwen-coder*' -n 40 --no-pager")
        time.sleep(1)
    log = node.check_output("journalctl -u %s --since %s --no-pager", PRIMARY, since)
    assert log.count("Control process exited") == 2
    assert ask(node) == first["node2"]

    # by itself it is not what starts at boot: the service is tried again
    assert node.run(f"systemctl is-enabled {PRIMARY}").rc == 0
    node.check_output(f"rm -r {broken}")
    switch("deactivate", "--limit", "node2,localhost")
    assert serves(node) == PRIMARY
    # a start that did not fail forgets those that did
    assert node.check_output(f"systemctl show --value -p NRestarts {PRIMARY}") == "0"
    run("molecule/transformers_standby/converge.yml", "--limit", "node2")
    assert "OnFailure=" in node.check_output(f"systemctl show -p OnFailure {PRIMARY}").splitlines()


def test_where_there_is_one_node_requests_wait_and_the_outage_is_said(on, load):
    alone = ("-e", json.dumps({"gateway_nodes": ["node1"]}))
    assert run("playbooks/gateway.yml", *alone)[0] == 0
    try:
        with load(8) as clients:
            clients.wait_for(16)
            output = switch("activate", *alone, "--limit", "node1,localhost")
            clients.wait_for(len(clients.outcomes) + 16)
            output += switch("deactivate", *alone, "--limit", "node1,localhost")
            clients.wait_for(len(clients.outcomes) + 16)
    finally:
        assert run("playbooks/gateway.yml")[0] == 0
    nothing_lost(on, clients.report)
    outages = [float(number) for number in re.findall(r"No other node took requests: for ([0-9.]+) s none was begun", output)]
    assert len(outages) == 2
    assert "They waited at the gateways, for at most 240 s (gateway_wait_seconds)." in output
    # what was measured is what a client saw
    slowest = max(o.ended - o.asked for o in clients.outcomes)
    assert 1 < slowest < max(outages) + 10
    assert serves(on("node1")) == PRIMARY
