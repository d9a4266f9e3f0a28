#!/usr/bin/python
"""Ansible module: bring a running HAProxy instance to what its files say, by its admin socket where that can be, else by a reload."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: haproxy_runtime
short_description: Bring a running HAProxy instance to what its files say
description:
  - Certificates (with their keys) and maps are exchanged in memory; the worker and its connections stay. Whatever else changed in the
    instance's directory since the worker started (configuration, CAs, CRLs) takes a reload, which is waited for. CAs and CRLs do so because
    HAProxy 2.6.12 was seen to crash at the second C(commit ssl ca-file) of a worker.
  - What is compared is the worker's memory, not a record of it, so that a run mends what an interrupted one left.
  - Does nothing where the instance does not run.
options:
  instance:
    description: Name of the unit, of its directory in C(/etc) and of that in C(/run).
    type: str
    required: true
  seconds:
    description: How long to wait for a new worker.
    type: int
    default: 30
author: the project
"""

# lines of a map in one command: what is sent at once must fit a buffer
BATCH = 50


class Refused(Exception):
    """HAProxy did not do what it was told to; the message is its own."""


class Runtime:
    """An instance's sockets.

    Args:
        directory: where ``admin.sock`` and ``master.sock`` are.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def _once(self, name: str, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(self.directory / name))
            connection.sendall(command.encode() + b"\n")
            if name == "master.sock":  # the master waits for more, else
                connection.shutdown(socket.SHUT_WR)
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
        return answer.decode()

    def _ask(self, name: str, command: str) -> str:
        """The answer to a question. While a worker takes over, a connection may be to the one that no longer listens."""
        for _ in range(3):
            try:
                return self._once(name, command)
            except TimeoutError:
                continue
        return self._once(name, command)

    def ask(self, command: str) -> str:
        """The worker's answer to a question."""
        return self._ask("admin.sock", command)

    def tell(self, command: str, done: str = "") -> str:
        """Have the worker do something; an answer without ``done`` (or any, where nothing is expected) is a refusal."""
        answer = self._once("admin.sock", command)
        if (done and done not in answer) or (not done and answer.strip()):
            raise Refused(f"{command.splitlines()[0].removesuffix(' <<')}: {' '.join(answer.split())}")
        return answer

    def worker(self) -> int:
        """Process id of the present worker; 0 where none answers."""
        try:
            found = re.search(r"^Pid: (\d+)$", self.ask("show info"), re.MULTILINE)
        except OSError:
            return 0
        return int(found[1]) if found else 0

    def failed_reloads(self) -> int:
        """How many reloads have failed since the last one that did not."""
        found = re.search(r"\[failed: (\d+)\]", self._ask("master.sock", "show proc"))
        return int(found[1]) if found else 0

    def certificates(self) -> dict[Path, str]:
        """Files of certificates that the worker uses -> SHA-1 of the certificate, as HAProxy shows it."""
        names = [line for line in self.ask("show ssl cert").splitlines() if line and line[0] not in "#*"]
        return {Path(name): _field(self.ask(f"show ssl cert {name}"), "SHA1 FingerPrint") for name in names}

    def set_certificate(self, path: Path) -> None:
        """Exchange certificate and key. HAProxy takes none that do not belong together."""
        pem = "\n".join(line for line in path.read_text().splitlines() if line.strip())
        try:
            self.tell(f"set ssl cert {path} <<\n{pem}\n", "ransaction")
            self.tell(f"commit ssl cert {path}", "Success!")
        except Refused:
            self.ask(f"abort ssl cert {path}")
            raise

    def maps(self) -> dict[Path, dict[str, str]]:
        """Files of maps -> their entries in the worker's memory."""
        names = re.findall(r"^\d+ \((/[^)]+)\) pattern loaded", self.ask("show map"), re.MULTILINE)
        return {Path(name): dict(_entries(self.ask(f"show map {name}"), 1)) for name in names}

    def set_map(self, path: Path, entries: dict[str, str]) -> None:
        """Exchange all entries at once: no request finds some of the old and some of the new."""
        created = self.tell(f"prepare map {path}", "New version created:")
        version = created.split(":")[1].strip()
        lines = [f"{key} {value}" for key, value in entries.items()]
        for start in range(0, len(lines), BATCH):
            self.tell(f"add map @{version} {path} <<\n" + "\n".join(lines[start : start + BATCH]) + "\n")
        self.tell(f"commit map @{version} {path}")


def _field(text: str, name: str) -> str:
    found = re.search(rf"^{name}: (.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _entries(text: str, skip: int = 0) -> Iterator[tuple[str, str]]:
    """Keys and values, a line each, after ``skip`` other words."""
    for line in text.splitlines():
        words = line.split(None, skip + 1)
        if line.strip() and not line.startswith("#"):
            yield words[skip], words[skip + 1].strip() if len(words) > skip + 1 else ""


def fingerprint(path: Path) -> str:
    """SHA-1 of the first certificate of a file."""
    pem = re.search(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", path.read_text(), re.DOTALL)
    return hashlib.sha1(ssl.PEM_cert_to_DER_cert(pem[0]), usedforsecurity=False).hexdigest().upper() if pem else "none"


def started(pid: int) -> float:
    """When a process began, in seconds since the epoch."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


class Instance:
    """A running instance and its files.

    Args:
        runtime: its sockets.
        directory: its files.
        reload: does it, and says what went wrong (empty: nothing).
        alert: the last thing that the log says about it.
    """

    def __init__(self, runtime: Runtime, directory: Path, reload: Callable[[], str], alert: Callable[[], str]) -> None:
        self.runtime, self.directory, self._reload, self._alert = runtime, directory, reload, alert

    def differing(self) -> list[Path]:
        """Certificates and maps whose file says something else than the worker's memory."""
        certificates = [path for path, shown in self.runtime.certificates().items() if path.is_file() and fingerprint(path) != shown]
        maps = [path for path, shown in self.runtime.maps().items() if path.is_file() and dict(_entries(path.read_text())) != shown]
        return certificates + maps

    def newer(self) -> list[Path]:
        """Other files that changed after the worker began."""
        swapped = {*self.runtime.certificates(), *self.runtime.maps()}
        began = started(self.runtime.worker())
        return sorted(p for p in self.directory.rglob("*") if p.is_file() and p not in swapped and p.stat().st_ctime >= began)

    def swap(self, path: Path) -> None:
        """Exchange one in memory."""
        if path in self.runtime.maps():
            self.runtime.set_map(path, dict(_entries(path.read_text())))
        else:
            self.runtime.set_certificate(path)

    def reload(self, seconds: int) -> None:
        """Reload, and wait until a new worker answers."""
        before, failed = self.runtime.worker(), self.runtime.failed_reloads()
        if problem := self._reload():
            raise Refused(problem)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.runtime.worker() not in (0, before):
                return
            try:
                if self.runtime.failed_reloads() > failed:
                    break
            except OSError:  # the master is executing itself anew
                pass
            time.sleep(0.1)
        raise Refused(f"no new worker took over within {seconds} s, and the one before goes on with what it had: {self._alert()}")


def main() -> None:
    """Look, swap, reload where it must be, and look again."""
    module = AnsibleModule(
        argument_spec={"instance": {"type": "str", "required": True}, "seconds": {"type": "int", "default": 30}}, supports_check_mode=True
    )
    name = module.params["instance"]
    unit = f"{name}.service"

    def alert() -> str:
        lines = module.run_command(["journalctl", "-u", unit, "-n", "50", "-o", "cat", "--no-pager"])[1].splitlines()
        return next((line for line in reversed(lines) if "[ALERT]" in line), "the log has no [ALERT]")

    def reload() -> str:
        rc, _, err = module.run_command(["systemctl", "reload", unit])
        return f"{err.strip()} {alert()}" if rc else ""

    runtime = Runtime(Path("/run", name))
    if not runtime.worker():
        module.exit_json(changed=False, running=False, swapped=[], reloaded_for=[])
    instance = Instance(runtime, Path("/etc", name), reload, alert)
    swapped, reload_for = [], instance.newer()
    differing = instance.differing()
    try:
        if not module.check_mode:
            for path in [] if reload_for else differing:
                try:
                    instance.swap(path)
                    swapped.append(path)
                except Refused as error:
                    module.warn(f"{error}; reloading {unit} instead")
                    reload_for.append(path)
            if reload_for:
                instance.reload(module.params["seconds"])
            if left := instance.differing():
                raise Refused(f"the worker still has another {', '.join(map(str, left))} than the file says")
    except (Refused, OSError) as error:
        module.fail_json(msg=f"{unit}: {error}")
    module.exit_json(
        changed=bool(swapped or reload_for or differing), running=True,
        swapped=[str(path) for path in swapped], reloaded_for=[str(path) for path in reload_for],
    )  # fmt: skip


if __name__ == "__main__":
    main()
