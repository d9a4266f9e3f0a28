"""What Prometheus scraped of the whole fleet: every metric that a rule or dashboard names is there, and panels show something."""

import json
import shlex
import time
from contextlib import contextmanager
from pathlib import Path

import dashboards
import metric_names
import pytest
from fleet import nothing_lost, run_playbook
from rollouts import LIGHT, load_of  # noqa: F401 (a fixture)

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


# this scenario's Prometheus is as slow as a fleet's, and its alerts go nowhere: for a test both are made otherwise, and put back
FILES = [f"/etc/qwen-prometheus/{name}.yml" for name in ("prometheus", "alertmanager", "rules/service")]
RELOAD = "systemctl reload prometheus prometheus-alertmanager"
AUTHORIZATION = "http_config: {authorization: {credentials: x}}"
QUICK = f"""
    for file in {" ".join(FILES)}; do cp -p $file $file.well; done
    sed -i 's/_interval: 15s/_interval: 2s/' /etc/qwen-prometheus/prometheus.yml
    sed -i -e 's/group_wait: .*/group_wait: 1s/' -e 's/group_interval: .*/group_interval: 2s/' \
      -e 's#^  - name: caretakers$#&\\n    webhook_configs: [{{url: "http://127.0.0.1:8500", {AUTHORIZATION}}}]#' \
      /etc/qwen-prometheus/alertmanager.yml
    sed -i 's/^\\( *for:\\) .*/\\1 2s/' /etc/qwen-prometheus/rules/service.yml
    rm -f /run/told
    systemd-run --quiet --unit=webhook python3 /run/webhook.py 8500 /run/told x
    {RELOAD}"""
# more prompts of 1,800 tokens than the engine's cache has room for, again and again, on the node itself
FILL = """
import json, threading, urllib.request
def ask(number):
    turn = 0
    while True:
        turn += 1
        prompt = f"{number} {turn} " + "word " * WORDS
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 150, "ignore_eos": True}
        head = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:8080/chat", json.dumps(body).encode(), head)).read()
for number in range(28):
    threading.Thread(target=ask, args=(number,)).start()
"""


@contextmanager
def quick_alerts(host):
    """Alerts of the service within seconds, to a receiver on the host; what it got so far."""
    host.check_output("printf '%%s' %s > /run/webhook.py", (Path(__file__).parents[2] / "resources/webhook.py").read_text())
    try:
        host.check_output("bash -ec %s", QUICK)
        yield lambda: [a for line in host.run("cat /run/told").stdout.splitlines() for a in json.loads(line)["alerts"]]
    finally:
        host.run(f"systemctl stop webhook; for file in {' '.join(FILES)}; do mv $file.well $file; done; {RELOAD}")


def arrives(told, want, status):
    """Wait until the receiver was told so."""
    deadline = time.monotonic() + 120
    while status not in [alert["status"] for alert in told() if want <= alert["labels"].items()]:
        assert time.monotonic() < deadline, told()
        time.sleep(1)


def test_a_cache_that_long_prompts_fill_is_told_and_then_that_it_is_well(on):
    node = on("node1")
    words = "curl -fsS -H 'Content-Type: application/json' -d %s http://127.0.0.1:8080/chat"
    body = {"messages": [{"role": "user", "content": "word " * 200}], "max_tokens": 1}
    tokens = json.loads(node.check_output(words, json.dumps(body)))["usage"]["prompt_tokens"]
    program = FILL.replace("WORDS", str(200 * 1700 // tokens))
    restarts = node.check_output("systemctl show -p NRestarts --value qwen-coder")
    want = {"alertname": "QwenKVCachePressure", "instance": "node1"}.items()
    with quick_alerts(on("mon1")) as told:
        node.check_output("systemd-run --quiet --unit=fill python3 -c %s", program)
        try:
            arrives(told, want, "firing")
            node.check_output("systemctl stop fill")
            arrives(told, want, "resolved")
        finally:
            node.run("systemctl stop fill")
    assert node.check_output("systemctl show -p NRestarts --value qwen-coder") == restarts


def test_the_standby_takes_over_under_load_and_is_told_and_nothing_is_lost(on, load_of):  # noqa: F811
    unit, want = "qwen-coder-transformers.service", {"alertname": "QwenStandbyActive", "instance": "node2"}.items()
    limit = ["--limit", "node2,localhost"]
    assert on("node2").run(f"systemctl is-active {unit}").stdout.strip() == "inactive"
    with quick_alerts(on("mon1")) as told, load_of(LIGHT) as clients:
        clients.wait_for(20)
        try:
            run_playbook("standby", "-e", "standby=activate", *limit)
            assert on("node2").check_output(f"systemctl is-active {unit}") == "active"
            arrives(told, want, "firing")
        finally:
            run_playbook("standby", "-e", "standby=deactivate", *limit)
        arrives(told, want, "resolved")
        clients.wait_for(len(clients.outcomes) + 20)
    nothing_lost(on, clients.report)
