"""The whole chain: client -> gateway -> mutual TLS -> node -> engine, and what happens when a part of it stops."""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import time
import uuid
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from count_lost_requests import Kind, Load
from fleet import fault, nothing_lost, run_playbook, wait_until_both_serve

ROOT = Path(__file__).resolve().parents[3]
WORKFLOWS = ROOT / "service_src/validation/workflows"
QUESTION = {
    "messages": [{"role": "user", "content": "Write a function that returns the sum of two numbers."}],
    "max_tokens": 32,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def client(inventory):
    """A kin client on this machine."""
    with httpx.Client(
        base_url=f"https://{inventory('gw1', 'ansible_host')}/api/qwen",
        verify=ssl.create_default_context(cafile=inventory("gw1", "pki_ca_dir") + "/ca.crt"),
        headers={"Authorization": f"Bearer {Path(inventory('gw1', 'lab_client_key_file')).read_text().strip()}"},
        timeout=60,
        limits=httpx.Limits(max_connections=64),
    ) as result:
        yield result


def test_greedy_answer_equals_transformers_token_for_token(client, on, greedy):
    answer = client.post("/chat", json={**QUESTION, "return_token_ids": True})
    assert answer.status_code == 200
    assert answer.json()["token_ids"] == greedy(on("node1"), QUESTION)


def test_stream_equals_the_whole_answer(client):
    whole = client.post("/chat", json=QUESTION).json()["message"]["content"]
    with client.stream("POST", "/chat", json={**QUESTION, "stream": True}) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    assert "".join(json.loads(e).get("delta", {}).get("content", "") for e in events) == whole


def test_one_request_is_followed_by_its_id_from_the_gateway_to_the_engine(client):
    """With the command that docs/observability.md shows, on this inventory."""
    mark = uuid.uuid4().hex
    answer = client.post("/chat", json=QUESTION, headers={"X-Request-ID": mark})
    assert (answer.status_code, answer.headers["X-Request-ID"]) == (200, mark)
    command = re.search(r"^ansible .*<id>.*$", (ROOT / "docs/observability.md").read_text(), re.MULTILINE)[0]
    command = command.replace("inventories/yours", str(Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent)).replace("<id>", mark)
    plain = {**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}
    for _ in range(10):  # journald takes a line a moment later
        out = subprocess.run(command, shell=True, env=plain, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        lines = {}
        for part in re.split(r"^(?=\w+ \| )", out, flags=re.MULTILINE):
            lines |= {part.split(" ")[0]: [json.loads(line) for line in part.splitlines() if line.startswith("{")]}
        if len([entry for entries in lines.values() for entry in entries]) == 3:
            break
    [gateway] = lines.pop("gw1")
    assert (gateway["client"], gateway["status"]) == ("demo", 200)
    proxy, service = sorted(lines.pop(gateway["node"]), key=lambda entry: "outcome" in entry)
    assert (proxy["client"], proxy["status"]) == ("gw1", 200)
    assert (service["outcome"], service["completion_tokens"]) == ("ok", answer.json()["usage"]["completion_tokens"])
    assert not any(lines.values())


def test_monitoring_scrapes_both_nodes(on, curl):
    for node in ("node1", "node2"):
        _, status, body = curl(on("mon1"), f"https://{node}:9090/metrics")
        assert status == 200
        assert "\nvllm:num_requests_running{" in body


HOSTS = ("gw1", "node1", "node2", "mon1")


def test_a_scan_of_all_ports_finds_what_the_inventory_declares(scan, declared, inventory):
    pairs = [(source, target) for source in (None, *HOSTS) for target in HOSTS if source != target]
    with ThreadPoolExecutor(2) as pool:
        seen = pool.map(lambda pair: scan(pair[0], inventory(pair[1], "ansible_host")), pairs)
        assert dict(zip(pairs, seen, strict=True)) == {pair: declared(*pair) for pair in pairs}


IDENTITY = "--cert /etc/qwen-pki/host.crt --key /etc/qwen-pki/host.key --cacert /etc/qwen-pki/ca.crt"
REFUSED = {
    "no certificate": ("gw1", "--cacert /etc/qwen-pki/ca.crt"),
    "another CA": ("gw1", "--cert /root/foreign.crt --key /root/foreign.key --cacert /etc/qwen-pki/ca.crt"),
    "wrong identity": ("mon1", IDENTITY),
}


@pytest.mark.parametrize("node", ["node1", "node2"])
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_client_of_another_identity_gets_nothing_from_a_node(on, curl, case, node):
    name, options = case
    rc, status, body = curl(on(name), f"https://{node}:8080/health", options)
    assert rc != 0
    assert (status, body) == (0, "")
    assert curl(on("gw1"), f"https://{node}:8080/health")[1] == 200


@pytest.fixture(scope="module")
def load(inventory):
    """Clients that keep asking through the gateway, by default half of them streaming: ``with load(8) as clients``."""
    url, ca = f"https://{inventory('gw1', 'ansible_host')}/api/qwen", inventory("gw1", "pki_ca_dir") + "/ca.crt"
    key = Path(inventory("gw1", "lab_client_key_file")).read_text().strip()

    def clients(number, streaming=0.5):
        streams = int(number * streaming)
        return Load(url, key, [Kind(streams, 48), Kind(number - streams, 48, streaming=False)], ca)

    return clients


@pytest.mark.parametrize(("node", "unit"), [("node1", "qwen-coder"), ("node2", "qwen-mtls-proxy")])
def test_stopping_a_part_of_a_node_costs_no_request(load, on, node, unit):
    wait_until_both_serve(on)
    with load(8) as clients:
        clients.wait_for(25)
        on(node).check_output(f"systemctl stop {unit}")
        time.sleep(4)
        clients.wait_for(len(clients.outcomes) + 25)
    on(node).check_output(f"systemctl start {unit}")
    assert len(clients.outcomes) > 50
    nothing_lost(on, clients.report)


def test_power_cut_of_a_node_costs_no_request_that_had_not_begun(load, on):
    wait_until_both_serve(on)
    with load(8) as clients:
        clients.wait_for(25)
        fault("kill", "node2")
        cut = clients.now
        time.sleep(8)
        clients.wait_for(len(clients.outcomes) + 25)
    fault("start", "node2")
    assert len(clients.outcomes) > 50
    lost = clients.report.lost
    assert [o for o in lost if o.asked > cut] == []
    # what the node was answering is lost at most: one request of each client, and its client knows within seconds
    assert len(lost) <= 8
    assert [o for o in lost if o.ended - cut > 8] == []


def test_the_node_comes_back_by_itself_after_the_power_cut(client, on):
    wait_until_both_serve(on)
    assert client.post("/chat", json=QUESTION).status_code == 200


def test_validation_passes_on_every_node_and_through_the_gateway(on, tmp_path):
    wait_until_both_serve(on)
    # how fast a node has to be is not judged beside three other hosts: service_src/tests/test_validate.py does
    wide = {figure: {"p95": 60_000} for figure in ("ttft_ms", "itl_ms", "total_ms")}
    targets = {"latency": wide, "latency-busy": wide, "deterministic": {"same_under_load": 1.0}}
    output, changed = run_playbook("validate", "-e", json.dumps({"validate_results": str(tmp_path), "validate_targets": targets}))
    assert set(changed.values()) == {0}
    for host in ("gw1", "node1", "node2"):
        suite = ET.parse(tmp_path / f"{host}.xml").getroot()
        cases = {(case.get("classname"), case.get("name")): case for case in suite.iter("testcase")}
        assert suite.get("failures") == "0", output
        assert suite.get("skipped") == "0", output
        assert {name.split(".")[1] for name, _ in cases} == {path.stem for path in WORKFLOWS.glob("*.yml")}
        assert "the golden set" in cases[f"{host}.persona", "no system message"].findtext("system-out")
    assert "the tokenizer alone, the transformers backend, the vllm backend" in output
    # nothing is left on a node
    assert on("node1").run("ls -d /tmp/*.validate").rc != 0


def test_another_value_of_one_host_is_another_release_of_it_and_goes_back(on, tmp_path):
    wait_until_both_serve(on)
    more = tmp_path / "more.yml"
    quick = "{qwen_service_rollout_watch_seconds: 2, qwen_service_rollout_requests: 6}"
    more.write_text(f"qwen_nodes: {{hosts: {{node2: {{qwen_service_max_num_seqs: 24}}}}, vars: {quick}}}\n")
    back = tmp_path / "back.yml"
    back.write_text(f"qwen_nodes: {{vars: {quick}}}\n")
    units = "systemctl show -p Id,InvocationID --value qwen-coder qwen-mtls-proxy qwen-gateway"
    began = {host: on(host).check_output("date +%s.%N") for host in HOSTS}
    before = {host: on(host).check_output(units).split() for host in HOSTS}
    root, env = "/opt/qwen-coder-service", on("node2").file("/opt/qwen-coder-service/current/qwen-coder.env").content_string
    standby = "/opt/qwen-coder-transformers"
    first = on("node2").file(f"{root}/current").linked_to

    output, changed = run_playbook("site", "-i", more, "--check", "--diff")
    # on the control machine, the sizing audit; on the node, a release of the service and one of the standby
    assert changed == {"localhost": 1, "gw1": 0, "node1": 0, "node2": 4, "mon1": 0}
    assert re.findall(r"^[-+](?![-+]).*max_num_seqs.*$", output, re.MULTILINE)[-2:] == ["-max_num_seqs=32", "+max_num_seqs=24"]

    _, changed = run_playbook("site", "-i", more)
    assert changed == {"localhost": 1, "gw1": 0, "node1": 0, "node2": 7, "mon1": 0}
    # the release; and in its turn: out of rotation, the switch, the restart, into rotation; and the standby's, which is not started
    touched = "find /etc /opt -xdev -type f -newermt @%s -not -path '*/cache/*'"
    second = on("node2").file(f"{root}/current").linked_to
    assert second != first
    assert {host: sorted(on(host).check_output(touched, began[host]).split()) for host in HOSTS} == {
        "gw1": [], "node1": [], "mon1": [],
        "node2": sorted(
            f"{on('node2').file(f'{tree}/current').linked_to}/{name}"
            for tree, unit in ((root, "qwen-coder"), (standby, "qwen-coder-transformers"))
            for name in ("qwen-coder.env", f"{unit}.service", "release.json")
        ),
    }  # fmt: skip
    after = {host: on(host).check_output(units).split() for host in HOSTS}
    restarted = {host: [unit for unit in after[host] if unit not in before[host]] for host in HOSTS}
    assert {host: len(units) for host, units in restarted.items()} == {"gw1": 0, "node1": 0, "node2": 1, "mon1": 0}
    assert on("node2").check_output("curl -fsS http://127.0.0.1:8080/ready")

    output, changed = run_playbook("rollback", "-i", back, "--limit", "node2,localhost")
    assert changed == {"localhost": 0, "node2": 4}  # the same without a release to put together
    assert f"node2 runs {Path(first).name}; before, it was {Path(second).name}." in output
    assert on("node2").file(f"{root}/current/qwen-coder.env").content_string == env
    assert on("node2").check_output(units).split()[:2] != after["node2"][:2]
    assert on("node2").check_output("curl -fsS http://127.0.0.1:8080/ready")
