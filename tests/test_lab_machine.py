"""Where the lab cannot be made, it stops with one sentence before anything is installed."""

import json
from pathlib import Path

import pytest

from playbooks import ansible_playbook

APT, CGROUPS = "/usr/bin/apt-get", "cgroup2fs"


@pytest.mark.parametrize(
    ("seen", "sentence"),
    [
        (["1000", APT, CGROUPS], "The lab makes hosts with a real systemd, for which it must be root on this machine; run make as root."),
        (["0", "none", CGROUPS], "The lab installs what it needs with apt-get, which this machine does not have; run it on Debian."),
        (
            ["0", APT, "none"],
            "The lab's hosts need cgroups, and none are mounted at /sys/fs/cgroup; mount them or use another machine.",
        ),
    ],
)
def test_it_says_what_is_missing(seen: list[str], sentence: str, tmp_path: Path) -> None:
    """What the machine shows is replaced; extra variables win over registered ones."""
    variables = {"lab_machine": {"stdout_lines": seen}, "lab_state_dir": f"{tmp_path}/state"}
    result = ansible_playbook("--check", "-i", "inventories/lab", "molecule/lab/create.yml", "-e", json.dumps(variables))
    assert result.returncode != 0
    assert f'"msg": "{sentence}"' in result.stdout + result.stderr
    assert "Prepare |" not in result.stdout
    assert not (tmp_path / "state").exists()
