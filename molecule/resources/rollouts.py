"""Roll-outs as the tests of scenarios site and upgrade see them: what they begin with, what a host ran, and how a release was refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from count_lost_requests import Kind, Load
from fleet import wait_until_both_serve

CODER = "/opt/qwen-coder-service"
NODES = ("node1", "node2")
MODEL = f"{CODER}/models/qwen-coder-tiny"
QUICK = {
    "qwen_service_rollout_watch_seconds": 3,
    "qwen_service_rollout_drain_seconds": 1,
    "qwen_service_rollout_requests": 6,
}


@pytest.fixture(scope="module")
def load_of(inventory):
    """Clients that keep asking through the gateway: ``with load_of(Kind(4, 24)) as clients``."""
    url, ca = f"https://{inventory('gw1', 'ansible_host')}/api/qwen", inventory("gw1", "pki_ca_dir") + "/ca.crt"
    key = Path(inventory("gw1", "lab_client_key_file")).read_text().strip()
    return lambda *kinds: Load(url, key, kinds, ca)


LIGHT = Kind(4, 24, pause_s=0.5)


@pytest.fixture
def more(tmp_path):
    """An inventory beside the lab's: ``more({"qwen_service_max_num_seqs": 24})``, for both nodes or those that are named."""

    def write(values=(), nodes=NODES, common=(), **of_host):
        hosts = {name: {**(dict(values) if name in nodes else {}), **of_host.get(name, {})} for name in NODES}
        common = {**dict(common), **QUICK, "qwen_service_rollout_evidence_dir": str(tmp_path / "evidence")}
        file = tmp_path / "more.yml"
        file.write_text(yaml.safe_dump({"qwen_nodes": {"hosts": hosts, "vars": common}}))
        return ["-i", str(file)]

    return write


def current(node):
    return Path(node.file(f"{CODER}/current").linked_to).name


def invocation(node):
    return node.check_output("systemctl show -p InvocationID --value qwen-coder")


def said(output):
    """What a playbook printed, on one line and without YAML's quotes of quotes."""
    return " ".join(output.replace("''", "'").split())


@pytest.fixture
def as_before(on):
    """What a host ran before the test: {host: (release, run of the service)}."""
    wait_until_both_serve(on)
    return {name: (current(on(name)), invocation(on(name))) for name in NODES}


def check_all_is_well(on):
    wait_until_both_serve(on)
    for name in NODES:
        assert on(name).check_output("curl -fsS http://127.0.0.1:8080/ready")
        assert not on(name).file(f"{CODER}/rollout.json").exists


def order(output):
    """The nodes that had their turn, in their order."""
    return re.findall(r"(node\d) runs \S+; before, it was", said(output))


WEIGHTS = f"""
    set -e
    for kind in corrupt nonsense; do rm -rf /srv/$kind; cp -r {MODEL} /srv/$kind; chmod -R a+rX /srv/$kind; done
    python3 - <<'END'
import glob, random, struct
for path in glob.glob("/srv/corrupt/*.safetensors"):
    with open(path, "r+b") as file:
        file.write(b"?" * 64)
for path in glob.glob("/srv/nonsense/*.safetensors"):
    data = bytearray(open(path, "rb").read())
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    numbers = [data[at:at + 4] for at in range(begin, len(data), 4)]
    random.Random(1).shuffle(numbers)
    data[begin:] = b"".join(numbers)
    open(path, "wb").write(data)
END"""


def place_bad_weights(on):
    """Weights that are no file of weights, and weights that answer nonsense, beside those that serve."""
    for name in NODES:
        on(name).check_output("bash -ec %s", WEIGHTS)


BAD_WEIGHTS = {
    kind: {"qwen_service_model_source": "directory", "qwen_service_model_dir": f"/srv/{kind}"} for kind in ("corrupt", "nonsense")
}


def check_it_was_refused(on, output, before, evidence_dir, task, why):
    """node1 refused a release and is as it was before, in service; node2 was not touched; the evidence is here."""
    paragraph = re.search(r"node1: release (\S+) was refused at '([^']+)': .*? goes on with this node\.", said(output))
    assert paragraph, output
    assert task in paragraph[2]
    assert why in paragraph[0], paragraph[0]
    assert f"node1 runs {before['node1'][0]} again and is in service." in paragraph[0]
    assert current(on("node1")) == before["node1"][0]
    assert (current(on("node2")), invocation(on("node2"))) == before["node2"]
    check_all_is_well(on)
    [evidence] = evidence_dir.iterdir()
    assert str(evidence) in paragraph[0]
    assert {"journal.log", "status.txt", "qwen-coder.env", "qwen-coder.service", "release.json", "metrics.txt", "reason.json"} <= {
        file.name for file in evidence.iterdir()
    }
    assert json.loads((evidence / "release.json").read_text())["id"] == paragraph[1]
