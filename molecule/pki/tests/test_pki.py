"""Role pki: identities that say who a host is, keys that stay where they were made."""

from pathlib import Path

import pytest

DIR = "/etc/qwen-pki"


def text(host, *options):
    return host.check_output(f"openssl x509 -in {DIR}/host.crt -noout {' '.join(options)}")


@pytest.mark.parametrize("name", ["gw1", "node1"])
def test_certificate_chains_to_the_ca_and_names_the_host(on, name):
    host = on(name)
    assert host.run(f"openssl verify -CAfile {DIR}/ca.crt {DIR}/host.crt").rc == 0
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
    names = on(name).check_output(f"ls {DIR}").split()
    assert names == ["ca.crt", "host.crt", "host.key"]


def test_key_of_the_ca_is_encrypted_at_rest(inventory):
    directory = Path(inventory("gw1", "pki_ca_dir"))
    assert "BEGIN ENCRYPTED PRIVATE KEY" in (directory / "ca.key").read_text()
    assert (directory / "ca.key").stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700


def test_certificate_was_renewed_when_its_time_had_come(on):
    host = on("node1")
    serial = "openssl x509 -noout -serial -in"
    assert host.check_output(f"{serial} /root/before.crt") != host.check_output(f"{serial} {DIR}/host.crt")
    assert host.run(f"openssl x509 -in {DIR}/host.crt -noout -checkend {720 * 3600}").rc == 0
