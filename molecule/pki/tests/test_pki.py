"""Role pki: identities that say who a host is, keys that stay where they were made, and certificates that are no longer good."""

import re
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests"))
from plugins import load

AUTHORITY = load("roles/pki/library/pki_authority.py")
DIR = "/etc/qwen-pki"
READY = "https://node1:8080/ready"
METRICS = "/var/lib/prometheus/node-exporter"


def text(host, *options, file=f"{DIR}/host.crt"):
    return host.check_output(f"openssl x509 -in {file} -noout {' '.join(options)}")


@pytest.mark.parametrize("name", ["gw1", "node1"])
def test_certificate_chains_to_the_ca_and_names_the_host(on, name):
    host = on(name)
    assert host.run(f"openssl verify -x509_strict -CAfile {DIR}/ca.crt -CRLfile {DIR}/ca.crl -crl_check {DIR}/host.crt").rc == 0
    assert f"CN = {name}" in text(host, "-subject")
    address = host.interface("eth0").addresses[0]
    assert text(host, "-ext subjectAltName").splitlines()[1].strip() == f"DNS:{name}, IP Address:{address}"


@pytest.mark.parametrize(
    ("name", "usage"),
    [("gw1", "TLS Web Server Authentication, TLS Web Client Authentication"), ("node1", "TLS Web Server Authentication")],
)
def test_usages_are_explicit(on, name, usage):
    assert text(on(name), "-ext extendedKeyUsage").splitlines()[1].strip() == usage
    assert text(on(name), "-ext keyUsage").splitlines() == ["X509v3 Key Usage: critical", "    Digital Signature"]


@pytest.mark.parametrize("name", ["gw1", "node1"])
def test_key_is_the_certificates_and_roots_alone(on, name):
    host = on(name)
    key = host.file(f"{DIR}/host.key")
    assert (key.user, key.group, key.mode) == ("root", "root", 0o600)
    public = host.check_output(f"openssl pkey -in {DIR}/host.key -pubout")
    assert public == text(host, "-pubkey")
    assert public != on("gw1" if name == "node1" else "node1").check_output(f"openssl pkey -in {DIR}/host.key -pubout")


@pytest.mark.parametrize("name", ["gw1", "node1"])
def test_no_host_holds_the_key_of_the_ca(on, name):
    assert on(name).check_output(f"ls {DIR}").split() == ["ca.crl", "ca.crt", "host.crt", "host.key"]
    assert on(name).run("grep -rl 'BEGIN ENCRYPTED PRIVATE KEY' /etc /root /var /tmp /opt").stdout == ""


def test_key_of_the_ca_is_encrypted_at_rest(inventory):
    directory = Path(inventory("gw1", "pki_ca_dir"))
    assert directory.stat().st_mode & 0o777 == 0o700
    # a rotation has ended: one CA is left
    assert sorted(path.name for path in directory.iterdir()) == ["active", "ca.crl", "ca.crt"]
    assert (directory / "active/ca.key").read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert (directory / "active/ca.key").stat().st_mode & 0o777 == 0o600


def test_certificate_was_renewed_when_its_time_had_come(on):
    host = on("node1")
    assert text(host, "-serial", file="/root/before.crt") != text(host, "-serial")


def test_no_request_failed_while_everything_was_changed(on):
    answers = on("gw1").file("/root/answers").content_string.split("\n")
    # the last one was interrupted
    wrong = [answer for answer in answers[:-2] if answer != "200"]
    assert len(answers) > 100
    assert wrong == []


def shows(name):
    return f"--cert /root/{name}.crt --key /root/{name}.key --cacert {DIR}/ca.crt"


def test_the_present_certificate_is_accepted(on, curl):
    assert curl(on("gw1"), READY)[:2] == (0, 200)


@pytest.fixture(scope="module")
def from_our_ca(on, inventory):
    """Certificates of the CA itself for the gateway's name, on the gateway: good, expired, not yet valid."""
    gateway = on("gw1")
    active = AUTHORITY.Authority(Path(inventory("gw1", "pki_ca_dir")) / "active", inventory("gw1", "pki_ca_passphrase"))
    identity = {"common_name": "gw1", "names": ["DNS:gw1"], "usages": ["clientAuth"]}
    key = AUTHORITY.ec.generate_private_key(AUTHORITY.ec.SECP256R1())
    encoding, plain = AUTHORITY.serialization.Encoding.PEM, AUTHORITY.serialization.NoEncryption()
    secret = key.private_bytes(encoding, AUTHORITY.serialization.PrivateFormat.PKCS8, plain).decode()
    at = datetime.now(UTC).replace(microsecond=0)
    times = {"good": (-1, 1), "expired": (-2, -1), "not-yet": (1, 2)}
    for name, (begin, end) in times.items():
        certificate = AUTHORITY.sign(
            active.key(), active.certificate, key.public_key(), identity, at + timedelta(hours=begin), at + timedelta(hours=end)
        )
        gateway.check_output("printf '%%s' %s > /root/%s.crt", AUTHORITY.pem(certificate).decode(), name)
        gateway.check_output("printf '%%s' %s > /root/%s.key", secret, name)


def test_a_certificate_of_our_ca_is_accepted(on, curl, from_our_ca):
    """So that those of the next test are refused for what they are said to be."""
    assert curl(on("gw1"), READY, shows("good"))[:2] == (0, 200)


@pytest.mark.parametrize("name", ["expired", "not-yet", "foreign", "first-ca", "superseded", "revoked"])
def test_what_is_no_longer_good_is_refused(on, curl, name, from_our_ca):
    rc, status, body = curl(on("gw1"), READY, shows(name))
    assert rc != 0
    assert (status, body) == (0, "")


@pytest.mark.parametrize("name", ["superseded", "revoked"])
def test_these_are_refused_for_being_revoked(on, name):
    """They are of the CA that is trusted, and within their time."""
    host = on("gw1")
    verify = f"openssl verify -CAfile {DIR}/ca.crt"
    ca = f"{verify} /root/{name}.crt"
    assert host.run(ca).rc == 0
    result = host.run(f"{verify} -CRLfile {DIR}/ca.crl -crl_check /root/{name}.crt")
    assert "certificate revoked" in result.stderr


@pytest.mark.parametrize("name", ["gw1", "node1"])
def test_ends_are_metrics(on, name):
    host = on(name)
    lines = host.file(f"{METRICS}/qwen_pki.prom").content_string.splitlines()
    seen = {match[1]: (match[2], int(match[3])) for line in lines if (match := re.fullmatch(r"(\w+)\{(.*)\} (\d+)", line))}
    ends = {"qwen_certificate_not_before_seconds", "qwen_certificate_not_after_seconds", "qwen_ca_not_after_seconds"}
    assert set(seen) == ends | {"qwen_crl_next_update_seconds"}
    labels, end = seen["qwen_certificate_not_after_seconds"]
    assert labels.startswith(f'identity="{name}",issuer="Qwen coder hosting CA ')
    assert end == int(host.check_output(f'date -d "$(openssl x509 -in {DIR}/host.crt -noout -enddate | cut -d= -f2)" +%s'))
    assert seen["qwen_crl_next_update_seconds"][1] == seen["qwen_ca_not_after_seconds"][1] > time.time() + 9 * 365 * 86400
    assert host.file(f"{METRICS}/qwen_pki.prom").mode == 0o644


# unattended renewal

UNIT = "qwen-pki-renewal"


def test_timer_is_on(on):
    timer = on("control1").service(f"{UNIT}.timer")
    assert timer.is_running and timer.is_enabled
    assert on("control1").check_output(f"systemctl show -p NextElapseUSecRealtime --value {UNIT}.timer")


def test_renewal_is_least_privileged(on):
    assert on("control1").run(f"systemd-analyze security --threshold=20 {UNIT}.service").rc == 0


def test_a_run_that_cannot_is_seen(on):
    """The passphrase is not that of the CA: nothing is changed, the unit has failed, the metric says so."""
    control = on("control1")
    before = text(on("node1"), "-serial")
    control.check_output(f"cp -a /etc/{UNIT}/ca_passphrase /root/kept && printf another-passphrase > /etc/{UNIT}/ca_passphrase")
    assert control.run(f"systemctl start {UNIT}.service").rc != 0
    control.check_output(f"mv /root/kept /etc/{UNIT}/ca_passphrase")
    assert control.check_output(f"systemctl is-failed {UNIT}.service") == "failed"
    assert "\nqwen_certificate_renewal_succeeded 0\n" in control.file(f"{METRICS}/qwen_pki_renewal.prom").content_string
    assert "pki_ca_passphrase does not open" in control.check_output(f"journalctl -u {UNIT} --no-pager -o cat")
    assert text(on("node1"), "-serial") == before


def test_a_run_renews_what_is_due(on, curl):
    control = on("control1")
    before = {name: text(on(name), "-serial") for name in ("gw1", "node1")}
    result = control.run(f"systemctl start {UNIT}.service")
    assert result.rc == 0, control.check_output(f"journalctl -u {UNIT} -n 50 --no-pager")
    after = {name: text(on(name), "-serial") for name in ("gw1", "node1")}
    assert before["gw1"] != after["gw1"] and before["node1"] != after["node1"]
    assert curl(on("gw1"), READY)[:2] == (0, 200)
    metrics = control.file(f"{METRICS}/qwen_pki_renewal.prom").content_string
    assert "\nqwen_certificate_renewal_succeeded 1\n" in metrics
    assert time.time() - int(re.search(r"^qwen_certificate_renewal_last_run_seconds (\d+)$", metrics, re.MULTILINE)[1]) < 60


def test_its_secrets_are_in_their_files_only(on, inventory):
    control = on("control1")
    passphrase = inventory("gw1", "pki_ca_passphrase")
    secret = control.file(f"/etc/{UNIT}/ca_passphrase")
    assert (secret.user, secret.mode, secret.content_string) == ("root", 0o600, passphrase)
    found = control.run("grep -rlF %s /etc /opt /root /var/lib /var/log /run /tmp", passphrase).stdout.split()
    assert found == [f"/etc/{UNIT}/ca_passphrase"]
    assert passphrase not in control.check_output("journalctl --no-pager -o cat")
    assert passphrase not in control.check_output(f"systemctl show {UNIT}.service")
