"""What Prometheus scraped of the whole fleet: every metric that a rule or dashboard names is there, and panels show something."""

import json
import shlex
import time

import dashboards
import metric_names
import pytest

API = "http://127.0.0.1:9091/api/v1"
# the lab has no GPUs (scenario exporters looks after them), and no timer that renews certificates
NOT_HERE = ["qwen_gpu_", "qwen_certificate_renewal_"]


@pytest.fixture(scope="module")
def ask(on):
    """An answer of Prometheus' API."""

    def get(path, **parameters):
        words = [word for name, value in parameters.items() for word in ("--data-urlencode", f"{name}={value}")]
        return json.loads(on("mon1").check_output(shlex.join(["curl", "-fsS", "-G", f"{API}/{path}", *words])))["data"]

    return get


@pytest.fixture(scope="module")
def worked(ask, inventory):
    """Streams went through the chain, and were scraped."""
    import ssl
    from pathlib import Path

    import httpx

    key = Path(inventory("gw1", "lab_client_key_file")).read_text().strip()
    trust = ssl.create_default_context(cafile=inventory("gw1", "pki_ca_dir") + "/ca.crt")
    question = {"messages": [{"role": "user", "content": "Count to ten."}], "max_tokens": 32, "stream": True}
    deadline = time.monotonic() + 120
    while True:
        answer = httpx.post(
            f"https://{inventory('gw1', 'ansible_host')}/api/qwen/chat",
            json=question,
            headers={"Authorization": f"Bearer {key}"},
            verify=trust,
            timeout=60,
        )
        assert answer.status_code == 200
        # two nodes and two scrapes of each, so that there is a rate
        if len(ask("query", query="sum by (instance) (qwen:ttft_seconds_bucket:rate5m) > 0")["result"]) >= 1:
            return
        assert time.monotonic() < deadline
        time.sleep(2)


def test_every_target_is_up(ask):
    targets = ask("targets", state="active")["activeTargets"]
    assert {(t["labels"]["job"], t["labels"]["instance"]) for t in targets if t["health"] != "up"} == set()
    jobs = {t["labels"]["job"] for t in targets}
    assert jobs == {"qwen-host", "qwen-service", "qwen-gateway", "qwen-bridge", "prometheus", "alertmanager", "blackbox"}


@pytest.mark.usefixtures("worked")
def test_every_metric_that_is_named_was_scraped(ask):
    """A counter that has not counted yet has a type and no series: its name is in the metadata."""
    assert metric_names.invented(set(ask("label/__name__/values")) | set(ask("metadata")), NOT_HERE) == []


@pytest.mark.usefixtures("worked")
def test_every_panel_returns_data(ask):
    expressions = [e for e in dashboards.expressions() if not any(word in e for word in NOT_HERE)]
    empty = {e for e in expressions if not ask("query", query=e)["result"]}
    assert empty == set()


def test_rules_are_evaluated_within_a_second(ask):
    for group in ask("rules")["groups"]:
        assert group["evaluationTime"] < 1
        assert [rule["lastError"] for rule in group["rules"] if rule["health"] == "err"] == []
