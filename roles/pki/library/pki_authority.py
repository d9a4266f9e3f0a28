#!/usr/bin/python
"""Ansible module: the project's own CA on the control machine, its rotation, its certificates and what it revoked."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pki_x509 import MISSING, USAGES, Problem, common_name, moment, pem, revoked, write

if not MISSING:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

DOCUMENTATION = r"""
module: pki_authority
short_description: The project's CA, its rotation, its certificates and its revocation lists
description:
  - Keeps a CA in a directory. A rotation adds a second one (C(next)), which later takes the first one's place (C(active), C(retiring)).
    Where a rotation stands is what is in the directory, so that one that was interrupted goes on with the next run.
  - C(ca.crt) and C(ca.crl) beside them are what hosts get, the certificates and revocation lists of all of them.
  - Keys are encrypted. One that the passphrase does not open is an error, never replaced.
options:
  path:
    description: Directory of the CA.
    type: path
    required: true
  passphrase:
    description: What encrypts the keys.
    type: str
    required: true
  common_name:
    description: Beginning of the common name of a new CA; a part of its serial number follows.
    type: str
    default: CA
  lifetime_days:
    description: Lifetime of a new CA.
    type: int
    default: 3650
  state:
    description:
      - C(present), there is a CA.
      - C(next), there is one that will take its place, or has.
      - C(promoted), that one signs.
      - C(dropping), hosts are no longer to trust the former one.
      - C(dropped), the former one is gone.
    type: str
    choices: [present, next, promoted, dropping, dropped]
    default: present
  csr:
    description: Request to sign. Only its key is taken from it; who that is, C(identity) says.
    type: str
  identity:
    description: C(common_name), C(names) (each with C(DNS:) or C(IP:) in front) and C(usages) of the certificate.
    type: dict
  hours:
    description: Lifetime of the certificate.
    type: float
    default: 720
  revoke:
    description: Common names whose certificates are revoked.
    type: list
    elements: str
    default: []
  keep:
    description: Serial numbers, in hexadecimal digits, that are not.
    type: list
    elements: str
    default: []
author: the qwen-coder-hosting maintainers
"""
RETURN = r"""
bundle: {description: Certificates of the CAs that hosts are to trust, returned: always, type: str}
crl: {description: Their revocation lists, returned: always, type: str}
active: {description: Certificate of the CA that signs, returned: always, type: str}
name: {description: Its common name, returned: always, type: str}
rotating: {description: Whether there is more than one CA, returned: always, type: bool}
certificate: {description: What was signed, returned: with csr, type: str}
revoked: {description: Serial numbers that were revoked now, returned: always, type: list}
"""

# clocks of hosts differ a little
SKEW = timedelta(minutes=5)
# how long before a CA's end each run says so
NOTICE = timedelta(days=90)
ROLES = ("active", "next", "retiring")


def now() -> datetime:
    """In whole seconds, as certificates have them."""
    return datetime.now(UTC).replace(microsecond=0)


def general_name(text: str) -> x509.GeneralName:
    """A name with its type in front."""
    kind, _, value = text.partition(":")
    if kind == "DNS":
        return x509.DNSName(value)
    if kind == "IP":
        return x509.IPAddress(ip_address(value))
    raise Problem(f"pki_subject_alternative_names has '{text}'; set it to names with DNS: or IP: in front.")


def sign(
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Certificate,
    public_key: Any,
    identity: dict[str, Any],
    not_before: datetime,
    not_after: datetime,
) -> x509.Certificate:
    """A certificate for a host."""
    subject_key = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity["common_name"])]))
        .issuer_name(issuer.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([USAGES[usage] for usage in identity["usages"]]), critical=False)
        .add_extension(x509.SubjectAlternativeName([general_name(name) for name in identity["names"]]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject_key), critical=False)
        .sign(key, hashes.SHA384())
    )


def key_usage(*names: str) -> x509.KeyUsage:
    """Exactly these usages."""
    every = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign",
        "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: name in names for name in every})


class Authority:
    """One CA: a directory with its key, certificate, revocation list, and the certificates that it issued."""

    def __init__(self, path: Path, passphrase: str) -> None:
        self.path = path
        self.passphrase = passphrase.encode()
        for name in ("ca.key", "ca.crt", "ca.crl"):
            if not (path / name).exists():
                raise Problem(f"pki_ca_dir has no {path.name}/{name}; put it back from a backup of '{path.parent}'.")
        self.certificate = x509.load_pem_x509_certificate((path / "ca.crt").read_bytes())
        self.crl = x509.load_pem_x509_crl((path / "ca.crl").read_bytes())

    @classmethod
    def create(cls, path: Path, passphrase: str, name: str, days: int) -> None:
        """Make one, whole or not at all."""
        part = path.with_name(f".{path.name}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(mode=0o700)
        (part / "issued").mkdir(mode=0o700)
        key = ec.generate_private_key(ec.SECP384R1())
        serial = x509.random_serial_number()
        # each has a name of its own, so that neither certificates nor revocation lists of two are mistaken for each other
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} {serial:040x}"[: len(name) + 9])])
        start = now() - SKEW
        subject_key = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(serial)
            .not_valid_before(start)
            .not_valid_after(start + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(key_usage("key_cert_sign", "crl_sign"), critical=True)
            .add_extension(subject_key, critical=False)
            .sign(key, hashes.SHA384())
        )
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
        write(part / "ca.key", key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption), 0o600)
        write(part / "ca.crt", pem(certificate), 0o644)
        write(part / "ca.crl", pem(revocation_list(certificate, key, [], 1)), 0o644)
        part.rename(path)

    def key(self) -> ec.EllipticCurvePrivateKey:
        """Its key, opened."""
        try:
            key = serialization.load_pem_private_key((self.path / "ca.key").read_bytes(), self.passphrase)
        except (ValueError, TypeError):
            raise Problem(
                f"pki_ca_passphrase does not open '{self.path}/ca.key'; set it to the passphrase that this CA was made with."
            ) from None
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    def issue(self, csr: str, identity: dict[str, Any], hours: float) -> x509.Certificate:
        """Sign, and keep a copy for the day on which it has to be revoked."""
        request = x509.load_pem_x509_csr(csr.encode())
        if not request.is_signature_valid:
            raise Problem(f"{identity['common_name']}: the host's request is not signed by its own key; run again.")
        # a certificate never outlives its CA
        not_after = min(now() + timedelta(hours=hours), moment(self.certificate, "not_valid_after"))
        certificate = sign(self.key(), self.certificate, request.public_key(), identity, now() - SKEW, not_after)
        for path, old in self.issued():
            if moment(old, "not_valid_after") < now():
                path.unlink(missing_ok=True)
        write(self.path / f"issued/{certificate.serial_number:x}.crt", pem(certificate), 0o644)
        return certificate

    def issued(self) -> list[tuple[Path, x509.Certificate]]:
        """What it signed and has not expired long ago."""
        found = []
        for path in sorted((self.path / "issued").glob("[0-9a-f]*.crt")):
            try:
                found.append((path, x509.load_pem_x509_certificate(path.read_bytes())))
            except FileNotFoundError:  # removed by another host's turn, as it has expired
                continue
        return found

    def superseded(self, names: list[str], keep: list[str]) -> list[int]:
        """Serial numbers of these names that are good, and are to be so no longer."""
        return [
            certificate.serial_number
            for _, certificate in self.issued()
            if common_name(certificate.subject) in names
            and f"{certificate.serial_number:x}" not in keep
            and moment(certificate, "not_valid_after") > now()
            and not revoked(self.crl, certificate)
        ]

    def revoke(self, serials: list[int]) -> None:
        """Write a new revocation list with these on it."""
        fresh = [x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now() - SKEW).build() for serial in serials]
        number = self.crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number + 1
        self.crl = revocation_list(self.certificate, self.key(), [*self.crl, *fresh], number)
        write(self.path / "ca.crl", pem(self.crl), 0o644)


def revocation_list(
    issuer: x509.Certificate, key: ec.EllipticCurvePrivateKey, revoked: list[x509.RevokedCertificate], number: int
) -> x509.CertificateRevocationList:
    """A revocation list that is good for as long as its CA: peers refuse everybody when one has expired, and each change is brought
    to them at once anyway."""
    subject_key = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(now() - SKEW)
        .next_update(moment(issuer, "not_valid_after"))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject_key), critical=False)
    )
    for entry in revoked:
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(key, hashes.SHA384())


class Directory:
    """The CAs of a project, and where their rotation stands."""

    def __init__(self, path: Path, passphrase: str, name: str, days: int) -> None:
        self.path, self.passphrase, self.name, self.days = path, passphrase, name, days

    def has(self, role: str) -> bool:
        """Whether there is a CA in this role."""
        return (self.path / role).exists()

    def get(self, role: str) -> Authority:
        """The CA in this role."""
        return Authority(self.path / role, self.passphrase)

    def make(self, role: str) -> None:
        """A CA for this role."""
        Authority.create(self.path / role, self.passphrase, self.name, self.days)

    def reach(self, state: str) -> bool:
        """Bring the rotation there; each step is one rename, or one directory that is made or removed. Says whether anything changed."""
        changed = False
        if not self.path.exists():
            self.path.mkdir(parents=True, mode=0o700)
            changed = True
        if self.path.stat().st_mode & 0o777 != 0o700:
            self.path.chmod(0o700)
            changed = True
        # a promotion that was interrupted between its two renames
        if not self.has("active") and self.has("retiring") and self.has("next"):
            (self.path / "next").rename(self.path / "active")
            changed = True
        if not self.has("active"):
            if any((self.path / role).exists() for role in ROLES):
                raise Problem(f"pki_ca_dir has no active; put it back from a backup of '{self.path}'.")
            self.make("active")
            changed = True
        # whatever comes: a passphrase that is wrong is found before a host is touched
        self.get("active").key()
        if state == "next" and not self.has("next") and not self.has("retiring"):
            self.make("next")
            changed = True
        if state == "promoted" and self.has("next"):
            self.get("next").key()
            (self.path / "active").rename(self.path / "retiring")
            (self.path / "next").rename(self.path / "active")
            changed = True
        if state == "dropped" and self.has("retiring"):
            # renamed first: half a CA must not be taken for one
            gone = self.path / ".retiring"
            shutil.rmtree(gone, ignore_errors=True)
            (self.path / "retiring").rename(gone)
            shutil.rmtree(gone)
            changed = True
        return changed

    def authorities(self, state: str) -> list[Authority]:
        """Those that hosts are to trust, the one that signs first."""
        dropped = ("retiring",) if state in ("dropping", "dropped") else ()
        return [self.get(role) for role in ROLES if self.has(role) and role not in dropped]

    def publish(self, authorities: list[Authority]) -> tuple[str, str, bool]:
        """Write what hosts and clients get: trusted certificates, revocation lists, and whether that is new."""
        bundle = b"".join(pem(authority.certificate) for authority in authorities)
        crl = b"".join(pem(authority.crl) for authority in authorities)
        changed = False
        for name, data in (("ca.crt", bundle), ("ca.crl", crl)):
            path = self.path / name
            if not path.exists() or path.read_bytes() != data:
                write(path, data, 0o644)
                changed = True
        return bundle.decode(), crl.decode(), changed


def notices(active: Authority) -> list[str]:
    """What every run says when the CA's end comes near."""
    end = moment(active.certificate, "not_valid_after")
    if end > now() + NOTICE:
        return []
    return [
        f"The CA in '{active.path}' ends at {end:%Y-%m-%d %H:%M} UTC, and every certificate of it; make a new one: "
        "playbooks/rotate_certificates.yml -e pki_rotate=ca"
    ]


def run(options: dict[str, Any], check: bool = False) -> dict[str, Any]:
    """Do what the options say."""
    path = Path(options["path"])
    directory = Directory(path, options["passphrase"], options["common_name"], options["lifetime_days"])
    if check:
        if not directory.has("active"):
            return {"changed": True, "bundle": "", "crl": "", "active": "", "name": "", "rotating": False, "revoked": []}
        directory.get("active").key()
        changed = False
    else:
        changed = directory.reach(options["state"])
    result: dict[str, Any] = {"revoked": []}
    if options["csr"]:
        if not check:
            result["certificate"] = pem(directory.get("active").issue(options["csr"], options["identity"], options["hours"])).decode()
        changed = True
    authorities = directory.authorities(options["state"])
    for authority in authorities:
        serials = authority.superseded(options["revoke"], options["keep"])
        if serials and not check:
            authority.revoke(serials)
        result["revoked"] += [f"{serial:x}" for serial in serials]
        changed = changed or bool(serials)
    bundle, crl, written = ("", "", False) if check else directory.publish(authorities)
    if check:
        bundle = "".join(pem(authority.certificate).decode() for authority in authorities)
        crl = "".join(pem(authority.crl).decode() for authority in authorities)
    return {
        **result,
        "changed": changed or written,
        "bundle": bundle,
        "crl": crl,
        "active": pem(authorities[0].certificate).decode(),
        "name": common_name(authorities[0].certificate.subject),
        "rotating": directory.has("next") or directory.has("retiring"),
        "warnings": notices(authorities[0]),
    }


def main() -> None:
    """Read the options, and give back the result."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "passphrase": {"type": "str", "required": True, "no_log": True},
            "common_name": {"type": "str", "default": "CA"},
            "lifetime_days": {"type": "int", "default": 3650},
            "state": {"type": "str", "choices": ["present", "next", "promoted", "dropping", "dropped"], "default": "present"},
            "csr": {"type": "str"},
            "identity": {"type": "dict"},
            "hours": {"type": "float", "default": 720},
            "revoke": {"type": "list", "elements": "str", "default": []},
            "keep": {"type": "list", "elements": "str", "default": []},
        },
        required_by={"csr": ["identity"]},
        supports_check_mode=True,
    )
    if MISSING:
        module.fail_json(msg=f"The control machine: {MISSING}")
    os.umask(0o077)
    try:
        module.exit_json(**run(module.params, module.check_mode))
    except Problem as problem:
        module.fail_json(msg=str(problem))


if __name__ == "__main__":
    main()
