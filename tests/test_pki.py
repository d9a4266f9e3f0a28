"""Role pki's modules against directories: the CA and its rotation, hosts' identities, what another CA gave."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from plugins import load

from playbooks import ansible_playbook

AUTHORITY: Any = load("roles/pki/library/pki_authority.py")
X509: Any = sys.modules["ansible.module_utils.pki_x509"]
IDENTITY: Any = load("roles/pki/library/pki_identity.py")
FILES: Any = load("roles/pki/library/pki_files.py")
PASSPHRASE = "twelve characters"


def wanted(name: str, usages: tuple[str, ...] = ("serverAuth", "clientAuth")) -> dict[str, Any]:
    return {"common_name": name, "names": [f"DNS:{name}", "IP:192.0.2.7"], "usages": list(usages)}


@dataclass
class Fleet:
    """A CA and hosts, as the playbooks drive them."""

    path: Path
    hosts: tuple[str, ...] = ("gw1", "node1")
    passphrase: str = PASSPHRASE
    answer: dict[str, Any] = field(default_factory=dict)
    placed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ca(self, **options: Any) -> dict[str, Any]:
        given = {
            "path": str(self.path / "pki"), "passphrase": self.passphrase, "common_name": "CA", "lifetime_days": 100, "state": "present",
            "csr": None, "identity": None, "hours": 720, "revoke": [], "keep": [],
        }  # fmt: skip
        result: dict[str, Any] = AUTHORITY.run({**given, **options})
        return result

    def request(self, host: str, **options: Any) -> dict[str, Any]:
        given = {
            "path": str(self.path / host), "identity": wanted(host), "active": self.answer["active"], "bundle": self.answer["bundle"],
            "crl": self.answer["crl"], "renew_before_hours": 240, "reissue": False,
        }  # fmt: skip
        result: dict[str, Any] = IDENTITY.requested({**given, **options})
        return result

    def place(self, host: str, certificate: str = "", key: str = "") -> dict[str, Any]:
        metrics = str(self.path / host / "metrics" / "qwen_pki.prom")
        result: dict[str, Any] = IDENTITY.present(
            {"path": str(self.path / host), "certificate": certificate, "key": key, "bundle": self.answer["bundle"],
             "crl": self.answer["crl"], "metrics": metrics}
        )  # fmt: skip
        self.placed[host] = result
        return result

    # what roles/pki/tasks and playbooks/rotate_certificates.yml do, each step by itself
    def trust(self, **options: Any) -> Iterator[Callable[[], Any]]:
        yield lambda: self.answer.update(self.ca(**options))
        for host in self.hosts:
            yield partial(self.place, host)

    def identities(self, state: str = "present", reissue: bool = False, **options: Any) -> Iterator[Callable[[], Any]]:
        yield lambda: self.answer.update(self.ca(state=state, **options))
        requests: dict[str, dict[str, Any]] = {}
        signed: dict[str, str] = {}
        for host in self.hosts:
            yield lambda host=host: requests.update({host: self.request(host, reissue=reissue)})  # type: ignore[misc]
        for host in self.hosts:

            def sign(host: str = host) -> None:
                if requests[host]["csr"]:
                    signed[host] = self.ca(csr=requests[host]["csr"], identity=wanted(host))["certificate"]

            yield sign
        for host in self.hosts:
            yield lambda host=host: self.place(host, signed.get(host, ""))  # type: ignore[misc]

    def rotate_ca(self) -> Iterator[Callable[[], Any]]:
        yield from self.trust(state="next")
        yield from self.identities("promoted")
        yield from self.trust(state="dropping")
        yield lambda: self.ca(state="dropped")

    def run(self, steps: Iterator[Callable[[], Any]], stop_after: int | None = None) -> int:
        done = 0
        for step in itertools.islice(steps, stop_after):
            step()
            done += 1
        return done

    def certificate(self, host: str) -> x509.Certificate:
        return x509.load_pem_x509_certificate((self.path / host / "host.crt").read_bytes())

    def accepts(self, host: str, certificate: x509.Certificate) -> bool:
        """Whether a peer with this host's bundle and lists would accept it."""
        bundle = x509.load_pem_x509_certificates((self.path / host / "ca.crt").read_bytes())
        lists = X509.lists((self.path / host / "ca.crl").read_text())
        issuers = [ca for ca in bundle if X509.issued_by(certificate, ca)]
        # a CA without a list is one by which nobody is accepted
        return any(
            entry.is_signature_valid(ca.public_key()) and entry.get_revoked_certificate_by_serial_number(certificate.serial_number) is None
            for ca in issuers
            for entry in lists
            if entry.issuer == ca.subject
        )

    def check_everybody_is_accepted(self) -> None:
        for host, peer in itertools.permutations(self.hosts, 2):
            assert self.accepts(host, self.certificate(peer)), f"{host} refuses {peer}"
            assert X509.public(IDENTITY.load_key(self.path / peer / "host.key")) == X509.public(self.certificate(peer))


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    result = Fleet(tmp_path)
    result.run(result.identities())
    return result


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_host_gets_what_it_asked_for(fleet: Fleet) -> None:
    certificate = fleet.certificate("node1")
    assert X509.common_name(certificate.subject) == "node1"
    assert certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName) == ["node1"]
    assert certificate.not_valid_before_utc < datetime.now(UTC) - timedelta(minutes=4)
    assert timedelta(hours=719) < certificate.not_valid_after_utc - datetime.now(UTC) < timedelta(hours=720)
    assert (fleet.path / "node1/host.key").stat().st_mode & 0o777 == 0o600
    fleet.check_everybody_is_accepted()


def test_a_second_run_changes_nothing(fleet: Fleet) -> None:
    before = tree(fleet.path)
    assert not fleet.ca()["changed"]
    for host in fleet.hosts:
        said = {name: fleet.placed[host][name] for name in ("identity", "serial", "issuer")}
        assert fleet.request(host) == {
            "changed": False,
            "csr": "",
            "why": "",
            **said,
        }
        assert not fleet.place(host)["changed"]
    assert tree(fleet.path) == before


def test_check_mode_writes_nothing(tmp_path: Path) -> None:
    options = {
        "path": str(tmp_path / "pki"), "passphrase": PASSPHRASE, "common_name": "CA", "lifetime_days": 100, "state": "present",
        "csr": None, "identity": None, "hours": 720, "revoke": [], "keep": [],
    }  # fmt: skip
    assert AUTHORITY.run(options, check=True)["changed"]
    assert tree(tmp_path) == {}
    fleet = Fleet(tmp_path)
    fleet.answer.update(fleet.ca())
    before = tree(tmp_path)
    request = {
        "path": str(tmp_path / "node1"), "identity": wanted("node1"), "active": fleet.answer["active"], "bundle": fleet.answer["bundle"],
        "crl": "", "renew_before_hours": 240, "reissue": False,
    }  # fmt: skip
    assert IDENTITY.requested(request, check=True)["why"] == "there is none"
    place = {"path": str(tmp_path / "node1"), "certificate": "", "key": "", "bundle": "a", "crl": "b", "metrics": str(tmp_path / "m")}
    assert IDENTITY.present(place, check=True)["changed"]
    assert tree(tmp_path) == before


def test_keys_of_the_ca_are_encrypted_and_hosts_have_none(fleet: Fleet) -> None:
    fleet.run(fleet.rotate_ca(), 1)
    for role in ("active", "next"):
        file = fleet.path / "pki" / role / "ca.key"
        assert file.read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
        assert file.stat().st_mode & 0o777 == 0o600
    assert (fleet.path / "pki").stat().st_mode & 0o777 == 0o700
    hosts = {name: text for name, text in tree(fleet.path).items() if not name.startswith("pki/")}
    assert sorted(name for name, text in hosts.items() if b"PRIVATE KEY" in text) == ["gw1/host.key", "node1/host.key"]
    on_the_control_machine = {name for name, text in tree(fleet.path / "pki").items() if b"PRIVATE KEY" in text}
    assert on_the_control_machine == {"active/ca.key", "next/ca.key"}


@pytest.mark.parametrize("state", ["present", "next", "promoted", "dropped"])
def test_a_wrong_passphrase_never_replaces_a_key(fleet: Fleet, state: str) -> None:
    before = tree(fleet.path / "pki")
    fleet.passphrase = "another passphrase"
    with pytest.raises(X509.Problem) as stopped:
        fleet.ca(state=state)
    key = fleet.path / "pki/active/ca.key"
    assert str(stopped.value) == f"pki_ca_passphrase does not open '{key}'; set it to the passphrase that this CA was made with."
    assert tree(fleet.path / "pki") == before


@pytest.mark.parametrize("lost", ["ca.key", "ca.crt", "ca.crl"])
def test_a_lost_file_of_the_ca_is_said_and_not_made_anew(fleet: Fleet, lost: str) -> None:
    (fleet.path / "pki/active" / lost).unlink()
    before = tree(fleet.path / "pki")
    with pytest.raises(X509.Problem) as stopped:
        fleet.ca()
    assert str(stopped.value) == f"pki_ca_dir has no active/{lost}; put it back from a backup of '{fleet.path}/pki'."
    assert tree(fleet.path / "pki") == before


def test_a_host_cannot_ask_for_another_name(fleet: Fleet) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gw1")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, AUTHORITY.hashes.SHA256())
    signed = fleet.ca(csr=csr.public_bytes(serialization.Encoding.PEM).decode(), identity=wanted("node1"))["certificate"]
    assert X509.common_name(x509.load_pem_x509_certificate(signed.encode()).subject) == "node1"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"renew_before_hours": 721}, "its end is near"),
        ({"reissue": True}, "a new one is asked for"),
        ({"identity": wanted("node7")}, "it says something else"),
        ({"identity": wanted("node1", ("serverAuth",))}, "it says something else"),
        ({"identity": {**wanted("node1"), "names": ["DNS:node1"]}}, "it says something else"),
    ],
)
def test_when_a_new_certificate_is_due(fleet: Fleet, options: dict[str, Any], why: str) -> None:
    asked = fleet.request("node1", **options)
    assert (asked["why"], bool(asked["csr"])) == (why, True)
    fleet.check_everybody_is_accepted()


def test_a_certificate_of_another_key_is_due(fleet: Fleet) -> None:
    (fleet.path / "node1/host.key").write_bytes((fleet.path / "gw1/host.key").read_bytes())
    assert fleet.request("node1")["why"] == "it is not that of the host's key"
    (fleet.path / "node1/host.key").unlink()
    assert fleet.request("node1")["why"] == "there is none"


def test_an_interruption_between_certificate_and_key_is_mended(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    signed = fleet.ca(csr=fleet.request("node1", reissue=True)["csr"], identity=wanted("node1"))["certificate"]
    replace = Path.replace

    def power_cut(self: Path, target: Path) -> Path:
        if self.name == "host.key.new":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", power_cut)
    with pytest.raises(KeyboardInterrupt):
        fleet.place("node1", signed)
    monkeypatch.undo()
    assert (fleet.path / "node1/host.crt").read_text() == signed
    assert fleet.request("node1")["why"] == ""
    fleet.check_everybody_is_accepted()


def test_an_answer_to_another_request_is_refused(fleet: Fleet) -> None:
    """Two runs at the same time: the second key is not that of the first one's certificate."""
    before = tree(fleet.path / "node1")
    signed = fleet.ca(csr=fleet.request("node1", reissue=True)["csr"], identity=wanted("node1"))["certificate"]
    fleet.request("node1", reissue=True)
    with pytest.raises(X509.Problem):
        fleet.place("node1", signed)
    after = tree(fleet.path / "node1")
    assert {name: after[name] for name in before} == before


def test_rotation_of_the_ca(fleet: Fleet) -> None:
    old = {host: fleet.certificate(host) for host in fleet.hosts}
    for step in fleet.rotate_ca():
        step()
        fleet.check_everybody_is_accepted()
    assert len(x509.load_pem_x509_certificates((fleet.path / "gw1/ca.crt").read_bytes())) == 1
    assert not fleet.accepts("gw1", old["node1"])
    assert not fleet.accepts("node1", old["gw1"])
    assert sorted(path.name for path in (fleet.path / "pki").iterdir()) == ["active", "ca.crl", "ca.crt"]
    assert not any(fleet.request(host)["why"] for host in fleet.hosts)


STEPS = 3 + 7 + 3 + 1


@pytest.mark.parametrize("stop", range(STEPS))
@pytest.mark.parametrize("between", [False, True], ids=["resumed", "after a normal run"])
def test_a_rotation_goes_on_wherever_it_was_interrupted(fleet: Fleet, stop: int, between: bool) -> None:
    """Everybody is accepted at every step, before and after; and one rotation is one rotation."""
    old = fleet.certificate("node1")
    assert fleet.run(fleet.rotate_ca(), stop) == stop
    serial = None
    for role in ("next", "active"):
        if stop and serial is None and (fleet.path / "pki" / role).exists():
            serial = x509.load_pem_x509_certificate((fleet.path / "pki" / role / "ca.crt").read_bytes()).serial_number
    fleet.check_everybody_is_accepted()
    if between:
        for step in fleet.identities():
            step()
            fleet.check_everybody_is_accepted()
    for step in fleet.rotate_ca():
        step()
        fleet.check_everybody_is_accepted()
    assert not fleet.accepts("gw1", old)
    assert not fleet.ca()["rotating"]
    if serial:
        assert x509.load_pem_x509_certificate(fleet.ca()["active"].encode()).serial_number == serial


@pytest.mark.parametrize("state", ["promoted", "dropped"])
def test_an_interruption_inside_a_step_of_the_ca(fleet: Fleet, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two renames, and while the former CA is removed."""
    fleet.ca(state="next")
    if state == "dropped":
        fleet.ca(state="promoted")
    rename = Path.rename
    seen: list[Path] = []

    def power_cut(self: Path, target: Path) -> Path:
        if seen:
            raise KeyboardInterrupt
        seen.append(self)
        return rename(self, target)

    def half(path: Path, **_: Any) -> None:
        if Path(path).exists():
            (Path(path) / "ca.key").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", power_cut)
    monkeypatch.setattr(AUTHORITY.shutil, "rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        fleet.ca(state=state)
    monkeypatch.undo()
    after = fleet.ca(state=state)
    assert after["rotating"] == (state == "promoted")
    assert after["bundle"].count("BEGIN CERTIFICATE") == (2 if state == "promoted" else 1)


def test_a_ca_that_was_made_halfway_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(tmp_path)

    def power_cut(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AUTHORITY, "revocation_list", power_cut)
    with pytest.raises(KeyboardInterrupt):
        fleet.ca()
    monkeypatch.undo()
    fleet.run(fleet.identities())
    fleet.check_everybody_is_accepted()


def test_superseded_certificates_are_revoked(fleet: Fleet) -> None:
    """What pki_rotate=leaf does."""
    old = {host: fleet.certificate(host) for host in fleet.hosts}
    for step in fleet.identities(reissue=True):
        step()
        fleet.check_everybody_is_accepted()
    assert fleet.accepts("gw1", old["node1"])
    keep = [fleet.placed[host]["serial"] for host in fleet.hosts]
    fleet.run(fleet.trust(revoke=list(fleet.hosts), keep=keep))
    fleet.check_everybody_is_accepted()
    assert not fleet.accepts("gw1", old["node1"])
    assert not fleet.accepts("node1", old["gw1"])
    again = fleet.ca(revoke=list(fleet.hosts), keep=keep)
    assert (again["changed"], again["revoked"]) == (False, [])


def test_a_revoked_host_gets_a_new_certificate(fleet: Fleet) -> None:
    old = fleet.certificate("node1")
    fleet.run(fleet.identities(revoke=["node1"]))
    assert fleet.answer["revoked"] == [f"{old.serial_number:x}"]
    assert not fleet.accepts("gw1", old)
    fleet.check_everybody_is_accepted()
    assert X509.common_name(fleet.certificate("gw1").subject) == "gw1"


def test_revocation_reaches_the_former_ca_during_a_rotation(fleet: Fleet) -> None:
    old = fleet.certificate("node1")
    fleet.run(fleet.rotate_ca(), 3 + 7)
    assert fleet.accepts("gw1", old)
    fleet.run(fleet.trust(revoke=["node1"], keep=[fleet.placed["node1"]["serial"]]))
    assert not fleet.accepts("gw1", old)
    fleet.check_everybody_is_accepted()


def test_a_list_is_good_for_as_long_as_its_ca(fleet: Fleet) -> None:
    """One that expires would have everybody refused."""
    fleet.ca(revoke=["node1"])
    ca = x509.load_pem_x509_certificate((fleet.path / "pki/active/ca.crt").read_bytes())
    crl = x509.load_pem_x509_crl((fleet.path / "pki/active/ca.crl").read_bytes())
    assert crl.next_update_utc == ca.not_valid_after_utc
    assert crl.last_update_utc < datetime.now(UTC) - timedelta(minutes=4)
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 2


def test_a_certificate_never_outlives_its_ca(fleet: Fleet) -> None:
    csr = fleet.request("node1", reissue=True)["csr"]
    signed = fleet.ca(csr=csr, identity=wanted("node1"), hours=24 * 101)["certificate"]
    ca = x509.load_pem_x509_certificate((fleet.path / "pki/active/ca.crt").read_bytes())
    assert x509.load_pem_x509_certificate(signed.encode()).not_valid_after_utc == ca.not_valid_after_utc


def test_a_certificate_that_ends_with_its_ca_is_not_made_anew_at_each_run(fleet: Fleet) -> None:
    csr = fleet.request("node1", reissue=True)["csr"]
    fleet.place("node1", fleet.ca(csr=csr, identity=wanted("node1"), hours=24 * 101)["certificate"])
    assert fleet.request("node1", renew_before_hours=24 * 101)["why"] == ""


def test_the_end_of_the_ca_is_said_in_time(tmp_path: Path) -> None:
    assert Fleet(tmp_path / "long").ca()["warnings"] == []
    path = tmp_path / "short"
    end = datetime.now(UTC) + timedelta(days=10) - timedelta(minutes=5)
    assert Fleet(path).ca(lifetime_days=10)["warnings"] == [
        f"The CA in '{path}/pki/active' ends at {end:%Y-%m-%d %H:%M} UTC, and every certificate of it; make a new one: "
        "playbooks/rotate_certificates.yml -e pki_rotate=ca"
    ]


def test_expired_certificates_are_forgotten(fleet: Fleet) -> None:
    csr = fleet.request("node1", reissue=True)["csr"]
    fleet.ca(csr=csr, identity=wanted("node1"), hours=-0.01)
    assert len(list((fleet.path / "pki/active/issued").iterdir())) == 3
    fleet.ca(csr=csr, identity=wanted("node1"))
    assert len(list((fleet.path / "pki/active/issued").iterdir())) == 3


def test_metrics(fleet: Fleet) -> None:
    text = (fleet.path / "node1/metrics/qwen_pki.prom").read_text()
    certificate = fleet.certificate("node1")
    issuer = X509.common_name(certificate.issuer)
    end = int(certificate.not_valid_after_utc.timestamp())
    assert f'qwen_certificate_not_after_seconds{{identity="node1",issuer="{issuer}"}} {end}\n' in text
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert [line.split("{")[0] for line in samples] == [
        "qwen_certificate_not_before_seconds", "qwen_certificate_not_after_seconds", "qwen_ca_not_after_seconds",
        "qwen_crl_next_update_seconds",
    ]  # fmt: skip
    for name in {line.split("{")[0] for line in samples}:
        assert re.search(rf"^# HELP {name} .+\n# TYPE {name} gauge\n{name}{{", text, re.MULTILINE)
    assert text.endswith("\n")
    # during a rotation, both CAs
    fleet.run(fleet.rotate_ca(), 3)
    text = (fleet.path / "node1/metrics/qwen_pki.prom").read_text()
    assert text.count("\nqwen_ca_not_after_seconds{") == text.count("\nqwen_crl_next_update_seconds{") == 2


# what the organisation's CA gave


@dataclass
class Given:
    """Files for one host, all in order."""

    path: Path
    fleet: Fleet

    def sign(
        self, key: Any = None, identity: dict[str, Any] | None = None, begin: int = -1, end: int = 24, authority: str = "active"
    ) -> Any:
        key = key or ec.generate_private_key(ec.SECP256R1())
        at = datetime.now(UTC).replace(microsecond=0)
        ca = AUTHORITY.Authority(self.fleet.path / "pki" / authority, PASSPHRASE)
        certificate = AUTHORITY.sign(
            ca.key(), ca.certificate, key.public_key(), identity or wanted("node1"), at + timedelta(hours=begin), at + timedelta(hours=end)
        )
        self.put(certificate, key)
        return certificate

    def put(self, certificate: Any, key: Any) -> None:
        (self.path / "node1.crt").write_bytes(X509.pem(certificate))
        text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (self.path / "node1.key").write_bytes(text)

    def problems(self, usages: tuple[str, ...] = ("serverAuth", "clientAuth")) -> list[str]:
        result: list[str] = FILES.check(self.path, "node1", list(usages))
        return result


@pytest.fixture
def given(fleet: Fleet) -> Given:
    path = fleet.path / "certificates"
    path.mkdir()
    for name in ("ca.crt", "ca.crl"):
        (path / name).write_bytes((fleet.path / "pki" / name).read_bytes())
    result = Given(path, fleet)
    result.sign()
    return result


def test_files_that_are_in_order(given: Given) -> None:
    assert given.problems() == []


def test_files_reach_the_host(given: Given) -> None:
    certificate, key = (given.path / "node1.crt").read_text(), (given.path / "node1.key").read_text()
    assert given.fleet.place("node1", certificate, key)["changed"]
    assert not given.fleet.place("node1", certificate, key)["changed"]
    assert (given.fleet.path / "node1/host.key").read_text() == key
    given.fleet.check_everybody_is_accepted()


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("node1.crt", "the host's certificate in PEM"),
        ("node1.key", "the host's key in PEM, not encrypted"),
        ("ca.crt", "the certificates of the organisation's CAs in PEM"),
        ("ca.crl", "the revocation lists of the organisation's CAs in PEM"),
    ],
)
def test_files_that_are_missing_or_something_else(given: Given, name: str, meaning: str) -> None:
    (given.path / name).write_text("nothing of the kind")
    assert given.problems() == [f"node1: '{given.path / name}' cannot be read; put {meaning} there."]
    (given.path / name).unlink()
    assert given.problems() == [f"node1: pki_files_dir has no '{name}'; put {meaning} there ({given.path})."]


def test_files_an_encrypted_key(given: Given) -> None:
    (given.path / "node1.key").write_bytes((given.fleet.path / "pki/active/ca.key").read_bytes())
    file = given.path / "node1.key"
    assert given.problems() == [f"node1: '{file}' cannot be read; put the host's key in PEM, not encrypted there."]


def test_files_a_key_of_another(given: Given) -> None:
    (given.path / "node1.key").write_bytes((given.fleet.path / "gw1/host.key").read_bytes())
    assert given.problems() == [
        f"node1: '{given.path}/node1.key' is not the key of '{given.path}/node1.crt'; put the two that belong together there."
    ]


def test_files_out_of_their_time(given: Given) -> None:
    file = given.path / "node1.crt"
    end = given.sign(begin=-2, end=-1).not_valid_after_utc
    assert given.problems() == [f"node1: '{file}' has expired at {end:%Y-%m-%d %H:%M} UTC; put a new one there."]
    begin = given.sign(begin=1).not_valid_before_utc
    assert given.problems() == [f"node1: '{file}' is not valid before {begin:%Y-%m-%d %H:%M} UTC; put one that is."]


def test_files_of_a_ca_that_is_not_there(given: Given) -> None:
    given.fleet.ca(state="next")
    given.sign(authority="next")
    assert given.problems() == [
        f"node1: '{given.path}/node1.crt' leads to no CA of '{given.path}/ca.crt'; put the CA that signed it there, or its intermediates "
        "after it."
    ]


def test_files_with_an_intermediate_ca(given: Given) -> None:
    root = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root")])
    at = datetime.now(UTC)
    middle = AUTHORITY.Authority(given.fleet.path / "pki/active", PASSPHRASE)

    def ca(subject: x509.Name, public: Any) -> x509.Certificate:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(name).public_key(public).serial_number(7)
        builder = builder.not_valid_before(at - timedelta(hours=1)).not_valid_after(at + timedelta(hours=1))
        return builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(root, AUTHORITY.hashes.SHA256())

    top = ca(name, root.public_key())
    (given.path / "ca.crt").write_bytes(X509.pem(top))
    builder = x509.CertificateRevocationListBuilder().issuer_name(name).last_update(at).next_update(at + timedelta(hours=1))
    (given.path / "ca.crl").write_bytes(X509.pem(builder.sign(root, AUTHORITY.hashes.SHA256())))
    assert len(given.problems()) == 1
    cross = ca(middle.certificate.subject, middle.certificate.public_key())
    (given.path / "node1.crt").write_bytes((given.path / "node1.crt").read_bytes() + X509.pem(cross))
    assert given.problems() == []


def test_files_that_a_host_signed(given: Given) -> None:
    """A host's certificate makes nobody a CA."""
    host = given.fleet.certificate("gw1")
    signer = IDENTITY.load_key(given.fleet.path / "gw1/host.key")
    key = ec.generate_private_key(ec.SECP256R1())
    at = datetime.now(UTC).replace(microsecond=0)
    given.put(AUTHORITY.sign(signer, host, key.public_key(), wanted("node1"), at - timedelta(hours=1), at + timedelta(hours=1)), key)
    (given.path / "node1.crt").write_bytes((given.path / "node1.crt").read_bytes() + X509.pem(host))
    assert len(given.problems()) == 1
    assert f"leads to no CA of '{given.path}/ca.crt'" in given.problems()[0]


def test_files_of_another_identity(given: Given) -> None:
    file = given.path / "node1.crt"
    given.sign(identity=wanted("node7"))
    assert given.problems() == [
        f"node1: the names (SAN) of '{file}' are node7; have it issued with DNS:node1, or set qwen_identity.",
        f"node1: the common name of '{file}' is node7; have it issued with node1, by which peers know this host.",
    ]


def test_files_for_another_use(given: Given) -> None:
    given.sign(identity=wanted("node1", ("serverAuth",)))
    assert given.problems(("serverAuth",)) == []
    assert given.problems() == [
        f"node1: the extended key usages of '{given.path}/node1.crt' are serverAuth; have it issued with serverAuth, clientAuth."
    ]


def test_files_that_are_revoked(given: Given) -> None:
    serial = x509.load_pem_x509_certificate((given.path / "node1.crt").read_bytes()).serial_number
    ca = AUTHORITY.Authority(given.fleet.path / "pki/active", PASSPHRASE)
    ca.revoke([serial])
    (given.path / "ca.crl").write_bytes(X509.pem(ca.crl))
    file = given.path / "node1.crt"
    assert given.problems() == [f"node1: '{file}' is revoked ('{given.path}/ca.crl'); put a new one there."]


def test_files_with_a_list_that_does_not_do(given: Given) -> None:
    given.fleet.ca(state="next")
    other = AUTHORITY.Authority(given.fleet.path / "pki/next", PASSPHRASE)
    (given.path / "ca.crt").write_bytes((given.fleet.path / "pki/ca.crt").read_bytes())
    name = other.certificate.subject.rfc4514_string()
    assert given.problems() == [
        f"node1: '{given.path}/ca.crl' has no list of {name}, so that peers would refuse everybody; put one of every CA there."
    ]


# what playbooks/rotate_certificates.yml refuses, before a host is changed


def rotate(*arguments: str) -> tuple[int, list[str]]:
    """Exit status and distinct messages; no host is there, and each says so at once."""
    gone = ["-e", "ansible_host=127.0.0.1", "-e", "ansible_port=1", "-e", "vault_pki_ca_passphrase=twelve characters"]
    result = ansible_playbook("-i", "inventories/example", "playbooks/rotate_certificates.yml", *gone, *arguments)
    return result.returncode, list(dict.fromkeys(re.findall(r'"msg": "((?:[^"\\]|\\.)*)"', result.stdout)))


def test_rotation_of_something_else() -> None:
    assert rotate("-e", "pki_rotate=all") == (
        2,
        [
            "pki_rotate is 'all'; set it to due (what has less than a third of its time left), leaf (every certificate), trust (a new CA "
            "beside the present one) or ca (the CA and every certificate)."
        ],
    )


def test_rotation_of_the_ca_is_for_all_hosts() -> None:
    assert rotate("-e", "pki_rotate=ca", "--limit", "gw1:node2:node3") == (
        2,
        ["pki_rotate is ca and --limit leaves out gw2, mon1, node1, which would not know the new CA; run without --limit."],
    )


def test_rotation_of_the_ca_with_hosts_that_are_away() -> None:
    status, messages = rotate("-e", "pki_rotate=ca")
    assert status != 0
    assert messages[-1] == (
        "pki_rotate is ca and gw1, gw2, mon1, node1, node2, node3 cannot be reached, which would not know the new CA; bring it back, "
        "or take it out of the inventory."
    )


def test_rotation_of_a_ca_that_is_not_ours() -> None:
    status, messages = rotate("-e", "pki_rotate=leaf", "-e", "pki_mode=files", "-e", "pki_files_dir=certificates")
    assert status != 0
    # every host says it, and no host is always the first
    sentence = "pki_rotate is leaf and pki_mode is files; put the new files into 'certificates' and set pki_rotate to due."
    assert sorted(messages)[0] == f"gw1: {sentence}"
