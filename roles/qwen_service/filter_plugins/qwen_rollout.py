"""What a roll-out says, made of what gateways and hosts answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Asked = Sequence[Mapping[str, Any]]


def rotation_problems(asked: Asked, host: str, leaving: Iterable[str], min_up: int, returning: bool = False) -> list[str]:
    """Gateways that would have too few nodes without a host.

    Args:
        asked: the answers of ``gateway_server``, one a gateway.
        host: the node that is to be taken out.
        leaving: all nodes that are to be taken out at the same time.
        min_up: how many others there must be.
        returning: whether nodes count that a roll-out which did not end has taken out; this one puts them back first.

    Returns:
        One sentence a gateway; a node that gets no requests there is missed by nobody.
    """
    found = []
    for answer in asked:
        there = {*answer["others_up"], *(answer["others_drained"] if returning else [])}
        others = sorted(there - set(leaving))
        if answer["up"] and len(others) < min_up:
            left = f"only {', '.join(others)}" if others else "no other node"
            found.append(
                f"{host}: without it, gateway {answer['__gateway_server_at']} has {left} that takes requests, and "
                f"qwen_service_rollout_min_up is '{min_up}'; bring others back first, or set it to {len(others)}"
                f"{'' if others else ', and clients are refused meanwhile'}."
            )
    return found


def outlived(asked: Asked) -> list[str]:
    """The requests that a node still answers, by gateway and client."""
    return [f"{who} (gateway {answer['__gateway_server_at']})" for answer in asked for who in answer.get("running", [])]


def not_up(asked: Asked) -> str:
    """The gateways that do not give requests to a node, with what they say."""
    return ", ".join(f"{answer['__gateway_server_at']} ({answer['status']})" for answer in asked if not answer["up"])


def versions(releases: Iterable[str]) -> list[str]:
    """The versions of the service that releases have; a release's name begins with it."""
    return sorted({release.partition("-")[0] for release in releases if release})


def lineup(nodes: Sequence[str], canaries: Sequence[str], begun: Sequence[str]) -> list[str]:
    """Nodes in the order in which they have their turn: those that another roll-out left in theirs, canaries as they are listed, others."""
    return list(dict.fromkeys(name for name in [*begun, *canaries, *nodes] if name in nodes))


def reason(result: Mapping[str, Any]) -> str:
    """Why a task failed, on one line; of a loop, what its items say."""
    items = [str(item.get("msg", "")) for item in result.get("results", []) if item.get("failed")]
    said = "; ".join(filter(None, items)) or str(result.get("msg") or result.get("stderr") or "it failed")
    return " ".join(said.split())


def failure(said: Mapping[str, Any], host: str) -> str:
    """What went wrong with a host, what state it is in, where the evidence is and what to do: one paragraph."""
    reason = str(said["reason"]).strip().rstrip(".")
    parts = [f"{host}: release {said['to']} was refused at '{said['task']}': {reason}."]
    if said.get("journal"):
        parts.append(f"The last error in its journal: {str(said['journal']).strip()}.")
    if said["back"]:
        parts.append(f"{host} runs {said['good']} again and is {said['place']}.")
    else:
        parts.append(
            f"{host} could not be put back to {said['good'] or 'anything'} ({str(said['why_not']).strip().rstrip('.')}) "
            f"and stays out of rotation."
        )
    parts.append("The roll-out stopped; nodes after this one were not touched.")
    parts.append(f"Evidence is in {said['evidence']}.")
    parts.append("Mend what is wrong and run the playbook again: it skips what is done and goes on with this node.")
    return " ".join(parts)


class FilterModule:
    """Filters of role ``qwen_service``."""

    def filters(self) -> dict[str, Any]:
        """Names under which templates find them."""
        return {
            "qwen_rotation_problems": rotation_problems,
            "qwen_rollout_outlived": outlived,
            "qwen_rollout_not_up": not_up,
            "qwen_rollout_versions": versions,
            "qwen_rollout_lineup": lineup,
            "qwen_rollout_reason": reason,
            "qwen_rollout_failure": failure,
        }
