"""Lock files: each says exactly what its .in file asks for, with hashes; what the service imports is of one version in all profiles."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ROOT / "service_src/profiles"
SOURCES = [*sorted(ROOT.glob("requirements/*.in")), *sorted(PROFILES.glob("*.in"))]
PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==(\S+)")


def pins(lock: str) -> dict[str, str]:
    return {canonicalize_name(match[1]): match[2] for line in lock.splitlines() if (match := PIN.match(line))}


def wrong(source: str, lock: str) -> list[str]:
    """What a lock file does not do."""
    found = []
    blocks = re.split(r"\n(?=[^\s#])", "\n" + re.sub(r"^\s*#.*\n?", "", lock, flags=re.MULTILINE))
    for block in filter(None, map(str.strip, blocks)):
        match = PIN.match(block)
        if match is None:
            found.append(f"'{block.splitlines()[0]}' is not pinned")
        elif not re.fullmatch(r"(?: \\\n\s+--hash=sha256:[0-9a-f]{64})+", block[match.end() :].rstrip()):
            found.append(f"{match[1]} has no hashes")
    pinned = pins(lock)
    for line in source.splitlines():
        if not (text := line.partition("#")[0].strip()):
            continue
        asked = Requirement(text)
        version = pinned.get(canonicalize_name(asked.name))
        if version is None or not asked.specifier.contains(version, prereleases=True):
            found.append(f"{asked} is asked for, and {version or 'none'} is locked")
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_lock_is_what_its_source_asks_for(source: Path) -> None:
    assert wrong(source.read_text(), source.with_suffix(".txt").read_text()) == [], "run make lock"


HASH = "    --hash=sha256:" + "0" * 64
GOOD = f"# a comment\none==1.0 \\\n{HASH} \\\n{HASH}\n    # via -r x.in\ntwo==2.0 \\\n{HASH}\n    # via one\n"


@pytest.mark.parametrize(
    ("source", "lock", "problems"),
    [
        ("one\n# two\n", GOOD, []),
        ("one==1.1\n", GOOD, ["one==1.1 is asked for, and 1.0 is locked"]),
        ("three\n", GOOD, ["three is asked for, and none is locked"]),
        ("one\n", GOOD.replace(f"two==2.0 \\\n{HASH}", "two==2.0"), ["two has no hashes"]),
        ("one\n", GOOD.replace("sha256", "md5"), ["one has no hashes", "two has no hashes"]),
        ("one\n", GOOD.replace("two==", "two>="), ["'two>=2.0 \\' is not pinned"]),
    ],
)
def test_a_wrong_lock_is_seen(source: str, lock: str, problems: list[str]) -> None:
    assert wrong(source, lock) == problems


def test_every_source_is_locked_and_no_other() -> None:
    locks = [*ROOT.glob("requirements/*.txt"), *PROFILES.glob("*.txt")]
    assert sorted(locks) == sorted(source.with_suffix(".txt") for source in SOURCES)


def test_what_the_service_imports_is_of_one_version_in_every_profile() -> None:
    same = pins((PROFILES / "service.constraints").read_text())
    for profile in ("cpu", "cuda12", "cuda13"):
        locked = pins((PROFILES / f"{profile}.txt").read_text())
        assert {name: locked.get(name) for name in same} == same, f"{profile}: run make lock"


def test_no_import_of_the_service_is_forgotten_there() -> None:
    imported = set()
    for path in (ROOT / "service_src/qwen_coder_service").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).split(".")[0])
    # the engine and what it pins are a profile's own
    others = imported - sys.stdlib_module_names - {"vllm", "torch", "qwen_coder_service"}
    same = {
        name.split("-")[0] if name.startswith("opentelemetry") else name for name in pins((PROFILES / "service.constraints").read_text())
    }
    assert {canonicalize_name(name) for name in others} - same == set()
