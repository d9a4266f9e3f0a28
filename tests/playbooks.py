"""Run a playbook as an operator does, and read what it says."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def ansible_playbook(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``ansible-playbook`` from the project's root; messages come as JSON, so that they can be compared to the letter."""
    return subprocess.run(
        ["ansible-playbook", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # against one that hangs; the largest, over 31 hosts, takes a minute where other tests run beside it
        timeout=400,
        check=False,
        env={**os.environ, "ANSIBLE_CALLBACK_RESULT_FORMAT": "json", "ANSIBLE_NOCOLOR": "1"},
    )
