#!/usr/bin/env python3
"""Write the Grafana dashboards; with --check, only say whether they are up to date.

Each dashboard is rows of panels, each panel a title, a unit and queries. A metric that is renamed is one edit here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "roles/prometheus/files/dashboards"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# what a dashboard can be narrowed to: variable -> where its values come from
VARIABLES = {
    "node": 'label_values(up{job="qwen-service"}, instance)',
    "host": 'label_values(up{job="qwen-host"}, instance)',
    "gateway": 'label_values(up{job="qwen-gateway"}, instance)',
}
NODE, HOST, GATEWAY = ('instance=~"$node"', 'instance=~"$host"', 'instance=~"$gateway"')
WIDTH, HEIGHT = 24, 7


@dataclass(frozen=True)
class Panel:
    """One panel.

    Args:
        title: what stands above it.
        queries: PromQL -> legend.
        unit: Grafana's name of the unit.
        kind: Grafana's type of panel.
        steps: colours of a tile: value -> colour, from the smallest on.
    """

    title: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    steps: tuple[tuple[float | None, str], ...] = ((None, "blue"),)


def tile(title: str, query: str, unit: str = "short", steps: Sequence[tuple[float | None, str]] = ((None, "blue"),)) -> Panel:
    """A figure in a colour."""
    return Panel(title, {query: ""}, unit, "stat", tuple(steps))


def low_is_bad(red: float, yellow: float) -> tuple[tuple[float | None, str], ...]:
    """Colours for what should be high."""
    return ((None, "red"), (red, "yellow"), (yellow, "green"))


def high_is_bad(yellow: float, red: float) -> tuple[tuple[float | None, str], ...]:
    """Colours for what should be low."""
    return ((None, "green"), (yellow, "yellow"), (red, "red"))


def quantiles(bucket: str, by: str = "") -> dict[str, str]:
    """Median and tail of a recorded histogram."""
    labels = f"le, {by}" if by else "le"
    legend = f"{{{{{by}}}}} " if by else ""
    return {f"histogram_quantile({q}, sum by ({labels}) ({bucket}))": f"{legend}p{q * 100:.0f}" for q in (0.5, 0.95, 0.99)}


def budget(slo: str) -> Panel:
    """How much of an objective's error budget of the last hours is left."""
    good = f'qwen:slo_errors:ratio_rate6h{{slo="{slo}"}} / on (slo) (1 - qwen:slo_objective)'
    return tile(f"{slo}: error budget left (6 h)", f"1 - {good}", "percentunit", low_is_bad(0, 0.5))


BOARDS: dict[str, tuple[str, tuple[str, ...], list[list[Panel]]]] = {
    "qwen-overview": (
        "Qwen: overview",
        (),
        [
            [
                tile("Nodes that take requests", "sum(qwen_ready)", steps=low_is_bad(1, 2)),
                tile("Availability (1 h)", '1 - qwen:slo_errors:ratio_rate1h{slo="availability"}', "percentunit", low_is_bad(0.99, 0.995)),
                tile("First tokens within 2 s (1 h)", '1 - qwen:slo_errors:ratio_rate1h{slo="ttft"}', "percentunit", low_is_bad(0.9, 0.95)),
                tile("Tokens within 0.1 s (1 h)", '1 - qwen:slo_errors:ratio_rate1h{slo="itl"}', "percentunit", low_is_bad(0.9, 0.95)),
                tile("Alerts", 'count(ALERTS{alertstate="firing",severity!="none"}) or vector(0)', steps=high_is_bad(1, 5)),
            ],
            [budget("availability"), budget("ttft"), budget("itl")],
            [
                Panel("Requests", {"sum by (outcome) (rate(qwen_requests_total[5m]))": "{{outcome}}"}, "reqps"),
                Panel("Tokens", {"sum(qwen:generation_tokens:rate1m)": "out", "sum(qwen:prompt_tokens:rate1m)": "in"}, "short"),
                Panel("Time to first token", quantiles("qwen:ttft_seconds_bucket:rate5m"), "s"),
            ],
            [
                Panel("KV cache", {"vllm_gpu_cache_usage": "{{instance}}"}, "percentunit"),
                Panel("Requests that wait", {"qwen:requests_waiting": "{{instance}}"}),
                Panel(
                    "Alerts that fire", {'ALERTS{alertstate="firing",severity!="none"} or on () vector(0)': "{{alertname}} {{instance}}"}
                ),
            ],
        ],
    ),
    "qwen-node": (
        "Qwen: a node",
        ("node",),
        [
            [
                tile("Takes requests", f"qwen_ready{{{NODE}}}", steps=low_is_bad(1, 1)),
                tile("In flight", f"qwen_requests_in_flight{{{NODE}}}"),
                tile("Engine ends (24 h)", f"sum(increase(qwen_engine_ends_total{{{NODE}}}[24h]))", steps=high_is_bad(1, 3)),
                Panel("What runs", {f"qwen_build_info{{{NODE}}}": ""}, kind="table"),
            ],
            [
                Panel("Requests by outcome", {f"sum by (outcome) (rate(qwen_requests_total{{{NODE}}}[5m]))": "{{outcome}}"}, "reqps"),
                Panel(
                    "Running and waiting",
                    {f"qwen:requests_running{{{NODE}}}": "{{instance}} run", f"qwen:requests_waiting{{{NODE}}}": "{{instance}} wait"},
                ),
                Panel("Time to first token", quantiles(f"qwen:ttft_seconds_bucket:rate5m{{{NODE}}}", "instance"), "s"),
            ],
            [
                Panel(
                    "Processor",
                    {f'1 - avg by (instance) (rate(node_cpu_seconds_total{{{NODE},mode="idle"}}[1m]))': "{{instance}}"},
                    "percentunit",
                ),
                Panel("Memory left", {f"node_memory_MemAvailable_bytes{{{NODE}}}": "{{instance}}"}, "bytes"),
                Panel(
                    "Disk left",
                    {
                        f'node_filesystem_avail_bytes{{{NODE},fstype!~"tmpfs|ramfs|squashfs"}} / node_filesystem_size_bytes': (
                            "{{instance}} {{mountpoint}}"
                        )
                    },
                    "percentunit",
                ),
            ],
        ],
    ),
    "qwen-kv-cache": (
        "Qwen: KV cache and batching",
        ("node",),
        [
            [
                Panel("KV cache", {f"vllm_gpu_cache_usage{{{NODE}}}": "{{instance}}"}, "percentunit"),
                Panel("Preemptions", {f"qwen:preemptions:rate5m{{{NODE}}}": "{{instance}}"}, "ops"),
                Panel("Prompts found in the cache", {f"qwen:prefix_cache_hits:ratio_rate5m{{{NODE}}}": "{{instance}}"}, "percentunit"),
            ],
            [
                Panel("Batch: requests that run", {f"qwen:requests_running{{{NODE}}}": "{{instance}}"}),
                Panel("Queue: requests that wait", {f"qwen:requests_waiting{{{NODE}}}": "{{instance}}"}),
                Panel("Time in the queue", quantiles(f"qwen:queue_seconds_bucket:rate5m{{{NODE}}}"), "s"),
            ],
            [
                Panel("Tokens out", {f"qwen:generation_tokens:rate1m{{{NODE}}}": "{{instance}}"}),
                Panel("Tokens in", {f"qwen:prompt_tokens:rate1m{{{NODE}}}": "{{instance}}"}),
                Panel("Time between tokens", quantiles(f"qwen:itl_seconds_bucket:rate5m{{{NODE}}}"), "s"),
            ],
        ],
    ),
    "qwen-gpu": (
        "Qwen: GPUs",
        ("host",),
        [
            [
                tile("GPUs that answer", f"sum(qwen_gpu_present{{{HOST}}})"),
                tile("GPUs that are missing", f"sum(qwen_gpu_expected{{{HOST}}} - qwen_gpu_present)", steps=high_is_bad(1, 1)),
                tile("Memory errors", f"sum(qwen_gpu_ecc_uncorrected_errors{{{HOST}}})", steps=high_is_bad(1, 1)),
                Panel("Cards", {f"qwen_gpu_info{{{HOST}}}": ""}, kind="table"),
            ],
            [
                Panel("Temperature", {f"qwen_gpu_temperature_celsius{{{HOST}}}": "{{instance}} {{gpu}}"}, "celsius"),
                Panel("Power", {f"qwen_gpu_power_watts{{{HOST}}}": "{{instance}} {{gpu}}"}, "watt"),
                Panel("Slowed down", {f"qwen_gpu_throttled{{{HOST}}}": "{{instance}} {{gpu}} {{reason}}"}),
            ],
            [
                Panel("Utilisation", {f"qwen_gpu_utilization_ratio{{{HOST}}}": "{{instance}} {{gpu}}"}, "percentunit"),
                Panel(
                    "Memory",
                    {f"qwen_gpu_memory_used_bytes{{{HOST}}} / qwen_gpu_memory_total_bytes": "{{instance}} {{gpu}}"},
                    "percentunit",
                ),
            ],
        ],
    ),
    "qwen-gateway": (
        "Qwen: gateways and clients",
        ("gateway",),
        [
            [
                tile("Nodes that are up", f'min(haproxy_backend_active_servers{{{GATEWAY},proxy="nodes"}})', steps=low_is_bad(1, 2)),
                tile("The bridge answers", "min(probe_success)", steps=low_is_bad(1, 1)),
                tile("Certificates are good for", "(min(probe_ssl_earliest_cert_expiry) - time()) / 86400", "d", low_is_bad(2, 7)),
                tile("Connections", f'sum(haproxy_frontend_current_sessions{{{GATEWAY},proxy="kin"}})'),
            ],
            [
                Panel(
                    "Answers to clients",
                    {f'sum by (code) (rate(haproxy_frontend_http_responses_total{{{GATEWAY},proxy="kin"}}[5m]))': "{{code}}"},
                    "reqps",
                ),
                Panel(
                    "Requests by node",
                    {f'sum by (server) (rate(haproxy_server_http_responses_total{{{GATEWAY},proxy=~"nodes.*"}}[5m]))': "{{server}}"},
                    "reqps",
                ),
                Panel(
                    "Second tries",
                    {f'sum by (server) (rate(haproxy_server_retry_warnings_total{{{GATEWAY},proxy=~"nodes.*"}}[5m]))': "{{server}}"},
                    "reqps",
                ),
            ],
            [
                Panel("Probe", {"probe_duration_seconds": "{{instance}}"}, "s"),
                Panel(
                    "Nodes in rotation",
                    {f'haproxy_server_status{{{GATEWAY},proxy="nodes",server!="hold",state="UP"}}': "{{instance}} {{server}}"},
                ),
                Panel(
                    "Bytes to clients",
                    {f'sum by (instance) (rate(haproxy_frontend_bytes_out_total{{{GATEWAY},proxy="kin"}}[5m]))': "{{instance}}"},
                    "Bps",
                ),
            ],
        ],
    ),
    "qwen-rollout": (
        "Qwen: rollout",
        (),
        [
            [
                tile("Releases that run", "count(count by (release) (qwen_release_info))"),
                Panel("Release, tier and profile", {"qwen_release_info": ""}, kind="table"),
                Panel("Engine and model", {"qwen_build_info": ""}, kind="table"),
            ],
            [
                Panel("Nodes by release", {"count by (release) (qwen_release_info)": "{{release}}"}),
                Panel("Nodes that take requests", {"qwen_ready": "{{instance}}"}),
                Panel("Time since the switch", {"time() - qwen_release_since_timestamp_seconds": "{{instance}}"}, "s"),
            ],
            [
                Panel("Errors of the gateway", {'qwen:slo_errors:ratio_rate5m{slo="availability"}': "errors"}, "percentunit"),
                Panel("Units that failed", {'sum by (instance) (node_systemd_unit_state{state="failed"})': "{{instance}}"}),
            ],
        ],
    ),
}


def draw(panel: Panel, number: int, x: int, y: int, width: int) -> dict[str, Any]:
    """A panel in Grafana's words."""
    table = panel.kind == "table"
    queries = [
        {
            "refId": chr(ord("A") + at),
            "datasource": DATASOURCE,
            "expr": query,
            "legendFormat": legend,
            "instant": panel.kind != "timeseries",
        }
        | ({"format": "table"} if table else {})
        for at, (query, legend) in enumerate(panel.queries.items())
    ]
    steps = [{"value": value, "color": colour} for value, colour in panel.steps]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": HEIGHT},
        "targets": queries,
        "fieldConfig": {"defaults": {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}, "overrides": []},
    }


def board(uid: str) -> dict[str, Any]:
    """A dashboard in Grafana's words."""
    title, variables, rows = BOARDS[uid]
    panels: list[dict[str, Any]] = []
    for at, row in enumerate(rows):
        width = WIDTH // len(row)
        panels += [draw(panel, len(panels) + place + 1, place * width, at * HEIGHT, width) for place, panel in enumerate(row)]
    listed: list[dict[str, Any]] = [{"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
    listed += [
        {
            "name": name,
            "type": "query",
            "datasource": DATASOURCE,
            "query": VARIABLES[name],
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        }
        for name in variables
    ]
    return {
        "uid": uid,
        "title": title,
        "tags": ["qwen"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": listed},
        "links": [{"type": "dashboards", "title": "Qwen", "tags": ["qwen"], "asDropdown": True, "keepTime": True}],
        "panels": panels,
    }


def expressions() -> list[str]:
    """Every query of every panel, with nothing left for Grafana to fill in."""
    found = [query for _, _, rows in BOARDS.values() for row in rows for panel in row for query in panel.queries]
    for name in VARIABLES:
        found = [query.replace(f"${name}", ".*") for query in found]
    return found


def main() -> None:
    """Write them, or compare."""
    texts = {TARGET / f"{uid}.json": json.dumps(board(uid), indent=1) + "\n" for uid in BOARDS}
    if "--check" in sys.argv[1:]:
        if {path: path.read_text() for path in TARGET.glob("*.json")} != texts:
            sys.exit("the dashboards are not what scripts/dashboards.py makes: run make docs")
        return
    for path in set(TARGET.glob("*.json")) - set(texts):
        path.unlink()
    for path, text in texts.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
