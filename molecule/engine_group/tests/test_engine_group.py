"""One engine over two hosts: it answers as one, fails and comes back as one, and is upgraded as one.

The tests go on from each other, and each leaves the engine in service.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
import pytest
import yaml
from fleet import fault, nothing_lost, run_playbook, states
from rollouts import CODER, LIGHT, MODEL, QUICK, current, invocation, load_of, said  # noqa: F401 (a fixture)

HOSTS = ("node1", "worker1")
QUESTION = {"messages": [{"role": "user", "content": "Write a function that adds."}], "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def client(inventory):
    """A kin client."""
    key = Path(inventory("gw1", "lab_client_key_file")).read_text().strip()
    with httpx.Client(
        base_url=f"https://{inventory('gw1', 'ansible_host')}/api/qwen", verify=inventory("gw1", "pki_ca_dir") + "/ca.crt",
        headers={"Authorization": f"Bearer {key}"}, timeout=300,
    ) as result:  # fmt: skip
        yield result


def state(host):
    return host.check_output("systemctl show -p ActiveState --value qwen-coder")


def computing(host):
    """Ranks of the engine that a host computes."""
    return sorted(line.split("VLLM::Worker_")[1] for line in host.run("pgrep -a -f '^VLLM::Worker_'").stdout.splitlines())


def wait_until(what, seconds=180):
    """Until it is so; how long that took."""
    begun = time.monotonic()
    while not what():
        assert time.monotonic() - begun < seconds
        time.sleep(0.5)
    return time.monotonic() - begun


def before_it(host):
    """The release to which a host would go back."""
    return Path(host.file(f"{CODER}/previous").linked_to).name


def ready(on):
    return on("node1").run("curl -fsS http://127.0.0.1:8080/ready").rc == 0


def test_the_engine_spans_both_hosts_and_answers_as_one(client, on, greedy):
    """In float32, with layers split over two hosts: the same ids that transformers gives on one."""
    assert {name: computing(on(name)) for name in HOSTS} == {"node1": ["TP0"], "worker1": ["TP1"]}
    answer = client.post("/chat", json={**QUESTION, "return_token_ids": True})
    assert answer.status_code == 200
    assert answer.json()["token_ids"] == greedy(on("node1"), QUESTION)


def test_a_worker_answers_nobody(on):
    assert states(on) == {"node1": "UP"}
    assert on("worker1").run("ss -Hltn sport = 8080 or sport = 9090").stdout == ""
    assert not on("worker1").file("/etc/qwen-mtls-proxy").exists
    assert current(on("worker1")) == current(on("node1"))  # the same release, to the digest


def test_the_hosts_of_an_engine_reach_each_other_and_nobody_else_does(on, scan, declared, inventory):
    listening = on("node1").check_output("ss -Hltn '! src 127.0.0.0/8' | awk '{print $4}'")
    engine = {int(line.rpartition(":")[2]) for line in listening.splitlines()} - {22, 8080, 9090, 9100}
    assert 29501 in engine
    addresses = {name: inventory(name, "ansible_host") for name in HOSTS}
    assert engine <= scan("worker1", addresses["node1"])
    for source in ("gw1", "mon1", None):
        for name in HOSTS:
            found = scan(source, addresses[name])
            assert found <= declared(source, name), (source, name)
            assert not found & engine


def test_a_part_that_dies_ends_the_engine_and_it_comes_back(client, on):
    before = {name: invocation(on(name)) for name in HOSTS}
    on("worker1").check_output("pkill -KILL -f '^VLLM::Worker_TP1'")
    print(f"noticed after {wait_until(lambda: not ready(on), 60):.0f} s")
    print(f"ready after {wait_until(lambda: ready(on)):.0f} s more")
    assert all(invocation(on(name)) != before[name] for name in HOSTS)
    assert client.post("/chat", json=QUESTION).status_code == 200


def test_a_head_that_dies_takes_its_worker_with_it_and_both_come_back(client, on):
    before = invocation(on("worker1"))
    on("node1").check_output("systemctl kill --signal=KILL qwen-coder")
    print(f"the worker began anew after {wait_until(lambda: invocation(on('worker1')) != before, 60):.0f} s")
    print(f"ready after {wait_until(lambda: ready(on)):.0f} s more")
    assert client.post("/chat", json=QUESTION).status_code == 200


def test_a_worker_without_power_is_missed_and_found_again(client, on):
    """Nobody says good-bye, and the engine has nothing to do meanwhile."""
    fault("kill", "worker1")
    try:
        print(f"noticed after {wait_until(lambda: not ready(on), 120):.0f} s")
    finally:
        fault("start", "worker1")
    print(f"ready after {wait_until(lambda: ready(on), 240):.0f} s more")
    assert client.post("/chat", json=QUESTION).status_code == 200


@pytest.fixture
def more(tmp_path):
    """An inventory beside the scenario's."""

    def write(**values):
        values = {**QUICK, "qwen_service_rollout_evidence_dir": str(tmp_path / "evidence"), **values}
        (tmp_path / "more.yml").write_text(yaml.safe_dump({"engine1": {"vars": values}}))
        return ["-i", str(tmp_path / "more.yml")]

    return write


def test_a_part_of_an_engine_is_no_target_for_an_upgrade(on, more):
    before = {name: (current(on(name)), invocation(on(name))) for name in HOSTS}
    output, _ = run_playbook("upgrade", *more(qwen_service_max_num_seqs=24), "--limit", "node1,localhost", fails=True)
    assert "node1: its engine spans node1, worker1, and --limit leaves out worker1; name all of them." in said(output)
    assert {name: (current(on(name)), invocation(on(name))) for name in HOSTS} == before


def test_hosts_of_an_engine_with_other_values_are_refused_before_anything_is_done(on, tmp_path):
    (tmp_path / "more.yml").write_text(yaml.safe_dump({"engine1": {"hosts": {"worker1": {"qwen_service_max_num_seqs": 24}}}}))
    output, changed = run_playbook("upgrade", "-i", str(tmp_path / "more.yml"), fails=True)
    assert (
        "worker1: qwen_service_max_num_seqs is '24', and '32' on node1, the head of its engine; set it to the same, best in a group that "
        "they share." in said(output)
    )
    assert {name: changed[name] for name in HOSTS} == dict.fromkeys(HOSTS, 0)


def test_an_upgrade_takes_the_whole_engine_and_loses_nothing(load_of, on, more):  # noqa: F811
    """The only node: requests wait at the gateway meanwhile."""
    before = {name: (current(on(name)), invocation(on(name))) for name in HOSTS}
    with load_of(LIGHT) as clients:
        clients.wait_for(20)
        output, _ = run_playbook("upgrade", *more(qwen_service_max_num_seqs=24))
        clients.wait_for(len(clients.outcomes) + 20)
    print(clients.report)
    nothing_lost(on, clients.report)
    after = {name: (current(on(name)), invocation(on(name))) for name in HOSTS}
    assert after["node1"][0] == after["worker1"][0] != before["node1"][0]
    assert all(after[name][1] != before[name][1] for name in HOSTS)
    assert said(output).count("before, it was") == 1
    assert not any(on(name).file(f"{CODER}/rollout.json").exists for name in HOSTS)
    _, changed = run_playbook("upgrade", *more(qwen_service_max_num_seqs=24))
    assert set(changed.values()) == {0}


def test_a_bad_release_goes_back_on_all_hosts(client, on, more):
    """Weights that only the worker cannot read: the head waits for it in vain."""
    before, previous = {name: current(on(name)) for name in HOSTS}, {name: before_it(on(name)) for name in HOSTS}
    for name in HOSTS:
        on(name).check_output(f"cp -r {MODEL} {MODEL}-bad")
    on("worker1").check_output(f"truncate --size=1000 {MODEL}-bad/model.safetensors")
    bad = {"qwen_service_model_source": "directory", "qwen_service_model_dir": f"{MODEL}-bad", "qwen_service_start_timeout_seconds": 150}
    output, _ = run_playbook("upgrade", *more(qwen_service_max_num_seqs=24, **bad), fails=True)
    assert f"node1 runs {before['node1']} again and is in service." in said(output)
    assert {name: current(on(name)) for name in HOSTS} == before
    assert {name: before_it(on(name)) for name in HOSTS} == previous
    assert not any(on(name).file(f"{CODER}/rollout.json").exists for name in HOSTS)
    journal = next(Path(more().pop()).parent.glob("evidence/*/journal-worker1.log")).read_text()
    assert "safetensors" in journal
    assert client.post("/chat", json=QUESTION).status_code == 200


def test_a_roll_back_takes_the_whole_engine(client, on, more):
    before = {name: current(on(name)) for name in HOSTS}
    run_playbook("rollback", *more())
    after = {name: current(on(name)) for name in HOSTS}
    assert after["node1"] == after["worker1"] != before["node1"]
    assert {name: computing(on(name)) for name in HOSTS} == {"node1": ["TP0"], "worker1": ["TP1"]}
    answer = client.post("/chat", json=QUESTION)
    assert answer.status_code == 200
    assert json.loads(answer.text)["message"]["content"]
