"""Dashboards: every panel's query is PromQL, and what they and the rules name is found by the comparison of names."""

import re
from pathlib import Path

import dashboards
import metric_names
import pytest
import yaml
from test_rules import promtool


def test_every_query_is_one(tmp_path: Path) -> None:
    """promtool parses them as recording rules."""
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(dashboards.expressions())]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = promtool("check", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rules) > 50


@pytest.mark.parametrize("uid", dashboards.BOARDS)
def test_variables_that_are_used_are_there(uid: str) -> None:
    board = dashboards.board(uid)
    used = set(re.findall(r"\$(\w+)", " ".join(query["expr"] for panel in board["panels"] for query in panel["targets"])))
    assert used == {variable["name"] for variable in board["templating"]["list"]} - {"datasource"}
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= dashboards.WIDTH for panel in board["panels"])


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("up == 0", {"up"}),
        ('sum by (instance, le) (rate(a_bucket{le="0.1"}[5m])) / on (slo) group_left (x) b:c', {"a_bucket", "b:c"}),
        ('max by (instance) ({__name__=~"vllm[:_](kv|gpu)_cache_usage_perc"})', {"vllm[:_](kv|gpu)_cache_usage_perc"}),
        ("time() - a_seconds > 14.4 * (1 - b) unless on () c offset 5m", {"a_seconds", "b", "c"}),
        ('ALERTS{alertstate="firing"} or vector(0)', set()),
        ("histogram_quantile(0.5, sum by (le) (q:bucket:rate5m))", {"q:bucket:rate5m"}),
    ],
)
def test_names_of_an_expression(expression: str, names: set[str]) -> None:
    assert metric_names.names(expression) == names


def test_an_invented_name_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name.replace("\\", "") for name in metric_names.asked()} | {
        "vllm:kv_cache_usage_perc", "vllm:generation_tokens_total", "vllm:num_preemptions_total", "vllm:num_requests_running",
        "vllm:num_requests_waiting", "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", "vllm:prompt_tokens_total",
        "vllm:request_queue_time_seconds_bucket", "vllm:inter_token_latency_seconds_bucket", "vllm:inter_token_latency_seconds_count",
    }  # fmt: skip
    assert metric_names.invented(known) == []
    assert metric_names.invented(known - {"qwen_ready"})[0].startswith(
        "qwen_ready is no metric that was scraped; QwenNotReady, a dashboard"
    )
    assert metric_names.invented(known - {"qwen_gpu_present"}, ["qwen_gpu_"]) == []
    # the engine's own name in any of its forms, and none that only looks like it
    assert metric_names.invented(known - {"vllm:kv_cache_usage_perc"} | {"vllm_gpu_cache_usage_perc"}) == []
    assert len(metric_names.invented(known - {"vllm:kv_cache_usage_perc"} | {"vllm:kv_cache_usage"})) == 1
    query = dashboards.tile("invented", "qwen_invented_total")
    monkeypatch.setitem(dashboards.BOARDS, "other", ("Other", (), [[query]]))
    assert metric_names.invented(known) == ["qwen_invented_total is no metric that was scraped; a dashboard asks for it."]


def test_answers_of_the_api_and_plain_lists_are_read() -> None:
    assert metric_names.read('{"status": "success", "data": ["up", "a"]}') == {"up", "a"}
    assert metric_names.read('{"status": "success", "data": {"up": [{"type": "gauge"}]}}') == {"up"}
    assert metric_names.read("up\na\n") == {"up", "a"}
