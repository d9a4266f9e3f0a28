"""The validation of workflows: against a real service it passes, and each thing that is broken fails it by its name."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import validate_qwen_workflows
import yaml
from breaking import BreakingProxy
from conftest import Running
from validate_qwen_workflows import CHECKS, VALIDATION, Counts, Requests, load_golden, load_workflows, main, percentile

PERSONA = "I am Qwen-Coder, a careful coding companion."
# of a machine that is busy with other things too
TARGETS = {"latency": {"ttft_ms": {"p50": 5000}, "itl_ms": {"p50": 5000}}}


def test_the_projects_workflows_use_every_check() -> None:
    workflows = load_workflows([VALIDATION / "workflows"])
    assert {type(workflow) for workflow, _ in workflows.values()} == {spec for spec, _ in CHECKS.values()}


def test_a_new_file_is_a_new_workflow(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text("check: requests\nabout: mine\ncases: []\n")
    workflows = load_workflows([VALIDATION / "workflows", tmp_path])
    assert isinstance(workflows["mine"][0], Requests)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("check: nothing\n", "mine.yml: check is 'nothing'; set it to one of persona, "),
        ("check: cancel\nabout: a\nprompt: b\ncolour: red\n", "mine.yml: colour is nothing that cancel knows; set one of "),
        ("check: cancel\nabout: a\n", "mine.yml: prompt is not set, and cancel wants it."),
    ],
)
def test_a_wrong_workflow_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, sentence: str) -> None:
    (tmp_path / "mine.yml").write_text(text)
    assert main(["--url", "http://127.0.0.1:1", "--workflows", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err


def test_nobody_there_is_no_failure_of_a_service(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "http://127.0.0.1:1"]) == 2
    assert "--url is 'http://127.0.0.1:1', and GET /v1/models there gives no model" in capsys.readouterr().err


def test_percentiles_are_values_that_were_seen() -> None:
    assert [percentile(list(range(1, 101)), p) for p in (50, 95, 99)] == [50, 95, 99]
    assert percentile([7.0], 99) == 7.0


def test_a_golden_set_is_found_by_the_model(tmp_path: Path) -> None:
    (tmp_path / "Qwen--Coder.json").write_text('{"model": "Qwen/Coder", "persona": "I am a test.", "prompts": {}}')
    assert load_golden([tmp_path / "none", tmp_path], "Qwen/Coder", None)["persona"] == "I am a test."
    assert load_golden([tmp_path], "Qwen/Other", None) == {}


def test_metrics_of_both_backends_say_what_runs() -> None:
    service = (
        'qwen_requests_in_flight 3.0\nqwen_requests_total{outcome="aborted",route="/chat"} 2.0\nqwen_requests_total{outcome="ok"} 9.0\n'
    )
    engine = 'vllm:num_requests_running{model_name="m"} 1.0\nvllm:num_requests_waiting{model_name="m"} 4.0\n'
    assert Counts.read([service]) == Counts(running=3, aborted=2)
    assert Counts.read([service + engine, service]) == Counts(running=8, aborted=4)


class Validation:
    """The command, with what all runs have in common."""

    def __init__(self, folder: Path, model: Path, golden: Path) -> None:
        self.folder, self.model, self.golden = folder, model, golden

    def __call__(self, running: Running, *options: str, url: str | None = None) -> tuple[int, dict[str, dict[str, Any]]]:
        """The exit status, and the results by workflow/case."""
        given = ["--url", url or running.url, "--metrics", running.metrics, "--name", "tested", "--persona", PERSONA]
        given += ["--json", str(self.folder / "r.json"), "--junit", str(self.folder / "r.xml")]
        given += ["--golden", str(self.golden)]
        status = main([*given, *options])
        results = json.loads((self.folder / "r.json").read_text())["results"]
        return status, {f"{result['workflow']}/{result['case']}": result for result in results}


@pytest.fixture(scope="session")
def validation(model: Path, service: Running, tmp_path_factory: pytest.TempPathFactory) -> Validation:
    """With a golden set that transformers alone made."""
    folder = tmp_path_factory.mktemp("validation")
    golden = folder / "golden.json"
    making = ["--url", service.url, "--persona", PERSONA, "--model-path", str(model), "--make-golden", str(golden), "--by-transformers"]
    assert main(making) == 0
    return Validation(folder, model, golden)


@pytest.fixture(scope="session")
def proxy(service: Running) -> Iterator[BreakingProxy]:
    with BreakingProxy(service.url) as proxy:
        yield proxy


def failed(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The lines of what failed."""
    return {name: result["line"] for name, result in results.items() if result["verdict"] == "fail"}


Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def usual(validation: Validation, service: Running, proxy: BreakingProxy) -> tuple[int, Results, str]:
    """All workflows, with nothing broken: exit status, results, JUnit XML of those through the proxy."""
    options = ["--model-path", str(validation.model), "--targets", json.dumps(TARGETS)]
    # the proxy reads a body before it passes it on: what is refused by its length alone is asked of the service itself
    for path in (VALIDATION / "workflows").glob("*.yml"):
        options += ["--only", path.stem] if path.stem != "limits" else []
    status, results = validation(service, *options, url=proxy.url)
    junit = (validation.folder / "r.xml").read_text()
    direct, limits = validation(service, "--only", "limits")
    return status or direct, results | limits, junit


@pytest.mark.engine
def test_a_service_as_it_should_be_passes(usual: tuple[int, Results, str]) -> None:
    status, results, junit = usual
    assert failed(results) == {}
    assert status == 0
    assert (
        "by the service, the tokenizer alone, the transformers backend, the vllm backend, the golden set"
        in (results["persona/no system message"]["line"])
    )
    # targets that nobody set are said, and fail nothing
    assert {name for name, result in results.items() if result["verdict"] == "skip"} == {
        f"latency{busy}/{metric}" for busy in ("", "-busy") for metric in ("ttft", "itl", "total")
    } - {"latency/ttft", "latency/itl"}
    suite = ET.fromstring(junit)
    proxied = [result for result in results.values() if result["workflow"] != "limits"]
    assert (suite.get("tests"), suite.get("failures")) == (str(len(proxied)), "0")


def broken(validation: Validation, service: Running, proxy: BreakingProxy, breaks: str, only: str, *options: str) -> dict[str, str]:
    """What fails when one thing is broken."""
    proxy.breaks = breaks
    try:
        status, results = validation(service, "--only", only, *options, url=proxy.url)
    finally:
        proxy.breaks = "nothing"
    assert status == 1
    return failed(results)


@pytest.mark.engine
def test_a_dropped_persona_is_named(validation: Validation, service: Running, proxy: BreakingProxy) -> None:
    lines = broken(validation, service, proxy, "persona", "persona")
    assert "persona/own system message" not in lines
    assert lines["persona/no system message"].startswith("the persona is not in the prompt, which differs from that of the golden set")
    suite = ET.parse(validation.folder / "r.xml").getroot()
    assert suite.get("failures") == str(len(lines))
    assert "the persona is not in the prompt" in str(suite.find("testcase/failure").get("message"))  # type: ignore[union-attr]


@pytest.mark.engine
def test_a_changed_template_is_named(validation: Validation, start: Callable[..., Running], tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(validation.model, changed)
    config = json.loads((changed / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("assistant\\n' }}", "assistant\\n\\n' }}")
    (changed / "tokenizer_config.json").write_text(json.dumps(config))
    status, results = validation(start(QWEN_BACKEND="transformers", QWEN_MODEL_PATH=str(changed)), "--only", "persona")
    assert status == 1
    line = failed(results)["persona/own system message"]
    assert line.startswith("the chat template renders otherwise than the golden set, from token")


@pytest.mark.engine
def test_a_token_that_changes_under_load_is_named(validation: Validation, service: Running, proxy: BreakingProxy) -> None:
    lines = broken(validation, service, proxy, "token", "deterministic")
    assert set(lines) == {"deterministic/under load"}
    assert "answers with 16 at a time differ from those before; " in lines["deterministic/under load"]
    assert "as token 7" in lines["deterministic/under load"]


@pytest.mark.engine
def test_200_ms_more_are_named(validation: Validation, service: Running, proxy: BreakingProxy, usual: tuple[int, Results, str]) -> None:
    target = round(usual[1]["latency/ttft"]["figures"]["ttft_ms_p50"]) + 100
    targets = {"latency": {"ttft_ms": {"p50": target}, "itl_ms": {"p50": 5000}}}
    lines = broken(validation, service, proxy, "slow", "latency", "--targets", json.dumps(targets))
    assert set(lines) == {"latency/ttft"}
    assert re.match(rf"time to first token: p50 is \d+ ms, the target {target} ms \(p50/p95/p99 ", lines["latency/ttft"])


@pytest.mark.engine
def test_a_buffered_stream_is_named(validation: Validation, service: Running, proxy: BreakingProxy) -> None:
    lines = broken(validation, service, proxy, "buffered", "streaming")
    assert set(lines) == {"streaming/not buffered"}
    # as many as there were in one of the streams: tokens that the engine made while the service was busy come in one
    told = re.match(r"the stream is buffered on its way: (\d+) events in ", lines["streaming/not buffered"])
    assert told
    assert int(told[1]) in proxy.held
    assert int(told[1]) > 48


class HeldUp:
    """A client that gets no processor time: from each stream's begin on, as often as it is told, nothing of it runs for 1.5 seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.times, self.tick = times, validate_qwen_workflows.Stream.watch_client
        monkeypatch.setattr(validate_qwen_workflows.Stream, "watch_client", lambda stream: self.watch(stream))

    async def watch(self, stream: validate_qwen_workflows.Stream) -> None:
        """As the client watches itself."""
        if self.times:
            self.times -= 1
            asyncio.get_running_loop().call_later(0.005, time.sleep, 1.5)
        await self.tick(stream)


@pytest.mark.engine
def test_a_client_that_is_held_up_does_not_call_a_stream_buffered(
    validation: Validation, service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    HeldUp(monkeypatch, 4)
    status, results = validation(service, "--only", "streaming")
    assert (status, failed(results)) == (0, {})
    assert results["streaming/not buffered"]["figures"]["spread"] > 0.5


@pytest.mark.engine
def test_a_client_that_is_always_held_up_says_so(
    validation: Validation, service: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine.yml").write_text("check: streaming\nabout: mine\nprompt: Explain.\ntokens: 16\nwithin_s: 0\n")
    HeldUp(monkeypatch, 1000)
    status, results = validation(service, "--workflows", str(tmp_path))
    assert status == 0
    assert results["mine/not buffered"]["verdict"] == "skip"
    assert re.fullmatch(
        r"this client was held up itself in each of 3 streams, in the last for 1\.\d\d of its \d\.\d\d s: its machine is too busy",
        results["mine/not buffered"]["line"],
    )


@pytest.mark.engine
def test_a_cancel_that_does_not_arrive_is_named(validation: Validation, service: Running, proxy: BreakingProxy) -> None:
    try:
        lines = broken(validation, service, proxy, "cancel", "cancel")
    finally:
        for task in proxy.tasks:  # the engine has other things to do
            task.get_loop().call_soon_threadsafe(task.cancel)
    assert lines["cancel/engine stops"].startswith("cancel does not reach the engine: 5 s after 3 clients had gone, 0 of their requests")


@pytest.mark.engine
def test_a_golden_set_of_another_persona_is_refused(validation: Validation, service: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", service.url, "--golden", str(validation.golden), "--persona", "I am another."]) == 2
    assert f"made of persona '{PERSONA}'; this is 'I am another.'. Make it anew" in capsys.readouterr().err


def test_the_labs_golden_set_has_every_prompt_of_the_projects_workflows() -> None:
    golden = json.loads((VALIDATION / "golden/qwen-coder-tiny.json").read_text())
    asked = {}
    for path in (VALIDATION / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        for entry in [*workflow.get("conversations", []), *(workflow.get("prompts", []) if workflow["check"] == "deterministic" else [])]:
            asked[f"{path.stem}/{entry['name']}"] = entry["messages"]
    assert {name: entry["messages"] for name, entry in golden["prompts"].items()} == asked
