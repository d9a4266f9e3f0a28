"""What ``playbooks/callback_plugins/preload.py`` saves: processor time of the same play with and without it, in pairs.

``python scripts/compare_preload.py [PAIRS]`` prints each pair and the median of the ratios. Processor time, and not the time by the clock:
it hardly depends on what else the machine does.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PLUGINS = Path(__file__).resolve().parent.parent / "playbooks/callback_plugins"
HOSTS = "one,two,"
# as a role has them: a module with filters in its arguments and a fact, by turns
TASKS = [
    {"ansible.builtin.command": "echo {{ 'x' | upper }}", "changed_when": False},
    {"ansible.builtin.set_fact": {"numbers": "{{ [1, 2] | map('string') | join(',') }}"}},
] * 20


def processor_seconds(folder: Path, plugins: Path) -> float:
    """Of one run of the play, with its modules."""
    environment = {**os.environ, "ANSIBLE_CONFIG": str(folder / "ansible.cfg"), "ANSIBLE_CALLBACK_PLUGINS": str(plugins)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["ansible-playbook", "-i", HOSTS, "-c", "local", str(folder / "play.yml")]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, and print."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "ansible.cfg").write_text("[defaults]\ninterpreter_python = /usr/bin/python3\n[connection]\npipelining = True\n")
        (folder / "play.yml").write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": TASKS}]))
        (folder / "none").mkdir()
        ratios = []
        for _ in range(pairs):
            without, loaded = processor_seconds(folder, folder / "none"), processor_seconds(folder, PLUGINS)
            ratios.append(loaded / without)
            print(f"without {without:.1f} s, with {loaded:.1f} s of processor time: {ratios[-1]:.2f}", flush=True)
    print(f"median of {pairs}: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
