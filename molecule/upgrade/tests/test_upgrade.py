"""Upgrades, roll-back and maintenance of a fleet that serves: nothing is lost, and what goes wrong undoes itself and stops.

Every test leaves both nodes in service. They go on from each other, in this order: the first takes the nodes to the transformers backend,
which starts in a quarter of vLLM's time, and there they stay. (vLLM under load is upgraded in scenario site.)
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
from fleet import ROOT, fault, nothing_lost, run_playbook, states, stop_playbook
from rollouts import (
    BAD_WEIGHTS,
    CODER,
    LIGHT,
    NODES,
    as_before,  # noqa: F401 (a fixture)
    check_all_is_well,
    check_it_was_refused,
    current,
    invocation,
    load_of,  # noqa: F401 (a fixture)
    order,
    place_bad_weights,
    said,
)
from rollouts import more as more_of  # noqa: F401 (a fixture)


@pytest.fixture
def more(more_of):  # noqa: F811
    """The same, for nodes of the transformers backend, which have no standby."""
    return partial(more_of, common={"qwen_service_backend": "transformers", "transformers_standby_enabled": False})


def test_another_backend_is_another_release(load_of, on, more, as_before):  # noqa: F811
    with load_of(LIGHT) as clients:
        clients.wait_for(20)
        output, _ = run_playbook("upgrade", *more())
        clients.wait_for(len(clients.outcomes) + 20)
    nothing_lost(on, clients.report)
    assert order(output) == ["node1", "node2"]
    for name in NODES:
        assert 'backend="transformers"' in on(name).check_output("curl -fsS http://127.0.0.1:9090/metrics")
    check_all_is_well(on)


def test_a_release_that_is_not_there_is_refused_before_anything_is_done(on, more, as_before):  # noqa: F811
    output, _ = run_playbook("rollback", *more(), "-e", "rollback_to=none", fails=True)
    assert "there is no release 'none' on this host; set it to one of those that are: " in said(output)
    assert {name: (current(on(name)), invocation(on(name))) for name in NODES} == as_before


def test_a_standby_that_is_wanted_and_not_there_is_said_before_anything_is_done(on, more_of, as_before):  # noqa: F811
    output, _ = run_playbook("upgrade", *more_of({"qwen_service_max_num_seqs": 24}), fails=True)
    assert (
        "node1: transformers_standby_enabled is true, and qwen-coder-transformers.service is not installed; run playbooks/site.yml, which "
        "installs it, or set transformers_standby_enabled to false." in said(output)
    )
    assert {name: (current(on(name)), invocation(on(name))) for name in NODES} == as_before


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """The service's source with faults that a setting chooses, and a wheelhouse of its own for it: what node1 is given."""
    folder = tmp_path_factory.mktemp("patched")
    shutil.copytree(ROOT / "service_src", folder / "source", ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info"))
    package = folder / "source/qwen_coder_service"
    shutil.copy(ROOT / "molecule/upgrade/faults.py", package / "rollout_faults.py")
    with (package / "main.py").open("a") as file:
        file.write("\nfrom .rollout_faults import wrap\n\napp = wrap(app)\n")
    wheels = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "qwen-coder/wheelhouse")
    # beside the other, for links; but for the service's own wheel it is the same
    own = Path(tempfile.mkdtemp(dir=wheels.parent, prefix="wheelhouse-upgrade-"))
    for wheelhouse in wheels.glob("cpu-*"):
        shutil.copytree(wheelhouse, own / wheelhouse.name, copy_function=os.link)
    yield {"qwen_service_source_dir": str(folder / "source"), "qwen_service_wheelhouse_dir": str(own)}
    shutil.rmtree(own)


def test_a_run_that_is_killed_while_it_puts_together_is_completed_by_the_next(load_of, on, more, patched, as_before):  # noqa: F811
    """And the environment with the faults is there from then on."""
    options = [*more(patched, nodes=["node1"]), "--limit", "node1,localhost"]
    with load_of(LIGHT) as clients:
        stop_playbook("upgrade", *options, at=["PLAY [2/3", "Packages | Install what is locked"], after=5)
        assert current(on("node1")) == as_before["node1"][0]
        _, changed = run_playbook("upgrade", *options)
    nothing_lost(on, clients.report)
    assert changed["node1"] > 5
    assert on("node1").file(f"{CODER}/current/venv").linked_to != on("node2").file(f"{CODER}/current/venv").linked_to
    check_all_is_well(on)
    # it stays what node1 runs: what follows is another setting of it, and costs no environment more


def test_back_to_the_release_before_and_forward_again_and_nothing_is_lost(load_of, on, more, as_before):  # noqa: F811
    before = Path(on("node1").file(f"{CODER}/previous").linked_to).name
    options = [*more(), "--limit", "node1,localhost"]
    with load_of(LIGHT) as clients:
        clients.wait_for(10)
        output, changed = run_playbook("rollback", *options)
        assert (current(on("node1")), changed) == (before, {"localhost": 0, "node1": 4})
        assert f"node1 runs {before}; before, it was {as_before['node1'][0]}." in said(output)
        run_playbook("rollback", *options)
        clients.wait_for(len(clients.outcomes) + 10)
    nothing_lost(on, clients.report)
    assert current(on("node1")) == as_before["node1"][0]
    check_all_is_well(on)


BAD = {
    # what node1 is given more, where it fails, and why
    "does not import": (
        {"qwen_service_extra_settings": {"ROLLOUT_FAULT": "import"}},
        "Run | Let what changed take effect",
        "ImportError: a package of this release is broken",
    ),
    "corrupt weights": (BAD_WEIGHTS["corrupt"], "Run | Let what changed take effect", ""),
    "nonsense": (BAD_WEIGHTS["nonsense"], "Gate | Ask it", "golden answers are right; wrong are"),
    "crashes": (
        {
            "qwen_service_extra_settings": {"ROLLOUT_FAULT": "crash", "ROLLOUT_FAULT_SECONDS": "20"},
            "qwen_service_rollout_watch_seconds": 60,
        },
        "Gate | Ask it", "after it was",
    ),
    "full disk": ({"qwen_service_start_timeout_seconds": 1799}, "Run | Make it the current release", "No space left on device"),
}  # fmt: skip

# the unit is written where nothing more fits
FILL = """
    set -e
    cp -a /etc/systemd/system /root/units
    mount -t tmpfs -o size=1m tmpfs /etc/systemd/system
    cp -a /root/units/. /etc/systemd/system/
    dd if=/dev/zero of=/etc/systemd/system/.full bs=4k 2>/dev/null || true"""


def slow(seconds):
    """A release of node1's that takes so much longer for each token."""
    return {"qwen_service_extra_settings": {"ROLLOUT_FAULT": "slow", "ROLLOUT_FAULT_SECONDS": str(seconds)}}


def test_a_release_that_is_twice_as_slow_undoes_itself_and_stops_the_roll_out(load_of, on, more, patched, as_before, tmp_path):  # noqa: F811
    """Of a release that takes long enough for a token that the gate can tell; below 5 ms a token is anything's fault."""
    with load_of(LIGHT) as clients:
        options = ["-e", "qwen_service_rollout_slower=100", "--limit", "node1,localhost"]
        output, _ = run_playbook("upgrade", *more(slow(0.03), nodes=["node1"], node1=patched), *options)
        token_ms = float(re.search(r"each after it ([\d.]+) ms", said(output))[1])
        before = {**as_before, "node1": (current(on("node1")), invocation(on("node1")))}
        # its own time is in both
        given = {**slow(round(0.03 + token_ms / 1000, 3)), "qwen_service_rollout_canaries": ["node1"]}
        output, _ = run_playbook("upgrade", *more(given, node1=patched), fails=True)
        clients.wait_for(len(clients.outcomes) + 10)
    nothing_lost(on, clients.report)
    why = "of the release before; at most 1.5 times is allowed"
    check_it_was_refused(on, output, before, tmp_path / "evidence", "Gate | Ask it", why)
    times = [float(number) for number in re.findall(r"a token takes \d+ ms, ([\d.]+) times", said(output))]
    assert times
    assert all(1.5 < number < 2.5 for number in times)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_release_undoes_itself_and_stops_the_roll_out(load_of, on, more, patched, as_before, tmp_path, case):  # noqa: F811
    given, task, why = BAD[case]
    node = on("node1")
    if "model_dir" in str(given):
        place_bad_weights(on)
    if case == "full disk":
        node.check_output("bash -ec %s", FILL)
    values = {**given, "qwen_service_rollout_canaries": ["node1"]}
    try:
        with load_of(LIGHT) as clients:
            clients.wait_for(10)
            # both nodes are to have it, and only the first gets it
            output, _ = run_playbook("upgrade", *more(values, node1=patched), fails=True)
            clients.wait_for(len(clients.outcomes) + 10)
    finally:
        if case == "full disk":
            node.check_output("umount /etc/systemd/system && systemctl daemon-reload")
    nothing_lost(on, clients.report)
    check_it_was_refused(on, output, as_before, tmp_path / "evidence", task, why)


def test_a_unit_that_does_not_parse_is_refused_while_it_is_put_together(on, more, patched, as_before):  # noqa: F811
    values = {"qwen_service_start_timeout_seconds": 10**22}
    output, _ = run_playbook("upgrade", *more(values, node1=patched), fails=True)
    assert re.search(
        r"qwen-coder\.service of release \S+ is refused, and nothing was changed: .*Failed to parse TimeoutStartSec", said(output)
    )
    assert {name: (current(on(name)), invocation(on(name))) for name in NODES} == as_before


TURN = ["PLAY [3/3"]
STEPS = [
    ("Turn | Take it out of rotation", signal.SIGINT, 1),
    ("Turn | Measure what is to be replaced", signal.SIGKILL, 0),
    ("Run | Start the service, now and at boot", signal.SIGKILL, 0),
    ("Run | Let what changed take effect", signal.SIGINT, 1),
    ("Gate | Ask it", signal.SIGKILL, 1),
    ("Turn | Put it back into rotation", signal.SIGINT, 0),
]


def test_a_run_that_is_interrupted_again_and_again_is_completed_by_the_next(load_of, on, more, patched, as_before):  # noqa: F811
    """Each goes on where the one before it was stopped, one step further."""
    options = [*more({"qwen_service_max_num_seqs": 24}, nodes=["node1"], node1={**patched, "qwen_service_max_num_seqs": 24}),
               "--limit", "node1,localhost"]  # fmt: skip
    with load_of(LIGHT) as clients:
        clients.wait_for(10)
        for at, how, after in STEPS:
            stop_playbook("upgrade", *options, at=[*TURN, at], how=how, after=after)
            clients.mark(at)
        output, _ = run_playbook("upgrade", *options)
    nothing_lost(on, clients.report)
    assert order(output) == ["node1"]
    assert "max_num_seqs=24" in on("node1").file(f"{CODER}/current/qwen-coder.env").content_string
    assert Path(on("node1").file(f"{CODER}/previous").linked_to).name == as_before["node1"][0]
    assert (current(on("node2")), invocation(on("node2"))) == as_before["node2"]
    check_all_is_well(on)


def test_a_host_that_cannot_be_reached_stays_out_and_the_next_run_goes_on(load_of, on, more, patched, as_before):  # noqa: F811
    options = more({"qwen_service_max_num_seqs": 16}, nodes=["node1"], node1=patched)
    with load_of(LIGHT) as clients:
        clients.wait_for(10)
        stop_playbook(
            "upgrade", *options, at=[*TURN, "Turn | Measure what is to be replaced"], how=None, then=lambda: fault("cut", "node1")
        )
        assert states(on)["node1"] != "UP"
        clients.wait_for(len(clients.outcomes) + 10)
    nothing_lost(on, clients.report)  # it was drained already
    assert invocation(on("node2")) == as_before["node2"][1]
    fault("heal", "node1")
    time.sleep(3)
    assert states(on)["node1"].startswith("DRAIN")
    run_playbook("upgrade", *options)
    check_all_is_well(on)


def test_what_a_person_took_out_stays_out_until_a_person_puts_it_back(load_of, on, more, as_before):  # noqa: F811
    drain = ["-e", "maintenance=drain", "--limit"]
    with load_of(LIGHT) as clients:
        clients.wait_for(10)
        run_playbook("maintenance", *more(), *drain, "node1")
        output, _ = run_playbook("maintenance", *more(), *drain, "node2", fails=True)
        assert (
            "node2: without it, gateway gw1 has no other node that takes requests, and qwen_service_rollout_min_up is '1'; "
            "bring others back first, or set it to 0, and clients are refused meanwhile." in said(output)
        )
        on("gw1").check_output("systemctl reload qwen-gateway")
        assert states(on)["node1"].startswith("MAINT")
    # nothing is asked meanwhile: a gateway that stands alone is away while it restarts
    on("gw1").check_output("systemctl restart qwen-gateway")
    time.sleep(3)
    assert states(on) == {"node1": "MAINT", "node2": "UP"}
    on("node1").check_output("systemctl stop qwen-coder")
    undrain = ["-e", "maintenance=undrain", "--limit", "node1"]
    output, _ = run_playbook("maintenance", *more(), *undrain, fails=True)
    assert "node1: its service is not ready" in said(output)
    on("node1").check_output("systemctl start qwen-coder")
    run_playbook("maintenance", *more(), *undrain)
    nothing_lost(on, clients.report)
    check_all_is_well(on)


def test_a_node_is_rebooted_under_load_and_nothing_is_lost(load_of, on, more, as_before):  # noqa: F811
    boot = on("node2").check_output("cat /proc/sys/kernel/random/boot_id; date +%s").split()
    with load_of(LIGHT) as clients:
        clients.wait_for(10)
        run_playbook("maintenance", *more(), "-e", "maintenance=reboot", "--limit", "node2")
        clients.wait_for(len(clients.outcomes) + 10)
    nothing_lost(on, clients.report)
    assert int(on("node2").check_output("stat -c %Y /proc/1")) >= int(boot[1])
    assert invocation(on("node2")) != as_before["node2"][1]
    check_all_is_well(on)


def test_a_service_whose_release_somebody_removed_is_still_one_that_runs(load_of, on, more, as_before):  # noqa: F811
    for name in NODES:
        on(name).check_output(f"rm -r {CODER}/releases/{current(on(name))}")
    with load_of(LIGHT) as clients:
        clients.wait_for(10)
        output, _ = run_playbook("upgrade", *more({"qwen_service_max_num_seqs": 28}))
        clients.wait_for(len(clients.outcomes) + 10)
    nothing_lost(on, clients.report)
    assert order(output) == ["node1", "node2"]
    check_all_is_well(on)
