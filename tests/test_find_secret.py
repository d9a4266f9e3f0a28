"""Where a secret is left: every place is found, and nothing else is."""

from __future__ import annotations

import base64
import bz2
import gzip
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plugins import load

module = load("roles/qwen_service/library/qwen_find_secret.py")
SECRETS = module.forms({"token": "hf_SuchASecretToken", "key": "AnotherOneThatIsLonger0123456789"})
TOKEN = b"hf_SuchASecretToken"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("plain", b"x" * 10 + TOKEN),
        ("base64", b"Authorization: Basic " + base64.b64encode(TOKEN) + b"\n"),
        ("across-two-reads", b"x" * (module.CHUNK - 5) + TOKEN + b"x" * module.CHUNK),
        ("packed.gz", gzip.compress(b"a line\n" + TOKEN)),
        ("packed.xz", lzma.compress(b"a line\n" + TOKEN)),
        ("packed.bz2", bz2.compress(b"a line\n" + TOKEN)),
        ("no-archive.gz", TOKEN),
    ],
)
def test_a_file_that_holds_it_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "innocent").write_bytes(b"hf_SuchASecretToke")
    assert list(module.in_files(SECRETS, [str(tmp_path)], [])) == [("token", str(tmp_path / name))]


def test_both_secrets_of_a_file_are_named_and_what_is_skipped_is_not(tmp_path: Path) -> None:
    (tmp_path / "both").write_bytes(TOKEN + b"\nAnotherOneThatIsLonger0123456789\n")
    (tmp_path / "model.safetensors").write_bytes(TOKEN)
    found = set(module.in_files(SECRETS, [str(tmp_path)], ["*.safetensors"]))
    assert found == {("token", str(tmp_path / "both")), ("key", str(tmp_path / "both"))}


def test_a_process_that_has_it_is_named(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "print(flush=True); input()"]
    with (
        subprocess.Popen([*sleep, TOKEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as argument,
        subprocess.Popen(sleep, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "X": TOKEN.decode()}) as variable,
    ):
        for process in (argument, variable):
            assert process.stdout is not None
            process.stdout.readline()
        found = {place.partition(" (")[0] for _, place in module.in_processes(SECRETS)}
        for process in (argument, variable):
            process.communicate(b"\n")
    assert {f"the command line of process {argument.pid}", f"the environment of process {variable.pid}"} <= found
