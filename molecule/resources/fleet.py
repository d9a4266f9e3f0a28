"""What the tests of a whole fleet share: an operator's runs of playbooks, faults of hosts, and who serves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STATES = (
    "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/qwen-gateway/admin.sock'); "
    "s.send(b'show stat\\n'); print(s.makefile().read())"
)


def fault(verb, name):
    """A power cut and its end, and the like, from the lab's own tool."""
    subprocess.run([ROOT / "molecule/lab/fault", verb, name], check=True, env=os.environ, stdout=subprocess.DEVNULL)


@contextmanager
def engines_yield(on, *names):
    """As if they computed on a GPU: nodes, and on them the engines, get the processor time that nobody else wants."""

    def give(niceness, verb):
        for name in names:
            on(name).check_output(f"renice -n {niceness} -u qwen-coder")
            fault(verb, name)

    try:
        give(19, "yield")
        yield
    finally:
        give(0, "even")


def states(on):
    """What the gateway says of each node: {"node1": "UP"}."""
    rows = [line.split(",") for line in on("gw1").check_output("python3 -c %s", STATES).splitlines() if line.startswith("nodes,node")]
    return {row[1]: row[17] for row in rows}


def wait_until_both_serve(on):
    """Both nodes stand as UP at the gateway."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        if list(states(on).values()) == ["UP", "UP"]:
            return
        time.sleep(1)
    raise AssertionError(f"nodes did not come back: {states(on)}")


def nothing_lost(on, report):
    """No request was; else what clients saw, and what hosts' logs say of such a request and of the nodes' health."""
    ids, said = [f"-e {outcome.request_id}" for outcome in report.lost[:20] if outcome.request_id], [str(report)]
    for name in ("node1", "node2", "gw1") if report.lost else ():
        lines = on(name).run(f"journalctl -b --no-pager -o short-precise | grep -F -e 'Server nodes/' {' '.join(ids)}").stdout
        said += [name, *lines.splitlines()[-8:]]
    # all of it in the message: of a long run's output only that is seen at the end
    assert report.lost == [], "\n".join(said)


def command(playbook, *options):
    """A playbook on the scenario's inventory, as an operator would run it."""
    inventory = Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent
    return ["ansible-playbook", "-i", inventory, *options, ROOT / f"playbooks/{playbook}.yml"]


PLAIN = {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0", "PYTHONUNBUFFERED": "1"}


def run_playbook(playbook, *options, fails=False, when=None):
    """What it printed, and its recap's changes by host; ``when`` it prints a text, what is to be done: ``{"text": function}``."""
    process = subprocess.Popen(
        command(playbook, *options), env={**os.environ, **PLAIN}, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    printed = []
    for line in process.stdout:
        printed.append(line)
        for text, then in (when or {}).items():
            if text in line:
                then()
    output = "".join(printed)
    assert (process.wait() != 0) == fails, output
    rows = re.findall(r"^(\S+)\s+: ok=\d+\s+changed=(\d+)", output.split("PLAY RECAP")[1], re.MULTILINE)
    return output, {host: int(changed) for host, changed in rows}


def stop_playbook(playbook, *options, at, how=signal.SIGKILL, after=0.0, then=lambda: None):
    """Run it until it prints each of these in turn, wait a moment, do something, and (unless ``how`` is None) end it; what it printed."""
    process = subprocess.Popen(
        command(playbook, *options), env={**os.environ, **PLAIN}, cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    printed, left = [], list(at)
    for line in process.stdout:
        printed.append(line)
        if left and left[0] in line:
            left.pop(0)
            if not left:
                time.sleep(after)
                then()
                if how is not None:
                    # the whole group, as a terminal does
                    os.killpg(process.pid, how)
    status = process.wait()
    assert not left, f"it never came to {left[0]}:\n{''.join(printed)}"
    assert status != 0, "".join(printed)
    return "".join(printed)
