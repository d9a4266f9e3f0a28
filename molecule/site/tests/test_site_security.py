"""What docs/security.md states, on the whole site: certificates that rotate under load, units with few rights, secrets in their files only.

After test_site.py: what that printed is searched as well.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from fleet import engines_yield, nothing_lost
from test_site import ROOT, load, wait_until_both_serve  # noqa: F401 (a fixture)

HOSTS = ("gw1", "node1", "node2", "mon1")
OLD = "--cert /root/{0}/host.crt --key /root/{0}/host.key --cacert /etc/qwen-pki/ca.crt"
# all that playbooks printed with the most that they print
outputs: dict[str, str] = {}


def playbook(name: str, *options: str) -> str:
    """Run a playbook on the scenario's inventory, as loud as it can be, and keep what it printed."""
    result = subprocess.run(
        ["ansible-playbook", "-i", Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent, *options, ROOT / name],
        env={**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    output = outputs[f"{name} {options}"] = result.stdout + result.stderr
    assert result.returncode == 0, output[-20000:]
    return output


@pytest.fixture(scope="module")
def rotated(load, on):  # noqa: F811
    """Every certificate replaced, and then the CA, while 64 clients stream; what the clients saw."""
    wait_until_both_serve(on)
    gateway, serials = on("gw1"), []
    # without, Ansible waits for engines most of the time, and 64 streams are there all the same
    with load(64, streaming=1) as clients, engines_yield(on, "node1", "node2"):
        clients.wait_for(200)
        for rotate in ("leaf", "ca"):
            gateway.check_output(f"rm -rf /root/{rotate} && cp -a /etc/qwen-pki /root/{rotate}")
            serials.append(gateway.check_output("openssl x509 -noout -serial -issuer -in /etc/qwen-pki/host.crt"))
            clients.mark(f"pki_rotate={rotate}")
            playbook("playbooks/rotate_certificates.yml", "-e", f"pki_rotate={rotate}", "--diff", "-vvv")
            clients.mark(f"pki_rotate={rotate} ended")
            clients.wait_for(len(clients.report.of("complete")) + 200)
    serials.append(gateway.check_output("openssl x509 -noout -serial -issuer -in /etc/qwen-pki/host.crt"))
    assert len(set(serials)) == 3
    yield clients.report
    gateway.check_output("rm -rf /root/leaf /root/ca")


def test_rotation_under_64_streams_loses_nothing(on, rotated):
    nothing_lost(on, rotated)
    assert rotated.running == 64
    assert len(rotated.outcomes) > 1000


@pytest.mark.parametrize("node", ["node1", "node2"])
@pytest.mark.parametrize("old", ["leaf", "ca"])
def test_the_old_certificate_is_refused_afterwards(on, curl, rotated, node, old):
    rc, status, body = curl(on("gw1"), f"https://{node}:8080/health", OLD.format(old))
    assert (rc != 0, status, body) == (True, 0, "")
    assert curl(on("gw1"), f"https://{node}:8080/health")[1] == 200


@pytest.mark.parametrize("name", HOSTS)
def test_every_unit_has_few_rights(on, name):
    host = on(name)
    units = set(host.check_output("systemctl list-unit-files --no-legend --type=service 'qwen*' | awk '{print $1}'").split())
    parts = {"gw1": {"qwen-gateway"}, "mon1": set()}.get(name, {"qwen-coder", "qwen-mtls-proxy"})
    assert {f"{part}.service" for part in parts | {"qwen-firewall", "qwen-exporters"}} <= units
    exposed = {}
    for unit in units:
        said = host.check_output(f"systemd-analyze security --no-pager {unit}")
        exposed[unit] = float(re.search(r"Overall exposure level for \S+: ([\d.]+)", said)[1])
    assert {unit: level for unit, level in exposed.items() if level > 2.0} == {}


def body(pem: str) -> str:
    """What stands in a key's file and nowhere else; the first lines of two keys of ssh are the same."""
    lines = pem.splitlines()
    return lines[len(lines) // 2]


def test_secrets_are_in_their_own_files_only(on, inventory, rotated, tmp_path):
    secrets = {
        "passphrase of the CA": inventory("gw1", "pki_ca_passphrase"),
        "key of a client": Path(inventory("gw1", "lab_client_key_file")).read_text().strip(),
        "key of ssh": body(Path(inventory("gw1", "lab_ssh_key")).read_text()),
    }
    keys = list(Path(inventory("gw1", "pki_ca_dir")).rglob("*.key"))
    assert keys
    secrets |= {f"key of the CA, {key.name}": body(key.read_text()) for key in keys}
    secrets |= {f"key of {name}": body(on(name).file("/etc/qwen-pki/host.key").content_string) for name in HOSTS}
    planted = "planted-where-it-must-be-found"
    on("mon1").check_output(f"echo {planted} > /var/tmp/planted; systemd-cat -t planter echo {planted}")
    secrets["planted"] = planted

    given, found = tmp_path / "secrets.json", tmp_path / "found"
    given.write_text(json.dumps(secrets))
    given.chmod(0o600)
    found.mkdir()
    on("gw1").check_output("rm -rf /root/leaf /root/ca")
    playbook("molecule/site/find_secrets.yml", "-e", f"secrets_file={given} secrets_found={found}")
    on("mon1").check_output("rm /var/tmp/planted")

    left = {name: {secret: sorted(places) for secret, places in json.loads((found / name).read_text()).items() if places} for name in HOSTS}
    own, exporters = "/etc/qwen-pki/host.key", "/etc/qwen-exporters/tls/host.pem"
    assert left == {
        "gw1": {"key of gw1": [exporters, "/etc/qwen-gateway/tls/host.pem", own]},
        "node1": {"key of node1": [exporters, "/etc/qwen-mtls-proxy/tls/host.pem", own]},
        "node2": {"key of node2": [exporters, "/etc/qwen-mtls-proxy/tls/host.pem", own]},
        "mon1": {
            "key of mon1": [exporters, own, "/etc/qwen-prometheus/tls/host.key"],
            "planted": ["/var/tmp/planted", "the journal (planter)"],
        },
    }

    playbook("playbooks/site.yml", "--check", "--diff", "-vvv", "--limit", "gw1,localhost")
    assert len(outputs) == 4
    assert {(run, secret) for run, output in outputs.items() for secret, value in secrets.items() if value in output} == set()
