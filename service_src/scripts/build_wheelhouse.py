#!/usr/bin/env python3
"""Build the wheelhouse from which hosts install a release: every wheel of a runtime profile's lock, and the service's own.

Done once on the control machine; a wheelhouse that is complete is found again by the digest of what went into it. With --service-only it
has no wheels but the service's: hosts then get the others from an index. The last line on standard output is JSON: the release's id, the
wheelhouse and what in it is the lock, the installer's part of the lock, and the service.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent
PACKAGE = "qwen_coder_service"
# wheels are fetched for the hosts' Python and platform, whatever runs this script
HOST_PYTHON = "3.11"
HOST_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(36, 4, -1)]
HOST_PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]


class Locked:
    """A requirement of a lock file: ``name==version`` and its hashes."""

    def __init__(self, lock: Path, name: str) -> None:
        """Find it.

        Raises:
            SystemExit: it is not in the lock.
        """
        found = re.search(rf"^{re.escape(name)}==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]+)+)", lock.read_text(), re.MULTILINE)
        if found is None:
            raise SystemExit(f"{lock} has no line {name}==... with hashes: run make lock")
        self.name, self.version, self.text = name, found[1], found[0]
        self.hashes = set(re.findall(r"sha256:([0-9a-f]+)", found[2]))


def say(text: str) -> None:
    """Tell a person what is going on; standard output is for the result."""
    print(text, file=sys.stderr, flush=True)


def digest(paths: list[Path]) -> str:
    """SHA-256 over names and contents, in a stable order."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(str(path.relative_to(SOURCE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def service_sources() -> list[Path]:
    """What the service's wheel is made of."""
    files = [p for p in (SOURCE / PACKAGE).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return [*files, SOURCE / "pyproject.toml"]


def pip(*arguments: str) -> None:
    """Run pip quietly, with its output on standard error.

    Raises:
        SystemExit: pip failed; the message says what to look at.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "315532800", "PIP_ROOT_USER_ACTION": "ignore"}
    if subprocess.run(command, stdout=sys.stderr, env=environment, check=False).returncode:
        raise SystemExit(
            f"pip {arguments[0]} failed: see above. A torch build that PyPI does not have (+cpu) comes from the index that "
            "PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL names: set one of them to PyTorch's wheel index."
        )


def download(requirements: Path, target: Path) -> None:
    """Download what a file with hashes names, as hosts need it."""
    platforms = [word for platform in HOST_PLATFORMS for word in ("--platform", platform)]
    abis = [word for abi in (f"cp{HOST_PYTHON.replace('.', '')}", "abi3", "none") for word in ("--abi", abi)]
    pip(
        "download", "--quiet", "--require-hashes", "--no-deps", "--only-binary", ":all:", "--dest", str(target),
        "--python-version", HOST_PYTHON, "--implementation", "cp", *abis, *platforms, "--requirement", str(requirements),
    )  # fmt: skip


def fetch(lock: Path, target: Path) -> None:
    """Download every wheel of a lock, checked against its hashes, into a directory that appears only when it is complete."""
    if (target / lock.name).exists():
        return
    say(f"fetching the wheels of profile {lock.stem} (0.6 GB for cpu, several for cuda; once)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as work:
        download(lock, Path(work))
        shutil.copy(lock, work)
        shutil.rmtree(target, ignore_errors=True)
        Path(work).chmod(0o755)
        Path(work).rename(target)
        Path(work).mkdir()  # what TemporaryDirectory expects to remove


def build(target: Path) -> Path:
    """Build the service's wheel into an empty folder of its own; another version's folder is removed."""
    wheels = list(target.glob("*.whl"))
    if wheels:
        return wheels[0]
    say("building the service's wheel")
    for old in target.parent.glob("service-*"):
        shutil.rmtree(old)
    with tempfile.TemporaryDirectory() as work:
        for path in service_sources():  # a copy: setuptools leaves build folders beside its sources
            copy = Path(work, "source", path.relative_to(SOURCE))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        pip("wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", f"{work}/out", f"{work}/source")
        wheel = next(Path(work, "out").glob("*.whl"))
        # by one rename: another run may build the same, and this one may be killed
        target.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=target.parent, prefix=".service-"))
        new.chmod(0o755)
        shutil.move(wheel, new / wheel.name)
        with contextlib.suppress(OSError):  # somebody else was quicker
            new.rename(target)
        shutil.rmtree(new, ignore_errors=True)
        return target / wheel.name


def main() -> None:
    """Build what is missing and print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", required=True, choices=sorted(p.stem for p in SOURCE.glob("profiles/*.txt") if p.stem != "test"))
    parser.add_argument("--output", required=True, type=Path, help="directory that holds wheelhouses")
    parser.add_argument("--service-only", action="store_true", help="no wheels but the service's")
    options = parser.parse_args()

    lock = SOURCE / "profiles" / f"{options.profile}.txt"
    lock_digest, source_digest = digest([lock]), digest(service_sources())
    wheelhouse = options.output.resolve() / f"{options.profile}-{lock_digest[:12]}{'-index' if options.service_only else ''}"
    if options.service_only:
        wheelhouse.mkdir(parents=True, exist_ok=True)
        shutil.copy(lock, wheelhouse)
    else:
        fetch(lock, wheelhouse)
    installer = wheelhouse / "installer.txt"
    installer.write_text(Locked(lock, "uv").text + "\n")
    wheel = build(wheelhouse / f"service-{source_digest[:12]}")

    version = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]["version"]
    release = hashlib.sha256((lock_digest + source_digest).encode()).hexdigest()[:12]
    print(
        json.dumps(
            {
                "id": f"{version}-{release}",
                "profile": options.profile,
                "wheelhouse": str(wheelhouse),
                "lock": lock.name,
                "installer": installer.name,
                "service": str(wheel.relative_to(wheelhouse)),
            }
        )
    )


if __name__ == "__main__":
    main()
