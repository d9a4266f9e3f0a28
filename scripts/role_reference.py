#!/usr/bin/env python3
"""Write docs/roles.md from the roles' argument specifications; with --check, only say whether it is up to date."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs/roles.md"


def plain(text: Any) -> str:
    """Ansible's markup as Markdown, on one line of a table."""
    lines = text if isinstance(text, list) else [str(text)]
    return re.sub(r"C\(([^)]*)\)", r"`\1`", " ".join(lines)).replace("|", "\\|")


def default(option: dict[str, Any]) -> str:
    """A default as it is written in YAML."""
    if "default" not in option:
        return "required"
    value = option["default"]
    text = " ".join(value.split()) if isinstance(value, str) and value else json.dumps(value)
    return "`" + text.replace("|", "\\|") + "`"


def reference() -> str:
    """The whole document."""
    parts = ["# Roles\n\nMade from the roles' `meta/argument_specs.yml` by `make docs`.\n"]
    for path in sorted(ROOT.glob("roles/*/meta/argument_specs.yml")):
        spec = yaml.safe_load(path.read_text())["argument_specs"]["main"]
        parts.append(f"\n## {path.parent.parent.name}\n\n{spec['short_description']}. {plain(spec['description'])}\n")
        parts.append("\n| variable | type | default | meaning |\n|---|---|---|---|\n")
        parts += [
            f"| `{name}` | {option['type']} | {default(option)} | {plain(option['description'])} |\n"
            for name, option in spec["options"].items()
        ]
    return "".join(parts)


def main() -> None:
    """Write it, or compare."""
    text = reference()
    if "--check" in sys.argv[1:]:
        if not TARGET.exists() or TARGET.read_text() != text:
            sys.exit("docs/roles.md is not what the argument specifications say: run make docs")
        return
    TARGET.write_text(text)


if __name__ == "__main__":
    main()
