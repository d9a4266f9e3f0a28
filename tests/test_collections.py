"""requirements.yml names what the pinned PyPI package `ansible` bundles, and all that is used."""

import json
import re
from pathlib import Path

import ansible_collections
import yaml

ROOT = Path(__file__).resolve().parent.parent
PINNED = {entry["name"]: entry["version"] for entry in yaml.safe_load((ROOT / "requirements.yml").read_text())["collections"]}
BUNDLED = Path(next(iter(ansible_collections.__path__)))


def test_pins_agree_with_the_bundle() -> None:
    bundled = {
        name: json.loads((BUNDLED / name.replace(".", "/") / "MANIFEST.json").read_text())["collection_info"]["version"] for name in PINNED
    }
    assert bundled == PINNED


def test_every_collection_in_use_is_pinned_and_no_other() -> None:
    used = set()
    for folder in ("roles", "playbooks", "molecule", "inventories"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in {".yml", ".j2"}:
                used |= set(re.findall(r"\b((?:ansible|community|containers)\.(?!builtin)[a-z]+)\.[a-z_0-9]+", path.read_text()))
    assert used == set(PINNED)
