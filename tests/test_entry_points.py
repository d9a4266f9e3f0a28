"""The scripts that the plan names do what they did: one host, one command."""

import re
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest

from playbooks import ROOT

CONFIGURE = ROOT / "service_src/scripts/configure_qwen_gateway.sh"
INSTALL = ROOT / "service_src/scripts/install_qwen_coder_service.sh"


def run(*arguments: str, script: Path = INSTALL) -> subprocess.CompletedProcess[str]:
    return subprocess.run([script, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_install_runs_the_site_for_one_host() -> None:
    """Every play of the site is limited to that host and the control machine."""
    result = run("-i", "inventories/example", "node3", "--list-hosts")
    assert result.returncode == 0, result.stderr
    plays = re.findall(r"play #\d+ \((.+?)\): (.+?)\tTAGS", result.stdout)
    assert "The service on every node, and on the hosts that compute for one" in [name for _, name in plays]
    assert set(re.findall(r"^      (\S+)$", result.stdout, re.MULTILINE)) == {"localhost", "node3"}


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        ([], 2, "usage: install_qwen_coder_service.sh [-i INVENTORY] HOST [OPTION OF ansible-playbook...]"),
        (["-i"], 2, "usage: install_qwen_coder_service.sh [-i INVENTORY] HOST [OPTION OF ansible-playbook...]"),
        (
            ["-i", "inventories/none", "node1"],
            1,
            "error: INVENTORY is 'inventories/none', which does not exist; "
            "set it to a folder of inventories/, for example inventories/lab.",
        ),
        (
            ["-i", "inventories/example", "gw1"],
            1,
            "error: HOST is 'gw1', which is no host of group qwen_nodes; set it to one of: node1 node2 node3.",
        ),
    ],
)
def test_install_says_what_it_wants(arguments: list[str], status: int, sentence: str) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stderr.strip()) == (status, sentence)


@pytest.mark.parametrize("verb", ["apply", "show"])
def test_configure_concerns_the_gateways(verb: str) -> None:
    result = run("-i", "inventories/example", verb, "--list-hosts", script=CONFIGURE)
    assert result.returncode == 0, result.stderr
    assert {"gw1", "gw2"} <= set(re.findall(r"^      (\S+)$", result.stdout, re.MULTILINE)) <= {"localhost", "gw1", "gw2"}


def test_a_new_client_gets_a_key_that_is_stored_nowhere() -> None:
    result = run("-i", "inventories/example", "add-client", "aurora", script=CONFIGURE)
    assert result.returncode == 0, result.stderr
    key = re.findall(r"^  (\S{43})$", result.stdout, re.MULTILINE)[0]
    assert f"  - {{name: aurora, key_sha256: {sha256(key.encode()).hexdigest()}}}" in result.stdout


def test_revoking_says_what_to_change() -> None:
    result = run("-i", "inventories/example", "revoke", "caretakers", script=CONFIGURE)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "  disabled: true")


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["-i", "inventories/none"], 1, "error: INVENTORY is 'inventories/none', which does not exist; "
         "set it to a folder of inventories/, for example inventories/lab."),
        (["-i", "inventories/example", "add-client", "a b"], 1,
         "error: NAME is 'a b'; set it to 1 to 64 letters, digits, '.', '_' or '-'."),
        (["-i", "inventories/example", "add-client", "caretakers"], 1,
         "error: NAME is 'caretakers', which is one of gateway_clients already; set it to another, or revoke it first."),
        (["-i", "inventories/example", "revoke", "nobody"], 1,
         "error: NAME is 'nobody', which is none of gateway_clients; set it to one of: caretakers."),
        (["-i", "inventories/example", "dance"], 2, "usage: configure_qwen_gateway.sh [-i INVENTORY] [apply|show] "
         "[OPTION OF ansible-playbook...] | add-client NAME | revoke NAME"),
    ],
)  # fmt: skip
def test_configure_says_what_it_wants(arguments: list[str], status: int, sentence: str) -> None:
    result = run(*arguments, script=CONFIGURE)
    assert (result.returncode, result.stderr.strip()) == (status, sentence)


@pytest.mark.parametrize("command", ["validate", "benchmark"])
def test_without_an_inventory_it_is_said_what_to_set(command: str) -> None:
    result = run("inventories/none", script=ROOT / "scripts" / command)
    assert (result.returncode, result.stderr.strip()) == (
        1,
        "error: INVENTORY is 'inventories/none', which does not exist; set it to a folder of inventories/, for example inventories/lab.",
    )


def test_without_a_lab_it_is_said_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_NETWORK_PREFIX", "127.90.0")  # nobody listens there
    monkeypatch.setenv("LAB_NAME", "none")
    result = run("inventories/lab", script=ROOT / "scripts/validate")
    assert result.returncode == 1
    assert result.stderr.strip().endswith(
        "not all of its hosts answer: there is no lab: make deploy makes one, or name a fleet of yours with INVENTORY=inventories/..."
    )
