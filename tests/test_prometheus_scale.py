"""scripts/prometheus_scale.py: simulated hosts answer what rules ask for, and Prometheus with the role's rules stays within limits."""

import argparse
import json
import re
import time
from pathlib import Path
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
    fleet = prometheus_scale.Fleet(nodes=50, gateways=2, cpus=128)
    assert sum(len(hosts) * len(samples) for hosts, samples in fleet.jobs.values()) > 100_000
    # all of them but what the role drops are there, and what rules make of them
    kept = sum(len(fleet.named(job, host)) for job, (hosts, _) in fleet.jobs.items() for host in hosts)
    assert figures["series"] > kept > 80_000


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


def test_what_was_written_in_advance_are_the_series_that_are_scraped_afterwards(tmp_path: Path) -> None:
    fleet = prometheus_scale.Fleet(nodes=2, gateways=1, cpus=2)
    fleet.began -= 600
    # (what rules make of them is new)
    series = 'count({job=~"qwen-.*",__name__!~"up|scrape_.*|.*:.*|ALERTS.*"})'
    with prometheus_scale.serving(fleet) as port, prometheus_scale.Prometheus(fleet, port, "2s", tmp_path, idle=True) as prometheus:

        def ask(query: str) -> float:
            return float(prometheus.ask("query", query=query)["result"][0]["value"][1])

        prometheus_scale.catch_up(fleet, prometheus.port, 10, 15)
        assert ask('count_over_time(node_load1{instance="node2"}[11m])') in (39, 40)
        assert ask('increase(vllm:generation_tokens_total{instance="node1"}[5m])') > 0
        before = ask(series)
        prometheus.begin()
        deadline = time.monotonic() + 60
        while not prometheus.whole():
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert ask(series) == before > 1000
        modes = prometheus.ask("query", query="count by (mode) (node_cpu_seconds_total)")["result"]
        assert {found["metric"]["mode"] for found in modes} == {"idle", "iowait", "system", "user"}
