"""What the testinfra suites of all scenarios share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import testinfra
from testinfra.host import Host


@cache
def _host(name: str) -> Host:
    return testinfra.get_host(f"ansible://{name}", ansible_inventory=os.environ["MOLECULE_INVENTORY_FILE"])


@pytest.fixture(scope="session")
def on() -> Callable[[str], Host]:
    """A lab host by its inventory name: ``on("node1").service("ssh")``."""
    return _host


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
        lines = node.file(f"{root}/qwen-coder.env").content_string.splitlines()
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
