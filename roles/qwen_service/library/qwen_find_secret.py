#!/usr/bin/python
"""Ansible module: say where on a host a secret is left. The secret itself comes on standard input and goes nowhere."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: qwen_find_secret
short_description: Say where on a host a secret is left
description:
  - Looks into files, also compressed ones, into the environment and the command line of every process, and into the journal.
  - Links are not followed; where they lead is looked into if it is below one of the paths.
options:
  secret:
    description: What to look for.
    type: str
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

CHUNK = 1 << 20
OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}  # type: ignore[dict-item]


def contains(stream: IO[bytes], secret: bytes) -> bool:
    """Whether a stream holds it, also across two reads."""
    tail = b""
    while chunk := stream.read(CHUNK):
        if secret in tail + chunk:
            return True
        tail = chunk[-len(secret) :]
    return False


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


def in_files(secret: bytes, paths: list[str], skip: list[str]) -> Iterator[str]:
    """Files that hold it; one that cannot be read might."""
    for path in files(paths, skip):
        try:
            with path.open("rb") as stream:
                if contains(stream, secret):
                    yield str(path)
                    continue
            if opener := OPENERS.get(path.suffix):
                with opener(path) as unpacked:
                    if contains(unpacked, secret):
                        yield str(path)
        except FileNotFoundError:
            continue
        except (EOFError, lzma.LZMAError):
            continue  # it only bears the name of a compressed file
        except OSError as error:
            if not isinstance(error, gzip.BadGzipFile):
                yield f"{path} (cannot be read: {error.strerror or error})"


def in_processes(secret: bytes) -> Iterator[str]:
    """Processes that have it in their environment or command line."""
    for process in Path("/proc").glob("[0-9]*"):
        for file, meaning in (("environ", "environment"), ("cmdline", "command line")):
            try:
                with (process / file).open("rb") as stream:
                    if contains(stream, secret):
                        yield f"the {meaning} of process {process.name} ({(process / 'comm').read_text(errors='replace').strip()})"
            except OSError:  # it has ended meanwhile
                continue


def in_journal(secret: bytes) -> Iterator[str]:
    """Who wrote it to the journal."""
    with subprocess.Popen(
        ["journalctl", "--no-pager", "--all", "--output=export"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as log:
        entry = b""
        writers = set()
        for line in log.stdout or ():
            if line != b"\n":
                entry += line
                continue
            if secret in entry:
                writer = re.search(rb"^(?:_SYSTEMD_UNIT|SYSLOG_IDENTIFIER)=(.*)$", entry, re.MULTILINE)
                writers.add(writer[1].decode(errors="replace") if writer else "unknown")
            entry = b""
    yield from (f"the journal ({writer})" for writer in sorted(writers))


def main() -> None:
    """Look, and give back the places."""
    module = AnsibleModule(
        argument_spec={
            "secret": {"type": "str", "required": True, "no_log": True},
            "paths": {"type": "list", "elements": "path", "required": True},
            "skip": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    options: dict[str, Any] = module.params
    secret = options["secret"].encode()
    places = [*in_files(secret, options["paths"], options["skip"]), *in_processes(secret), *in_journal(secret)]
    module.exit_json(changed=False, places=places)


if __name__ == "__main__":
    main()
