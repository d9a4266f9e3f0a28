"""The Python files of a profile's vLLM wheel, read from the index without fetching the wheel: it is 300 to 500 MB, they are a few MB.

A wheel is a zip archive, whose directory is at its end; HTTP ranges bring that and what is asked for. Where an index has no JSON or no
ranges, pip fetches the whole wheel and checks its hash.
"""

from __future__ import annotations

import ast
import hashlib
import io
import os
import ssl
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import httpx
from build_wheelhouse import Locked, download, say

BLOCK = 1 << 20
"""Bytes that are asked for at a time."""


class RemoteFile(io.RawIOBase):
    """A file at a URL, for whoever seeks and reads."""

    def __init__(self, client: httpx.Client, url: str) -> None:
        """Ask for its first block.

        Raises:
            httpx.HTTPError: the server does not answer, or not with a part of the file.
        """
        self._client, self._url, self._position = client, url, 0
        self._blocks: dict[int, bytes] = {}
        self._size = BLOCK
        self._block(0)

    def _block(self, index: int) -> bytes:
        if index not in self._blocks:
            wanted = f"bytes={index * BLOCK}-{(index + 1) * BLOCK - 1}"
            answer = self._client.get(self._url, headers={"Range": wanted})
            answer.raise_for_status()
            if answer.status_code != httpx.codes.PARTIAL_CONTENT:
                raise httpx.HTTPError("the index sends whole files only")
            self._size = int(answer.headers["content-range"].rpartition("/")[2])
            self._blocks[index] = answer.content
        return self._blocks[index]

    def seekable(self) -> bool:
        """It is."""
        return True

    def readable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go there."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer, or a part of it that lies in one block."""
        if self._position >= self._size:
            return 0
        index, start = divmod(self._position, BLOCK)
        part = self._block(index)[start : start + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)


class Wheel:
    """A wheel's name, hash, and its Python modules as syntax trees."""

    def __init__(self, name: str, sha256: str, archive: zipfile.ZipFile) -> None:
        self.name, self.sha256, self._archive = name, sha256, archive
        self._names = set(archive.namelist())
        self.tree = cache(self._tree)

    def path(self, module: str) -> str | None:
        """The file of a module; None if there is none."""
        base = module.replace(".", "/")
        return next((name for name in (f"{base}.py", f"{base}/__init__.py") if name in self._names), None)

    def text(self, path: str) -> str:
        """A file's content."""
        return self._archive.read(path).decode()

    def below(self, folder: str) -> list[str]:
        """The Python files in a folder."""
        return sorted(name for name in self._names if name.startswith(folder) and name.endswith(".py"))

    def _tree(self, module: str) -> ast.Module | None:
        path = self.path(module)
        return None if path is None else ast.parse(self.text(path))


def _index() -> str:
    """The index that pip is set to."""
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    set_to = os.environ.get("PIP_INDEX_URL") or subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return set_to or "https://pypi.org/simple"


def open_wheel(locked: Locked) -> Wheel:
    """Open the wheel of a locked requirement for hosts: Linux on x86_64.

    Raises:
        SystemExit: no index has it.
    """
    # the system's certificates, as pip has them
    client = httpx.Client(follow_redirects=True, timeout=60, verify=ssl.create_default_context())
    try:
        page = client.get(f"{_index().rstrip('/')}/{locked.name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
        page.raise_for_status()
        for file in page.json()["files"]:
            if file["hashes"].get("sha256") in locked.hashes and file["filename"].endswith("x86_64.whl"):
                url = str(page.url.join(file["url"]))
                archive = zipfile.ZipFile(io.BufferedReader(RemoteFile(client, url)))
                return Wheel(file["filename"], file["hashes"]["sha256"], archive)
        raise ValueError("it does not list the wheel")
    except (httpx.HTTPError, ValueError, KeyError) as error:
        say(f"{locked.name} {locked.version} cannot be read from the index in parts ({type(error).__name__}): fetching the whole wheel")
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder, "requirement.txt")
        requirement.write_text(locked.text + "\n")
        download(requirement, Path(folder))
        wheel = next(Path(folder).glob("*.whl"))
        content = wheel.read_bytes()
    return Wheel(wheel.name, hashlib.sha256(content).hexdigest(), zipfile.ZipFile(io.BytesIO(content)))
