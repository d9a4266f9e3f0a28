"""Role gateway: the bridge /api/qwen, its clients, and nodes that come and go."""

import json
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest


@pytest.fixture(scope="module")
def client(inventory):
    """A kin client on this machine, outside the lab's hosts."""
    key = Path(inventory("gw1", "lab_client_key_file")).read_text().strip()
    with httpx.Client(
        base_url=f"https://{inventory('gw1', 'ansible_host')}",
        verify=ssl.create_default_context(cafile=inventory("gw1", "pki_ca_dir") + "/ca.crt"),
        headers={"Authorization": f"Bearer {key}"},
        timeout=20,
    ) as result:
        yield result


def test_a_chat_reaches_a_node(client):
    answer = client.post("/api/qwen/chat", json={"messages": []})
    assert answer.status_code == 200
    assert answer.json()["path"] == "/chat"
    assert answer.json()["host"] in {"node1", "node2"}


def test_both_nodes_are_used(client):
    with ThreadPoolExecutor(8) as pool:
        hosts = {a.json()["host"] for a in pool.map(lambda _: client.post("/api/qwen/chat", json={}), range(32))}
    assert hosts == {"node1", "node2"}


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Basic ZGVtbzpkZW1v"])
def test_nobody_without_a_key_passes(client, header):
    request = client.build_request("POST", "/api/qwen/chat", json={})
    del request.headers["Authorization"]
    if header is not None:
        request.headers["Authorization"] = header
    answer = client.send(request)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert error["type"] == "authentication_error"
    assert error["request_id"] == answer.headers["X-Request-ID"]


def test_the_hash_of_a_key_is_no_key(client, on):
    line = on("gw1").file("/etc/qwen-gateway/clients.map").content_string.splitlines()[-1]
    assert client.post("/api/qwen/chat", json={}, headers={"Authorization": f"Bearer {line.split()[0]}"}).status_code == 401


def test_the_key_goes_no_further(client):
    assert "authorization" not in {k.lower() for k in client.post("/api/qwen/chat", json={}).json()["headers"]}


@pytest.mark.parametrize(
    "path", ["/", "/chat", "/api/qwen", "/api/qwen/", "/api/qwen/ready", "/api/qwen/metrics", "/api/qwen/docs", "/api/qwenchat"]
)
def test_other_paths_are_unknown(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_other_methods_are_named(client):
    answer = client.get("/api/qwen/chat")
    assert answer.status_code == 405
    assert answer.headers["Allow"] == "POST"


def test_request_id_is_kept_if_sane_and_made_if_not(client):
    kept = client.post("/api/qwen/chat", json={}, headers={"X-Request-ID": "kin-42"})
    assert kept.headers["X-Request-ID"] == "kin-42"
    assert kept.json()["headers"]["x-request-id"] == "kin-42"
    made = client.post("/api/qwen/chat", json={}, headers={"X-Request-ID": 'a"b c'})
    assert made.headers["X-Request-ID"] not in ("", 'a"b c')
    assert made.json()["headers"]["x-request-id"] == made.headers["X-Request-ID"]


def test_a_stream_is_not_buffered(client):
    import time

    times = []
    with client.stream("POST", "/api/qwen/chat", json={"stream": True}) as answer:
        for line in answer.iter_lines():
            if line:
                times.append(time.monotonic())
    assert len(times) == 5
    assert times[-1] - times[0] > 1.2


def test_a_stopped_service_costs_no_request(client, on):
    """No wait for a health check: the very next requests are answered by the other node."""
    on("node1").check_output("systemctl stop upstream@8080")
    try:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: client.post("/api/qwen/chat", json={"text": "x" * 100_000}), range(64)))
    finally:
        on("node1").check_output("systemctl start upstream@8080")
    assert [a.status_code for a in answers] == [200] * 64
    assert {a.json()["host"] for a in answers} == {"node2"}


def test_no_node_at_all_is_said_in_json(client, on):
    for name in ("node1", "node2"):
        on(name).check_output("systemctl stop upstream@8080")
    try:
        answer = client.post("/api/qwen/chat", json={})
    finally:
        for name in ("node1", "node2"):
            on(name).check_output("systemctl start upstream@8080")
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "overloaded_error"


def test_a_node_that_is_not_ready_gets_nothing_and_comes_back(client, on):
    import time

    def hosts():
        return {client.post("/api/qwen/chat", json={}).json()["host"] for _ in range(12)}

    on("node2").check_output("touch /run/upstream-unready")
    time.sleep(5)
    assert hosts() == {"node1"}
    on("node2").check_output("rm /run/upstream-unready")
    time.sleep(5)
    assert hosts() == {"node1", "node2"}


def test_a_node_of_the_wrong_identity_gets_nothing(on):
    """Nodes that answer under another name than the one expected: the gateway's check of the identity refuses them."""
    config = on("gw1").file("/etc/qwen-gateway/haproxy.cfg").content_string
    for node in ("node1", "node2"):
        line = next(line for line in config.splitlines() if line.strip().startswith(f"server {node} "))
        assert f"verifyhost {node}" in line
    on("gw1").check_output(
        "mkdir -p /tmp/w && sed -E -e 's/(str.|verifyhost |check-sni )node[12]/\\1node9/g' "
        "-e 's/:443 ssl/:8443 ssl/' -e 's#/run/qwen-gateway/#/tmp/w/#' /etc/qwen-gateway/haproxy.cfg > /tmp/w/cfg && "
        "{ haproxy -D -f /tmp/w/cfg -p /tmp/w/pid; sleep 4; }"
    )
    try:
        states = on("gw1").check_output(
            "python3 -c \"import socket; s = socket.socket(socket.AF_UNIX); s.connect('/tmp/w/admin.sock'); "
            "s.send(b'show stat\\n'); print(s.makefile().read())\""
        )
    finally:
        on("gw1").check_output("kill $(cat /tmp/w/pid)")
    rows = [line.split(",") for line in states.splitlines() if line.startswith("nodes,node")]
    assert [row[17] for row in rows] == ["DOWN", "DOWN"]


def test_log_names_client_node_and_request(client, on):
    client.post("/api/qwen/chat", json={}, headers={"X-Request-ID": "in-the-log"})
    lines = on("gw1").check_output("journalctl -u qwen-gateway -o cat --no-pager | grep in-the-log").splitlines()
    entry = json.loads(lines[-1])
    assert (entry["client"], entry["id"], entry["status"]) == ("demo", "in-the-log", 200)
    assert entry["node"] in {"node1", "node2"}


def test_unit(on):
    host = on("gw1")
    assert host.service("qwen-gateway").is_running
    assert host.service("qwen-gateway").is_enabled
    assert host.run("systemd-analyze security --threshold=20 qwen-gateway.service").rc == 0


def test_no_key_stands_in_files_or_journal(client, on):
    key = client.headers["Authorization"].removeprefix("Bearer ")
    assert on("gw1").run(f"grep -rq {key} /etc /var/log /run --include=* --exclude-dir=journal").rc == 1
    assert on("gw1").run(f"journalctl --no-pager | grep -v grep | grep -q {key}").rc == 1
