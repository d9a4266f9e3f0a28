"""Role exporters: what monitoring hosts read, and nobody else."""

import re
import time
from pathlib import Path

import metric_names
import pytest

NODE = "https://node1:9100"
IDENTITY = "--cert /etc/qwen-pki/host.crt --key /etc/qwen-pki/host.key"
CA = "--cacert /etc/qwen-pki/ca.crt"
UNITS = ["prometheus-node-exporter.service", "qwen-exporters.service", "qwen-host-metrics.service", "qwen-dcgm-exporter.service"]


@pytest.fixture
def read(on, curl):
    """A path of a host's exporters, as the monitoring host reads it."""

    def metrics(path="/node/metrics", host="node1"):
        rc, status, body = curl(on("mon1"), f"https://{host}:9100{path}")
        assert (rc, status) == (0, 200)
        return body

    return metrics


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.parametrize("host", ["node1", "mon1"])
def test_a_host_is_read_over_mutual_tls(read, host):
    text = read(host=host)
    assert "\nnode_filesystem_avail_bytes{" in text
    assert "\nnode_textfile_scrape_error 0\n" in text
    # what a host with many processors has most of, and nobody asks for
    assert not {"node_softnet_processed_total", "node_cpu_guest_seconds_total"} & {line.partition("{")[0] for line in text.splitlines()}
    assert '\nnode_systemd_unit_state{name="ssh.service",state="active",type="notify"} 1\n' in text
    assert "cron.service" not in text


def test_what_runs_and_what_the_gpus_say(read):
    text = read()
    assert '\nqwen_release_info{profile="cpu",release="1.2.3-cpu-abc",tier="cpu-lab"} 1\n' in text
    assert "\nqwen_gpu_expected 2\n" in text
    assert "\nqwen_gpu_present 2\n" in text
    assert '\nqwen_gpu_temperature_celsius{gpu="1"} 31\n' in text


def test_every_metric_of_gpus_and_releases_that_is_named_is_there(read):
    scraped = set(re.findall(r"^([a-zA-Z_:][\w:]*)", read(), re.MULTILINE))
    own = {name for name in metric_names.asked() if name.startswith(("qwen_gpu_", "qwen_release_", "qwen_host_", "node_"))}
    # there was no such error (tests/test_host_metrics.py has some)
    assert own - scraped == {"qwen_gpu_xid_last_timestamp_seconds"}


@pytest.mark.parametrize(
    ("machine", "shown", "again", "stays"),
    [
        # none is started for a look
        pytest.param("2x80-missing", "qwen_gpu_present 1", "qwen_gpu_present 2", True, id="a lost GPU, by the process of before"),
        # which devices it may use, systemd settles as it starts
        pytest.param("no-driver", "qwen_gpu_driver_ok 0", "qwen_gpu_driver_ok 1", False, id="a driver that fails, by a new one"),
    ],
)
def test_what_happens_to_gpus_shows(on, read, machine, shown, again, stays):
    process = on("node1").check_output("systemctl show -P MainPID qwen-host-metrics")
    on("node1").check_output(f"/opt/fake_gpu/place.py /opt/machine {machine}")
    try:
        until(lambda: f"\n{shown}\n" in read())
    finally:
        on("node1").check_output("/opt/fake_gpu/place.py /opt/machine 2x80-nvlink")
    until(lambda: f"\n{again}\n" in read())
    assert (on("node1").check_output("systemctl show -P MainPID qwen-host-metrics") == process) is stays


def test_metrics_of_others_are_shown_too(on, read):
    """Role pki and others leave files in the directory of the textfile collector."""
    on("node1").check_output("echo 'qwen_from_elsewhere 7' > /var/lib/prometheus/node-exporter/elsewhere.prom")
    assert "\nqwen_from_elsewhere 7\n" in read()
    on("node1").check_output("rm /var/lib/prometheus/node-exporter/elsewhere.prom")


def test_dcgm_is_shown_on_hosts_with_gpus(on, curl, read):
    assert 'DCGM_FI_DEV_GPU_TEMP{gpu="0"} 31' in read("/gpu/metrics")
    assert curl(on("mon1"), "https://mon1:9100/gpu/metrics")[1] == 404


@pytest.mark.parametrize("path", ["/", "/metrics", "/node", "/node/metrics/", "/node/debug/pprof", "/haproxy/metrics", "/gpu/"])
def test_nothing_else_is_shown(on, curl, path):
    assert curl(on("mon1"), f"{NODE}{path}")[1] == 404


def test_only_reading(on, curl):
    assert curl(on("mon1"), f"{NODE}/node/metrics", f"{IDENTITY} {CA} -X POST")[1] == 405


REFUSED = {
    "no certificate": ("mon1", CA),
    "another CA": ("mon1", f"--cert /root/foreign.crt --key /root/foreign.key {CA}"),
    "identity of a node": ("node1", f"{IDENTITY} {CA}"),
    "TLS 1.2": ("mon1", f"--tls-max 1.2 {IDENTITY} {CA}"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_everybody_else_gets_nothing(on, curl, case):
    name, options = case
    rc, status, body = curl(on(name), f"{NODE}/node/metrics", options)
    assert rc != 0
    assert (status, body) == (0, "")


def test_exporters_themselves_listen_on_loopback(on):
    host = on("node1")
    address = host.interface("eth0").addresses[0]
    lines = [line.split() for line in host.check_output("ss -Hltn").splitlines()]
    assert {line[3] for line in lines} & {f"{address}:9100", "127.0.0.1:9100", "127.0.0.1:9400"} == {
        f"{address}:9100", "127.0.0.1:9100", "127.0.0.1:9400",
    }  # fmt: skip
    assert not [
        line[3] for line in lines if line[3].startswith(("0.0.0.0", "*", "[::]")) and line[3].rpartition(":")[2] in ("9100", "9400")
    ]


@pytest.mark.parametrize("unit", UNITS)
def test_units_are_hardened(on, unit):
    assert on("node1").run(f"systemd-analyze security --threshold=20 {unit}").rc == 0


def test_units_run_at_boot(on):
    for unit in ("prometheus-node-exporter", "qwen-exporters", "qwen-dcgm-exporter", "qwen-host-metrics"):
        assert on("node1").service(unit).is_running
        assert on("node1").service(unit).is_enabled
    assert not on("mon1").file("/etc/systemd/system/qwen-host-metrics.service").exists


def test_the_journal_has_its_limits(on):
    settings = on("node1").check_output("systemd-analyze cat-config systemd/journald.conf | grep -v '^#'").splitlines()
    assert {"SystemMaxUse=2G", "MaxRetentionSec=30day", "RateLimitBurst=20000", "Storage=persistent"} <= set(settings)
    # what journald says when it starts: it took the limits
    assert "max 2.0G" in on("node1").check_output("journalctl --no-pager -o cat -t systemd-journald")


LOGS = Path(__file__).resolve().parents[3] / "docs/logs"
# this host sends its own journal to the store that it is; only the store's address is another than in the examples
CENTRAL_STORE = """set -e
apt-get install -y -qq --no-install-recommends systemd-journal-remote >/dev/null
cd /tmp/logs
install -D -m 644 journal-upload.conf /etc/systemd/journal-upload.conf.d/60-qwen.conf
sed -i s/logs.example.org/mon1/ /etc/systemd/journal-upload.conf.d/60-qwen.conf
for unit in upload.service remote.service remote.socket; do
  install -D -m 644 journal-$unit.conf /etc/systemd/system/systemd-journal-$unit.d/60-qwen.conf
done
install -d -m 700 /etc/qwen-logs
(umask 077 && cat /etc/qwen-pki/host.crt /etc/qwen-pki/host.key > /etc/qwen-logs/host.pem)
systemctl daemon-reload
systemd-run -q --unit qwen-logs haproxy -f /tmp/logs/haproxy.cfg
systemctl restart systemd-journal-remote.socket systemd-journal-upload
"""


def test_the_example_of_a_central_store_keeps_lines_of_who_has_a_certificate(on, curl):
    host = on("mon1")
    host.check_output("mkdir -p /tmp/logs")
    for file in LOGS.iterdir():
        host.check_output("printf '%%s' %s > %s", file.read_text(), f"/tmp/logs/{file.name}")
    host.check_output("bash -c %s", CENTRAL_STORE)
    host.check_output("logger -t probe this-arrives")
    until(lambda: host.run("journalctl -D /var/log/journal/remote -t probe -o cat | grep -q this-arrives").rc == 0, 60)
    for options in (CA, f"--cert /root/foreign.crt --key /root/foreign.key {CA}"):
        rc, status, _ = curl(host, "https://mon1:19532/upload", f"-X POST {options}")
        assert (rc != 0, status) == (True, 0)
    host.check_output("systemctl stop systemd-journal-upload systemd-journal-remote.socket systemd-journal-remote qwen-logs")
