"""What has bytecode after an installation, and what has none."""

from __future__ import annotations

import compileall
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_coder_service import bytecode

FOLDER = {
    "qwen_a/__init__.py": "",
    "qwen_a/used.py": "from . import needed\n",
    "qwen_a/needed.py": "",
    "qwen_a/unused.py": "",
    "qwen_a/gpu.py": "raise RuntimeError('no GPU\\nhere')\n",
}


def test_what_is_imported_is_compiled_and_nothing_else(tmp_path: Path) -> None:
    for name, text in FOLDER.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    names = ("qwen_a.used", "qwen_a.gpu", "qwen_a.missing")
    program = f"from qwen_coder_service import bytecode; print(bytecode.write({names!r}))"
    env = {"PYTHONPATH": f"{tmp_path}:{Path(bytecode.__file__).parents[1]}", "PYTHONDONTWRITEBYTECODE": "1"}
    said = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout
    assert said.strip() == str({
        "qwen_a.gpu": "RuntimeError: no GPU\nhere",
        "qwen_a.missing": "ModuleNotFoundError: No module named 'qwen_a.missing'",
    })  # fmt: skip
    compiled = {file.name.split(".")[0] for file in (tmp_path / "qwen_a/__pycache__").iterdir()}
    assert compiled == {"__init__", "used", "needed", "gpu"}


def compiled(environment: Path) -> dict[str, Path]:
    """Modules of an environment of which there is bytecode, and where it is."""
    return {f"{file.parts[-3]}.{file.name.split('.')[0]}": file for file in environment.rglob("__pycache__/*.pyc")}


def test_what_another_environment_compiled_of_the_same_file_is_shared(tmp_path: Path) -> None:
    within = "venv/lib/python3/site-packages"
    for name in ("old", "new"):
        (tmp_path / name / within / "qwen_a").mkdir(parents=True)
    old, new = (tmp_path / name / within / "qwen_a" for name in ("old", "new"))
    for module in ("same", "changed", "gone", "compiled"):
        (old / f"{module}.py").write_text(f"x = {module!r}\n")
    compileall.compile_dir(old, quiet=1)
    for module in ("same", "compiled"):
        (new / f"{module}.py").hardlink_to(old / f"{module}.py")
    shutil.copy2(old / "changed.py", new)
    (new / "more.py").write_text("x = 1\n")
    compileall.compile_file(new / "compiled.py", quiet=1)

    assert bytecode.share([str(tmp_path), "/nonexistent"], str(new.parent)) == 1
    assert set(compiled(new)) == {"qwen_a.same", "qwen_a.compiled"}
    assert compiled(new)["qwen_a.same"].samefile(compiled(old)["qwen_a.same"])
    # Python takes it: nothing is written
    before = compiled(new)["qwen_a.same"].stat().st_mtime_ns
    said = subprocess.run(
        [sys.executable, "-v", "-c", "import qwen_a.same"], env={"PYTHONPATH": str(new.parent)}, capture_output=True, text=True, check=True
    ).stderr
    assert f"code object from '{compiled(new)['qwen_a.same']}'" in said
    assert compiled(new)["qwen_a.same"].stat().st_mtime_ns == before


@pytest.mark.parametrize("name", [name for name in bytecode.MODULES if name.startswith("qwen_coder_service.")])
def test_the_services_own_modules_are_there(name: str) -> None:
    assert Path(bytecode.__file__).parents[1].joinpath(*name.split(".")).with_suffix(".py").exists()
