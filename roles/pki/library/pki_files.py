#!/usr/bin/python
"""Ansible module: check, on the control machine, what the organisation's CA gave for a host."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.pki_x509 import MISSING, USAGES, certificates, common_name, issued_by, lists, moment, public, revoked

if not MISSING:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

DOCUMENTATION = r"""
module: pki_files
short_description: Check a host's certificate from the organisation's CA
description:
  - Looks at C(<identity>.crt) (with intermediate CAs after it, if there are any), C(<identity>.key), C(ca.crt) and
    C(ca.crl) in a directory, and says everything that would keep the host from being reached. Changes nothing.
options:
  path:
    description: The directory.
    type: path
    required: true
  identity:
    description: Name that the certificate is to have.
    type: str
    required: true
  usages:
    description: Extended key usages that it is to have.
    type: list
    elements: str
    required: true
author: the qwen-coder-hosting maintainers
"""
RETURN = r"""
problems: {description: What is wrong, a sentence each, returned: always, type: list}
"""


def load(path: Path, identity: str) -> tuple[dict[str, Any], list[str]]:
    """What the files hold, and sentences about those that hold nothing."""
    found: dict[str, Any] = {}
    problems = []
    readers: dict[str, Any] = {
        "certificates": (f"{identity}.crt", lambda data: some(certificates(data.decode())), "the host's certificate in PEM"),
        "key": (f"{identity}.key", lambda data: serialization.load_pem_private_key(data, None), "the host's key in PEM, not encrypted"),
        "bundle": ("ca.crt", lambda data: some(certificates(data.decode())), "the certificates of the organisation's CAs in PEM"),
        "crl": ("ca.crl", lambda data: some(lists(data.decode())), "the revocation lists of the organisation's CAs in PEM"),
    }
    for what, (name, reader, meaning) in readers.items():
        if not (path / name).exists():
            problems.append(f"{identity}: pki_files_dir has no '{name}'; put {meaning} there ({path}).")
            continue
        try:
            found[what] = reader((path / name).read_bytes())
        except (ValueError, TypeError):
            problems.append(f"{identity}: '{path / name}' cannot be read; put {meaning} there.")
    return found, problems


def some(found: list[Any]) -> list[Any]:
    """At least one."""
    if not found:
        raise ValueError
    return found


def good(certificate: x509.Certificate, at: datetime) -> bool:
    """Whether it is within its time."""
    begin, end = moment(certificate, "not_valid_before"), moment(certificate, "not_valid_after")
    return bool(begin <= at <= end)


def chains(certificates: list[x509.Certificate], bundle: list[x509.Certificate], at: datetime) -> bool:
    """Whether the first leads to a CA of the bundle, by way of the others."""
    current, others = certificates[0], certificates[1:]
    while True:
        if any(issued_by(current, ca) and good(ca, at) for ca in bundle):
            return True
        step = next((ca for ca in others if issued_by(current, ca) and good(ca, at)), None)
        if step is None:
            return False
        others = [ca for ca in others if ca is not step]
        current = step


def names(certificate: x509.Certificate) -> list[str]:
    """Names that it is valid for."""
    try:
        value = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return list(value.get_values_for_type(x509.DNSName))


def usages(certificate: x509.Certificate) -> list[str]:
    """Its extended key usages, by their names."""
    known = {usage: name for name, usage in USAGES.items()}
    try:
        return [
            known.get(usage, usage.dotted_string) for usage in certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        ]
    except x509.ExtensionNotFound:
        return []


def check(path: Path, identity: str, wanted: list[str]) -> list[str]:
    """Everything that is wrong."""
    found, problems = load(path, identity)
    if problems:
        return problems
    certificate, at = found["certificates"][0], datetime.now(UTC)
    file = f"'{path / identity}.crt'"

    if public(found["key"]) != public(certificate):
        problems.append(f"{identity}: '{path / identity}.key' is not the key of {file}; put the two that belong together there.")
    if at < moment(certificate, "not_valid_before"):
        problems.append(
            f"{identity}: {file} is not valid before {moment(certificate, 'not_valid_before'):%Y-%m-%d %H:%M} UTC; put one that is."
        )
    if at > moment(certificate, "not_valid_after"):
        problems.append(
            f"{identity}: {file} has expired at {moment(certificate, 'not_valid_after'):%Y-%m-%d %H:%M} UTC; put a new one there."
        )
    if not chains(found["certificates"], found["bundle"], at):
        problems.append(
            f"{identity}: {file} leads to no CA of '{path / 'ca.crt'}'; put the CA that signed it there, or its intermediates after it."
        )
    if identity not in names(certificate):
        seen = ", ".join(names(certificate)) or "none"
        problems.append(f"{identity}: the names (SAN) of {file} are {seen}; have it issued with DNS:{identity}, or set qwen_identity.")
    if (seen := common_name(certificate.subject) or "none") != identity:
        problems.append(f"{identity}: the common name of {file} is {seen}; have it issued with {identity}, by which peers know this host.")
    if set(wanted) - set(usages(certificate)):
        seen = ", ".join(usages(certificate)) or "none"
        problems.append(f"{identity}: the extended key usages of {file} are {seen}; have it issued with {', '.join(wanted)}.")
    for entry in found["crl"]:
        end = moment(entry, "next_update")
        if end < at:
            problems.append(f"{identity}: a list of '{path / 'ca.crl'}' has expired at {end:%Y-%m-%d %H:%M} UTC; fetch it anew.")
        if revoked(entry, certificate):
            problems.append(f"{identity}: {file} is revoked ('{path / 'ca.crl'}'); put a new one there.")
    listed = {entry.issuer for entry in found["crl"]}
    problems += [
        f"{identity}: '{path / 'ca.crl'}' has no list of {ca.subject.rfc4514_string()}, so that peers would refuse everybody; put one of "
        "every CA there."
        for ca in found["bundle"]
        if ca.subject not in listed
    ]
    return problems


def main() -> None:
    """Read the options, and give back the result."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "identity": {"type": "str", "required": True},
            "usages": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    if MISSING:
        module.fail_json(msg=f"The control machine: {MISSING}")
    module.exit_json(changed=False, problems=check(Path(module.params["path"]), module.params["identity"], module.params["usages"]))


if __name__ == "__main__":
    main()
