"""Role gateway: the bridge /api/qwen, its clients, and nodes that come and go."""

import json
import os
import socket
import ssl
import subprocess
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[3]


def client_context(inventory):
    """Trust in the lab's CA."""
    return ssl.create_default_context(cafile=inventory("gw1", "pki_ca_dir") + "/ca.crt")


@pytest.fixture(scope="module")
def client(inventory):
    """A kin client on this machine, outside the lab's hosts."""
    key = Path(inventory("gw1", "lab_client_key_file")).read_text().strip()
    with httpx.Client(
        base_url=f"https://{inventory('gw1', 'ansible_host')}",
        verify=client_context(inventory),
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


def refused(answer, status, reason, on):
    """A refusal as it should be, and its line in the log."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["reason"]) == (status, reason)
    assert error["request_id"] == answer.headers["X-Request-ID"]
    entry = logged(on, error["request_id"])
    assert (entry["status"], entry["reason"]) == (status, reason)
    return error, entry


def logged(on, word):
    """The last line of the access log in which a word stands."""
    look = f"journalctl -u qwen-gateway -o cat --no-pager | grep -F -- '{word}'"
    found = on("gw1").run(f"for i in 1 2 3 4 5; do {look} && exit; sleep 0.2; done")
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("header", "reason"),
    [(None, "no_key"), ("", "no_key"), ("Bearer", "no_key"), ("Basic ZGVtbzpkZW1v", "no_key"), ("Bearer wrong", "unknown_key")],
)
def test_nobody_without_a_key_passes(client, on, header, reason):
    request = client.build_request("POST", "/api/qwen/chat", json={})
    del request.headers["Authorization"]
    if header is not None:
        request.headers["Authorization"] = header
    answer = client.send(request)
    error, entry = refused(answer, 401, reason, on)
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert error["type"] == "authentication_error"
    assert entry["client"] == "-"


def keyed(name):
    """The header of one of the clients that the scenario adds (converge.yml)."""
    return {"Authorization": f"Bearer key-of-{name}"}


def test_a_revoked_key_is_said(client, on):
    error, entry = refused(client.post("/api/qwen/chat", json={}, headers=keyed("revoked")), 403, "revoked_key", on)
    assert error["type"] == "permission_error"
    assert entry["client"] == "revoked"


def test_a_rate_is_kept_and_refusals_do_not_count(client, on):
    """Three requests within a minute, and not the fourth; the limit of one client is not another's."""
    # what earlier runs left in the table
    on("gw1").check_output(socket_program("clear table clients key rated"))
    answers = [client.post("/api/qwen/chat", json={}, headers=keyed("rated")) for _ in range(3)]
    assert [a.status_code for a in answers] == [200] * 3
    for _ in range(3):
        answer = client.post("/api/qwen/chat", json={}, headers=keyed("rated"))
        error, entry = refused(answer, 429, "rate_limit", on)
        assert (error["limit"], error["value"], entry["client"]) == (3, 3, "rated")
        assert answer.headers["Retry-After"] == "21"
    assert client.post("/api/qwen/chat", json={}).status_code == 200


def test_concurrency_counts_requests_and_comes_down(client, on):
    """Two at the same time, over one connection or several; an ended or cancelled stream makes room at once."""

    def ask(**body):
        return client.build_request("POST", "/api/qwen/chat", json=body, headers=keyed("narrow"))

    # requests one after another on a connection that is kept are one at a time
    assert [client.send(ask()).status_code for _ in range(5)] == [200] * 5
    streams = [client.send(ask(stream=True, events=40), stream=True) for _ in range(2)]
    try:
        assert [s.status_code for s in streams] == [200, 200]
        answer = client.send(ask())
        error, entry = refused(answer, 429, "concurrency_limit", on)
        assert (error["limit"], error["value"], entry["client"]) == (2, 3, "narrow")
        assert answer.headers["Retry-After"] == "1"
        streams.pop().close()  # cancelled
        time.sleep(0.5)
        assert client.send(ask()).status_code == 200
        with client.stream("POST", "/api/qwen/chat", json={"stream": True, "events": 2}, headers=keyed("narrow")) as ended:
            assert len([line for line in ended.iter_lines() if line]) == 2
        time.sleep(0.5)
        assert client.send(ask()).status_code == 200
    finally:
        for stream in streams:
            stream.close()


def test_limits_of_the_body(client, on):
    limit, unsized = 4194304, 131072
    fits = json.dumps({"text": "x" * (limit - 12)}).encode()
    assert len(fits) == limit
    assert client.post("/api/qwen/chat", content=fits).status_code == 200
    error, entry = refused(client.post("/api/qwen/chat", content=fits + b" "), 413, "body_too_large", on)
    assert (error["limit"], error["value"], entry["client"]) == (limit, limit + 1, "demo")
    # without a length
    assert client.post("/api/qwen/chat", content=iter([b'{"a": ', b"1}"])).status_code == 200
    error, _ = refused(client.post("/api/qwen/chat", content=iter([fits[: unsized + 1]])), 411, "length_required", on)
    assert error["limit"] == unsized


def test_limits_of_the_head(client, on):
    error, _ = refused(client.get("/api/qwen/health", headers={"X-Long": "x" * 16384}), 431, "header_too_large", on)
    assert error["limit"] == 16384 < error["value"]
    error, _ = refused(client.get("/api/qwen/health", headers={f"X-{n}": "1" for n in range(70)}), 431, "too_many_headers", on)
    assert error["limit"] == 64 < error["value"]


def raw(client, head, *, wait=12.0, tls=None):
    """Send bytes over TLS and give what comes back, and after how long."""
    context = tls or ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((client.base_url.host, 443), timeout=wait) as plain, context.wrap_socket(plain) as connection:
        connection.sendall(head)
        began, answer = time.monotonic(), b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer, time.monotonic() - began


def test_slow_heads_and_bodies_end_after_ten_seconds(client, on):
    """The head by HAProxy's own plain text (it has no other before there is a request), the body as JSON."""
    key = client.headers["Authorization"]
    begin = f"POST /api/qwen/chat HTTP/1.1\r\nHost: gw1\r\nAuthorization: {key}\r\n"
    head = begin + "X-Request-ID: slow-body\r\nContent-Length: 100\r\n\r\nabc"
    chunked = begin + "X-Request-ID: slow-chunks\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda text: raw(client, text.encode()), [head[:60], head, chunked]))
    for answer, seconds in answers:
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert 9 < seconds < 12
    assert logged(on, "slow-body")["reason"] == logged(on, "slow-chunks")["reason"] == "timeout"
    assert logged(on, '"reason":"bad_request"')["status"] in (0, 408)


def test_what_is_no_http_is_refused(client, on):
    answer, _ = raw(client, b"NO HTTP AT ALL\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert logged(on, '"reason":"bad_request"')["client"] == "-"


def test_plain_http_and_old_tls_are_refused(client, on):
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{client.base_url.host}:443/api/qwen/health")
    assert logged(on, "http request")["reason"] == "tls"
    for version in (ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2):
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname = False
        old.set_ciphers("DEFAULT:@SECLEVEL=0")
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = version
        with pytest.raises((ssl.SSLError, ConnectionError)):
            raw(client, b"GET / HTTP/1.1\r\n\r\n", tls=old)
    assert logged(on, "unsupported protocol")["reason"] == "tls"


def test_answers_say_nothing_about_the_server(client):
    for answer in (client.post("/api/qwen/chat", json={}), client.get("/api/qwen/none")):
        assert not {"server", "x-powered-by", "via", "x-internal"} & set(answer.headers)
        assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"


def test_a_client_does_not_say_where_it_comes_from(client):
    given = {"X-Forwarded-For": "192.0.2.1", "X-Forwarded-Host": "a", "Forwarded": "for=192.0.2.1", "X-Real-IP": "192.0.2.1"}
    seen = {name.lower() for name in client.post("/api/qwen/chat", json={}, headers=given).json()["headers"]}
    assert not seen & {name.lower() for name in given}


def test_the_bridge_is_described_to_its_clients(client, on):
    refused(httpx.get(client.base_url.join("/api/qwen/bridge"), verify=False), 401, "no_key", on)
    document = client.get("/api/qwen/bridge", headers=keyed("narrow")).json()
    assert document["base_url"] == f"{client.base_url}/api/qwen".replace("//api", "/api")
    assert document["client"] == {"name": "narrow", "requests_per_minute": 0, "concurrency": 2}
    assert document["limits"]["body_bytes"] == 4194304
    assert document["models"] == ["qwen-coder-tiny"]
    for entry in document["paths"]:  # what it says is what is admitted
        for method in entry["methods"]:
            assert client.request(method, f"/api/qwen{entry['path']}", json={}).status_code == 200


def socket_program(command):
    """A command for the admin socket."""
    return (
        "python3 -c \"import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/qwen-gateway/admin.sock'); "
        f"s.sendall(b'{command}\\n'); print(s.makefile().read())\""
    )


def test_the_hash_of_a_key_is_no_key(client, on):
    line = on("gw1").file("/etc/qwen-gateway/clients.map").content_string.splitlines()[-1]
    assert len(line.split()[0]) == 64
    assert client.post("/api/qwen/chat", json={}, headers={"Authorization": f"Bearer {line.split()[0]}"}).status_code == 401


def test_the_key_goes_no_further(client):
    assert "authorization" not in {k.lower() for k in client.post("/api/qwen/chat", json={}).json()["headers"]}


OTHER_PATHS = [
    "/", "/chat", "/api/qwen", "/api/qwen/", "/api/qwenchat", "/api/qwen/ready", "/api/qwen/live", "/api/qwen/metrics", "/api/qwen/docs",
    "/api/qwen/redoc", "/api/qwen/openapi.json", "/api/qwen/tokenize", "/api/qwen/detokenize", "/api/qwen/pause", "/api/qwen/resume",
    "/api/qwen/invocations", "/api/qwen/pooling", "/api/qwen/score", "/api/qwen/v1/completions", "/api/qwen/v1/embeddings",
    "/api/qwen/v1/load_lora_adapter", "/api/qwen/collective_rpc", "/api/qwen/sleep", "/api/qwen/reset_prefix_cache",
    "//api/qwen/chat", "/api/qwen//chat", "/api/qwen/../chat", "/api/qwen/x/../chat", "/api/qwen/%2e/chat", "/api/qwen/%63hat",
    "/api/qwen/chat;x=1", "/api/qwen/chat/", "/api/qwen/CHAT", "/API/qwen/chat", "/api/qwen/chat%00", "/api/qwen/chat%3f", '/api/qwen/a"]',
]  # fmt: skip


@pytest.mark.parametrize("path", OTHER_PATHS)
def test_other_paths_are_unknown(client, on, path):
    """To the letter: no client's library gets to tidy the path."""
    mark = uuid.uuid4().hex
    head = f"GET {path} HTTP/1.1\r\nHost: gw1\r\nAuthorization: {client.headers['Authorization']}\r\n"
    answer, _ = raw(client, f"{head}X-Request-ID: {mark}\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["reason"] == "path"
    entry = logged(on, mark)
    assert (entry["client"], entry["reason"], entry["request"]) == ("demo", "path", f"GET {path}")


def test_other_methods_are_named(client, on):
    answer = client.get("/api/qwen/chat")
    refused(answer, 405, "method", on)
    assert answer.headers["Allow"] == "POST"


def test_request_id_is_kept_if_sane_and_made_if_not(client):
    kept = client.post("/api/qwen/chat", json={}, headers={"X-Request-ID": "kin-42"})
    assert kept.headers["X-Request-ID"] == "kin-42"
    assert kept.json()["headers"]["x-request-id"] == "kin-42"
    made = client.post("/api/qwen/chat", json={}, headers={"X-Request-ID": 'a"b c'})
    assert made.headers["X-Request-ID"] not in ("", 'a"b c')
    assert made.json()["headers"]["x-request-id"] == made.headers["X-Request-ID"]


def test_a_stream_is_not_buffered(client):
    times = []
    with client.stream("POST", "/api/qwen/chat", json={"stream": True}) as answer:
        for line in answer.iter_lines():
            if line:
                times.append(time.monotonic())
    assert len(times) == 5
    assert times[-1] - times[0] > 1.2


def role(host, name, tasks, **variables):
    """Run a role, or one entry point of it, on a host, as a playbook would."""
    run = subprocess.run(
        ["ansible", "-i", Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent, host, "-m", "ansible.builtin.include_role",
         "-a", f"name={name} tasks_from={tasks}", "-e", json.dumps(variables)],
        env={**os.environ, "ANSIBLE_ROLES_PATH": str(ROOT / "roles")}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


def put(host, path, content):
    """Write a file of the identity, as role pki would."""
    host.check_output("umask 077 && printf %s %s > %s", "%s", content, path)


def worker(host, instance):
    """Process id of the present worker."""
    return host.check_output(f"pgrep -P $(systemctl show -p MainPID --value {instance}) | tail -1")


def test_no_request_is_lost_while_keys_certificates_and_cas_change(client, on, inventory):
    """A stream, and eight clients that keep their connections, across a certificate, a revoked key, and three reloads."""
    gateway, made = on("gw1"), Path(inventory("gw1", "pki_ca_dir")) / "test"
    paths = {f"/etc/qwen-pki/{name}": gateway.file(f"/etc/qwen-pki/{name}").content_string for name in ("host.crt", "host.key", "ca.crl")}
    stop, answers = threading.Event(), []

    def keep_asking():
        with httpx.Client(base_url=client.base_url, verify=client_context(inventory), headers=client.headers, timeout=30) as own:
            while not stop.is_set():
                try:
                    answers.append(own.post("/api/qwen/chat", json={}).status_code)
                except httpx.HTTPError as error:
                    answers.append(repr(error))
                time.sleep(0.25)

    def stream(headers):
        with client.stream("POST", "/api/qwen/chat", json={"stream": True, "events": 150}, headers=headers) as answer:
            return len([line for line in answer.iter_lines() if line])

    paths["/etc/qwen-gateway/clients.map"] = gateway.file("/etc/qwen-gateway/clients.map").content_string
    clients = inventory("gw1", "gateway_clients")
    with ThreadPoolExecutor(10) as pool:
        streams = [pool.submit(stream, keyed("narrow")), pool.submit(stream, {})]
        time.sleep(1)
        askers = [pool.submit(keep_asking) for _ in range(8)]
        try:
            first = worker(gateway, "qwen-gateway")
            for end in ("crt", "key"):
                put(gateway, f"/etc/qwen-pki/host.{end}", (made / f"good.{end}").read_text())
            role("gw1", "haproxy", "identity", haproxy_instance="qwen-gateway")
            serial = gateway.check_output("openssl x509 -noout -serial -in /etc/qwen-pki/host.crt")
            shown = "echo | openssl s_client -connect localhost:443 2>/dev/null | openssl x509 -noout -serial"
            assert gateway.check_output(shown) == serial
            assert worker(gateway, "qwen-gateway") == first  # nothing but memory changed

            role("gw1", "gateway", "main", gateway_clients=clients)  # without the scenario's own clients
            assert client.post("/api/qwen/chat", json={}, headers=keyed("narrow")).status_code == 401
            revoked = (made / "revoked.crl").read_text()
            for crl in (revoked, paths["/etc/qwen-pki/ca.crl"], revoked):
                before = worker(gateway, "qwen-gateway")
                put(gateway, "/etc/qwen-pki/ca.crl", crl)
                role("gw1", "haproxy", "identity", haproxy_instance="qwen-gateway")
                assert worker(gateway, "qwen-gateway") != before
            assert [s.result(timeout=90) for s in streams] == [150, 150]
        finally:
            stop.set()
            for asker in askers:
                asker.result(timeout=60)
            for path, content in paths.items():
                put(gateway, path, content)
            role("gw1", "haproxy", "identity", haproxy_instance="qwen-gateway")
    assert len(answers) > 500
    assert {*answers} == {200}


@pytest.fixture
def connected(client, inventory):
    """Six clients, each with a connection on which it asked once; a function by which each asks again on the same."""
    context, key, connects = client_context(inventory), {"Authorization": client.headers["Authorization"]}, []
    clients = [httpx.Client(base_url=client.base_url, verify=context, headers=key, timeout=30) for _ in range(6)]

    def trace(event, _):
        connects.extend([event] if event == "connection.connect_tcp.started" else [])

    def ask():
        with ThreadPoolExecutor(len(clients)) as pool:
            return list(pool.map(lambda of: of.post("/api/qwen/chat", json={}, extensions={"trace": trace}), clients))

    def again():
        connects.clear()
        answers = ask()
        assert connects == []
        return answers

    assert [answer.status_code for answer in ask()] == [200] * 6
    assert len(connects) == 6
    yield again
    for of in clients:
        of.close()


def administer(host, command):
    """A command to the present worker of the gateway."""
    said = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect('/run/qwen-gateway/admin.sock'); "
    return host.check_output("python3 -c %s %s", said + "s.send(sys.argv[1].encode() + b'\\n'); print(s.makefile().read())", command)


def test_a_worker_of_before_a_reload_asks_no_node_by_itself(connected, on):
    """It does not know that a node is taken out, nor has it the certificate of today; what it is asked goes to the present worker."""
    gateway = on("gw1")
    gateway.check_output("systemctl reload qwen-gateway")
    administer(gateway, "set server nodes/node1 state maint")
    try:
        answers = connected()
    finally:
        administer(gateway, "set server nodes/node1 state ready")
    assert [(answer.status_code, answer.json()["host"]) for answer in answers] == [(200, "node2")] * 6
    entry = logged(on, answers[0].headers["X-Request-ID"])
    assert (entry["client"], entry["node"], entry["status"]) == ("demo", "successor", 200)


def test_a_worker_without_a_successor_asks_a_node(connected, on):
    """The gateway is stopped: connections that wait get one more answer."""
    gateway = on("gw1")
    gateway.check_output("systemctl stop --no-block qwen-gateway")
    try:
        time.sleep(1)
        assert [answer.status_code for answer in connected()] == [200] * 6
    finally:
        gateway.check_output("systemctl start qwen-gateway")
        time.sleep(3)


def test_requests_beyond_what_nodes_get_at_a_time_wait_their_turn(client, on, inventory):
    """Twelve streams of two seconds, where two nodes get two at a time: three waves, and none refused."""
    gateway, many = on("gw1"), str(inventory("gw1", "gateway_node_concurrency"))
    rows = [line.split(",") for line in administer(gateway, "show stat").splitlines()]
    limit = rows[0].index("slim")
    assert {row[1]: row[limit] for row in rows if row[0] == "nodes" and row[1].startswith("node")} == {"node1": many, "node2": many}
    for node in ("node1", "node2"):
        administer(gateway, f"set maxconn server nodes/{node} 2")

    def stream(_):
        with client.stream("POST", "/api/qwen/chat", json={"stream": True}) as answer:
            return answer.status_code, len([line for line in answer.iter_lines() if line])

    try:
        begun = time.monotonic()
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(stream, range(12)))
        took = time.monotonic() - begun
    finally:
        for node in ("node1", "node2"):
            administer(gateway, f"set maxconn server nodes/{node} {many}")
    assert answers == [(200, 5)] * 12
    assert took > 3 * 5 * 0.4 - 0.5


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


def connections(host, backend):
    """Connections to nodes that the present worker made for a backend, and how often it used one again."""
    rows = [line.split(",") for line in administer(host, "show stat").splitlines()]
    of = [row for row in rows if row[0] == backend and row[1].startswith("node")]
    return tuple(sum(int(row[rows[0].index(name)]) for row in of) for name in ("connect", "reuse"))


# (HAProxy looks every 30 s for connections that are too many, and may close the one that would have been next)
@pytest.mark.parametrize(("backend", "size", "used_again"), [("nodes", 10, {18, 19, 20}), ("nodes_large", 20_000, {0})])
def test_small_requests_share_connections_and_large_ones_have_their_own(client, on, backend, size, used_again):
    def ask(times):
        assert {client.post("/api/qwen/chat", json={"text": "x" * size}).status_code for _ in range(times)} == {200}

    ask(10)
    before = connections(on("gw1"), backend)
    ask(20)
    made, again = (now - then for now, then in zip(connections(on("gw1"), backend), before, strict=True))
    assert made + again == 20
    assert again in used_again


# (systemd starts a terminator anew, and nobody the stand-in for a service)
KILL = {
    "terminator": "systemctl kill -s KILL qwen-mtls-proxy",
    "service": "systemctl kill -s KILL upstream@8080; sleep 1; systemctl start upstream@8080",
}


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize("kill", KILL.values(), ids=KILL)
def test_what_is_killed_costs_no_request(client, on, inventory, kill, size):
    """Clients that keep their connections, while those to a node, or on to its service, break and cannot be made, four times."""
    stop, answers = threading.Event(), []

    def keep_asking():
        with httpx.Client(base_url=client.base_url, verify=client_context(inventory), headers=client.headers, timeout=30) as own:
            while not stop.is_set():
                try:
                    # (no more than a short answer, which is there or not: one that has begun is never begun anew)
                    answers.append(own.post("/api/qwen/chat", content="{}" + " " * size).status_code)
                except httpx.HTTPError as error:
                    answers.append(repr(error))

    with ThreadPoolExecutor(8) as pool:
        askers = [pool.submit(keep_asking) for _ in range(8)]
        try:
            for _ in range(4):
                time.sleep(1.5)
                on("node1").check_output(kill)
        finally:
            time.sleep(3)
            stop.set()
    for asker in askers:
        asker.result()
    assert len(answers) > 200
    assert {*answers} == {200}


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
    assert logged(on, answer.headers["X-Request-ID"])["reason"] in ("no_node", "node")


def test_a_node_that_is_not_ready_gets_nothing_and_comes_back(client, on):
    def hosts():
        return {client.post("/api/qwen/chat", json={}).json()["host"] for _ in range(12)}

    on("node2").check_output("touch /run/upstream-unready")
    time.sleep(5)
    assert hosts() == {"node1"}
    on("node2").check_output("rm /run/upstream-unready")
    time.sleep(5)
    assert hosts() == {"node1", "node2"}


def health(host):
    """What the present worker has of each node: {"node1": "UP"}; "UP 1/2", where one check that fails takes it out, is up, too."""
    rows = [line.split(",") for line in administer(host, "show stat").splitlines()]
    return {row[1]: row[rows[0].index("status")].split()[0] for row in rows if row[0] == "nodes" and row[1].startswith("node")}


def test_nodes_that_are_busy_after_a_reload_stay_in(client, on):
    """The first check of a new worker takes a node out if it fails, and all nodes may be late at once."""
    for node in ("node1", "node2"):
        on(node).check_output("echo 1.5 > /run/upstream-slow")
    try:
        on("gw1").check_output("systemctl reload qwen-gateway")
        seen = set()
        for _ in range(20):
            time.sleep(0.25)
            seen |= {client.post("/api/qwen/chat", json={}).status_code, *health(on("gw1")).values()}
        assert seen == {200, "UP"}
        on("node2").check_output("echo 4 > /run/upstream-slow")
        time.sleep(8)
        assert health(on("gw1")) == {"node1": "UP", "node2": "DOWN"}
    finally:
        for node in ("node1", "node2"):
            on(node).check_output("rm -f /run/upstream-slow")
        time.sleep(6)
    assert health(on("gw1")) == {"node1": "UP", "node2": "UP"}


def test_a_request_waits_where_all_nodes_missed_their_checks(client, on):
    for node in ("node1", "node2"):
        administer(on("gw1"), f"set server nodes/{node} health down")
    begun = time.monotonic()
    answer = client.post("/api/qwen/chat", json={})
    assert answer.status_code == 200
    assert time.monotonic() - begun > 0.5


def test_a_request_waits_where_all_nodes_are_taken_out(client, on):
    for node in ("node1", "node2"):
        administer(on("gw1"), f"set server nodes/{node} state drain")
    back = threading.Timer(3, lambda: administer(on("gw1"), "set server nodes/node2 state ready"))
    back.start()
    begun = time.monotonic()
    try:
        answer = client.post("/api/qwen/chat", json={})
        took = time.monotonic() - begun
    finally:
        back.join()
        administer(on("gw1"), "set server nodes/node1 state ready")
    assert (answer.status_code, answer.json()["host"]) == (200, "node2")
    assert took > 2


def test_requests_outlast_a_moment_in_which_no_node_gets_to_a_handshake(connected, on):
    """Their connections are not made in time, and then all nodes are out; HAProxy would end the clients' connections without a word."""
    for node in ("node1", "node2"):
        on(node).check_output("systemctl kill -s STOP qwen-mtls-proxy")
    try:
        resume = threading.Timer(
            7, lambda: [on(node).check_output("systemctl kill -s CONT qwen-mtls-proxy") for node in ("node1", "node2")]
        )
        resume.start()
        answers = connected()
    finally:
        resume.join()
    assert [answer.status_code for answer in answers] == [200] * 6


def test_a_node_of_the_wrong_identity_gets_nothing(on):
    """Nodes that answer under another name than the one expected: the gateway's check of the identity refuses them."""
    config = on("gw1").file("/etc/qwen-gateway/haproxy.cfg").content_string
    for node in ("node1", "node2"):
        line = next(line for line in config.splitlines() if line.strip().startswith(f"server {node} "))
        assert f"verifyhost {node}" in line
    on("gw1").check_output(
        "mkdir -p /tmp/w && sed -E -e 's/(str.|verifyhost |check-sni )node[12]/\\1node9/g' "
        "-e 's/:443 ssl/:8443 ssl/' -e 's/bind 127.0.0.1:[0-9]+/bind 127.0.0.1:18405/' -e 's#/run/qwen-gateway/#/tmp/w/#' "
        "/etc/qwen-gateway/haproxy.cfg > /tmp/w/cfg && haproxy -D -f /tmp/w/cfg -p /tmp/w/pid && sleep 4"
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
