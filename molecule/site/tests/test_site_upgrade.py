"""An upgrade of the whole site while clients stream; scenario upgrade tries everything that goes wrong."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

from count_lost_requests import Kind
from fleet import run_playbook
from rollouts import (
    CODER,
    NODES,
    as_before,  # noqa: F401 (a fixture)
    check_all_is_well,
    current,
    load_of,  # noqa: F401 (a fixture)
    more,  # noqa: F401 (a fixture)
    order,
    said,
)


def test_an_upgrade_under_load_loses_nothing_and_names_what_outlived_the_wait(load_of, on, more, as_before):  # noqa: F811
    # a value that no test before this one has put together on a node
    options = more({"qwen_service_max_num_seqs": 20, "qwen_service_rollout_canaries": ["node2"]})

    def long_streams():
        """Begun as a node's turn begins, and longer than its requests get to end."""
        with load_of(Kind(6, 1500)) as load:
            time.sleep(1)
        return load

    with ThreadPoolExecutor() as pool, load_of(Kind(32, 16, pause_s=3)) as clients:
        clients.wait_for(100)
        clients.mark("upgrade")
        loads = [clients]
        begin = {"Turn | Remember that its turn has begun": lambda: loads.append(pool.submit(long_streams))}
        output, changed = run_playbook("upgrade", *options, when=begin)
        clients.mark("upgrade ended")
        clients.wait_for(2000, timeout_s=600)
        loads[1:] = [load.result() for load in loads[1:]]
    for load in loads:
        print(load.report)
    assert [lost for load in loads for lost in load.report.lost] == []
    assert len(clients.outcomes) >= 2000
    assert [len(load.outcomes) >= 6 for load in loads[1:]] == [True, True]
    # the release; out of rotation, the switch, the restart, into rotation
    assert {name: changed[name] for name in NODES} == {"node1": 5, "node2": 5}
    assert order(output) == ["node2", "node1"]
    assert re.search(r"node\d still answers after 1 s: \S+ since \S+ \(gateway gw1\)", said(output))
    assert "golden answers are right" in said(output)
    for name in NODES:
        assert current(on(name)) != as_before[name][0]
        assert "max_num_seqs=20" in on(name).file(f"{CODER}/current/qwen-coder.env").content_string
    check_all_is_well(on)

    output, changed = run_playbook("upgrade", *options)
    assert {name: changed[name] for name in NODES} == {"node1": 0, "node2": 0}
    assert order(output) == []
