#!/usr/bin/python
"""Ansible module: a host's key, certificate, trust bundle and revocation lists, and when they end as metrics."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pki_x509 import MISSING, USAGES, Problem, certificates, common_name, lists, moment, public, revoked, write

if not MISSING:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

DOCUMENTATION = r"""
module: pki_identity
short_description: A host's key and certificate
description:
  - With C(state=requested), looks at the host's certificate. If a new one is due, makes a key and gives back a request for it.
  - With C(state=present), puts the answer to that request (or a key and a certificate from elsewhere) in place, the trust bundle, the
    revocation lists, and the metrics about them.
options:
  path:
    description: Directory on the host.
    type: path
    required: true
  state:
    description: Which half of it.
    type: str
    choices: [requested, present]
    required: true
  identity:
    description: C(common_name), C(names) and C(usages) that the certificate is to have.
    type: dict
    default: {}
  active:
    description: Certificate of the CA that signs; the certificate of another one is due.
    type: str
    default: ""
  bundle:
    description: Certificates of the CAs that the host is to trust.
    type: str
    required: true
  crl:
    description: Their revocation lists; a certificate that is on one of them is due.
    type: str
    default: ""
  renew_before_hours:
    description: A certificate that has less left is due.
    type: float
    default: 240
  reissue:
    description: The certificate is due, whatever it is.
    type: bool
    default: false
  certificate:
    description: Certificate to put in place.
    type: str
    default: ""
  key:
    description: Its key, where it was not made on this host.
    type: str
    default: ""
  metrics:
    description: File for node exporter's textfile collector.
    type: path
author: the qwen-coder-hosting maintainers
"""
RETURN = r"""
csr: {description: Request for a certificate; empty where none is due, returned: with state=requested, type: str}
why: {description: Why one is due, returned: with state=requested, type: str}
identity: {description: Common name of the certificate in place, returned: always, type: str}
serial: {description: Its serial number, returned: always, type: str}
issuer: {description: Common name of the CA that issued it, returned: always, type: str}
"""


def load_key(path: Path) -> Any:
    """The key in a file; none where there is none, or half of one."""
    try:
        return serialization.load_pem_private_key(path.read_bytes(), None)
    except (FileNotFoundError, ValueError):
        return None


class Identity:
    """What is in the directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key_file, self.next_key_file, self.certificate_file = path / "host.key", path / "host.key.new", path / "host.crt"
        self.read()

    def read(self) -> None:
        """Look at it."""
        text = self.certificate_file.read_text() if self.certificate_file.exists() else ""
        self.certificate: x509.Certificate | None = next(iter(certificates(text)), None)
        self.key = load_key(self.key_file)

    def settle(self) -> bool:
        """Finish what was interrupted between a new certificate and its key. Says whether there was anything to finish."""
        key = load_key(self.next_key_file)
        if self.certificate is None or key is None or public(key) != public(self.certificate):
            return False
        self.next_key_file.replace(self.key_file)
        self.read()
        return True

    def due(self, options: dict[str, Any]) -> str:
        """Why a new certificate is due; empty where it is not."""
        certificate, wanted = self.certificate, options["identity"]
        if options["reissue"]:
            return "a new one is asked for"
        if certificate is None or self.key is None:
            return "there is none"
        if public(self.key) != public(certificate):
            return "it is not that of the host's key"
        ca = certificates(options["active"])[0]
        if certificate.issuer != ca.subject:
            return "it is of another CA"
        end, soon = moment(certificate, "not_valid_after"), datetime.now(UTC) + timedelta(hours=options["renew_before_hours"])
        # one that ends with its CA would be followed by one that does so as well
        if end < min(soon, moment(ca, "not_valid_after")):
            return "its end is near"
        if any(revoked(entry, certificate) for entry in lists(options["crl"])):
            return "it is revoked"
        if not self.says(wanted):
            return "it says something else"
        return ""

    def says(self, wanted: dict[str, Any]) -> bool:
        """Whether the certificate has the name, the names and the usages that it is to have."""
        assert self.certificate is not None
        extensions = self.certificate.extensions
        try:
            names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            extended = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except x509.ExtensionNotFound:
            return False
        seen = {f"DNS:{name}" for name in names.get_values_for_type(x509.DNSName)}
        seen |= {f"IP:{name}" for name in names.get_values_for_type(x509.IPAddress)}
        meant = {f"IP:{ip_address(name[3:])}" if name.startswith("IP:") else name for name in wanted["names"]}
        return (
            common_name(self.certificate.subject) == wanted["common_name"]
            and seen == meant
            and set(extended) == {USAGES[usage] for usage in wanted["usages"]}
        )

    def request(self, name: str) -> str:
        """Make a key, which waits beside the present one, and a request for it."""
        key = ec.generate_private_key(ec.SECP256R1())
        encryption = serialization.NoEncryption()
        text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        write(self.next_key_file, text, 0o600)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
        return csr.public_bytes(serialization.Encoding.PEM).decode()

    def put(self, certificate: str, key: str) -> None:
        """A certificate and its key in place, one right after the other."""
        if key:
            write(self.next_key_file, key.encode(), 0o600)
        waiting = load_key(self.next_key_file)
        if waiting is None or public(waiting) != public(certificates(certificate)[0]):
            raise Problem("The certificate is not for the key that waits on this host: two runs at the same time? Run again.")
        write(self.certificate_file, certificate.encode(), 0o644)
        self.next_key_file.replace(self.key_file)
        self.read()


def metrics(certificate: x509.Certificate, bundle: str, crl: str) -> str:
    """When everything begins and ends, for node exporter's textfile collector."""
    lines = []

    def gauge(name: str, meaning: str, values: dict[str, datetime]) -> None:
        if values:
            lines.extend([f"# HELP {name} {meaning}", f"# TYPE {name} gauge"])
            lines.extend(f"{name}{{{labels}}} {value.timestamp():.0f}" for labels, value in values.items())

    def label(**values: str) -> str:
        text = {name: value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for name, value in values.items()}
        return ",".join(f'{name}="{value}"' for name, value in text.items())

    who = label(identity=common_name(certificate.subject), issuer=common_name(certificate.issuer))
    authorities = certificates(bundle)
    gauge(
        "qwen_certificate_not_before_seconds",
        "Begin of the host's certificate, in seconds since 1970.",
        {who: moment(certificate, "not_valid_before")},
    )
    gauge(
        "qwen_certificate_not_after_seconds",
        "End of the host's certificate, in seconds since 1970.",
        {who: moment(certificate, "not_valid_after")},
    )
    gauge(
        "qwen_ca_not_after_seconds",
        "End of a CA that the host trusts, in seconds since 1970.",
        {label(ca=common_name(ca.subject), serial=f"{ca.serial_number:x}"): moment(ca, "not_valid_after") for ca in authorities},
    )
    gauge(
        "qwen_crl_next_update_seconds",
        "Until when a revocation list is good, in seconds since 1970; peers refuse everybody afterwards.",
        {label(ca=common_name(entry.issuer)): moment(entry, "next_update") for entry in lists(crl)},
    )
    return "\n".join(lines) + "\n"


def said(identity: Identity) -> dict[str, str]:
    """What the certificate in place is."""
    if identity.certificate is None:
        return {"identity": "", "serial": "", "issuer": ""}
    certificate = identity.certificate
    return {
        "identity": common_name(certificate.subject),
        "serial": f"{certificate.serial_number:x}",
        "issuer": common_name(certificate.issuer),
    }


def requested(options: dict[str, Any], check: bool = False) -> dict[str, Any]:
    """The first half."""
    path = Path(options["path"])
    changed = False
    if not path.exists() and not check:
        path.mkdir(parents=True, mode=0o755)
        path.chmod(0o755)
        changed = True
    identity = Identity(path)
    changed = (not check and identity.settle()) or changed
    why = identity.due(options)
    csr = identity.request(options["identity"]["common_name"]) if why and not check else ""
    return {"changed": bool(why) or changed, "csr": csr, "why": why, **said(identity)}


def present(options: dict[str, Any], check: bool = False) -> dict[str, Any]:
    """The second half."""
    path = Path(options["path"])
    changed = not path.exists()
    if changed and not check:
        path.mkdir(parents=True, mode=0o755)
        path.chmod(0o755)
    identity = Identity(path)
    if not check:
        changed = identity.settle() or changed
    certificate = options["certificate"]
    fresh = bool(certificate) and (
        not identity.certificate_file.exists()
        or identity.certificate_file.read_text() != certificate
        or identity.key is None
        or public(identity.key) != public(certificates(certificate)[0])
    )
    if fresh and not check:
        identity.put(certificate, options["key"])
    files = [(path / "ca.crt", options["bundle"]), (path / "ca.crl", options["crl"])]
    if options["metrics"] and identity.certificate is not None:
        files.append((Path(options["metrics"]), metrics(identity.certificate, options["bundle"], options["crl"])))
    for file, text in files:
        seen = file.read_text() if file.exists() else ""
        if seen == text:
            continue
        changed = True
        if check:
            continue
        if text:
            if not file.parent.exists():
                file.parent.mkdir(parents=True, mode=0o755)
                file.parent.chmod(0o755)
            write(file, text.encode(), 0o644)
        else:
            file.unlink()
    for file, mode in ((identity.key_file, 0o600), (identity.certificate_file, 0o644)):
        if file.exists() and file.stat().st_mode & 0o777 != mode:
            changed = True
            if not check:
                file.chmod(mode)
    return {"changed": changed or fresh, **said(identity)}


def main() -> None:
    """Read the options, and give back the result."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "state": {"type": "str", "choices": ["requested", "present"], "required": True},
            "identity": {"type": "dict", "default": {}},
            "active": {"type": "str", "default": ""},
            "bundle": {"type": "str", "required": True},
            "crl": {"type": "str", "default": ""},
            "renew_before_hours": {"type": "float", "default": 240},
            "reissue": {"type": "bool", "default": False},
            "certificate": {"type": "str", "default": ""},
            "key": {"type": "str", "default": "", "no_log": True},
            "metrics": {"type": "path"},
        },
        supports_check_mode=True,
    )
    if MISSING:
        module.fail_json(msg=f"This host: {MISSING}")
    try:
        half = requested if module.params["state"] == "requested" else present
        module.exit_json(**half(module.params, module.check_mode))
    except Problem as problem:
        module.fail_json(msg=str(problem))


if __name__ == "__main__":
    main()
