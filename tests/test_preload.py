"""Plugins are loaded before Ansible forks, and what a role brings along later is still found."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# a filter that says in which process it was loaded
FILTER = """
import os
LOADED = os.getpid()
class FilterModule:
    def filters(self):
        return {"loaded_here": lambda _: os.getpid() == LOADED}
"""
PLAY = """
- hosts: all
  gather_facts: false
  tasks:
    - ansible.builtin.set_fact:
        first: "{{ 'x' | loaded_here }}"
    - ansible.builtin.include_role:
        name: late
    - ansible.builtin.debug:
        msg: "FIRST {{ first }} LATE {{ late }}"
"""


@pytest.fixture
def play(tmp_path: Path) -> Path:
    """A play with a filter of its own, and a role that is included and brings another."""
    (tmp_path / "filter_plugins").mkdir()
    (tmp_path / "filter_plugins/here.py").write_text(FILTER)
    (tmp_path / "roles/late/tasks").mkdir(parents=True)
    (tmp_path / "roles/late/filter_plugins").mkdir()
    (tmp_path / "roles/late/filter_plugins/late.py").write_text(FILTER.replace("loaded_here", "loaded_late"))
    (tmp_path / "roles/late/tasks/main.yml").write_text(json.dumps([{"ansible.builtin.set_fact": {"late": "{{ 'x' | loaded_late }}"}}]))
    (tmp_path / "ansible.cfg").write_text("[defaults]\n")
    (tmp_path / "play.yml").write_text(PLAY)
    return tmp_path / "play.yml"


@pytest.mark.parametrize(("plugins", "by_the_worker"), [("playbooks/callback_plugins", False), ("docs", True)])
def test_workers_inherit_what_the_parent_has_loaded(play: Path, plugins: str, by_the_worker: bool) -> None:
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(play.with_name("ansible.cfg")),
        "ANSIBLE_CALLBACK_PLUGINS": str(ROOT / plugins),
        "ANSIBLE_NOCOLOR": "1",
    }
    done = subprocess.run(
        ["ansible-playbook", "-i", "one,", "-c", "local", play], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.search(rf"FIRST {by_the_worker} LATE {by_the_worker}", done.stdout), done.stdout


def test_the_project_uses_it() -> None:
    shown = subprocess.run(["ansible-config", "dump", "--only-changed"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"DEFAULT_CALLBACK_PLUGIN_PATH({ROOT}/ansible.cfg) = ['{ROOT}/playbooks/callback_plugins']" in shown
