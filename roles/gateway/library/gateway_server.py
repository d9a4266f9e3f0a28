#!/usr/bin/python
"""Ansible module: take a node out of a gateway's rotation and put it back, over the gateway's admin socket."""

from __future__ import annotations

import csv
import grp
import io
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

DOCUMENTATION = """
module: gateway_server
short_description: Drain a node at a gateway, or put it back
description:
  - A node that drains gets no new request; those that run go on. The module waits for their end.
  - Who is taken out is also written where the gateway finds it when it reloads or restarts.
options:
  server:
    description: Inventory name of the node.
    type: str
    required: true
  state:
    description: C(drain) and C(maint) take it out, and C(ready) puts it back; C(info) only looks. Roll-outs drain; C(maint) is a person's.
    choices: [info, drain, maint, ready]
    required: true
  wait_seconds:
    description: How long requests that run may take, or a node that is put back, or looked at, may take to be found healthy.
    type: int
    default: 0
  backend:
    description: The backend that the node is a server of.
    type: str
    default: nodes
  socket:
    description: The admin socket.
    type: path
    default: /run/qwen-gateway/admin.sock
  state_file:
    description: What the gateway reads at its start.
    type: path
    default: /var/lib/qwen-gateway/servers.state
  port:
    description: The node's port by the inventory, for C(ready).
    type: int
  group:
    description: The group that the gateway runs as.
    type: str
    default: haproxy
author: the project
"""

RETURN = """
before:
  description: The node's state at the gateway before.
others_up:
  description: Nodes beside this one that take requests.
others_drained:
  description: Nodes beside this one that a roll-out has taken out, and not yet put back.
sessions:
  description: Requests that the node still answers.
running:
  description: Each of them, by its client's address and its age.
load:
  description: Requests that all nodes answer, or that wait for one.
up:
  description: Whether the gateway finds the node healthy and gives it requests.
"""

# bits of srv_admin_state in `show servers state` (HAProxy's management guide)
FORCED = {0x01: "maint", 0x08: "drain"}
NAME, ADDRESS, OPERATION, ADMIN, PORT = 3, 4, 5, 6, 18
RUNNING = "2"


class Gateway:
    """A running HAProxy, by its admin socket."""

    def __init__(self, path: str, backend: str) -> None:
        self.path, self.backend = path, backend

    def ask(self, command: str) -> str:
        """What it answers to a command.

        Raises:
            OSError: it does not run.
        """
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(self.path)
            connection.sendall(command.encode() + b"\n")
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        return answer.decode()

    def servers(self) -> dict[str, dict[str, str]]:
        """Each node's line of the statistics, by its name; a backup is where requests wait, and no node."""
        text = self.ask(f"show stat {self.backend} 4 -1").removeprefix("# ")
        return {row["svname"]: row for row in csv.DictReader(io.StringIO(text)) if row["bck"] == "0"}

    def states(self) -> list[list[str]]:
        """The lines of `show servers state`, by field; the first two are the format's version and the names."""
        return [line.split(" ") for line in self.ask(f"show servers state {self.backend}").splitlines() if line]

    def taken_out(self, name: str) -> str:
        """How somebody took a node out: drain, maint, or not at all ("")."""
        bits = next(int(fields[ADMIN]) for fields in self.states() if fields[0] != "#" and len(fields) > ADMIN and fields[NAME] == name)
        return next((state for bit, state in FORCED.items() if bits & bit), "")

    def correct(self, name: str, port: int) -> None:
        """Give a node its port: one that was changed while the node was taken out lost against that of the file of states."""
        row = next(fields for fields in self.states() if len(fields) > PORT and fields[NAME] == name)
        if row[PORT] != str(port):
            self.ask(f"set server {self.backend}/{name} addr {row[ADDRESS]} port {port}")

    def running(self, name: str) -> list[str]:
        """The requests that a node answers: the client's address, and since when."""
        found = re.findall(rf"src=(\S+):\d+ fe=\S+ be={self.backend} srv={re.escape(name)} .*?age=(\S+)", self.ask("show sess"))
        return [f"{address} since {age}" for address, age in found]

    def to_keep(self) -> str:
        """What a gateway that starts is to know of its nodes: who is taken out. Who is healthy it finds out itself."""
        lines = []
        for fields in self.states():
            if fields[0] != "#" and len(fields) > ADMIN:
                if not any(int(fields[ADMIN]) & bit for bit in FORCED):
                    continue
                fields[OPERATION] = RUNNING
            lines.append(" ".join(fields))
        return "\n".join(lines) + "\n"

    def save(self, path: Path, group: str, dry: bool) -> bool:
        """Keep it, and say whether that was to be changed."""
        wanted, there = self.to_keep(), path.read_text(encoding="ascii") if path.is_file() else ""
        if dry or who(wanted) == who(there):
            return who(wanted) != who(there)
        owner = grp.getgrnam(group).gr_gid
        path.parent.mkdir(mode=0o750, exist_ok=True)
        os.chown(path.parent, 0, owner)
        new = path.with_name(f".{path.name}.new")
        new.write_text(wanted, encoding="ascii")
        new.chmod(0o640)
        os.chown(new, 0, owner)
        new.replace(path)
        return True


def who(states: str) -> list[list[str]]:
    """Of a file of states, what counts: names and how they were taken out."""
    rows = [line.split(" ") for line in states.splitlines()]
    return sorted([row[NAME], row[ADMIN]] for row in rows if row[0] != "#" and len(row) > ADMIN)


def main() -> None:
    """Run as a module."""
    from ansible.module_utils.basic import AnsibleModule

    module = AnsibleModule(
        argument_spec={
            "server": {"type": "str", "required": True},
            "state": {"choices": ["info", "drain", "maint", "ready"], "required": True},
            "wait_seconds": {"type": "int", "default": 0},
            "backend": {"type": "str", "default": "nodes"},
            "socket": {"type": "path", "default": "/run/qwen-gateway/admin.sock"},
            "state_file": {"type": "path", "default": "/var/lib/qwen-gateway/servers.state"},
            "port": {"type": "int"},
            "group": {"type": "str", "default": "haproxy"},
        },
        supports_check_mode=True,
    )
    options: dict[str, Any] = module.params
    gateway, name, state = Gateway(options["socket"], options["backend"]), options["server"], options["state"]
    try:
        servers = gateway.servers()
        if name not in servers:
            module.fail_json(msg=f"{name} is no node of this gateway; it has {', '.join(sorted(servers))}.")
        before = gateway.taken_out(name) or "ready"
        changed = state not in ("info", before)
        if state == "ready" and options["port"] and not module.check_mode:
            gateway.correct(name, options["port"])
        tell = f"set server {options['backend']}/{name} state {state}"
        if changed and not module.check_mode and (said := gateway.ask(tell).strip()):
            module.fail_json(msg=f"the gateway does not take {name} to {state}: {said}")
        # also what a run that was cut off between the two left
        if state != "info":
            changed |= gateway.save(Path(options["state_file"]), options["group"], module.check_mode)
        deadline = time.monotonic() + options["wait_seconds"]
        while True:
            servers = gateway.servers()
            row = servers[name]
            sessions, up = int(row["scur"]) + int(row["qcur"] or 0), row["status"].startswith("UP")
            done = {"drain": sessions == 0, "maint": sessions == 0, "ready": up, "info": up}[state]
            if done or module.check_mode or time.monotonic() >= deadline:
                break
            time.sleep(0.5)
        running = gateway.running(name) if sessions else []
    except OSError as error:
        module.fail_json(msg=f"the gateway's socket {options['socket']} does not answer: {error}")
    others = sorted(other for other, row in servers.items() if other != name and row["status"].startswith("UP"))
    drained = sorted(other for other in servers if other != name and gateway.taken_out(other) == "drain")
    load = sum(int(row["scur"]) + int(row["qcur"] or 0) for row in servers.values())
    module.exit_json(
        changed=changed, before=before, status=row["status"], sessions=sessions, running=running, up=up, others_up=others,
        others_drained=drained, load=load,
    )  # fmt: skip


if __name__ == "__main__":
    main()
