"""What has bytecode after an installation, and what has none."""

from __future__ import annotations

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


@pytest.mark.parametrize("name", [name for name in bytecode.MODULES if name.startswith("qwen_coder_service.")])
def test_the_services_own_modules_are_there(name: str) -> None:
    assert Path(bytecode.__file__).parents[1].joinpath(*name.split(".")).with_suffix(".py").exists()
