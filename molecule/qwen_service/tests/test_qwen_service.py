"""Role qwen_service: the real engine on a host, as systemd runs it."""

import json
import os
import re
import time
from pathlib import Path

import pytest

ROOT = "/opt/qwen-coder-service"
URL = "http://127.0.0.1:8080"
QUESTION = {"messages": [{"role": "user", "content": "def add(a, b):"}], "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def node(on):
    return on("node1")


def ask(node, body, path="/chat"):
    return json.loads(node.check_output(f"curl -fsS -m 60 -H 'Content-Type: application/json' -d %s {URL}{path}", json.dumps(body)))


def pid(node):
    return node.check_output("systemctl show -p MainPID --value qwen-coder")


def test_unit_runs_enabled_and_valid(node):
    service = node.service("qwen-coder")
    assert service.is_running
    assert service.is_enabled
    assert service.is_valid


def test_it_is_ready_and_healthy(node):
    for path in ("/ready", "/health", "/live"):
        assert node.run(f"curl -fsS {URL}{path}").rc == 0


def test_it_answers_a_chat(node):
    answer = ask(node, QUESTION)
    assert answer["message"]["role"] == "assistant"
    assert answer["message"]["content"]
    assert 0 < answer["usage"]["completion_tokens"] <= 24


def test_it_streams_what_it_answers(node):
    out = node.check_output(f"curl -fsSN -H 'Content-Type: application/json' -d %s {URL}/chat", json.dumps({**QUESTION, "stream": True}))
    events = [line.removeprefix("data: ") for line in out.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert len(events) > 3


def test_it_listens_on_loopback_only(node):
    listening = {line.split()[3] for line in node.check_output("ss -Hltn").splitlines()}
    outside = {address for address in listening if not address.startswith(("127.", "[::1]"))}
    assert {address.rsplit(":", 1)[1] for address in outside} == {"22"}
    assert {"127.0.0.1:8080", "127.0.0.1:9090"} <= listening


def test_it_answers_over_its_socket(node):
    """Whoever the terminator is: it is no member of the service's group."""
    assert '"ready"' in node.check_output("runuser -u nobody -- curl -fsS --unix-socket /run/qwen-coder/service.sock http://node1/ready")


def test_metrics_are_plain_text_for_the_packaged_prometheus(node):
    head, _, body = node.check_output("curl -fsSi -H 'Accept: application/openmetrics-text' http://127.0.0.1:9090/metrics").partition(
        "\r\n\r\n"
    )
    assert "text/plain; version=0.0.4" in head
    assert "\nvllm:kv_cache_usage_perc{" in body


def test_exactly_one_worker(node):
    assert len(node.check_output(f"pgrep -P {pid(node)}").split()) == 1


def test_unit_has_least_privilege(node):
    assert node.run("systemd-analyze security --threshold=20 qwen-coder.service").rc == 0
    assert node.check_output(f"stat -c %U /proc/{pid(node)}") == "qwen-coder"
    assert "CapEff:\t0000000000000000" in node.check_output(f"cat /proc/{pid(node)}/status")
    for path in ("/etc/x", f"{ROOT}/releases/x", f"{ROOT}/x"):
        assert node.run(f"nsenter -t {pid(node)} -m touch {path}").rc != 0


def test_release_is_current_complete_and_rootss(node):
    current = node.file(f"{ROOT}/current").linked_to
    assert current.startswith(f"{ROOT}/releases/")
    release = json.loads(node.file(f"{current}/release.json").content_string)
    assert current.endswith(release["id"])
    assert node.file(f"{current}/venv").linked_to == f"{ROOT}/environments/{release['environment']}/venv"
    assert node.run(f"find {current}/ {current}/venv/ ! -user root -o -perm -o+w ! -type l | grep -q .").rc == 1


def test_release_shares_its_files_with_a_cache_that_no_copy_deletes(node):
    release = node.file(f"{ROOT}/current").linked_to
    assert int(node.check_output(f"stat -c %h {release}/venv/lib/python3*/site-packages/torch/version.py")) >= 2
    assert node.file(f"{ROOT}/uv-cache").is_directory
    # what the wheelhouse's copy does not know, it deletes
    assert node.run(f"find {ROOT}/wheelhouse -name '.*cache*' | grep -q .").rc == 1


def test_env_file_holds_the_tier_and_no_unknown_engine_variable_is_seen(node):
    env = node.file(f"{ROOT}/current/qwen-coder.env").content_string
    for line in (
        "QWEN_BACKEND=vllm",
        "VLLM_TENSOR_PARALLEL_SIZE=1",
        "VLLM_MAX_MODEL_LEN=2048",
        "max_batch_tokens=8192",
        "max_num_seqs=32",
    ):
        assert line in env.splitlines()
    assert "Unknown vLLM environment variable" not in node.check_output("journalctl -u qwen-coder --no-pager")


def test_greedy_answer_equals_transformers_token_for_token(node, greedy):
    """The persona, the chat template and the engine together: the same ids that transformers gives for the same messages."""
    assert ask(node, {**QUESTION, "return_token_ids": True})["token_ids"] == greedy(node, QUESTION)


def test_stop_lets_a_stream_end_and_exits_cleanly(node):
    body = json.dumps({**QUESTION, "max_tokens": 1500, "stream": True, "ignore_eos": True})
    out = node.run(
        f"curl -sSN -H 'Content-Type: application/json' -d %s {URL}/chat > /tmp/stream & stream=$!; "
        "sleep 1; systemctl stop qwen-coder; wait $stream; "
        "echo rc=$?; tail -n 2 /tmp/stream; systemctl show -p Result --value qwen-coder; systemctl start qwen-coder",
        body,
    )
    assert out.stdout.split() == ["rc=0", "data:", "[DONE]", "success"]


def restarts(node):
    return int(node.check_output("systemctl show -p NRestarts --value qwen-coder"))


def wait_until(node, command, seconds):
    """Wait until a command succeeds on the host; seconds that it took."""
    began = time.monotonic()
    while node.run(command).rc:
        assert time.monotonic() - began < seconds, node.check_output("journalctl -u qwen-coder -n 30 --no-pager")
        time.sleep(0.5)
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("signal", "victim", "result"),
    [
        ("KILL", "VLLM::EngineCore", "exit-code"),
        ("STOP", "VLLM::EngineCore", "exit-code"),
        # the service itself does nothing any more: systemd's own watchdog
        ("STOP", "the worker", "watchdog"),
    ],
)
def test_what_is_dead_or_stalled_is_started_anew_within_30_s(node, signal, victim, result):
    before, main = restarts(node), pid(node)
    target = f"pgrep -P {main}" if victim == "the worker" else f"pgrep -f ^{victim}"
    node.check_output(f"kill -{signal} $({target} | head -n 1)")
    assert wait_until(node, f"! kill -0 {main}", 35) < 30
    wait_until(node, f"curl -fsS {URL}/ready", 120)
    assert restarts(node) == before + 1
    assert f"Failed with result '{result}'" in node.check_output("journalctl -u qwen-coder -n 300 --no-pager")
    assert ask(node, QUESTION)["message"]["content"]


def test_ends_are_counted_over_restarts(node):
    metrics = node.check_output("curl -fsS http://127.0.0.1:9090/metrics")
    assert 'qwen_engine_ends_total{reason="died"} 1.0' in metrics
    assert 'qwen_engine_ends_total{reason="stalled"} 1.0' in metrics


@pytest.mark.parametrize("name", ["qwen-coder.env", "qwen-coder.service"])
def test_the_dry_run_on_the_fresh_host_showed_what_was_then_written(node, name):
    """The first converge in the log is the dry run: what its diff adds is the file, whole."""
    log = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"], "ansible.log").read_text()
    log = re.sub(r"\x1b\[[0-9;]*m", "", log)
    dry_run = log.split("PLAY [Converge]")[1].split("PLAY RECAP")[0]
    diff = re.search(rf"^\+\+\+ after: \S+/{name}$\n@@ .*@@\n((?:\+.*\n)+)", dry_run, re.MULTILINE)
    assert diff, dry_run[-3000:]
    assert [line[1:] for line in diff.group(1).splitlines()] == node.file(f"{ROOT}/current/{name}").content_string.splitlines()
