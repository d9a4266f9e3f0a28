"""The benchmark's report: what it says of runs, and what it refuses to say; and what a plan measures."""

from __future__ import annotations

import copy
import importlib.util
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import benchmark_qwen
import benchmark_report
import pytest

ROOT = Path(__file__).resolve().parents[1]


def filters(name: str) -> Any:
    """A filter plugin of the playbooks, as a module."""
    spec = importlib.util.spec_from_file_location(f"playbooks_{name}", ROOT / f"playbooks/filter_plugins/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TARGETS = {
    "vLLM direct": {"path": "direct", "node": "node1", "backend": "vllm", "variant": "full"},
    "vLLM gateway": {"path": "gateway", "node": "node1", "backend": "vllm", "variant": "full"},
    "transformers direct": {"path": "direct", "node": "node1", "backend": "transformers", "variant": "full"},
    "paced direct": {"path": "direct", "node": "node1", "backend": "paced", "variant": "full"},
    "paced gateway": {"path": "gateway", "node": "node1", "backend": "paced", "variant": "full"},
}
ENGINES = ("vLLM direct", "vLLM gateway", "transformers direct")


def figures(tokens_per_s: float, ms: float, failed: int = 0) -> dict[str, Any]:
    """What the load generator gives, as far as it is read."""
    times = {f"{p}_{name}_ms": ms for p in ("p50", "p95", "p99") for name in ("ttft", "itl", "tpot")}
    seconds = 2.0
    tokens = {"output_throughput": tokens_per_s, "total_output_tokens": tokens_per_s * seconds, "duration": seconds}
    return {**times, **tokens, "request_throughput": 1.0, "request_goodput": 1.0, "failed": failed}


def result(label: str = "a", speed: float = 1.0) -> dict[str, Any]:
    """A run: transformers makes 100 tokens/s, vLLM 300, and 2 % fewer through the gateway."""
    rate = {"vLLM direct": 300, "vLLM gateway": 294, "transformers direct": 100, "paced direct": 50, "paced gateway": 50}
    runs = [
        {"target": name, "part": part, "input": 64, "output": 32, "concurrency": c, "requests": 9, "round": r,
         "result": figures(rate[name] * speed * (1 + 0.5 * r), 10 + 2 * (name == "vLLM gateway") + 3 * (name == "paced gateway"))}
        for part, names, cs in (
            ("matrix", ENGINES, (1, 8)), ("chain", ENGINES[:2], (1, 32, 256, 1000)),
            ("paced", ("paced direct", "paced gateway"), (32, 256, 1000)),
        )
        for name in names for c in cs for r in range(3)
    ]  # fmt: skip
    load = {"rounds": 3, "output": 32, "input": 64}
    points = [{"concurrency": 32, "token_ms": 30, "at_random": False}, {"concurrency": 256, "token_ms": 250, "at_random": True}]
    points.append({"concurrency": 1000, "token_ms": 1000, "at_random": False})
    machine = {"processor": "x", "cores": 2, "memory_gib": 23, "gpus": []}
    return {
        "label": label,
        "date": "2026-01-01T00:00:00Z",
        "generator": {"name": "vllm bench serve", "version": "1"},
        "machine": {"client": dict(machine), "nodes": {"node1": dict(machine)}},
        "settings": {"node1": {"max_num_seqs": 32}},
        "versions": {"vllm": "1"},
        "load": {
            "matrix": dict(load),
            "chain": dict(load),
            "paced": {**load, "first_ms": 200, "points": points},
            "goodput": {"ttft": 600},
        },
        "targets": TARGETS,
        "runs": runs,
    }


def put(path: Path, data: dict[str, Any]) -> str:
    path.write_text(json.dumps(data))
    return str(path)


def test_ratios_are_of_rounds(tmp_path: Path) -> None:
    text = benchmark_report.document(result())
    assert "- vLLM / transformers: 3.00 to 3.00 times the tokens/s, by load." in text
    assert "at 32: 2.0% of the throughput lost; at most 3% wanted: **met**" in text
    assert "at 256: p99 of the first token +2 ms (rounds +2 to +2), between tokens +2.0 ms (rounds +2.0 to +2.0); at most +5 ms" in text
    assert "at 32, by the clock: 0.0% of the throughput lost; at most 3% wanted: **met**" in text
    assert "at 256, by the clock: p99 of the first token +3 ms (rounds +3 to +3)" in text
    assert "at 32 at a time another every 30 ms, at 256 at a time another every 250 ms (requests begin at random moments" in text
    assert "1000 streams at a time: 0 failed through the gateway, 0 direct; none wanted: **met**" in text
    assert "1000 streams at a time, by the clock: 0 failed through the gateway, 0 direct; none wanted: **met**" in text
    assert text.count("**met**") == 6


def test_the_chain_may_be_measured_by_the_clock_alone() -> None:
    run = result()
    run["runs"] = [entry for entry in run["runs"] if entry["part"] != "chain"]
    text = benchmark_report.document(run)
    assert "- through the gateway / direct, by the clock: 1.00 to 1.00 times the tokens/s, by load." in text
    assert "at 32, by the clock: 0.0% of the throughput lost" in text
    assert "at 32: " not in text
    assert text.count("**met**") == 3


def test_throughput_is_of_all_rounds() -> None:
    """A round that took three times as long counts three times."""
    run = result()
    for entry in run["runs"]:
        if (entry["target"], entry["round"]) == ("transformers direct", 0):
            entry["result"]["total_output_tokens"], entry["result"]["duration"] = 100.0, 6.0
    pair, key = ("vLLM direct", "transformers direct"), (64, 8)
    assert benchmark_report.throughput_ratio(run, "matrix", pair, key) == pytest.approx(450 / ((100 + 300 + 400) / 10))


def test_the_middle_is_deaf_to_one_round() -> None:
    assert benchmark_report.middle([0.5, 0.6, 0.7]) == pytest.approx(0.6)
    assert benchmark_report.middle([0.6, 0.6, 0.6, 0.6, 9.0]) == pytest.approx(0.6)
    assert benchmark_report.middle([2.0]) == 2.0


def test_rounds_on_both_sides_of_a_limit_decide_nothing() -> None:
    run = result()
    last = next(r for r in run["runs"] if (r["target"], r["concurrency"], r["round"]) == ("paced gateway", 256, 2))
    last["result"]["p99_ttft_ms"] = 40
    text = benchmark_report.document(run)
    assert "at 256, by the clock: p99 of the first token +3 ms (rounds +3 to +30), between tokens +3.0 ms (rounds +3.0 to +3.0)" in text
    assert text.count("**not decided**") == 1


def test_a_missed_target_is_said() -> None:
    run = result()
    for entry in run["runs"]:
        if entry["target"] == "vLLM gateway":
            entry["result"] = figures(200, 20, failed=1)
    text = benchmark_report.document(run)
    assert text.count("**missed**") == 3


def test_plots_are_svg_and_always_the_same() -> None:
    first, second = benchmark_report.plots(result()), benchmark_report.plots(result())
    assert first == second
    for svg in first.values():
        assert len(ET.fromstring(svg).findall("{http://www.w3.org/2000/svg}polyline")) == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r["machine"]["nodes"]["node1"].update(cores=64), "machine.nodes.node1.cores is '2' in one and '64' in the other"),
        (lambda r: r["settings"]["node1"].update(max_num_seqs=64), "settings.node1.max_num_seqs is '32' in one and '64' in the other"),
        (lambda r: r["load"]["matrix"].update(output=64), "load.matrix.output is '32' in one and '64' in the other"),
        (lambda r: r["generator"].update(version="2"), "generator.version is '1' in one and '2' in the other"),
    ],
)
def test_unequal_runs_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, sentence: str) -> None:
    other = copy.deepcopy(result("b"))
    change(other)
    assert benchmark_report.main(["compare", put(tmp_path / "a", result()), put(tmp_path / "b", other)]) == 2
    assert f"'a' and 'b' cannot be compared: {sentence}." in capsys.readouterr().err


def test_another_release_is_compared_and_a_slower_one_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = put(tmp_path / "a", result())
    upgraded = {**result("b", speed=0.85), "versions": {"vllm": "2"}}
    assert benchmark_report.main(["compare", before, put(tmp_path / "b", upgraded)]) == 0
    assert benchmark_report.main(["compare", before, put(tmp_path / "b", upgraded), "--slower", "10"]) == 1
    assert "vLLM direct, 64 tokens in, 8 at a time: 382.5 tokens/s instead of 450.0, 18% worse" in capsys.readouterr().out


def test_nodes_of_unequal_hardware_are_not_set_side_by_side() -> None:
    run = copy.deepcopy(result())
    run["targets"]["vLLM gateway"]["node"] = "node2"
    run["machine"]["nodes"]["node2"] = {**run["machine"]["nodes"]["node1"], "cores": 4}
    with pytest.raises(benchmark_report.Incomparable, match=r"node1 and node2 cannot be compared: machine\.cores is '2'"):
        benchmark_report.document(run)


def test_runs_agree_by_their_ratios(tmp_path: Path) -> None:
    first, slower = put(tmp_path / "a", result()), put(tmp_path / "b", result("b", speed=0.5))
    assert benchmark_report.main(["agree", first, slower]) == 0
    other = copy.deepcopy(result("c"))
    for entry in other["runs"]:
        if entry["target"] == "transformers direct":
            entry["result"]["total_output_tokens"] *= 1.2
    assert benchmark_report.main(["agree", first, put(tmp_path / "c", other)]) == 1


def test_what_is_no_result_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_report.main(["document", put(tmp_path / "x", {"runs": []})]) == 2
    assert "x is no result of make benchmark" in capsys.readouterr().err


def test_the_projects_document_is_what_its_results_give() -> None:
    assert benchmark_report.main(["document", "--check"]) == 0


SAID = {"variant": "full", "model": "m", "port": 8080}
WAYS = {"transformers": "beside", "port": 18080, "gateway": "https://gw/api/qwen", "ca": "ca", "key_file": "key", "paced": False}


def test_a_node_without_another_way_is_reached_over_ssh() -> None:
    node = {
        "inventory_hostname": "n",
        "ansible_host": "192.0.2.1",
        "ansible_user": "me",
        "ansible_port": 2222,
        "qwen_service_described": SAID,
    }
    targets = filters("benchmark").benchmark_targets([node], WAYS)
    assert [target["name"] for target in targets] == ["vLLM direct", "vLLM gateway", "transformers direct"]
    assert targets[0]["tunnel"] == ["ssh", "-o", "BatchMode=yes", "-p", "2222", "-l", "me", "192.0.2.1"]
    assert (targets[2]["url"], targets[1]["url"]) == ("http://127.0.0.1:18080", "https://gw/api/qwen")


def test_other_weights_have_a_target_of_their_own_and_the_chain_two_ways_to_one_node() -> None:
    benchmark = filters("benchmark")
    nodes = [
        {"inventory_hostname": "n", "benchmark_direct_command": "within n", "qwen_service_described": SAID},
        {"inventory_hostname": "q", "benchmark_direct_command": "within q", "qwen_service_described": {**SAID, "variant": "awq-4bit"}},
    ]
    targets = benchmark.benchmark_targets(nodes, WAYS)
    assert [(t["name"], t.get("prefix")) for t in targets if t["path"] == "direct" and t["backend"] == "vllm"] == [
        ("vLLM direct", ["within", "n"]), ("vLLM awq-4bit direct", ["within", "q"]),
    ]  # fmt: skip
    load = benchmark.benchmark_load(targets, ["vllm", "transformers"], {"rounds": 1}, {"rounds": 2}, {})
    assert load["chain"]["targets"] == ["vLLM direct", "vLLM gateway"]
    alone = benchmark.benchmark_load(benchmark.benchmark_targets(nodes, {**WAYS, "gateway": ""}), ["vllm"], {}, {}, {})
    assert (alone["matrix"]["targets"], alone["chain"]["targets"]) == (["vLLM direct", "vLLM awq-4bit direct"], [])


MATRIX = {"input": [64], "output": 32, "concurrency": [1, 8, 64], "rounds": 3, "each": 4, "least": 12, "most": 128}
CHAIN = {"input": 32, "rounds": 3, "points": [{"concurrency": 1000, "output": 32, "requests": 1000, "rounds": 1}]}
PACED = {
    "input": 32, "rounds": 2, "first_ms": 200,
    "points": [
        {"concurrency": 32, "output": 128, "token_ms": 30, "requests": 64, "at_random": False},
        {"concurrency": 256, "output": 32, "token_ms": 250, "requests": 512, "at_random": True},
    ],
}  # fmt: skip


def test_each_round_has_all_points_and_the_targets_take_turns() -> None:
    often, once = (benchmark_qwen.Point("chain", 32, 8, c, c) for c in (1, 1000))
    turns = benchmark_qwen.turns([(often, 2, ["a", "b"]), (once, 1, ["a", "b"])])
    seen = [(index, point.concurrency, name) for index, point, name in turns]
    assert seen == [(0, 1, "a"), (0, 1, "b"), (0, 1000, "a"), (0, 1000, "b"), (1, 1, "b"), (1, 1, "a")]
    assert list(benchmark_qwen.turns([])) == []


def test_what_is_measured_by_the_clock_is_a_part_of_its_own() -> None:
    """Both ways, in the service's place; requests come as often as keep so many there."""
    benchmark = filters("benchmark")
    node = {"inventory_hostname": "n", "benchmark_direct_command": "within n", "qwen_service_described": SAID}
    targets = benchmark.benchmark_targets([node], {**WAYS, "paced": True})
    assert [(t["name"], t["url"]) for t in targets if t["backend"] == "paced"] == [
        ("paced direct", "http://127.0.0.1:8080"), ("paced gateway", "https://gw/api/qwen"),
    ]  # fmt: skip
    seen = {}
    for backends in (["vllm", "transformers"], ["paced"]):
        load = benchmark.benchmark_load(targets, backends, MATRIX, CHAIN, PACED)
        assert {target["backend"] for target in load["targets"]} == {*backends}
        seen[backends[0]] = [(vars(point), rounds, names) for point, rounds, names in benchmark_qwen.points(load)]
    assert [(point["part"], point["concurrency"], point["requests"], rounds) for point, rounds, _ in seen["vllm"]] == [
        ("matrix", 1, 12, 3), ("matrix", 8, 32, 3), ("matrix", 64, 128, 3), ("chain", 1000, 1000, 1),
    ]  # fmt: skip
    load = benchmark.benchmark_load(targets, ["vllm", "transformers"], {**MATRIX, "gateway_rounds": 1}, CHAIN, PACED)
    assert [(point.concurrency, rounds, names) for point, rounds, names in benchmark_qwen.points(load)][:2] == [
        (1, 3, ["vLLM direct", "transformers direct"]), (1, 1, ["vLLM gateway"]),
    ]  # fmt: skip
    assert {tuple(names) for _, _, names in seen["paced"]} == {("paced direct", "paced gateway")}
    assert [(point["part"], point["rate"], point["token_ms"], rounds) for point, rounds, _ in seen["paced"]] == [
        ("paced", None, 30, 2), ("paced", 32.2, 250, 2),
    ]  # fmt: skip
    names = [target["name"] for target in targets]
    drawn = {
        part: [benchmark_qwen.seed(benchmark_qwen.Point(**point), 1, name, names) for name in ways]
        for part, ((point, _, ways), *_) in seen.items()
    }
    assert drawn["paced"] == [1, 1]
    assert len(set(drawn["vllm"])) == 3
    point = benchmark_qwen.Point(**seen["paced"][1][0])
    words = benchmark_qwen.arguments(benchmark_qwen.Target(**targets[0]), point, {"tokenizer": "t", "goodput": {}}, 0)
    assert words[words.index("--request-rate") + 1] == "32.2"
    assert json.loads(words[words.index("--extra-body") + 1]) == {"seed": 250}
    assert words[words.index("--max-concurrency") + 1] == "256"


def test_targets_that_are_reached_in_the_same_way_share_a_load_generator() -> None:
    """Each takes as long to start as many runs do."""
    node = {"inventory_hostname": "n", "benchmark_direct_command": "within n", "qwen_service_described": SAID}
    ways = {t["name"]: benchmark_qwen.Target(**t).way for t in filters("benchmark").benchmark_targets([node], {**WAYS, "paced": True})}
    assert ways["vLLM direct"] == ways["transformers direct"] == ways["paced direct"]
    assert ways["vLLM gateway"] == ways["paced gateway"] != ways["vLLM direct"]
