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
short_description: Put a release together, make one the current one, forget old ones, and remember a roll-out
description:
  - A release is a directory below C(releases) with its files, a link C(venv) into its environment, and C(release.json). What is in it
    never changes; its name is that of its environment and a digest of its files.
  - C(current) and C(previous) below the root are links to releases. The unit of the current one is copied to where systemd looks.
  - C(rollout.json) below the root is there from before a host is taken out of rotation until it is back. What it says outlives a roll-out
    that was killed, so that the next one knows what served before, and how fast.
options:
  root:
    description: Directory that holds C(releases) and C(environments).
    type: path
    required: true
  state:
    description: >-
      C(prepared) puts a release together; C(current) makes one the current one and forgets old ones; C(info) only looks; C(begun) remembers
      that a roll-out to a release is under way, and C(ended) that it no longer is.
    choices: [prepared, current, info, begun, ended]
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
    description: For C(current), C(info) and C(begun), the release, or C(previous).
    type: str
  previous:
    description: For C(current), what C(previous) is to name, if not the release that was the current one; none where it is empty.
    type: str
  measured:
    description: For C(begun), how fast what ran before was.
    type: dict
    default: {}
  unit_dir:
    description: Where units are copied to.
    type: path
    default: /etc/systemd/system
  unit:
    description: The unit that runs the current release.
    type: str
    default: qwen-coder.service
  instead:
    description: Another unit that may serve in its place, in which case it need not run.
    type: str
  keep:
    description: For C(current), how many releases stay; current and previous one always do.
    type: int
    default: 3
author: the project
"""

RETURN = """
restart:
  description: For C(current) and C(info), whether what runs is not the release yet.
id:
  description: The release.
before:
  description: The release that was the current one, or an empty string.
previous:
  description: For C(info), what C(previous) names.
about:
  description: For C(info), what C(release.json) says of the release.
rollout:
  description: For C(info) and C(begun), what a roll-out that did not end left; empty where none did.
good:
  description: For C(info), the release to go back to, the last that is known to serve; an empty string where nothing was there.
due:
  description: For C(info), whether there is something to do; another release, a restart, a start, or a roll-out that did not end.
live:
  description: For C(info), whether clients may notice what is done; a release was the current one, or a unit runs although it is gone.
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
        self.memory = root / "rollout.json"

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

    def rollout(self) -> dict[str, Any]:
        """What a roll-out that did not end left."""
        try:
            found = json.loads(self.memory.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) and {"from", "to", "previous"} <= set(found) else {}

    def good(self) -> str:
        """The last release that is known to serve: not one that a roll-out which did not end has put in place and not proved."""
        begun = str(self.rollout().get("from", ""))
        return begun if begun in self.complete() else self.named("current")

    def resolve(self, name: str) -> str:
        """The release that a name means. The one before, asked for again after a roll-out that did not end, is still the same."""
        if name != "previous":
            return name
        rollout, there = self.rollout(), self.complete()
        if rollout.get("asked") == "previous" and rollout["to"] in there:
            return str(rollout["to"])
        return str(rollout["from"]) if rollout.get("from") in there else self.named("previous")

    def known(self, name: str) -> str:
        """The same, of those that are there.

        Raises:
            ReleaseError: it is not.
        """
        name = self.resolve(name)
        if name not in self.complete():
            there = ", ".join(self.complete()) or "none"
            raise ReleaseError(f"there is no release '{name}' on this host; set it to one of those that are: {there}.")
        return name

    def about(self, name: str) -> dict[str, Any]:
        """What a release's release.json says."""
        text = self.file(name, "release.json")
        return json.loads(text) if text else {}

    def begin(self, asked: str, measured: dict[str, Any], dry: bool) -> dict[str, Any]:
        """Remember that a roll-out is under way, and what it found; what one that did not end found before stays.

        Raises:
            ReleaseError: there is no such release.
        """
        name, before = self.known(asked), self.rollout()
        now = {
            "from": self.good(),
            "previous": before.get("previous", self.named("previous")),
            "to": name,
            "asked": asked,
            "measured": measured or before.get("measured", {}),
        }
        if not dry:
            new = self.memory.with_name(f".{self.memory.name}.new")
            write(new, json.dumps(now, indent=2) + "\n")
            new.replace(self.memory)
        return now

    def end(self, dry: bool) -> None:
        """Forget it."""
        if not dry:
            self.memory.unlink(missing_ok=True)

    def switch(self, name: str, units: Path, dry: bool, previous: str | None = None) -> tuple[str, str, bool]:
        """Make a release the current one; (its name, the one before, whether anything changed).

        Raises:
            ReleaseError: there is no such release.
        """
        current = self.named("current")
        name = self.resolve(name) if dry else self.known(name)
        wanted = {units / file.name: file.read_text(encoding="utf-8") for file in (self.releases / name).glob("*.service")}
        stale = {path: text for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text}
        changed = current != name or bool(stale)
        if changed and not dry:
            # the links first: what a crash leaves half done, the next run completes
            if current and current != name:
                behind = current if previous is None else previous
                if behind:
                    link(self.root / "previous", f"releases/{behind}")
                else:
                    (self.root / "previous").unlink(missing_ok=True)
            link(self.root / "current", f"releases/{name}")
            for path, text in stale.items():
                new = path.with_name(f".{path.name}.new")
                write(new, text)
                new.replace(path)
        return name, current, changed

    def shown(self, unit: str) -> dict[str, str]:
        """What systemd says of a unit."""
        shown = subprocess.run(
            ["systemctl", "show", "--timestamp=unix", "--property=ActiveState,ExecMainStartTimestamp", unit],
            capture_output=True, text=True, check=False,
        ).stdout  # fmt: skip
        return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)

    def outdated(self, state: dict[str, str]) -> bool:
        """Whether a unit runs since before its release became the current one: a run was cut off before the restart."""
        since, link = state.get("ExecMainStartTimestamp", "").removeprefix("@"), self.root / "current"
        if state.get("ActiveState") not in ("active", "activating", "reloading") or not since.isdigit() or not link.is_symlink():
            return False
        return int(since) < int(link.lstat().st_mtime)

    def forget(self, keep: int, dry: bool) -> tuple[list[str], list[str]]:
        """Remove old releases and environments that no release uses; (those that stay, those that went)."""
        releases = self.complete()
        held = {self.named("current"), self.named("previous"), self.good()} - {""}
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
            "state": {"choices": ["prepared", "current", "info", "begun", "ended"], "default": "prepared"},
            "environment": {"type": "str"},
            "files": {"type": "dict", "default": {}},
            "checks": {"type": "dict", "default": {}},
            "about": {"type": "dict", "default": {}},
            "id": {"type": "str"},
            "previous": {"type": "str"},
            "measured": {"type": "dict", "default": {}},
            "unit_dir": {"type": "path", "default": "/etc/systemd/system"},
            "keep": {"type": "int", "default": 3},
            "unit": {"type": "str", "default": "qwen-coder.service"},
            "instead": {"type": "str"},
        },
        required_if=[("state", "prepared", ["environment"]), *((("state", state, ["id"])) for state in ("current", "info", "begun"))],
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
        if options["state"] == "begun":
            module.exit_json(changed=False, rollout=releases.begin(options["id"], options["measured"], module.check_mode))
        if options["state"] == "ended":
            releases.end(module.check_mode)
            module.exit_json(changed=False, rollout={})
        dry = module.check_mode or options["state"] == "info"
        name, before, changed = releases.switch(options["id"], Path(options["unit_dir"]), dry, options["previous"])
        state, instead = releases.shown(options["unit"]), releases.shown(options["instead"]) if options["instead"] else {}
        restart = changed or releases.outdated(state)
        if options["state"] == "info":
            # a dry run did not put it together
            name = name if module.check_mode else releases.known(name)
            rollout, units = releases.rollout(), (state.get("ActiveState"), instead.get("ActiveState"))
            serves = "active" in units
            module.exit_json(
                changed=False, id=name, before=before, previous=releases.named("previous"), about=releases.about(name), rollout=rollout,
                good=releases.good(), restart=restart, due=restart or bool(rollout) or not serves,
                live=bool(before) or not {"active", "activating", "reloading"}.isdisjoint(units),
            )  # fmt: skip
        kept, removed = releases.forget(options["keep"], module.check_mode)
    except ReleaseError as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{error.filename or options['root']}: {error.strerror or error}")
    shown = {"before": f"current -> {before}\n", "after": f"current -> {name}\n"} if before != name else {}
    module.exit_json(changed=changed or bool(removed), restart=restart, id=name, before=before, kept=kept, removed=removed, diff=shown)


if __name__ == "__main__":
    main()
