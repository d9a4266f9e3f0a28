#!/usr/bin/python
"""Ansible module: the releases of a host. One is put together beside the others, and becomes the current one by a single rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

DOCUMENTATION = """
module: qwen_release
short_description: Put a release together, make one the current one, forget old ones
description:
  - A release is a directory below C(releases) with its files, a link C(venv) into its environment, and C(release.json). What is in it
    never changes; its name is that of its environment and a digest of its files.
  - C(current) and C(previous) below the root are links to releases. The unit of the current one is copied to where systemd looks.
options:
  root:
    description: Directory that holds C(releases) and C(environments).
    type: path
    required: true
  state:
    description: C(prepared) puts a release together; C(current) makes one the current one and forgets old ones.
    choices: [prepared, current]
    default: prepared
  environment:
    description: Name of a directory below C(environments), for C(prepared).
    type: str
  files:
    description: Name and content of each file of the release, for C(prepared). They hold no secret; differences are shown.
    type: dict
    default: {}
  checks:
    description: Commands that must accept a file before the release gets its name, by the file's name; C({}) is its path.
    type: dict
    default: {}
  about:
    description: What else goes into C(release.json).
    type: dict
    default: {}
  id:
    description: For C(current), the release, or C(previous).
    type: str
  unit_dir:
    description: Where units are copied to.
    type: path
    default: /etc/systemd/system
  unit:
    description: The unit that runs the current release.
    type: str
    default: qwen-coder.service
  keep:
    description: For C(current), how many releases stay; current and previous one always do.
    type: int
    default: 3
author: the project
"""

RETURN = """
restart:
  description: For C(current), whether what runs is not the current release yet.
id:
  description: The release.
before:
  description: The release that was the current one, or an empty string.
kept:
  description: For C(current), the releases that are there, the newest first.
removed:
  description: For C(current), the releases that were forgotten.
"""


class ReleaseError(Exception):
    """What is wrong, in a sentence."""


def write(path: Path, content: str) -> None:
    """Write a file whole, and to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o644)


def link(path: Path, target: str | Path) -> None:
    """Make a link point elsewhere in one step."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(path)


class Releases:
    """The releases below a root."""

    def __init__(self, root: Path) -> None:
        self.root, self.releases, self.environments = root, root / "releases", root / "environments"

    def named(self, name: str) -> str:
        """The release that a link names, or an empty string."""
        link = self.root / name
        return link.readlink().name if link.is_symlink() and link.exists() else ""

    def complete(self) -> list[str]:
        """The releases that are whole, the newest first."""
        found = sorted(self.releases.glob("*/release.json"), key=lambda file: (file.stat().st_mtime_ns, file.parent.name), reverse=True)
        return [file.parent.name for file in found if not file.parent.name.startswith(".") and (file.parent / "venv").is_symlink()]

    def file(self, release: str, name: str) -> str:
        """A file of a release, or an empty string."""
        path = self.releases / release / name
        return path.read_text(encoding="utf-8") if release and path.is_file() else ""

    def prepare(self, environment: str, files: dict[str, str], checks: dict[str, list[str]], about: dict[str, Any], dry: bool) -> Any:
        """Put a release together; (its name, whether it was not there, differences to the current one).

        Raises:
            ReleaseError: a check refuses a file.
        """
        digest = hashlib.sha256(json.dumps([files, about], sort_keys=True).encode()).hexdigest()[:8]
        name = f"{environment}-{digest}"
        target, current = self.releases / name, self.named("current")
        present = name in self.complete() and all(self.file(name, file) == content for file, content in files.items())
        differences = [
            {
                "before_header": str(self.root / "current" / file), "before": self.file(current, file),
                "after_header": str(target / file), "after": content,
            }
            for file, content in files.items() if not present and self.file(current, file) != content
        ]  # fmt: skip
        if present:
            return name, False, differences
        where = None if dry else self.releases
        with tempfile.TemporaryDirectory(prefix=".new-", dir=where) as scratch:
            new = Path(scratch, name)
            new.mkdir(mode=0o755)
            (new / "venv").symlink_to(self.environments / environment / "venv")
            for file, content in files.items():
                write(new / file, content)
            for file, command in checks.items():
                self.check(new, file, command)
            if dry:
                return name, True, differences
            if target.exists():  # somebody changed it, or a run was cut off
                self.replace_files(target, new, files)
            write(new / "release.json", json.dumps({"id": name, "environment": environment, **about}, indent=2) + "\n")
            if target.exists():
                (new / "release.json").replace(target / "release.json")
            else:
                new.rename(target)
        return name, True, differences

    def replace_files(self, target: Path, new: Path, files: dict[str, str]) -> None:
        """Give a release that is there its files again, each in one step: it may be the current one."""
        for file in files:
            (new / file).replace(target / file)
        link(target / "venv", (new / "venv").readlink())

    def check(self, new: Path, name: str, command: list[str]) -> None:
        """Have a command look at a file as if the release were the current one.

        Raises:
            ReleaseError: it says no.
        """
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, name)
            file.write_text(self.file_as_current(new, name), encoding="utf-8")
            result = subprocess.run(
                [str(file) if part == "{}" else part for part in command], capture_output=True, text=True, check=False, errors="replace"
            )
        if result.returncode:
            said = (result.stderr or result.stdout).strip()
            raise ReleaseError(f"{name} of release {new.name} is refused, and nothing was changed: {said}")

    def file_as_current(self, new: Path, name: str) -> str:
        """A new file's text with the paths that it will have once the release is the current one."""
        return (new / name).read_text(encoding="utf-8").replace(f"{self.root / 'current'}/", f"{new}/")

    def switch(self, name: str, units: Path, dry: bool) -> tuple[str, str, bool]:
        """Make a release the current one; (its name, the one before, whether anything changed).

        Raises:
            ReleaseError: there is no such release.
        """
        current = self.named("current")
        name = name if name != "previous" else self.named("previous")
        if name not in self.complete() and not dry:
            there = ", ".join(self.complete()) or "none"
            raise ReleaseError(f"there is no release '{name}' on this host; set it to one of those that are: {there}.")
        wanted = {units / file.name: file.read_text(encoding="utf-8") for file in (self.releases / name).glob("*.service")}
        stale = {path: text for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text}
        changed = current != name or bool(stale)
        if changed and not dry:
            # the links first: what a crash leaves half done, the next run completes
            if current and current != name:
                link(self.root / "previous", f"releases/{current}")
            link(self.root / "current", f"releases/{name}")
            for path, text in stale.items():
                new = path.with_name(f".{path.name}.new")
                write(new, text)
                new.replace(path)
        return name, current, changed

    def outdated(self, unit: str) -> bool:
        """Whether a unit runs since before its release became the current one: a run was cut off before the restart."""
        shown = subprocess.run(
            ["systemctl", "show", "--timestamp=unix", "--property=ActiveState,ExecMainStartTimestamp", unit],
            capture_output=True, text=True, check=False,
        ).stdout  # fmt: skip
        state = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
        since = state.get("ExecMainStartTimestamp", "").removeprefix("@")
        if state.get("ActiveState") not in ("active", "activating", "reloading") or not since.isdigit():
            return False
        return int(since) < int((self.root / "current").lstat().st_mtime)

    def forget(self, keep: int, dry: bool) -> tuple[list[str], list[str]]:
        """Remove old releases and environments that no release uses; (those that stay, those that went)."""
        releases = self.complete()
        held = {self.named("current"), self.named("previous")} - {""}
        room = max(keep - len(held), 0)
        kept = held | set([release for release in releases if release not in held][:room])
        removed = [release for release in releases if release not in kept]
        if not dry:
            for release in removed:
                shutil.rmtree(self.releases / release)
            used = {(self.releases / release / "venv").readlink().parent.name for release in kept}
            for environment in self.environments.iterdir() if removed else ():
                if environment.name not in used:
                    shutil.rmtree(environment)
        return [release for release in releases if release in kept], removed


def main() -> None:
    """Run as a module."""
    from ansible.module_utils.basic import AnsibleModule

    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "state": {"choices": ["prepared", "current"], "default": "prepared"},
            "environment": {"type": "str"},
            "files": {"type": "dict", "default": {}},
            "checks": {"type": "dict", "default": {}},
            "about": {"type": "dict", "default": {}},
            "id": {"type": "str"},
            "unit_dir": {"type": "path", "default": "/etc/systemd/system"},
            "keep": {"type": "int", "default": 3},
            "unit": {"type": "str", "default": "qwen-coder.service"},
        },
        required_if=[("state", "prepared", ["environment"]), ("state", "current", ["id"])],
        supports_check_mode=True,
    )
    options: dict[str, Any] = module.params
    releases = Releases(Path(options["root"]))
    try:
        if options["state"] == "prepared":
            name, changed, differences = releases.prepare(
                options["environment"], options["files"], options["checks"], options["about"], module.check_mode
            )
            module.exit_json(changed=changed, id=name, before=releases.named("current"), diff=differences)
        name, before, changed = releases.switch(options["id"], Path(options["unit_dir"]), module.check_mode)
        restart = changed or releases.outdated(options["unit"])
        kept, removed = releases.forget(options["keep"], module.check_mode)
    except ReleaseError as error:
        module.fail_json(msg=str(error))
    shown = {"before": f"current -> {before}\n", "after": f"current -> {name}\n"} if before != name else {}
    module.exit_json(changed=changed or bool(removed), restart=restart, id=name, before=before, kept=kept, removed=removed, diff=shown)


if __name__ == "__main__":
    main()
