"""Roll-outs without hosts: what is refused before any is asked, and what is said of one that failed."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from plugins import load

from playbooks import ansible_playbook

rollout = load("roles/qwen_service/filter_plugins/qwen_rollout.py")


def asked(gateway: str, *others: str, up: bool = True, **more: Any) -> dict[str, Any]:
    """What a gateway answers about a node."""
    return {
        "__gateway_server_at": gateway,
        "others_up": list(others),
        "others_drained": [],
        "up": up,
        "status": "UP" if up else "DOWN",
        **more,
    }


@pytest.mark.parametrize(
    ("gateways", "leaving", "least", "sentences"),
    [
        ([asked("gw1", "node2"), asked("gw2", "node2")], [], 1, []),
        ([asked("gw1", "node2"), asked("gw2")], [], 1, [
            "node1: without it, gateway gw2 has no other node that takes requests, and qwen_service_rollout_min_up is '1'; "
            "bring others back first, or set it to 0, and clients are refused meanwhile."]),
        ([asked("gw1", "node2", "node3")], ["node1", "node3"], 2, [
            "node1: without it, gateway gw1 has only node2 that takes requests, and qwen_service_rollout_min_up is '2'; bring others back "
            "first, or set it to 1."]),
        # nobody misses what is out already, and a fleet of one may say so
        ([asked("gw1", up=False)], [], 1, []),
        ([asked("gw1")], [], 0, []),
    ],
)  # fmt: skip
def test_who_can_be_missed(gateways: Any, leaving: list[str], least: int, sentences: list[str]) -> None:
    assert rollout.rotation_problems(gateways, "node1", leaving, least) == sentences


def test_who_is_taken_out_by_a_roll_out_that_did_not_end_counts_where_it_is_put_back_first() -> None:
    gateways = [asked("gw1", others_drained=["node2"])]
    assert rollout.rotation_problems(gateways, "node1", [], 1, returning=True) == []
    assert len(rollout.rotation_problems(gateways, "node1", [], 1)) == 1


def test_canaries_come_first_and_in_their_order_but_for_what_is_to_be_completed() -> None:
    nodes = ["node1", "node2", "node3"]
    assert rollout.lineup(nodes, ["node3", "node9", "node2"], []) == ["node3", "node2", "node1"]
    assert rollout.lineup(nodes, ["node3"], ["node2"]) == ["node2", "node3", "node1"]


def test_versions_of_releases() -> None:
    assert rollout.versions(["0.1.0-a-b", "", "0.1.0-c-d", "0.2.0-a-b"]) == ["0.1.0", "0.2.0"]


def test_requests_that_outlive_the_wait_are_named() -> None:
    assert rollout.outlived([asked("gw1", running=["192.0.2.7 since 12s"]), asked("gw2")]) == ["192.0.2.7 since 12s (gateway gw1)"]
    assert rollout.not_up([asked("gw1"), asked("gw2", up=False)]) == "gw2 (DOWN)"


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"msg": "a\n  b"}, "a b"),
        ({"msg": "One or more items failed", "results": [{"msg": "x"}, {"failed": True, "msg": "y"}]}, "y"),
        ({"stderr": "no"}, "no"),
        ({}, "it failed"),
    ],
)
def test_reasons_are_on_one_line(result: dict[str, Any], said: str) -> None:
    assert rollout.reason(result) == said


SAID = {"to": "2-b", "good": "1-a", "task": "Gate | Ask it", "reason": "0 of 5 are right.", "evidence": "/e", "place": "in service"}


def test_what_is_said_of_a_host_that_was_put_back() -> None:
    assert rollout.failure({**SAID, "back": True, "journal": "ImportError: x"}, "node1") == (
        "node1: release 2-b was refused at 'Gate | Ask it': 0 of 5 are right. The last error in its journal: ImportError: x. "
        "node1 runs 1-a again and is in service. The roll-out stopped; nodes after this one were not touched. Evidence is in /e. "
        "Mend what is wrong and run the playbook again: it skips what is done and goes on with this node."
    )


def test_what_is_said_of_a_host_that_could_not_be_put_back() -> None:
    assert " node1 could not be put back to 1-a (no disk) and stays out of rotation. " in rollout.failure(
        {**SAID, "back": False, "why_not": "no disk"}, "node1"
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "maintenance is ''; set it to drain, undrain or reboot (-e maintenance=...). "
             "--limit is not given; name the nodes that are meant, for example --limit node1."),
        (["-e", "maintenance=drain"], "--limit is not given; name the nodes that are meant, for example --limit node1."),
        (["-e", "maintenance=stop", "--limit", "node1"],
         "maintenance is 'stop'; set it to drain, undrain or reboot (-e maintenance=...)."),
        (["-e", "maintenance=drain", "--limit", "node1,gw1"],
         "--limit names gw1, which is no node; set it to some of node1, node2, node3."),
    ],
)  # fmt: skip
def test_maintenance_says_what_it_wants(options: list[str], sentence: str) -> None:
    result = ansible_playbook("-i", "inventories/example", "playbooks/maintenance.yml", *options)
    assert result.returncode == 2, result.stdout + result.stderr
    assert {json.loads(said) for said in re.findall(r'"msg": ("(?:[^"\\]|\\.)*")', result.stdout)} == {sentence}


def test_maintenance_of_what_is_no_node_at_all_is_refused() -> None:
    result = ansible_playbook("-i", "inventories/example", "playbooks/maintenance.yml", "-e", "maintenance=drain", "--limit", "gw1")
    assert result.returncode == 2
    assert "--limit names gw1, which is no node; set it to some of node1, node2, node3." in result.stdout


@pytest.mark.parametrize("playbook", ["upgrade", "rollback", "site"])
def test_a_limit_reaches_every_play(playbook: str) -> None:
    result = ansible_playbook("-i", "inventories/example", f"playbooks/{playbook}.yml", "--limit", "node2,localhost", "--list-hosts")
    assert result.returncode == 0, result.stderr
    assert set(re.findall(r"^      (\S+)$", result.stdout, re.MULTILINE)) == {"localhost", "node2"}
