"""Prometheus' rules, run by promtool: every alert fires in a story and clears in one (tests/rules/cases.yml)."""

import re
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from plugins import ROOT

FILES = sorted((ROOT / "roles/prometheus/files/rules").glob("*.yml"))
GROUPS = [group for file in FILES for group in yaml.safe_load(file.read_text())["groups"]]
RULES = [rule for group in GROUPS for rule in group["rules"]]
# what is recorded first: promtool takes the groups as they come, and in large steps a record of the step before is too old
ORDER = [group["name"] for group in sorted(GROUPS, key=lambda group: "record" not in group["rules"][0])]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
CASES: list[dict[str, Any]] = yaml.safe_load((ROOT / "tests/rules/cases.yml").read_text())
SEVERITIES = {"critical", "warning", "info", "none"}


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "scripts/promtool", *map(str, arguments)], capture_output=True, text=True, check=False)


def samples(name: str, labels: list[dict[str, str]]) -> list[dict[str, Any]]:
    """What promtool is to find: one series a firing alert, with exactly these labels."""
    return [{"labels": "ALERTS" + str_labels({"alertname": name, "alertstate": "firing", **alert}), "value": 1} for alert in labels]


def str_labels(labels: dict[str, str]) -> str:
    return "{" + ",".join(f'{key}="{value}"' for key, value in sorted(labels.items())) + "}"


def told(case: dict[str, Any]) -> dict[str, Any]:
    """A story in promtool's words."""
    # `0x20` is a number to YAML, and a series of zeroes to promtool
    assert {type(values) for values in case["series"].values()} == {str}, case
    query = f'ALERTS{{alertname="{case["alert"]}",alertstate="firing"}}'
    moments = [(at, labels) for at, labels in case.get("fires", {}).items()] + [(at, []) for at in case["clear"]]
    return {
        "name": case["alert"],
        "interval": case.get("step", "1m"),
        "input_series": [{"series": series, "values": values} for series, values in case["series"].items()],
        "promql_expr_test": [{"expr": query, "eval_time": at, "exp_samples": samples(case["alert"], labels)} for at, labels in moments],
    }


def run(folder: Path, cases: list[dict[str, Any]]) -> str:
    """What promtool finds wrong; empty when all goes as it is told."""
    wrong = ""
    for step in sorted({case.get("step", "1m") for case in cases}):
        file = folder / f"{step}.yml"
        tests = [told(case) for case in cases if case.get("step", "1m") == step]
        told_files = {"rule_files": [str(path) for path in FILES], "evaluation_interval": step, "group_eval_order": ORDER, "tests": tests}
        file.write_text(yaml.safe_dump(told_files))
        done = promtool("test", "rules", file)
        wrong += done.stdout + done.stderr if done.returncode else ""
    return wrong


def test_rules_parse() -> None:
    done = promtool("check", "rules", *FILES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_story_goes_as_it_is_told(tmp_path: Path) -> None:
    assert run(tmp_path, CASES) == ""


def test_a_story_that_is_wrong_is_seen(tmp_path: Path) -> None:
    """The check of the check: a time at which the alert does not fire, and a label that it does not have."""
    story = next(case for case in CASES if case["alert"] == "QwenServiceDown")
    assert "FAILED" in run(tmp_path, [{**story, "clear": ["9m"]}])
    assert "FAILED" in run(tmp_path, [{**story, "fires": {"9m": [{"severity": "warning", "instance": "node1", "job": "qwen-service"}]}}])


def test_every_alert_fires_in_a_story_and_clears_in_one() -> None:
    fires: dict[str, bool] = defaultdict(bool)
    clears: dict[str, bool] = defaultdict(bool)
    for case in CASES:
        fires[case["alert"]] |= bool(case.get("fires"))
        clears[case["alert"]] |= bool(case["clear"])
    assert {name for name in ALERTS if not fires[name]} == set()
    # the watchdog is there to fire always
    assert {name for name in ALERTS if not clears[name]} == {"QwenWatchdog"}
    assert set(fires) == set(ALERTS)


@pytest.mark.parametrize("alert", ALERTS.values(), ids=ALERTS)
def test_an_alert_says_how_bad_what_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in SEVERITIES
    assert alert["annotations"]["summary"].endswith(".")
    assert alert["annotations"]["runbook"] == f"docs/runbooks.md#{alert['alert'].lower()}"


def test_every_alert_has_a_section_in_the_runbooks_and_every_section_an_alert() -> None:
    assert re.findall(r"^### (Qwen\w+)$", (ROOT / "docs/runbooks.md").read_text(), re.MULTILINE) == sorted(ALERTS)


def test_runbooks_name_playbooks_and_documents_that_exist() -> None:
    text = (ROOT / "docs/runbooks.md").read_text()
    assert [path for path in re.findall(r"playbooks/\w+\.yml", text) if not (ROOT / path).exists()] == []
    assert [path for path in re.findall(r"\]\(([\w.-]+\.md)", text) if not (ROOT / "docs" / path).exists()] == []
