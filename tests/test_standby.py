"""What is wrong with what is said of a standby stops before any host is touched, and what is asked of the playbook, too.

The hosts of the example have addresses of the documentation range (RFC 5737): nobody answers there.
"""

import re
from pathlib import Path

import pytest
import yaml

from playbooks import ROOT, ansible_playbook

SECRETS = {"vault_pki_ca_passphrase": "twelve characters", "vault_caretakers_key_sha256": "0" * 64}


@pytest.fixture
def secrets(tmp_path: Path) -> str:
    """What the example's vault would hold."""
    path = tmp_path / "vault.yml"
    path.write_text(yaml.safe_dump(SECRETS))
    return f"-e@{path}"


def said(output: str) -> list[str]:
    """The messages of what failed, without those of hosts that nobody has."""
    return [message for message in re.findall(r'"msg": "(.*)"', output) if "Failed to connect" not in message]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "standby is not set; set it to activate or deactivate (-e standby=activate)."),
        (("-e", "standby=on"), "standby is 'on'; set it to activate or deactivate (-e standby=activate)."),
        (
            ("-e", "standby=activate", "-e", "standby_drain_seconds=soon"),
            "standby_drain_seconds is 'soon'; set it to a number of seconds.",
        ),
    ],
)
def test_the_playbook_says_what_it_wants(options: tuple[str, ...], sentence: str, secrets: str) -> None:
    result = ansible_playbook("-i", "inventories/example", secrets, *options, "playbooks/standby.yml")
    assert result.returncode != 0
    assert sentence in said(result.stdout + result.stderr)
    recap = result.stdout.split("PLAY RECAP")[1]
    assert re.findall(r"^(\S+)\s+:", recap, re.MULTILINE) == ["localhost"]


@pytest.mark.parametrize(
    ("variable", "sentence"),
    [
        (
            "transformers_standby_root=/opt/qwen-coder-service/",
            "transformers_standby_root is '/opt/qwen-coder-service/'; set it to a directory of its own, by its absolute path, for example "
            "/opt/qwen-coder-transformers.",
        ),
        (
            "transformers_standby_root=standby",
            "transformers_standby_root is 'standby'; set it to a directory of its own, by its absolute path, for example "
            "/opt/qwen-coder-transformers.",
        ),
        (
            "transformers_standby_after_failed_starts=21",
            "transformers_standby_after_failed_starts is '21'; set it to a number of starts from 1 to 20, or to 0 to have the standby "
            "started by nobody but you.",
        ),
        ("transformers_standby_keep_releases=0", "transformers_standby_keep_releases is '0'; set it to 1 or more."),
    ],
)
def test_preflight_refuses_a_wrong_value(variable: str, sentence: str, secrets: str, tmp_path: Path) -> None:
    """Of the nodes that have a standby."""
    more = tmp_path / "more.yml"
    more.write_text("qwen_nodes: {hosts: {node1: {transformers_standby_enabled: true}}}\n")
    result = ansible_playbook(
        "-i", "inventories/example", "-i", more, secrets, "-e", variable, "-e", f"preflight_report={tmp_path}/report.md",
        "-e", "ansible_timeout=1",
        "--limit", "node1,node3,localhost", "playbooks/preflight.yml",
    )  # fmt: skip
    assert result.returncode != 0
    assert f"node1: {sentence}" in said(result.stdout + result.stderr)
    assert f"node3: {sentence}" not in said(result.stdout + result.stderr)


def test_there_is_no_standby_for_awq_weights(secrets: str, tmp_path: Path) -> None:
    result = ansible_playbook(
        "-i", "inventories/example", secrets, "-e", "transformers_standby_enabled=true", "-e", f"preflight_report={tmp_path}/report.md",
        "-e", "ansible_timeout=1", "--limit", "node3,localhost", "playbooks/preflight.yml",
    )  # fmt: skip
    assert (
        "node3: transformers_standby_enabled is true, and the runtime profiles have nothing with which the transformers library computes "
        "weights of the kind awq-4bit; set it to false." in said(result.stdout + result.stderr)
    )


def test_what_starts_the_standby_by_itself_names_the_standby() -> None:
    """systemd ignores a name that it does not know: nothing else would tell."""
    variables = yaml.safe_load((ROOT / "roles/transformers_standby/vars/main.yml").read_text())
    service = yaml.safe_load((ROOT / "roles/qwen_service/vars/main.yml").read_text())
    assert variables["__transformers_standby_unit"] == service["__qwen_service_standby"]
    assert variables["__transformers_standby_primary"] == service["__qwen_service_primary"]
    assert f'name="{variables["__transformers_standby_unit"]}"' in (ROOT / "roles/prometheus/files/rules/service.yml").read_text()
