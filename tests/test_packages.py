"""What pip and uv say when packages cannot be had, in a sentence: their own words of today are the input."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from playbooks import ROOT

spec = importlib.util.spec_from_file_location("qwen_packages", ROOT / "roles/qwen_service/filter_plugins/qwen_packages.py")
assert spec is not None
assert spec.loader is not None
qwen_packages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(qwen_packages)

PIP_HASH = """ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated
    uv==0.13.9 from https://mirror/uv-0.13.9-py3-none-manylinux_2_17_x86_64.whl (from -r installer.txt (line 1)):
        Expected sha256 00
             Got        d7"""
UV_HASH = "error: Failed to download `fastapi==0.136.3`\n  cause: Hash mismatch for `fastapi==0.136.3`\n\n Expected:\n sha256:3d"
PIP_NONE = (
    "ERROR: Could not find a version that satisfies the requirement uv==0.13.9 (from versions: none)\nERROR: No matching distribution found"
)
UV_NONE = "cause: Because fastapi was not found in the package registry and you require fastapi==0.136.3, we can conclude that"
UV_VERSION = "cause: Because there is no version of fastapi==0.136.3 and you require fastapi==0.136.3, we can conclude that"
PIP_401 = f"WARNING: 401 Error, Credentials not correct for http://u:p4ss@mirror/simple/uv/\n{PIP_NONE}"
PIP_DOWN = f"WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(...)': /simple/uv/\n{PIP_NONE}"
UV_DOWN = "error: Request failed after 3 retries in 8.9s\n  cause: Failed to fetch: http://u:p4ss@mirror/simple/fastapi/"

AT = "qwen_service_index_url 'http://mirror/simple and https://torch/whl'"
IS = "qwen_service_index_url is 'http://mirror/simple and https://torch/whl'"


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            PIP_HASH,
            f"uv==0.13.9 at {AT} is not the file whose hash is in cpu.txt; set it to an index that has the files of PyPI unchanged.",
        ),
        (
            UV_HASH,
            f"fastapi==0.136.3 at {AT} is not the file whose hash is in cpu.txt; set it to an index that has the files of PyPI unchanged.",
        ),
        *[
            (
                said,
                f"{package} is not at {AT}; put it there, add an index that has it to qwen_service_extra_index_urls, "
                "or set qwen_service_package_source to wheelhouse.",
            )
            for said, package in ((PIP_NONE, "uv==0.13.9"), (UV_NONE, "fastapi==0.136.3"), (UV_VERSION, "fastapi==0.136.3"))
        ],
        (PIP_401, f"{AT} refuses this user and password; set it to a URL with those that it admits."),
        *[
            (
                said,
                f"{IS}, which this host cannot reach; set it to an index that it can, or set qwen_service_package_source to wheelhouse.",
            )
            for said in (PIP_DOWN, UV_DOWN)
        ],
        (
            "error: No space left at http://u:p4ss@mirror/x",
            f"the packages of cpu.txt were not installed from {AT}: error: No space left at http://mirror/x",
        ),
    ],
)
@pytest.mark.parametrize("loop", [False, True])
def test_an_index_that_does_not_give_them(said: str, sentence: str, loop: bool) -> None:
    failed: dict[str, Any] = {"stderr": said}
    failed = {"results": [{"changed": True}, failed]} if loop else failed
    indexes = ["http://u:p4ss@mirror/simple", "https://torch/whl"]
    assert qwen_packages.qwen_service_packages_problem(failed, "index", indexes, "cpu.txt") == sentence


def test_a_wheelhouse() -> None:
    said = qwen_packages.qwen_service_packages_problem({"stderr": UV_HASH}, "wheelhouse", [], "cpu.txt")
    assert said == f"the packages of cpu.txt were not installed from the wheelhouse: {UV_HASH}"
