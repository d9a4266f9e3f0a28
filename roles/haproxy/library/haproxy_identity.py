#!/usr/bin/python
"""Ansible module: put a host's identity where an HAProxy instance reads it, never a certificate with the key of another."""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: haproxy_identity
short_description: Put a host's identity where an HAProxy instance reads it
description:
  - Writes C(host.pem) (certificate and key in one file, so that no reader sees one without the other), C(ca.crt) and C(ca.crl).
  - Nothing is written unless certificate and key belong together, and CA and CRL can be read.
  - Does nothing where the directory is absent, as on a host that has no such instance.
options:
  source:
    description: Directory with C(host.crt), C(host.key), C(ca.crt) and C(ca.crl), as role C(pki) leaves it.
    type: path
    required: true
  path:
    description: The instance's directory.
    type: path
    required: true
extends_documentation_fragment: [ansible.builtin.files]
author: the project
"""


def pair(path: str) -> None:
    """Fail unless the file holds a certificate and its key."""
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path)


def trusted(path: str) -> None:
    """Fail unless the file holds certificates or revocation lists."""
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)


# what the instance reads -> what it is made of, and what must hold for it
FILES: dict[str, tuple[list[str], Callable[[str], None], str]] = {
    "host.pem": (["host.crt", "host.key"], pair, "are no certificate and its key"),
    "ca.crt": (["ca.crt"], trusted, "holds no certificate"),
    "ca.crl": (["ca.crl"], trusted, "holds no revocation list"),
}


def assemble(source: Path, parts: list[str]) -> bytes:
    """The parts in one, each ended by a line's end."""
    return b"".join(source.joinpath(part).read_bytes().rstrip() + b"\n" for part in parts)


def check(content: bytes, good: Callable[[str], None]) -> str:
    """What is wrong with a content; empty when it is good."""
    with tempfile.NamedTemporaryFile() as file:  # mode 0600
        file.write(content)
        file.flush()
        try:
            good(file.name)
        except ssl.SSLError as error:
            return str(error)
    return ""


def main() -> None:
    """Compare, check everything, then write."""
    module = AnsibleModule(
        argument_spec={"source": {"type": "path", "required": True}, "path": {"type": "path", "required": True}},
        add_file_common_args=True,
        supports_check_mode=True,
    )
    source, path = Path(module.params["source"]), Path(module.params["path"])
    if not path.is_dir():
        module.exit_json(changed=False, files=[])
    contents = {}
    for name, (parts, good, wrong) in FILES.items():
        missing = [part for part in parts if not source.joinpath(part).is_file()]
        if missing and module.check_mode:  # a dry run before role pki ran
            module.exit_json(changed=True, files=sorted(FILES))
        if missing:
            module.fail_json(msg=f"{source / missing[0]} does not exist; run role pki on this host first.")
        contents[name] = assemble(source, parts)
        if problem := check(contents[name], good):
            module.fail_json(
                msg=f"{' and '.join(str(source / part) for part in parts)} {wrong} ({problem}); issue this host's identity anew."
            )
    changed = []
    for name, content in contents.items():
        target = path / name
        different = not target.is_file() or target.read_bytes() != content
        if different and not module.check_mode:
            with tempfile.NamedTemporaryFile(dir=module.tmpdir, delete=False) as file:
                file.write(content)
            module.atomic_move(file.name, str(target))
        attributes = module.load_file_common_arguments({**module.params, "path": str(target)})
        if (different and module.check_mode) or module.set_fs_attributes_if_different(attributes, different):
            changed.append(name)
    module.exit_json(changed=bool(changed), files=changed)


if __name__ == "__main__":
    main()
