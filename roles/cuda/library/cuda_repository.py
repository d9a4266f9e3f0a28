#!/usr/bin/python3
"""What an apt repository offers, asked before the host knows of it: nothing is left on the host."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url

DOCUMENTATION = r"""
module: cuda_repository
short_description: Ask a flat apt repository what it has
description:
  - Gets the repository's key, compares its fingerprint, and lets apt read the repository with lists of its own. Changes nothing.
options:
  url:
    description: The repository.
    type: str
    required: true
  key_url:
    description: Where the key is.
    type: str
    required: true
  key_content:
    description: The key itself; where empty, it is fetched.
    type: str
    default: ""
  fingerprint:
    description: Fingerprint that the key must have.
    type: str
    required: true
  packages:
    description: Packages to ask for.
    type: list
    elements: str
    required: true
author: the qwen-coder-hosting maintainers
"""
RETURN = r"""
problem:
  description: A sentence, without the host, where the repository cannot be used; empty otherwise.
  returned: always
  type: str
key:
  description: The key, armoured.
  returned: always
  type: str
offers:
  description: What C(apt-cache madison) says of the repository.
  returned: always
  type: str
known:
  description: The same of the host's other repositories, as it last read them.
  returned: always
  type: str
blind:
  description: The host has read none yet.
  returned: always
  type: bool
"""

SECONDS = 60


def fingerprints(key: str, folder: Path) -> list[str]:
    """Fingerprints of the primary keys in an armoured file; none where it holds no key."""
    command = ["gpg", "--homedir", str(folder), "--batch", "--with-colons", "--import-options", "show-only", "--import"]
    shown = subprocess.run(command, input=key, capture_output=True, text=True, check=False, timeout=SECONDS).stdout
    return re.findall(r"^pub:.*\n(?:(?!fpr:).*\n)*fpr:+([0-9A-F]+):", shown, re.MULTILINE)


def fetch(url: str) -> str:
    """Text behind a URL.

    Raises:
        OSError: it does not answer, or with an error.
        ValueError: it is no text, or no URL.
    """
    text: str = open_url(url, timeout=SECONDS).read().decode()
    return text


def apt(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of apt's programs, in English."""
    return subprocess.run(arguments, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})


def offers(url: str, key: str, packages: list[str], folder: Path) -> tuple[str, str]:
    """What a repository has of some packages, and apt's complaint where it cannot be read."""
    (folder / "key.asc").write_text(key)
    (folder / "sources.list").write_text(f"deb [signed-by={folder}/key.asc] {url} /\n")
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    options = [
        f"-oDir::Etc::SourceList={folder}/sources.list", "-oDir::Etc::SourceParts=/dev/null", f"-oDir::State::Lists={folder}/lists",
        f"-oDir::Cache={folder}/cache", "-oAPT::Sandbox::User=root", f"-oAcquire::http::Timeout={SECONDS}", "-oAcquire::Retries=1",
    ]  # fmt: skip
    update = apt("apt-get", "update", "-q", "--error-on=any", *options)
    if update.returncode:
        complaints = re.findall(r"^[EW]: (.*)", update.stderr, re.MULTILINE)
        return "", " ".join((complaints or [update.stderr])[0].split())
    return apt("apt-cache", "madison", *options, *packages).stdout, ""


def look(url: str, key_url: str, key_content: str, fingerprint: str, packages: list[str]) -> dict[str, str]:
    """All that the module returns but what Ansible adds."""
    key, source = key_content, "cuda_key_content"
    if not key:
        source = f"cuda_key_url '{key_url}'"
        try:
            key = fetch(key_url)
        except (OSError, ValueError) as error:
            problem = f"cuda_key_url is '{key_url}', which does not give a key ({error}); set it to one that does, or set cuda_key_content."
            return {"problem": problem, "key": "", "offers": "", "known": ""}
    with tempfile.TemporaryDirectory() as name:
        seen = fingerprints(key, Path(name))
        if seen != [fingerprint]:
            problem = (
                f"cuda_key_fingerprint is '{fingerprint}', and the key of {source} has {' and '.join(seen) or 'none'}; "
                "set cuda_key_fingerprint to that only where the vendor says so, or get the right key."
            )
            return {"problem": problem, "key": "", "offers": "", "known": ""}
        offered, complaint = offers(url, key, packages, Path(name))
    known = apt("apt-cache", "madison", *packages).stdout
    problem = f"cuda_repository_url is '{url}', which apt cannot read ({complaint}); set it to one that it can." if complaint else ""
    return {"problem": problem, "key": key, "offers": offered, "known": known}


def main() -> None:
    """Answer Ansible."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "key_url": {"type": "str", "required": True, "no_log": False},
            "key_content": {"type": "str", "default": "", "no_log": False},  # a public key
            "fingerprint": {"type": "str", "required": True},
            "packages": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    if not module.get_bin_path("gpg"):
        problem = "cuda_key_fingerprint is compared by gpg, which this host does not have; install the package gnupg."
        module.exit_json(changed=False, problem=problem, key="", offers="", known="", blind=False)
    blind = not any(Path("/var/lib/apt/lists").glob("*_Packages*"))
    module.exit_json(changed=False, blind=blind, **look(**module.params))


if __name__ == "__main__":
    main()
