"""From who may call whom to addresses and ports of rules: what is merged, what is refused."""

from typing import Any

import pytest
from plugins import load

firewall: Any = load("roles/firewall/filter_plugins/firewall.py")

WHERE: dict[str, Any] = {
    "host": "node1",
    "parts": ["node"],
    "ports": {"node_port": 8080, "gateway_port": 443, "exporters": []},
    "sources": {"gateway": ["gw1", "gw2"], "clients": ["0.0.0.0/0", "::/0"], "management": ["192.0.2.0/29", "192.0.2.4"]},
    "variables": {"management": "firewall_management_networks"},
    "addresses": {"gw1": ["192.0.2.11", "2001:db8::11"], "gw2": ["192.0.2.12"]},
}


def admitted(*flows: dict[str, Any], extra: list[dict[str, Any]] | None = None) -> Any:
    return firewall.firewall_admitted(list(flows), extra or [], WHERE)


def rule(family: str, sources: list[str], ports: list[str], name: str = "gateway", protocol: str = "tcp") -> dict[str, Any]:
    return {"from": name, "family": family, "sources": sources, "protocol": protocol, "ports": ports}


def test_a_part_stands_for_all_addresses_of_its_hosts() -> None:
    assert admitted({"from": "gateway", "to": ["node"], "ports": "node_port"})["rules"] == [
        rule("ip", ["192.0.2.11", "192.0.2.12"], ["8080"]),
        rule("ip6", ["2001:db8::11"], ["8080"]),
    ]


def test_a_flow_to_another_part_or_to_no_port_is_no_rule() -> None:
    assert admitted(
        {"from": "clients", "to": ["gateway"], "ports": "gateway_port"}, {"from": "gateway", "to": ["node"], "ports": "exporters"}
    ) == {"rules": [], "problems": []}


def test_everybody_is_a_rule_without_addresses() -> None:
    assert admitted({"from": "clients", "to": ["node"], "ports": "node_port"})["rules"] == [
        rule("ip", [], ["8080"], "clients"),
        rule("ip6", [], ["8080"], "clients"),
    ]


def test_what_overlaps_is_merged() -> None:
    """nftables refuses sets whose intervals overlap."""
    extra = [{"from": "management", "ports": [9000, "8999-9010", 9011, 80], "protocol": "udp"}]
    assert admitted(extra=extra)["rules"] == [rule("ip", ["192.0.2.0/29"], ["80", "8999-9011"], "management", "udp")]


def test_a_name_stands_for_what_it_resolves_to() -> None:
    (four, *_) = admitted(extra=[{"from": "localhost", "ports": 80}])["rules"]
    assert four["sources"] in (["127.0.0.1"], ["::1"])


@pytest.mark.parametrize(
    ("flow", "sentence"),
    [
        ({"ports": 80}, "firewall_extra_flows has an entry without from; set from there."),
        ({"from": "gateway"}, "firewall_extra_flows has an entry without ports; set ports there."),
        ({"from": "10.0.0.0/40", "ports": 1}, "firewall_extra_flows has '10.0.0.0/40', which is no network; "
         "set firewall_extra_flows to networks such as 192.0.2.0/24."),
        ({"from": "10.0.0.1/8", "ports": 1}, "firewall_extra_flows has '10.0.0.1/8', which has bits set behind its prefix; "
         "set firewall_extra_flows to 10.0.0.0/8 or 10.0.0.1 there."),
        ({"from": "none.invalid", "ports": 1}, "firewall_extra_flows has 'none.invalid', which is no address and does not resolve on the "
         "control machine; set firewall_extra_flows to an address in place of 'none.invalid'."),
        ({"from": "gateway", "ports": "20-10"}, "firewall_extra_flows has '20-10', which is no port; "
         "set firewall_extra_flows to ports from 1 to 65535 or ranges of them."),
        ({"from": "gateway", "ports": 1, "protocol": "sctp"}, "firewall_extra_flows has the protocol 'sctp'; set it to tcp or udp."),
    ],
)  # fmt: skip
def test_refused(flow: dict[str, Any], sentence: str) -> None:
    assert admitted(extra=[flow])["problems"] == [f"node1: {sentence}"]


def test_a_host_whose_address_does_not_resolve_is_named_by_its_variable() -> None:
    where = {**WHERE, "addresses": {**WHERE["addresses"], "gw2": ["gw2.invalid"]}}
    (problem,) = firewall.firewall_admitted([{"from": "gateway", "to": ["node"], "ports": "node_port"}], [], where)["problems"]
    assert problem == (
        "gw2: qwen_address has 'gw2.invalid', which is no address and does not resolve on the control machine; "
        "set qwen_address to an address in place of 'gw2.invalid'."
    )


@pytest.mark.parametrize(("address", "inside"), [("192.0.2.3", True), ("192.0.2.8", False), ("fe80::1%eth0", True), ("2001:db8::1", False)])
def test_holds(address: str, inside: bool) -> None:
    assert firewall.firewall_holds(["192.0.2.0/29", "fe80::/64"], address) is inside
