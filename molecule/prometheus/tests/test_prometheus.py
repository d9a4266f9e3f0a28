"""Role prometheus: what is scraped, which alerts arrive when something really happens, and what is refused."""

import json
import shlex
import time
from contextlib import contextmanager

import metric_names
import pytest

API = "http://127.0.0.1:9091/api/v1"
UNITS = ["prometheus", "prometheus-alertmanager", "prometheus-blackbox-exporter"]
PKI = "/var/lib/prometheus/node-exporter/qwen_pki.prom"


@pytest.fixture(scope="module")
def api(on):
    """Ask Prometheus, on its own host."""

    def get(path):
        answer = json.loads(on("mon1").check_output(f"curl -fsS -g {shlex.quote(f'{API}/{path}')}"))
        assert answer["status"] == "success"
        return answer["data"]

    return get


@pytest.fixture(scope="module")
def query(api, on):
    """A query's series: labels and value."""

    def ask(expression):
        command = f"curl -fsS -G {API}/query --data-urlencode {shlex.quote('query=' + expression)}"
        return [(series["metric"], series["value"][1]) for series in json.loads(on("mon1").check_output(command))["data"]["result"]]

    return ask


@pytest.fixture(scope="module")
def arrived(on):
    """What the receiver got so far: (path is one file for all) alert, status, instance, annotations."""

    def read():
        lines = on("mon1").run("cat /var/lib/webhook/kept").stdout.splitlines()
        return [alert for line in lines for alert in json.loads(line)["alerts"]]

    return read


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(1)
    return found


def states(alerts, alert, labels=None):
    """How an alert was told to the receiver, in order."""
    return [a["status"] for a in alerts if a["labels"]["alertname"] == alert and (labels or {}).items() <= a["labels"].items()]


TARGETS = {
    ("qwen-host", "gw1"), ("qwen-host", "node1"), ("qwen-host", "mon1"), ("qwen-service", "node1"), ("qwen-gateway", "gw1"),
    ("qwen-bridge", "gw1"), ("prometheus", "mon1"), ("alertmanager", "mon1"), ("blackbox", "mon1"),
}  # fmt: skip


def test_every_target_of_the_inventory_is_up(api):
    def up():
        targets = api("targets?state=active")["activeTargets"]
        seen = {(t["labels"]["job"], t["labels"]["instance"]): t["health"] for t in targets}
        return seen if set(seen.values()) == {"up"} else None

    assert set(until(up)) == TARGETS


def test_nothing_crosses_the_wire_without_tls(api):
    for target in api("targets?state=active")["activeTargets"]:
        wire = target["labels"]["job"] in ("qwen-host", "qwen-service", "qwen-gateway")
        assert target["scrapeUrl"].startswith("https://" if wire else "http://127.0.0.1:")


def test_the_probe_sees_through_to_a_node(query):
    assert query('probe_http_status_code{job="qwen-bridge"}')[0][1] == "200"
    assert query("probe_success")[0][1] == "1"


def test_the_engines_names_are_recorded_under_stable_ones(query):
    assert until(lambda: query("vllm_gpu_cache_usage")) == [({"__name__": "vllm_gpu_cache_usage", "instance": "node1"}, "0")]
    assert query("qwen:requests_waiting")[0][0]["instance"] == "node1"


def test_every_metric_that_is_named_was_scraped(api, query):
    """GPUs are in scenario exporters, and a release and certificates' files are the business of their roles."""
    until(lambda: query("qwen:slo_errors:ratio_rate5m"))
    scraped = set(api("label/__name__/values")) | set(api("metadata"))
    without = ["qwen_gpu_", "qwen_release_", "qwen_certificate_", "qwen_ca_", "qwen_crl_"]
    assert metric_names.invented(scraped, without) == []


def test_quiet_but_for_the_watchdog(query, arrived):
    """Nothing is wrong, and only the alert that says so is there; before anything is broken below."""
    firing = {labels["alertname"] for labels, _ in query('ALERTS{alertstate="firing"}')}
    # the hosts' disk is this machine's, which may be filling while tests run
    assert firing - {"QwenDiskFilling"} == {"QwenWatchdog"}
    until(lambda: states(arrived(), "QwenWatchdog"))


METRICS = "/usr/local/lib/upstream.prom"
CONFIG = "/etc/qwen-prometheus/prometheus.yml"
RULES = "/etc/qwen-prometheus/rules/service.yml"
# a small file system that is no tmpfs: an overlay on one has its size
SMALL, FULL = "/srv/small", "/srv/full"
# what is done to the hosts, how it is mended, and what the receiver must be told: alert and labels. Steps of one round come together.
BREAK_FIRST = {
    # a target that somebody took out by hand, and then a mistake that Prometheus is told to read; an engine's end is told for
    # 30 s, so that this comes before it
    "mon1": f"""
        cp -p {CONFIG} {CONFIG}.well
        cp -p {RULES} {RULES}.well
        sed -i 's/\\[15m\\]/[30s]/' {RULES}
        sed -i '/job_name: qwen-host.gw1/,/labels:/d' {CONFIG}
        systemctl reload prometheus
        sleep 3
        echo nonsense >> {CONFIG}
        systemctl kill -s HUP prometheus""",
    "gw1": "systemctl stop qwen-gateway",
    "node1": f"""
        cp {METRICS} {METRICS}.well
        sed -i -e 's/^\\(vllm:kv_cache_usage_perc{{.*}}\\) .*/\\1 0.97/' -e 's/^\\(vllm:num_requests_waiting{{.*}}\\) .*/\\1 7.0/' \
          -e 's/^qwen_ready .*/qwen_ready 0.0/' -e 's/^\\(qwen_engine_ends_total{{reason="died"}}\\) .*/\\1 1.0/' {METRICS}
        [ ! -e {PKI} ] || mv {PKI} {PKI}.well
        echo "qwen_certificate_not_after_seconds{{path=\\"host.crt\\"}} $(date -d +1day +%s)" > {PKI}
        mkdir -p {SMALL} {FULL}
        mount -t tmpfs -o size=8m tmpfs {SMALL}
        mkdir {SMALL}/up {SMALL}/work
        mount -t overlay -o lowerdir={FULL},upperdir={SMALL}/up,workdir={SMALL}/work overlay {FULL}
        head -c 8M /dev/zero > {FULL}/filled || true
        systemd-run --quiet --unit=qwen-fails false || true""",
}
MEND_FIRST = {
    "node1": f"mv {METRICS}.well {METRICS}; rm {PKI}; mv {PKI}.well {PKI}; systemctl reset-failed qwen-fails; umount {FULL} {SMALL}",
    "gw1": "systemctl start qwen-gateway",
    "mon1": f"mv {CONFIG}.well {CONFIG}; systemctl reload prometheus",
}
TOLD_FIRST = [
    ("QwenCertificateExpiresSoon", {"instance": "node1", "severity": "critical"}),
    ("QwenKVCachePressure", {"instance": "node1", "severity": "critical"}),
    ("QwenNotReady", {"instance": "node1"}),
    ("QwenUnitFailed", {"instance": "node1", "name": "qwen-fails.service"}),
    ("QwenGatewayDown", {"instance": "gw1"}),
    ("QwenTargetMissing", {"job": "qwen-host"}),
    ("QwenConfigurationRefused", {"instance": "mon1"}),
    ("QwenEngineEnded", {"instance": "node1", "reason": "died"}),
    ("QwenDiskAlmostFull", {"instance": "node1", "mountpoint": FULL}),
]
BREAK_THEN = {"node1": "systemctl stop qwen-mtls-proxy", "mon1": "systemctl stop qwen-exporters"}
MEND_THEN = {
    "node1": "systemctl start qwen-mtls-proxy",
    "mon1": f"systemctl start qwen-exporters; mv {RULES}.well {RULES}; systemctl reload prometheus",
}
TOLD_THEN = [
    ("QwenServiceDown", {"instance": "node1"}),
    ("QwenNoNodeServing", {"instance": "gw1"}),
    ("QwenHostDown", {"instance": "mon1"}),
]


@contextmanager
def broken(on, steps, mend):
    """Do the steps, and mend what they did."""
    try:
        for host, command in steps.items():
            on(host).check_output("bash -ec %s", command)
        yield
    finally:
        for host, command in mend.items():
            on(host).run("bash -c %s", command)


@pytest.mark.parametrize(
    ("steps", "mend", "told"),
    [
        pytest.param(
            BREAK_FIRST, MEND_FIRST, TOLD_FIRST, id="cache, readiness, certificate, unit, disk, engine, gateway, target, configuration"
        ),
        pytest.param(BREAK_THEN, MEND_THEN, TOLD_THEN, id="terminator, host"),
    ],
)
def test_what_is_broken_is_told_and_what_is_mended_too(on, arrived, steps, mend, told):
    def missing(status):
        alerts = arrived()
        return [name for name, labels in told if status not in states(alerts, name, labels)]

    with broken(on, steps, mend):
        deadline = time.monotonic() + 150
        while missing("firing") and time.monotonic() < deadline:
            time.sleep(1)
        assert missing("firing") == []
    deadline = time.monotonic() + 150
    while missing("resolved") and time.monotonic() < deadline:
        time.sleep(1)
    assert missing("resolved") == []


def test_what_is_told_has_a_summary_and_a_runbook(arrived):
    for alert in arrived():
        name, notes = alert["labels"]["alertname"], alert["annotations"]
        assert notes["runbook"] == f"docs/runbooks.md#{name.lower()}"
        assert notes["summary"]
        assert "<" not in notes["summary"]
        assert "%!" not in notes["summary"]


def test_a_configuration_that_is_wrong_is_refused_and_what_runs_goes_on(on, api):
    host = on("mon1")
    before = host.check_output("systemctl show -p MainPID --value prometheus")
    for unit, file in (("prometheus", CONFIG), ("prometheus-alertmanager", "/etc/qwen-prometheus/alertmanager.yml")):
        host.check_output(f"cp -p {file} {file}.well && echo nonsense >> {file}")
        try:
            assert host.run(f"systemctl reload {unit}").rc != 0
        finally:
            host.check_output(f"mv {file}.well {file}")
        assert host.service(unit).is_running
    host.check_output("systemctl reload prometheus prometheus-alertmanager")
    assert host.check_output("systemctl show -p MainPID --value prometheus") == before


def test_a_reload_loses_no_sample(on, query):
    """Scrapes go on every 2 s over three reloads: no gap of more than two of them."""
    for _ in range(3):
        on("mon1").check_output("systemctl reload prometheus")
        time.sleep(2)
    assert float(query("count_over_time(prometheus_build_info[20s])")[0][1]) >= 8


def test_alertmanager_answers_as_soon_as_it_has_started(on):
    """What is ordered after it, Prometheus, would drop alerts otherwise."""
    on("mon1").check_output("systemctl restart prometheus-alertmanager && curl -fsS http://127.0.0.1:9093/-/ready")


def test_dashboards_are_in_grafana_as_they_are_in_the_project(on):
    kept = json.loads(on("mon1").check_output("cat /var/lib/grafana/kept"))
    files = {path.stem: json.loads(path.read_text()) for path in metric_names.RULES.parent.glob("dashboards/*.json")}
    assert {uid: {k: v for k, v in entry["dashboard"].items() if k not in ("id", "version")} for uid, entry in kept.items()} == files
    # pushed once: the second run of the role found them there
    assert {entry["dashboard"]["version"] for entry in kept.values()} == {1}


def test_every_panel_that_a_fleet_without_gpus_can_fill_returns_data(query):
    import dashboards

    empty = [expression for expression in dashboards.expressions() if not query(expression)]
    # a release, GPUs and streams within the last minutes are not to be had from a stand-in
    rare = ("qwen_gpu_", "qwen_release_", "qwen:ttft", "qwen:itl", "qwen:queue", "qwen:prefix", 'slo="ttft"', 'slo="itl"')
    assert [expression for expression in empty if not any(word in expression for word in rare)] == []


@pytest.mark.parametrize("unit", UNITS)
def test_units_are_hardened_and_run_at_boot(on, unit):
    host = on("mon1")
    assert host.run(f"systemd-analyze security --threshold=20 {unit}.service").rc == 0
    assert host.service(unit).is_running
    assert host.service(unit).is_enabled
    pid = host.check_output(f"systemctl show -p MainPID --value {unit}")
    assert host.check_output(f"stat -c %U /proc/{pid}") == "prometheus"
    assert host.run(f"nsenter -t {pid} -m touch /etc/written").rc != 0


def test_prometheus_collects_its_garbage_early(on):
    """As scripts/prometheus_scale.py has it, whose figures are the promise (docs/observability.md)."""
    environment = on("mon1").check_output("tr '\\0' '\\n' < /proc/$(systemctl show -p MainPID --value prometheus)/environ")
    assert {"GOGC=50", "GOMEMLIMIT=819MiB"} <= {*environment.splitlines()}
    assert on("mon1").check_output("systemctl show -p MemoryHigh --value prometheus") == str(1024 * 2**20)


def test_the_daemons_listen_on_loopback_alone(on):
    lines = [line.split() for line in on("mon1").check_output("ss -Hltnp").splitlines() if "prometheus" in line]
    assert {line[3] for line in lines} == {"127.0.0.1:9091", "127.0.0.1:9093", "127.0.0.1:9115", "127.0.0.1:9100"}


def test_secrets_are_where_they_are_needed_and_nowhere_else(on, inventory):
    from pathlib import Path

    host = on("mon1")
    key = Path(inventory("gw1", "lab_client_key_file")).read_text().strip()
    for secret, file in (("token-of-the-webhook", "webhook_token"), (key, "probe_key")):
        pattern = f"[{secret[0]}]{secret[1:]}"
        found = host.check_output(f"grep -rlE {pattern} /etc --exclude=webhook.service").splitlines()
        assert found == [f"/etc/qwen-prometheus/credentials/{file}"]
        assert host.file(found[0]).mode == 0o600
        for unit in UNITS:
            pid = host.check_output(f"systemctl show -p MainPID --value {unit}")
            assert host.run(f"grep -aqE {pattern} /proc/{pid}/cmdline /proc/{pid}/environ").rc == 1
            assert host.run(f"journalctl --no-pager -u {unit} | grep -qE {pattern}").rc == 1


def test_the_external_mode_writes_files_and_starts_nothing(on):
    host = on("gw1")
    assert not host.package("prometheus").is_installed
    root = "/srv/external"
    assert host.check_output(f"grep -c job_name: {root}/scrape_configs.yml") == "5"
    assert host.file(f"{root}/tls/host.key").mode == 0o640
    for name in ("rules/slo.yml", "rules/inventory.yml", "dashboards/qwen-overview.json", "alertmanager.yml"):
        assert host.file(f"{root}/{name}").exists


def test_a_secret_that_is_no_longer_set_leaves_no_file(on):
    """The second run of the external mode had a key for the probe and no token of the webhook any more."""
    assert on("gw1").file("/srv/external/credentials").listdir() == ["probe_key"]
    assert "credentials" not in on("gw1").file("/srv/external/alertmanager.yml").content_string
