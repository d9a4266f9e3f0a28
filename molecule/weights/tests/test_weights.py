"""Role qwen_service: weights that were brought, and a token that is rotated."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

MODELS = "/opt/qwen-coder-service/models"
BROUGHT = ["Qwen--Tiny@0123456789ab", "from-archive", "from-peer"]
PROJECT = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
SETTINGS = yaml.safe_load((PROJECT / "molecule/weights/vars.yml").read_text())
OLD, NEW = SETTINGS["qwen_service_hub_token"], "hf_theSecondOfTheLab"
TOKEN_FILE = "/etc/qwen-coder/hf_token"


@pytest.fixture(scope="module")
def node(on):
    return on("node1")


@pytest.mark.parametrize("name", BROUGHT)
def test_weights_are_whole_and_what_their_manifest_says(node, name):
    names = node.check_output(f"ls {MODELS}/{name}").split()
    assert {"MANIFEST.sha256", "config.json", "merges.txt", "model.safetensors", "tokenizer.json"} <= set(names)
    node.check_output(f"cd {MODELS}/{name} && sha256sum --check --strict --quiet MANIFEST.sha256")
    assert node.check_output(f"cmp {MODELS}/{name}/model.safetensors /srv/hub/model.safetensors && echo same") == "same"
    assert node.run(f"find {MODELS} -name '*.partial' | grep .").rc == 1


def test_the_service_cannot_write_to_them(node):
    path = f"{MODELS}/{BROUGHT[0]}/model.safetensors"
    assert node.run(f"runuser -u qwen-coder -- sh -c ': >>{path}'").rc != 0
    assert node.run(f"runuser -u qwen-coder -- sh -c ': >{MODELS}/x'").rc != 0
    assert node.run(f"runuser -u qwen-coder -- head -c 1 {path}").rc == 0


def test_the_unit_may_little(node):
    assert node.service("qwen-coder-weights").is_valid
    assert node.run("systemd-analyze security --threshold=25 qwen-coder-weights.service").rc == 0


def test_the_token_is_in_one_file_of_roots(node):
    file = node.file(TOKEN_FILE)
    assert (file.user, file.group, file.mode) == ("root", "root", 0o600)
    assert file.content_string == OLD + "\n"
    unit = node.file("/etc/systemd/system/qwen-coder-weights.service").content_string
    assert f"LoadCredential=hf_token:{TOKEN_FILE}\n" in unit


def hub(node, **settings):
    """How the stand-in serves from now on."""
    node.check_output("curl -fsS -d @- http://127.0.0.1:8100/control <<'END'\n" + json.dumps(settings).replace("%", "%%") + "\nEND")


def rotate(tmp_path, old=OLD, new=NEW):
    """The playbook as an operator runs it, as talkative as it can be: what it says, and the message with which it failed."""
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps({**SETTINGS, "qwen_service_hub_token": new, "rotate_token_old": old}))
    done = subprocess.run(
        ["ansible-playbook", "-i", Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent, "--limit", "localhost,node1", "-vvv", "--diff",
         "-e", f"@{file}", "playbooks/rotate_token.yml"],
        cwd=PROJECT,
        env={**os.environ, "ANSIBLE_CALLBACK_RESULT_FORMAT": "json"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    assert OLD not in said and NEW not in said
    failed = re.search(r'fatal: .*?"msg": "(.*?)"', said, re.DOTALL)
    assert (done.returncode == 0) == (failed is None), said[-3000:]
    return said, failed and failed[1]


def test_a_token_is_rotated_and_the_old_one_is_gone(node, tmp_path):
    assert rotate(tmp_path, old="")[1] == (
        "node1: rotate_token_old is not set, or is no token; set it to the token that is to be gone, in a file that ansible-vault "
        "encrypted (-e @file)."
    )
    assert rotate(tmp_path, new=OLD)[1] == "node1: qwen_service_hub_token is the same as rotate_token_old; set it to the new token."
    assert rotate(tmp_path)[1] == (
        "node1: http://127.0.0.1:8100 answers 401 to qwen_service_hub_token instead of 200; set it to a valid token."
    )
    assert node.file(TOKEN_FILE).content_string == OLD + "\n"
    # both are valid, and the old one is in places where people leave such things
    hub(node, tokens=[OLD, NEW])
    node.check_output(
        f"printf %s {OLD} | tee /etc/left | gzip >/var/log/left.1.gz; logger -t somebody token {OLD}; "
        f"HF_TOKEN={OLD} systemd-run --quiet --unit=left --setenv=HF_TOKEN sleep 1000"
    )
    failed = rotate(tmp_path)[1]
    assert node.file(TOKEN_FILE).content_string == NEW + "\n"
    places = failed.removeprefix("node1: rotate_token_old is still in ").removesuffix("; remove it there and run this playbook again.")
    assert re.fullmatch(
        r"/etc/left, /run/systemd/transient/left\.service, /var/log/left\.1\.gz, the environment of process \d+ \(sleep\), "
        r"the journal \(somebody\)",
        ", ".join(sorted(places.split(", "))),
    )
    node.check_output("rm /etc/left /var/log/left.1.gz; systemctl stop left; journalctl --rotate; journalctl --vacuum-time=1s")
    assert rotate(tmp_path)[1] == (
        "node1: http://127.0.0.1:8100 answers 200 to rotate_token_old instead of 401; revoke it at the hub and run this playbook again."
    )
    hub(node, tokens=[NEW])
    said, failed = rotate(tmp_path)
    assert failed is None
    assert re.search(r"node1 +: ok=\d+ +changed=0 +unreachable=0 +failed=0", said)
