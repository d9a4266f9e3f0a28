"""The scripts that the plan names do what they did: one host, one command."""

import re
import subprocess

import pytest

from playbooks import ROOT

INSTALL = ROOT / "service_src/scripts/install_qwen_coder_service.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([INSTALL, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_install_runs_the_site_for_one_host() -> None:
    """Every play of the site is limited to that host and the control machine."""
    result = run("-i", "inventories/example", "node3", "--list-hosts")
    assert result.returncode == 0, result.stderr
    plays = re.findall(r"play #\d+ \((.+?)\): (.+?)\tTAGS", result.stdout)
    assert "The service and its terminator on every node" in [name for _, name in plays]
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
