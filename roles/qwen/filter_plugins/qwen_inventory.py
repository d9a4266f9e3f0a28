"""Checks of an inventory that need no host: what is wrong is said before anything is touched."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any


def _name(values: list[str]) -> str:
    """Join names for a sentence, in a stable order."""
    return ", ".join(sorted(values))


def _value(variables: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """A host's value of a variable; the default where it is unset.

    Raises:
        LookupError: its template refers to something that is not defined; the message names that.
    """
    try:
        value = variables.get(name, default)
        str(value)  # an undefined variable inside a template shows when it is used, and not before
    except Exception as error:
        raise LookupError(str(error)) from error
    return default if value is None else value


def _missing_groups(groups: Mapping[str, list[str]], words: Mapping[str, Any]) -> list[str]:
    found = []
    for part, variable in (("gateway", "qwen_gateway_group"), ("node", "qwen_node_group")):
        group = words[variable]
        if not groups.get(group):
            found.append(
                f"The inventory has no {part}: group '{group}' is empty; put at least one host into '{group}', "
                f"or set {variable} to the group that holds them."
            )
    return found


def _wrong_tier(host: str, variables: Mapping[str, Any], words: Mapping[str, Any]) -> list[str]:
    tier = _value(variables, "qwen_gpu_tier", words["qwen_gpu_tier"])
    if tier in words["tiers"]:
        return []
    return [f"{host}: qwen_gpu_tier is '{tier}', which no tier is named; set it to one of {_name(words['tiers'])}."]


def _engine(host: str, hostvars: Mapping[str, Mapping[str, Any]]) -> tuple[Any, str]:
    """What a host says of the hosts of its engine, and where these find it."""
    variables = hostvars[host]
    found = [_value(variables, name) for name in ("qwen_engine_address", "qwen_address", "ansible_host")]
    return _value(variables, "qwen_engine_hosts", []), str(next(filter(None, found), host))


def _wrong_engine(
    host: str, hostvars: Mapping[str, Mapping[str, Any]], parts_of: Mapping[str, set[str]], words: Mapping[str, Any]
) -> list[str]:
    """What is wrong with an engine over several hosts, as one of them says it."""
    hosts, address = _engine(host, hostvars)
    node, worker = ([name for name, parts in sorted(parts_of.items()) if part in parts] for part in ("node", "worker"))
    if not hosts:
        if host not in worker:
            return []
        return [
            f"{host}: qwen_engine_hosts is not set, and '{words['qwen_worker_group']}' are hosts that compute for a node; set it to the "
            f"names of the engine's hosts, the node first, on each of them, for example [{node[0] if node else 'node1'}, {host}]."
        ]
    if not isinstance(hosts, (list, tuple)) or isinstance(hosts, str):
        return [f"{host}: qwen_engine_hosts is '{hosts}'; set it to a list of names, the node first."]
    said = f"{host}: qwen_engine_hosts is [{', '.join(map(str, hosts))}]"
    if host not in hosts or len(set(hosts)) < len(hosts):
        return [f"{said}; set it to each of the engine's hosts once, {host} among them."]
    if hosts[0] not in node:
        return [f"{said}, and {hosts[0]} is in no group '{words['qwen_node_group']}'; put that host first which answers."]
    if wrong := [name for name in hosts[1:] if name not in worker or name in node]:
        return [f"{said}, and {wrong[0]} is not in group '{words['qwen_worker_group']}' alone; put it there, or take it out."]
    if other := [name for name in hosts if list(_engine(name, hostvars)[0] or []) != list(hosts)]:
        return [f"{said}, and another on {other[0]}; set it to the same on all of them, best in a group that they share."]
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return [
            f"{host}: qwen_engine_address is '{address}', which is no IP address; set it to the one at which the engine's hosts find it."
        ]
    tier, first = (_value(hostvars[name], "qwen_gpu_tier", words["qwen_gpu_tier"]) for name in (host, hosts[0]))
    if tier != first:
        return [f"{host}: qwen_gpu_tier is '{tier}', and '{first}' on {hosts[0]}, the head of its engine; set it to the same."]
    return []


def _wrong_ports(host: str, variables: Mapping[str, Any], words: Mapping[str, Any], parts: set[str]) -> list[str]:
    found = []
    ports: dict[str, int] = {}
    for name, (default, openers) in words["ports"].items():
        if not parts & set(openers):
            continue
        seen = _value(variables, name, default)
        try:
            port = int(seen)
        except (TypeError, ValueError):
            port = 0
        if not 1 <= port <= 65535:
            found.append(f"{host}: {name} is '{seen}', which is no port; set it to a number from 1 to 65535.")
            continue
        twin = next((other for other, used in ports.items() if used == port), None)
        if twin:
            found.append(f"{host}: {twin} and {name} are both {port}; set {name} to a port that is not in use on this host.")
        ports[name] = port
    return found


def _unset(host: str, variables: Mapping[str, Any], words: Mapping[str, Any], parts: set[str]) -> list[str]:
    found = []
    for name, entry in words["required"].items():
        if not parts & set(entry["parts"]):
            continue
        try:
            if any(_value(variables, other) == value for other, value in entry.get("unless", {}).items()):
                continue
            value, reason = _value(variables, name), ""
        except LookupError as error:
            value, reason = None, f" ({error})"
        if value in (None, "", [], {}):
            found.append(f"{host}: {name} is not set{reason}; set it to {entry['to']}.")
    return found


def qwen_inventory_problems(
    hostvars: Mapping[str, Mapping[str, Any]], groups: Mapping[str, list[str]], words: Mapping[str, Any]
) -> list[str]:
    """Say what is wrong with an inventory.

    Args:
        hostvars: Ansible's ``hostvars``.
        groups: Ansible's ``groups``.
        words: the group variables and tier of role ``qwen`` by their names, ``tiers`` (known names), ``ports``
            (variable -> [default, parts]) and ``required`` (variable -> {parts, to, unless}); a part is gateway, node, worker
            or monitoring.

    Returns:
        One sentence a problem: host, variable, value seen, value to set. Empty when nothing is wrong.
    """
    found = _missing_groups(groups, words)
    parts_of: dict[str, set[str]] = {}
    for part in ("gateway", "node", "worker", "monitoring"):
        for host in groups.get(words[f"qwen_{part}_group"]) or []:
            parts_of.setdefault(host, set()).add(part)
    for host, parts in sorted(parts_of.items()):
        variables = hostvars[host]
        try:
            if parts & {"node", "worker"}:
                found += _wrong_tier(host, variables, words)
                found += _wrong_engine(host, hostvars, parts_of, words)
            found += _wrong_ports(host, variables, words, parts)
        except LookupError as error:
            found.append(f"{host}: {error}; set it, or what refers to it.")
        found += _unset(host, variables, words, parts)
    return found


class FilterModule:
    """Filters of role ``qwen``."""

    def filters(self) -> dict[str, Any]:
        """Names under which templates find them."""
        return {"qwen_inventory_problems": qwen_inventory_problems}
