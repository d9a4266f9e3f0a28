"""Role haproxy: instances beside each other, hardened, reloaded without cutting a stream."""

import pytest


@pytest.mark.parametrize(("name", "port"), [("one", 8441), ("two", 8442)])
def test_instances_stand_beside_each_other(on, name, port):
    host = on("gw1")
    assert host.service(name).is_running
    assert host.service(name).is_enabled
    assert host.check_output(f"curl -fsS --cacert /etc/qwen-pki/ca.crt --resolve gw1:{port}:127.0.0.1 https://gw1:{port}/word") == name


def test_debians_own_instance_is_off(on):
    assert not on("gw1").service("haproxy").is_running
    assert not on("gw1").service("haproxy").is_enabled


def test_reload_lets_a_stream_end(on):
    """The stream begins before the reload and ends after it, served by the old worker; the new worker answers meanwhile."""
    stream = on("gw1").run(
        "curl -sSN --cacert /etc/qwen-pki/ca.crt --resolve gw1:8441:127.0.0.1 -H 'Content-Type: application/json' "
        """-d '{"stream": true, "events": 10}' https://gw1:8441/chat > /tmp/stream & stream=$!; """
        "sleep 1; before=$(systemctl show -p MainPID --value one); systemctl reload one; after=$(systemctl show -p MainPID --value one); "
        "curl -fsS --cacert /etc/qwen-pki/ca.crt --resolve gw1:8441:127.0.0.1 https://gw1:8441/word; "
        "wait $stream; echo rc=$? same=$([ $before = $after ] && echo yes); grep -c data: /tmp/stream"
    )
    assert stream.stdout.split() == ["one", "rc=0", "same=yes", "10"]


def test_another_certificate_is_shown(on):
    """side_effect.yml gave it to instance `one`, without a reload."""
    host = on("gw1")
    serial = host.check_output("openssl x509 -noout -serial -in /root/good.crt")
    assert host.check_output("echo | openssl s_client -connect 127.0.0.1:8441 2>/dev/null | openssl x509 -noout -serial") == serial
    assert host.check_output("echo | openssl s_client -connect 127.0.0.1:8442 2>/dev/null | openssl x509 -noout -serial") != serial


def test_stop_lets_a_stream_end(on):
    stream = on("gw1").run(
        "curl -sSN --cacert /etc/qwen-pki/ca.crt --resolve gw1:8442:127.0.0.1 -H 'Content-Type: application/json' "
        """-d '{"stream": true, "events": 10}' https://gw1:8442/chat > /tmp/stream & stream=$!; """
        "sleep 1; systemctl restart two; wait $stream; echo rc=$?; grep -c data: /tmp/stream"
    )
    assert stream.stdout.split() == ["rc=0", "10"]


@pytest.mark.parametrize(("name", "threads"), [("one", 1), ("two", 3)])
def test_threads_are_as_many_as_are_set(on, name, threads):
    host = on("gw1")
    worker = host.check_output(f"pgrep -P $(systemctl show -p MainPID --value {name}) | tail -1")
    assert host.check_output(f"ls /proc/{worker}/task | wc -l") == str(threads)


def test_freed_memory_is_kept(on):
    """glibc reads it from the environment of the process."""
    host = on("gw1")
    worker = host.check_output("pgrep -P $(systemctl show -p MainPID --value two) | tail -1")
    set_to = host.check_output(f"tr '\\0' '\\n' < /proc/{worker}/environ | grep ^MALLOC_ | sort").split()
    assert set_to == ["MALLOC_MMAP_THRESHOLD_=1048576", "MALLOC_TRIM_THRESHOLD_=33554432"]


@pytest.mark.parametrize("name", ["one", "two"])
def test_unit_is_hardened(on, name):
    host = on("gw1")
    assert host.run(f"systemd-analyze security --threshold=20 {name}.service").rc == 0
    pid = host.check_output(f"systemctl show -p MainPID --value {name}")
    assert host.check_output(f"stat -c %U /proc/{pid}") == "haproxy"
    assert host.run(f"nsenter -t {pid} -m touch /etc/{name}/written").rc != 0


def test_key_is_readable_by_the_proxy_alone(on):
    key = on("gw1").file("/etc/one/tls/host.pem")
    assert (key.user, key.group, key.mode) == ("root", "haproxy", 0o640)
