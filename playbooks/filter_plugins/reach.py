"""How this machine's own programs reach a host as Ansible does: over ssh, with what the inventory says about it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any


def ssh_command(variables: Mapping[str, Any], *options: str) -> list[str]:
    """The beginning of a command that runs on a host; empty where Ansible works on this machine itself.

    Args:
        variables: the host's (``hostvars[...]``).
        options: more for ssh.
    """
    if variables.get("ansible_connection") == "local":
        return []
    command = ["ssh", "-o", "BatchMode=yes", *options]
    for name in ("ansible_ssh_common_args", "ansible_ssh_extra_args"):
        command += shlex.split(str(variables.get(name) or ""))
    if key := variables.get("ansible_ssh_private_key_file"):
        command += ["-i", str(key)]
    if port := variables.get("ansible_port"):
        command += ["-p", str(port)]
    if user := variables.get("ansible_user"):
        command += ["-l", str(user)]
    return [*command, str(variables.get("ansible_host") or variables["inventory_hostname"])]


def qwen_metrics_command(variables: Mapping[str, Any], port: int = 9090) -> str:
    """A command of this machine that prints the metrics of a node's service."""
    known = variables.get("qwen_service_validated") or {}
    url = f"http://127.0.0.1:{known.get('metrics_port', port)}/metrics"
    return shlex.join([*ssh_command(variables), "curl", "-sS", "-m", "10", url])


class FilterModule:
    """Filters."""

    def filters(self) -> dict[str, Any]:
        """By their names."""
        return {"qwen_metrics_command": qwen_metrics_command, "qwen_ssh_command": ssh_command}
