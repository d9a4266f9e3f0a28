"""A model's files: which of them are wanted, the manifest that they are checked against, and the folder in which they gather.

The manifest is what ``sha256sum`` reads and writes. Lines that begin with ``#`` are comments to it; here they also hold the model, its
revision and the files' sizes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from ..lifecycle import sd_notify

MANIFEST = "MANIFEST.sha256"
GB = 10**9
CHUNK = 1 << 20
WORKERS = 4
"""Files that are fetched or hashed at a time."""

# what an engine reads, and the terms; the same weights in other formats stay behind
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")
_LINE = re.compile(r"([0-9a-f]{64})[ ][ *](.+)")


class WeightsError(RuntimeError):
    """What stands in the way, and what to do about it, in one sentence."""

    status = 1


class WrongUse(WeightsError):
    """An option has a value that cannot be meant."""

    status = 2


class TryLater(WeightsError):
    """Nothing is wrong here; the other side cannot now (EX_TEMPFAIL of sysexits.h)."""

    status = 75


@dataclass(frozen=True)
class File:
    """What is known of a file before it is there. Sizes are bytes; the git sum is that of its blob."""

    name: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None


class Sums:
    """The sums of a file, taken as it passes by.

    Args:
        size: bytes that the file will have; git's sum begins with them.
    """

    def __init__(self, size: int) -> None:
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)

    def update(self, chunk: bytes) -> None:
        """Take the next bytes."""
        self._sha256.update(chunk)
        self._git.update(chunk)

    @property
    def sha256(self) -> str:
        """In hexadecimal digits."""
        return self._sha256.hexdigest()

    def check(self, path: Path, file: File) -> File:
        """Give what is known of the file now that it is there.

        Raises:
            WeightsError: it is another than the expected one; it is removed.
        """
        for kind, expected, seen in (("SHA-256", file.sha256, self.sha256), ("git", file.git_sha1, self._git.hexdigest())):
            if expected and expected != seen:
                path.unlink()
                raise WeightsError(
                    f"{file.name} has the {kind} sum {seen} instead of {expected}; it was removed, run this again to get it anew."
                )
        return replace(file, sha256=self.sha256)


def wanted(name: str) -> bool:
    """Whether an engine needs a file of that name."""
    return any(fnmatch(name, pattern) for pattern in _WANTED)


def check_name(name: str, where: str) -> str:
    """Give the name back.

    Raises:
        WeightsError: it points out of the folder that it is in.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or "\n" in name:
        raise WeightsError(f"{where} names '{name}', which is no place inside a model's folder; make it anew with plain relative names.")
    return str(path)


def read_manifest(path: Path) -> dict[str, File]:
    """Read what ``sha256sum`` wrote, with the sizes where there are some.

    Raises:
        WeightsError: it is not there, or not of that form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); it should hold lines as sha256sum writes them.") from error
    files: dict[str, File] = {}
    size: int | None = None
    for line in filter(None, lines):
        if line.startswith("#"):
            size = int(line.split()[1]) if re.fullmatch(r"# \d+ bytes", line) else None
            continue
        if not (match := _LINE.fullmatch(line)):
            raise WeightsError(f"{path} has the line '{line}', which is not one that sha256sum writes; make it anew.")
        name = check_name(match[2], str(path))
        if name != MANIFEST:  # `sha256sum * >MANIFEST.sha256` has it in there too, empty
            files[name] = File(name, size, match[1])
        size = None
    if not files:
        raise WeightsError(f"{path} is empty; it should hold lines as sha256sum writes them.")
    return files


def read_origin(path: Path) -> str:
    """The manifest's first line: ``model@revision``, or nothing where it does not say."""
    with path.open(encoding="utf-8") as file:
        line = file.readline().strip()
    return line.removeprefix("# ") if line.startswith("# ") and "@" in line else ""


def missing(folder: Path) -> str:
    """One sentence if not all is there that the folder's manifest names, by size and not by content; else nothing."""
    for file in read_manifest(folder / MANIFEST).values():
        path = folder / file.name
        if not path.is_file():
            return f"{path} is not there; remove {folder} and run this again."
        if file.size is not None and path.stat().st_size != file.size:
            return f"{path} has {path.stat().st_size} bytes instead of {file.size}; remove {folder} and run this again."
    return ""


class Progress:
    """What is told while bytes come in: systemd every second, the log every ten.

    Args:
        total: bytes that there will be.
    """

    def __init__(self, total: int) -> None:
        self._total, self._done, self._fetched = total, 0, 0
        self._lock = threading.Lock()
        self._began = self._told = time.monotonic()
        self._logged = self._began - 8  # a first line after two seconds

    def add(self, count: int, fetched: bool = True) -> None:
        """Count bytes; negative ones are taken back, and what was there already does not count for the speed."""
        with self._lock:
            self._done += count
            self._fetched += max(0, count) if fetched else 0
            now = time.monotonic()
            if now - self._told < 1:
                return
            self._told = now
            rate = self._fetched / (now - self._began)
            left = (self._total - self._done) / rate / 60 if rate else 0
            text = f"{self._done / GB:.1f} of {self._total / GB:.1f} GB, {rate / 1e6:.0f} MB/s, {left:.0f} min left"
            sd_notify(f"STATUS={text}")
            if now - self._logged >= 10:
                self._logged = now
                print(text, flush=True)


def check_all(folder: Path, files: Mapping[str, File], remove: bool = False) -> list[str]:
    """Hash all files, and say in a sentence each which are missing or wrong.

    Args:
        folder: where they are.
        files: each with its SHA-256 sum.
        remove: those that are wrong.
    """

    def look(file: File) -> str:
        path = folder / file.name
        if not path.is_file():
            return f"{path} is not there."
        sums = Sums(path.stat().st_size)
        with path.open("rb") as opened:
            while chunk := opened.read(CHUNK):
                sums.update(chunk)
                progress.add(len(chunk))
        if sums.sha256 == file.sha256:
            return ""
        if remove:
            path.unlink()
        return f"{path} has the SHA-256 sum {sums.sha256} instead of {file.sha256}{'; it was removed' if remove else ''}."

    progress = Progress(sum(path.stat().st_size for path in map(folder.joinpath, files) if path.is_file()))
    with ThreadPoolExecutor(WORKERS) as pool:
        return [sentence for sentence in pool.map(look, files.values()) if sentence]


class Partial:
    """The folder beside the target in which files gather until all of them are there and right.

    Args:
        target: the directory to be made.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".partial")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make it, and keep others out.

        Raises:
            TryLater: somebody else holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise TryLater(f"Another qwen-weights works on {self.path}; wait until it has ended.") from None
        finally:
            os.close(handle)
            with suppress(OSError):  # nothing came, nothing stays
                self.path.rmdir()

    def room(self, needed: int) -> None:
        """See that the file system takes so many bytes more, and a hundredth beside them.

        Raises:
            WeightsError: it does not.
        """
        needed += max(needed // 100, CHUNK) if needed else 0
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise WeightsError(
                f"{self.path.parent} has {free / GB:.2f} GB free and {needed / GB:.2f} GB more are needed; free some, or set "
                "qwen_service_model_dir to a directory on a larger file system."
            )

    def full(self) -> WeightsError:
        """What to say when the file system is full all the same."""
        return WeightsError(
            f"{self.path.parent} is full, something else has filled it meanwhile; free some space and run this again, what is there "
            "is kept."
        )

    @contextmanager
    def writing(self, name: str, mode: str = "wb") -> Iterator[BinaryIO]:
        """Open a file in it; what was written ends on the disk, not in a cache.

        Args:
            name: below the folder.
            mode: as of ``open``, binary.
        """
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode) as opened:
            file = cast(BinaryIO, opened)
            yield file
            file.flush()
            os.fsync(file.fileno())

    def place(self, files: Mapping[str, File], origin: str) -> None:
        """Write the manifest, leave nothing else in there, and give the folder its name.

        Args:
            files: each with its SHA-256 sum.
            origin: ``model@revision``, or nothing.
        """
        for path in sorted(self.path.rglob("*"), reverse=True):
            name = str(path.relative_to(self.path))
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
                else:
                    path.chmod(0o755)
            elif name not in files:
                path.unlink()
            else:
                path.chmod(0o644)
        lines = [f"# {origin}"] if origin else []
        for name in sorted(files):
            lines += [f"# {(self.path / name).stat().st_size} bytes", f"{files[name].sha256}  {name}"]
        with self.writing(MANIFEST) as manifest:
            manifest.write(("\n".join(lines) + "\n").encode())
        (self.path / MANIFEST).chmod(0o644)
        self.path.chmod(0o755)
        for folder in {self.path, *((self.path / name).parent for name in files)}:
            _sync(folder)
        self.path.rename(self.target)
        _sync(self.target.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_full(error: OSError) -> bool:
    """Whether a write failed for want of space."""
    return error.errno in {errno.ENOSPC, errno.EDQUOT}
