"""What the testinfra suites of all scenarios share."""

from __future__ import annotations

import json
import os
import subprocess
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
            ["ansible", "-i", Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent, host, "-m", "debug", "-a", f"var={name}"],
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
        result = host.run(f"curl -sS -m 20 -w '\\n%{{http_code}}' {options} {url}")
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
