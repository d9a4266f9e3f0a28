"""From who may call whom, as the inventory says it, to the addresses and ports of firewall rules."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping
from typing import Any

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Wrong(ValueError):
    """A value that cannot be used; the message goes on after the value, and has {variable} where the variable is to be named."""


def _resolve(name: str) -> list[str]:
    """All addresses of a name, as this machine knows them."""
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)]
    except (socket.gaierror, UnicodeError) as error:
        raise Wrong(
            f"which is no address and does not resolve on the control machine; set {{variable}} to an address in place of '{name}'"
        ) from error


def _networks(entry: str) -> list[Network]:
    """The networks for which an entry stands: a network, an address, or a name."""
    try:
        return [ipaddress.ip_network(entry)]
    except ValueError:
        pass
    if "/" in entry:
        try:
            meant = ipaddress.ip_network(entry, strict=False)
        except ValueError:
            raise Wrong("which is no network; set {variable} to networks such as 192.0.2.0/24") from None
        raise Wrong(f"which has bits set behind its prefix; set {{variable}} to {meant} or {entry.partition('/')[0]} there")
    return [ipaddress.ip_network(address.partition("%")[0]) for address in _resolve(entry)]


def _ports(value: Any) -> list[tuple[int, int]]:
    """Ports and ranges, sorted, without overlaps."""
    found = []
    for entry in value if isinstance(value, list) else [value]:
        first, dash, last = str(entry).partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            low, high = 0, 0
        if not 1 <= low <= high <= 65535:
            raise Wrong("which is no port; set {variable} to ports from 1 to 65535 or ranges of them")
        found.append((low, high))
    merged: list[tuple[int, int]] = []
    for low, high in sorted(found):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _collapse(networks: Iterable[Network]) -> list[tuple[str, list[str]]]:
    """By nftables' family name, without overlaps; an empty list stands for every address of the family."""
    four: list[ipaddress.IPv4Network] = []
    six: list[ipaddress.IPv6Network] = []
    for network in networks:
        if isinstance(network, ipaddress.IPv4Network):
            four.append(network)
        else:
            six.append(network)
    result = []
    for family, collapsed in (("ip", list(ipaddress.collapse_addresses(four))), ("ip6", list(ipaddress.collapse_addresses(six)))):
        if collapsed:
            every = collapsed[0].prefixlen == 0
            names = [str(n.network_address if n.prefixlen == n.max_prefixlen else n) for n in collapsed]
            result.append((family, [] if every else names))
    return result


def _said(entry: str, where: Mapping[str, Any], variable: str) -> list[tuple[str, str, str]]:
    """Host, variable and value behind an entry: a host of the inventory has addresses of its own."""
    if entry not in where["addresses"]:
        return [(where["host"], variable, entry)]
    address, *others = where["addresses"][entry]
    return [(entry, "qwen_address", address), *((entry, "qwen_source_addresses", other) for other in others)]


def _rules(flow: Mapping[str, Any], where: Mapping[str, Any], found: list[str]) -> list[dict[str, Any]]:
    """A flow's rules, one for each IP version; what is wrong with it goes to ``found``."""
    named = flow["from"] if isinstance(flow["from"], list) else [flow["from"]]
    networks: list[Network] = []
    for name in map(str, named):
        variable = flow.get("variable") or where["variables"].get(name, "qwen_address")
        for entry in map(str, where["sources"].get(name, [name])):
            for host, said, value in _said(entry, where, variable):
                try:
                    networks += _networks(value)
                except Wrong as error:
                    found.append(f"{host}: {said} has '{value}', {str(error).format(variable=said)}.")
    try:
        ports = _ports(flow["ports"])
    except Wrong as error:
        variable = flow.get("variable") or flow["named"]
        found.append(f"{where['host']}: {variable} has '{flow['ports']}', {str(error).format(variable=variable)}.")
        return []
    protocol = flow.get("protocol") or "tcp"
    if protocol not in ("tcp", "udp"):
        found.append(f"{where['host']}: {flow['variable']} has the protocol '{protocol}'; set it to tcp or udp.")
        return []
    if not ports:
        return []
    text = [str(low) if low == high else f"{low}-{high}" for low, high in ports]
    return [
        {"from": ", ".join(map(str, named)), "family": family, "sources": sources, "protocol": protocol, "ports": text}
        for family, sources in _collapse(networks)
    ]


def firewall_admitted(flows: list[dict[str, Any]], extra: list[dict[str, Any]], where: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Say what a host's firewall admits.

    Args:
        flows: ``__qwen_flows``: parts, and the variable that holds the ports.
        extra: ``firewall_extra_flows``: {from, ports, protocol}.
        where: ``host``; ``parts`` that it plays; ``ports`` (variable -> value); ``sources`` (word -> networks, addresses, names and
            hosts); ``variables`` (word -> variable to name in a sentence); ``addresses`` (host -> its addresses).

    Returns:
        ``rules``, each {from, family, sources, protocol, ports}, and ``problems``, a sentence for each.
    """
    mine = [
        {"from": flow["from"], "ports": where["ports"][flow["ports"]], "named": flow["ports"]}
        for flow in flows
        if set(flow["to"]) & set(where["parts"])
    ]
    found: list[str] = []
    rules = [rule for flow in mine for rule in _rules(flow, where, found)]
    for flow in extra:
        missing = [key for key in ("from", "ports") if key not in flow]
        if missing:
            found.append(
                f"{where['host']}: firewall_extra_flows has an entry without {' and '.join(missing)}; set {' and '.join(missing)} there."
            )
            continue
        rules += _rules({**flow, "variable": "firewall_extra_flows"}, where, found)
    return {"rules": rules, "problems": list(dict.fromkeys(found))}


def firewall_holds(networks: list[str], address: str) -> bool:
    """Whether an address is in one of these networks, addresses or names."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    return any(wanted in network for entry in networks for network in _networks(str(entry)))


class FilterModule:
    """Filters of role ``firewall``."""

    def filters(self) -> dict[str, Any]:
        """Names under which templates find them."""
        return {"firewall_admitted": firewall_admitted, "firewall_holds": firewall_holds}
