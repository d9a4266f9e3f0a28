#!/usr/bin/python
"""What a host has for a model beside GPUs: memory, room on disk, and what of it is there already. It changes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

DOCUMENTATION = """
module: qwen_capacity
short_description: Memory, disk and what is already on a host
description:
  - Reads how much memory a host has, how much room there is where models and releases go, and which of them are there.
options:
  root:
    description: Directory of the service; it need not be there yet.
    type: path
    required: true
  model_dir:
    description: Directory of the model; it need not be there yet.
    type: path
    required: true
attributes:
  check_mode:
    support: full
    description: It changes nothing.
author: the qwen-coder-hosting maintainers
"""

EXAMPLES = """
- name: Look at the host
  qwen_capacity:
    root: /opt/qwen-coder-service
    model_dir: /opt/qwen-coder-service/models/some-model
  register: capacity
"""

RETURN = """
memory_bytes:
  description: All of the host's memory.
  returned: always
  type: int
root:
  description: The filesystem of the service's directory (C(mount), C(free_bytes)).
  returned: always
  type: dict
model:
  description: The same for the model's directory, its C(config) where it has one, and the C(bytes) that its files take.
  returned: always
  type: dict
profiles:
  description: Runtime profiles of which a complete release is there.
  returned: always
  type: list
  elements: str
"""


def memory_bytes(meminfo: str) -> int:
    """MemTotal of /proc/meminfo, in bytes."""
    line = next(line for line in meminfo.splitlines() if line.startswith("MemTotal:"))
    return int(line.split()[1]) * 1024


def filesystem(path: str) -> dict[str, Any]:
    """Mount point and free bytes of the filesystem that a directory is or would be on; free to root, who installs."""
    there = Path(path)
    while not there.exists():
        there = there.parent
    there = there.resolve()
    stat = os.statvfs(there)
    while not os.path.ismount(there):
        there = there.parent
    return {"mount": str(there), "free_bytes": stat.f_bfree * stat.f_frsize}


def model(path: str) -> dict[str, Any]:
    """A model's config.json, None where there is none that can be read, and how many bytes are in its directory or on their way to it."""
    config = None
    directory = Path(path)
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None  # what is wrong with it is said by who needs it
    # blocks, not lengths: what is being fetched has its length before it has its bytes
    places = (directory, directory.with_name(directory.name + ".partial"))  # where files gather until all are there
    held = sum(file.stat().st_blocks * 512 for place in places for file in place.rglob("*") if file.is_file())
    return {**filesystem(path), "config": config if isinstance(config, dict) else None, "bytes": held}


def profiles(root: str) -> list[str]:
    """The profiles of complete environments."""
    found = set()
    for file in Path(root, "environments").glob("*/environment.json"):
        try:
            found.add(str(json.loads(file.read_text(encoding="utf-8"))["profile"]))
        except (OSError, ValueError, KeyError):
            continue
    return sorted(found)


def main() -> None:
    """Run as a module."""
    from ansible.module_utils.basic import AnsibleModule

    options = {"root": {"type": "path", "required": True}, "model_dir": {"type": "path", "required": True}}
    module = AnsibleModule(argument_spec=options, supports_check_mode=True)
    root, model_dir = module.params["root"], module.params["model_dir"]
    module.exit_json(
        changed=False,
        memory_bytes=memory_bytes(Path("/proc/meminfo").read_text(encoding="ascii")),
        root=filesystem(root),
        model=model(model_dir),
        profiles=profiles(root),
    )


if __name__ == "__main__":
    main()
