"""Checks of an inventory that need no host: what is wrong is said before anything is touched."""

from __future__ import annotations

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
            (variable -> [default, parts]) and ``required`` (variable -> {parts, to, unless}); a part is gateway, node or
            monitoring.

    Returns:
        One sentence a problem: host, variable, value seen, value to set. Empty when nothing is wrong.
    """
    found = _missing_groups(groups, words)
    parts_of: dict[str, set[str]] = {}
    for part in ("gateway", "node", "monitoring"):
        for host in groups.get(words[f"qwen_{part}_group"]) or []:
            parts_of.setdefault(host, set()).add(part)
    for host, parts in sorted(parts_of.items()):
        variables = hostvars[host]
        try:
            if "node" in parts:
                found += _wrong_tier(host, variables, words)
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
