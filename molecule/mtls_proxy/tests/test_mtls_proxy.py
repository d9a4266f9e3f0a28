"""Role mtls_proxy: who is answered, who is not, and what is passed on."""

import json
import threading

import pytest

SERVICE, METRICS = "https://node1:8080", "https://node1:9090"
IDENTITY = "--cert /etc/qwen-pki/host.crt --key /etc/qwen-pki/host.key"
CA = "--cacert /etc/qwen-pki/ca.crt"


def test_the_gateway_is_answered(on, curl):
    rc, status, body = curl(on("gw1"), f"{SERVICE}/ready")
    assert (rc, status) == (0, 200)
    assert '"path": "/ready"' in body


def test_monitoring_reads_metrics(on, curl):
    assert curl(on("mon1"), f"{METRICS}/metrics")[:2] == (0, 200)


# every one of these gets no HTTP answer at all: status 0 and no body
REFUSED = {
    "no certificate": ("gw1", SERVICE, CA),
    "another CA": ("gw1", SERVICE, f"--cert /root/foreign.crt --key /root/foreign.key {CA}"),
    "identity of monitoring": ("mon1", SERVICE, f"{IDENTITY} {CA}"),
    "certificate of a node, for serving only": ("node1", SERVICE, f"{IDENTITY} {CA}"),
    "the gateway at the metrics": ("gw1", METRICS, f"{IDENTITY} {CA}"),
    "no certificate at the metrics": ("mon1", METRICS, CA),
    "expired": ("gw1", SERVICE, f"--cert /root/expired.crt --key /root/expired.key {CA}"),
    "not yet valid": ("gw1", SERVICE, f"--cert /root/not-yet-valid.crt --key /root/not-yet-valid.key {CA}"),
    "revoked": ("gw1", SERVICE, f"--cert /root/revoked.crt --key /root/revoked.key {CA}"),
    "right CA, name of nobody": ("gw1", SERVICE, f"--cert /root/mallory.crt --key /root/mallory.key {CA}"),
    "TLS 1.1": ("gw1", SERVICE, f"--tls-max 1.1 --ciphers DEFAULT:@SECLEVEL=0 {IDENTITY} {CA}"),
    "TLS 1.2": ("gw1", SERVICE, f"--tls-max 1.2 {IDENTITY} {CA}"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_everybody_else_gets_nothing(on, curl, case):
    name, url, options = case
    rc, status, body = curl(on(name), f"{url}/{'metrics' if url == METRICS else 'ready'}", options)
    assert rc != 0
    assert (status, body) == (0, "")


def test_plain_http_gets_nothing(on, curl):
    rc, status, body = curl(on("gw1"), "http://node1:8080/ready", "")
    assert rc != 0
    assert (status, body) == (0, "")


def test_a_server_of_another_name_is_not_trusted(on, curl):
    """The client checks the identity as well: gw1's own address does not answer for node1."""
    rc, status, _ = curl(on("gw1"), "https://gw1:8080/ready", f"{IDENTITY} {CA} --connect-to gw1:8080:node1:8080")
    assert (rc, status) == (60, 0)


def test_a_good_certificate_made_the_same_way_is_answered(on, curl):
    """What the ones above are refused for is what their names say."""
    assert curl(on("gw1"), f"{SERVICE}/ready", f"--cert /root/good.crt --key /root/good.key {CA}")[:2] == (0, 200)


def test_who_was_refused_and_why_stands_in_the_log(on, curl):
    curl(on("gw1"), f"{SERVICE}/ready", REFUSED["right CA, name of nobody"][2])
    curl(on("gw1"), f"{SERVICE}/ready", REFUSED["revoked"][2])
    curl(on("gw1"), "http://node1:8080/ready", "")
    lines = [json.loads(line) for line in on("node1").check_output("journalctl -u qwen-mtls-proxy -o cat | grep ^{").splitlines()]
    assert any((line.get("client"), line.get("reason")) == ("mallory", "identity") for line in lines)
    assert any(line.get("reason") == "tls" and "certificate verify failed" in line["detail"] for line in lines)
    assert any(line.get("reason") == "tls" and "http request" in line["detail"] for line in lines)


@pytest.mark.parametrize(("options", "status", "reason"), [
    ("-H 'Content-Length: 4194305' -X POST", 413, "body_too_large"),
    (f"-H 'X-Long: {'x' * 17000}'", 431, "header_too_large"),
])  # fmt: skip
def test_limits(on, curl, options, status, reason):
    _, seen, body = curl(on("gw1"), f"{SERVICE}/chat", f"{IDENTITY} {CA} {options}")
    assert (seen, json.loads(body)["error"]["reason"]) == (status, reason)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/metrics",
        "/invocations",
        "/pause",
        "/v1/completions",
        "/redoc",
        "/tokenize",
        "/detokenize",
        "/pooling",
        "/v1/embeddings",
        "/live",
        "/CHAT",
        "/chat;x",
        "/%63hat",
        "/chat/",
        "/chat/x",
        "//chat",
    ],
)
def test_other_paths_are_not_passed_on(on, curl, path):
    assert curl(on("gw1"), f"{SERVICE}{path}")[1] == 404


@pytest.mark.parametrize(("method", "path"), [("GET", "/chat"), ("DELETE", "/chat"), ("POST", "/health"), ("TRACE", "/ready")])
def test_other_methods_are_not_passed_on(on, curl, method, path):
    options = f"{IDENTITY} {CA} -X {method}"
    assert curl(on("gw1"), f"{SERVICE}{path}", options)[1] == 405


def test_metrics_port_serves_metrics_only(on, curl):
    assert curl(on("mon1"), f"{METRICS}/chat")[1] == 404


def test_a_stream_is_not_buffered(on):
    """Five events, 0.4 s apart, arrive one by one."""
    out = on("gw1").check_output(
        f"curl -sSN {IDENTITY} {CA} "
        f'-d \'{{"stream": true}}\' {SERVICE}/chat | while read -r line; do [ -n "$line" ] && date +%s%N; done; true'
    )
    times = [int(t) / 1e9 for t in out.split()]
    assert len(times) == 5
    assert times[-1] - times[0] > 1.2


@pytest.mark.parametrize(("size", "connections"), [(10, {1, 2}), (16384, {1, 2}), (16385, {10})])
def test_small_requests_share_connections_to_the_service_and_large_ones_have_their_own(on, curl, size, connections):
    """Each comes over a connection of its own to the terminator. (One that is kept may be closed as it was idle for long.)"""
    host = on("gw1")
    host.check_output("head -c %s /dev/zero | tr '\\0' ' ' | sed 's/^../{}/' > /tmp/body", str(size))
    assert host.file("/tmp/body").size == size
    answers = [curl(host, f"{SERVICE}/chat", f"{IDENTITY} {CA} --data-binary @/tmp/body") for _ in range(10)]
    assert {status for _, status, _ in answers} == {200}
    assert len({json.loads(body)["from"] for *_, body in answers}) in connections
    assert {json.loads(body)["over"] for *_, body in answers} == {"socket"}


# asks once over a connection, and says what comes next on it, unasked, within ten seconds
WAIT = """
import http.client, ssl
context = ssl.create_default_context(cafile="/etc/qwen-pki/ca.crt")
context.load_cert_chain("/etc/qwen-pki/host.crt", "/etc/qwen-pki/host.key")
connection = http.client.HTTPSConnection("node1", 8080, context=context, timeout=10)
connection.request("GET", "/ready")
answer = connection.getresponse()
answer.read()
print(answer.status, connection.sock.recv(1))
"""


def test_connections_that_wait_end_at_a_reload(on):
    """A gateway keeps them, and would go on with a certificate that is revoked by now."""
    reload = threading.Timer(2, lambda: on("node1").check_output("systemctl reload qwen-mtls-proxy"))
    reload.start()
    try:
        assert on("gw1").check_output("python3 -c %s", WAIT) == "200 b''"
    finally:
        reload.join()


def test_refusals_stand_in_the_log_with_the_name(on):
    log = on("node1").check_output("journalctl -u qwen-mtls-proxy -o cat --no-pager")
    assert '"client":"mon1"' in log
    assert '"client":"gw1"' in log


def test_unit(on):
    host = on("node1")
    assert host.service("qwen-mtls-proxy").is_running
    assert host.service("qwen-mtls-proxy").is_enabled
    assert host.run("systemd-analyze security --threshold=20 qwen-mtls-proxy.service").rc == 0


def test_listens_where_it_should_and_nowhere_else(on):
    host = on("node1")
    address = host.interface("eth0").addresses[0]
    listening = {line.split()[3] for line in host.check_output("ss -Hltnp").splitlines() if "haproxy" in line}
    assert listening == {f"{address}:8080", f"{address}:9090"}
