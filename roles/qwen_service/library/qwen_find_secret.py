#!/usr/bin/python
"""Ansible module: say where on a host secrets are left. They come on standard input and go nowhere."""

from __future__ import annotations

import base64
import bz2
import gzip
import lzma
import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: qwen_find_secret
short_description: Say where on a host secrets are left
description:
  - Looks into files, also compressed ones, into the environment and the command line of every process, and into the journal.
  - Links are not followed; where they lead is looked into if it is below one of the paths.
options:
  secrets:
    description: What to look for, by a name of its own, also in base64. All are found in one reading.
    type: dict
    required: true
  paths:
    description: Directories to look through.
    type: list
    elements: path
    required: true
  skip:
    description: Patterns of file names that are not looked into.
    type: list
    elements: str
    default: []
author: the project
"""

# name -> the forms in which it may stand somewhere; (name, place)
Secrets = dict[str, tuple[bytes, ...]]
Places = Iterator[tuple[str, str]]

CHUNK = 1 << 20
OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}  # type: ignore[dict-item]


def forms(secrets: dict[str, str]) -> Secrets:
    """What stands on a disk where a secret was left: itself, or base64 of it."""
    return {name: (secret.encode(), base64.b64encode(secret.encode()).rstrip(b"=")[:-1]) for name, secret in secrets.items()}


def holds(data: bytes, secrets: Secrets) -> set[str]:
    """The names of the secrets that are in the data."""
    return {name for name, shapes in secrets.items() if any(shape in data for shape in shapes)}


def contained(stream: IO[bytes], secrets: Secrets) -> set[str]:
    """The names of the secrets that a stream holds, also across two reads."""
    longest = max(len(shape) for shapes in secrets.values() for shape in shapes)
    found: set[str] = set()
    tail = b""
    while chunk := stream.read(CHUNK):
        found |= holds(tail + chunk, secrets)
        tail = chunk[-longest:]
    return found


def files(paths: list[str], skip: list[str]) -> Iterator[Path]:
    """Plain files below the paths, those with several names once. The journal is read in another way."""
    seen = set()
    for top in paths:
        for folder, _, names in os.walk(top):
            if folder.startswith(("/var/log/journal", "/run/log/journal")):
                continue
            for name in names:
                path = Path(folder, name)
                try:
                    status = path.lstat()
                except FileNotFoundError:
                    continue
                if not stat.S_ISREG(status.st_mode) or (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                if not any(fnmatch(name, pattern) for pattern in skip):
                    yield path


def in_files(secrets: Secrets, paths: list[str], skip: list[str]) -> Places:
    """Files that hold one; one that cannot be read might hold each."""
    for path in files(paths, skip):
        try:
            with path.open("rb") as stream:
                found = contained(stream, secrets)
            if opener := OPENERS.get(path.suffix):
                # what only bears the name of a compressed file is no more than it is
                with suppress(EOFError, lzma.LZMAError, gzip.BadGzipFile), opener(path) as unpacked:
                    found |= contained(unpacked, secrets)
        except FileNotFoundError:
            continue
        except OSError as error:
            yield from ((name, f"{path} (cannot be read: {error.strerror or error})") for name in secrets)
        else:
            yield from ((name, str(path)) for name in found)


def in_processes(secrets: Secrets) -> Places:
    """Processes that have one in their environment or command line."""
    for process in Path("/proc").glob("[0-9]*"):
        for file, meaning in (("environ", "environment"), ("cmdline", "command line")):
            with suppress(OSError):  # it has ended meanwhile
                with (process / file).open("rb") as stream:
                    found = contained(stream, secrets)
                who = f"process {process.name} ({(process / 'comm').read_text(errors='replace').strip()})"
                yield from ((name, f"the {meaning} of {who}") for name in found)


def in_journal(secrets: Secrets) -> Places:
    """Who wrote one to the journal."""
    with subprocess.Popen(
        ["journalctl", "--no-pager", "--all", "--output=export"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as log:
        entry = b""
        written = set()
        for line in log.stdout or ():
            if line != b"\n":
                entry += line
                continue
            if found := holds(entry, secrets):
                writer = re.search(rb"^(?:_SYSTEMD_UNIT|SYSLOG_IDENTIFIER)=(.*)$", entry, re.MULTILINE)
                written |= {(name, writer[1].decode(errors="replace") if writer else "unknown") for name in found}
            entry = b""
    yield from ((name, f"the journal ({writer})") for name, writer in sorted(written))


def main() -> None:
    """Look, and give back the places."""
    module = AnsibleModule(
        argument_spec={
            "secrets": {"type": "dict", "required": True, "no_log": True},
            "paths": {"type": "list", "elements": "path", "required": True},
            "skip": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    options: dict[str, Any] = module.params
    secrets = forms(options["secrets"])
    places: dict[str, list[str]] = {name: [] for name in secrets}
    for name, place in (*in_files(secrets, options["paths"], options["skip"]), *in_processes(secrets), *in_journal(secrets)):
        places[name].append(place)
    module.exit_json(changed=False, places=places)


if __name__ == "__main__":
    main()
