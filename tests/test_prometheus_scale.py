"""scripts/prometheus_scale.py: simulated hosts answer what rules ask for, and Prometheus with the role's rules stays within limits."""

import argparse
import json
import re
from typing import Any

import metric_names
import prometheus_scale
import pytest

HOSTS = prometheus_scale.Fleet(nodes=3, gateways=2, cpus=4)


def answer(job: str, host: str) -> list[prometheus_scale.Sample]:
    return prometheus_scale.parse(HOSTS.scrape(job, host).decode())


def test_simulated_hosts_give_what_rules_and_dashboards_ask_for() -> None:
    scraped = {sample.series.partition("{")[0] for job, (hosts, _) in HOSTS.jobs.items() for sample in answer(job, hosts[0])}
    # a counter that has not counted yet has a type and no series
    scraped |= {name for file in prometheus_scale.SCRAPES.iterdir() for name in re.findall(r"^# TYPE (\S+)", file.read_text(), re.M)}
    # what Prometheus, Alertmanager, the probe and the inventory say themselves, and what only some fleets have
    elsewhere = ["up", "prometheus_", "alertmanager_", "probe_", "qwen:targets_expected", "qwen_certificate_", "qwen_crl_", "qwen_ca_"]
    assert metric_names.invented(scraped, elsewhere) == []


def test_hosts_differ_move_and_know_each_other() -> None:
    first, second = (answer("qwen-service", host) for host in ("node1", "node2"))
    assert [sample.series for sample in first] == [sample.series for sample in second]
    assert [sample.value for sample in first] != [sample.value for sample in second]
    cpus = {
        sample.series
        for sample in answer("qwen-host", "node3")
        if sample.series.startswith("node_cpu_seconds_total") and "idle" in sample.series
    }
    assert len(cpus) == 4
    servers = {sample.series for sample in answer("qwen-gateway", "gw2") if sample.series.startswith("haproxy_server_bytes_in_total")}
    assert len(servers) == 3


def test_what_is_no_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="not a sample: 'up'"):
        prometheus_scale.parse("# TYPE up gauge\nup\n")


def test_fifty_nodes_stay_within_the_memory_and_every_rule_is_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    """Each host once; how long rules take is for a machine that does nothing else (docs/observability.md)."""
    status = prometheus_scale.main(["--interval", "10s", "--seconds", "1", "--rule-seconds", "60"])
    out = capsys.readouterr().out
    assert status == 0, out
    assert out.endswith("Within 1024 MiB and 60 s.\n")
    figures = json.loads(out[: out.rindex("}") + 1])
    assert figures["series"] > 100_000


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        ({}, None),
        ({"memory_bytes": 1025 * 2**20}, "Prometheus took 1025 MiB of memory; 1024 are allowed."),
        ({"slowest_group": "qwen-slo", "slowest_group_seconds": 1.04}, "Rules of qwen-slo took 1.04 s; 1 are allowed."),
        ({"failures": 3}, "3 scrapes or rules failed, or evaluations were left out."),
        ({"evaluations": 0}, "No rule was evaluated: give it more seconds."),
    ],
)
def test_limits_that_are_crossed_are_said(figures: dict[str, Any], sentence: str | None) -> None:
    seen = prometheus_scale.Seen(**{"evaluations": 1, **figures})
    limits = argparse.Namespace(memory_mib=1024, rule_seconds=1)
    assert prometheus_scale.wrong(seen, limits) == ([sentence] if sentence else [])
