#!/usr/bin/env python3
"""Make or add to an apt repository like NVIDIA's: flat, signed, with packages of its names that are next to empty.

    vendor.py FOLDER VERSION...

FOLDER gets repo/, foreign/ (the same, signed by somebody else), key.pub, both.pub (both keys in one file), and both fingerprints.
nvidia-smi, the fake one of /opt/machine, and what its kernel module does: the one that was loaded first stays until the next boot.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

MACHINE = Path("/opt/machine")
LOAD = """#!/usr/bin/python3
import json, sys
from pathlib import Path
machine = Path("/opt/machine")
loaded, installed = machine / "sys/module/nvidia/version", Path("/usr/lib/nvidia/version").read_text().strip()
state = json.loads((machine / "gpus.json").read_text())
if sys.argv[1] == "boot" or not loaded.exists():
    loaded.parent.mkdir(parents=True, exist_ok=True)
    loaded.write_text(installed + "\\n")
    state.pop("fails", None)
    state["driver"] = installed
elif loaded.read_text().strip() != installed:
    state["fails"] = "mismatch"
(machine / "gpus.json").write_text(json.dumps(state))
"""
UNIT = """[Unit]
Description={name}
[Service]
Type={kind}
RemainAfterExit={stays}
ExecStart={command}
[Install]
WantedBy=multi-user.target
"""


def unit(name, command, kind="simple"):
    text = UNIT.format(name=name, kind=kind, stays="yes" if kind == "oneshot" else "no", command=command)
    return {f"lib/systemd/system/{name}.service": text}


def packages(version):
    """Name -> (version, dependencies, files, script after installation)."""
    branch, revision = int(version.split(".")[0]), f"{version}-1"
    fabric = "nvidia-fabricmanager" if branch >= 580 else f"nvidia-fabricmanager-{branch}"
    module = {
        "usr/lib/nvidia/version": version + "\n",
        "usr/lib/nvidia/load": LOAD,
        **unit("nvidia-module", "/usr/bin/python3 /usr/lib/nvidia/load boot", "oneshot"),
    }
    loading = "#!/bin/sh\npython3 /usr/lib/nvidia/load install\nsystemctl enable nvidia-module.service\n"
    return {
        "libcuda1": (revision, "", {}, ""),
        "nvidia-driver-cuda": (revision, f"libcuda1 (= {revision})", {"usr/bin/nvidia-smi": MACHINE / "nvidia-smi"}, ""),
        "nvidia-kernel-open-dkms": (revision, "", module, loading),
        # as some distributions start it: there, and persistence off
        "nvidia-persistenced": (revision, "", unit("nvidia-persistenced", "/bin/sleep infinity"), ""),
        fabric: (revision, "", unit("nvidia-fabricmanager", "/bin/sleep infinity"), ""),
    }


OTHERS = {
    f"linux-headers-{os.uname().release}": ("6.1.0-1", "", {}, ""),
    "cuda-toolkit-12-1": ("12.1.1-1", "", {}, ""),
    "nvidia-container-toolkit": ("1.17.8-1", "", {}, ""),
}


def build(folder, name, version, depends, files, script):
    """One package."""
    with tempfile.TemporaryDirectory() as work:
        root = Path(work, "root")
        control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: the vendor\nDescription: a stand-in\n"
        (root / "DEBIAN").mkdir(parents=True)
        (root / "DEBIAN/control").write_text(control + (f"Depends: {depends}\n" if depends else ""))
        if script:
            (root / "DEBIAN/postinst").write_text(script)
            (root / "DEBIAN/postinst").chmod(0o755)
        for path, content in files.items():
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                target.symlink_to(content)
            else:
                target.write_text(content)
        root.chmod(0o755)
        subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", root, folder], check=True, capture_output=True)


def gpg(home, *arguments):
    return subprocess.run(["gpg", "--homedir", home, "--batch", "--yes", *arguments], check=True, capture_output=True, text=True).stdout


def sign(folder, home):
    """Index and signature of a flat repository."""
    index = subprocess.run(["apt-ftparchive", "packages", "."], cwd=folder, check=True, capture_output=True, text=True).stdout
    (folder / "Packages").write_text(index)
    origin = ["-o", "APT::FTPArchive::Release::Origin=NVIDIA", "-o", "APT::FTPArchive::Release::Label=NVIDIA CUDA"]
    # not beside what it describes while it is made
    release = subprocess.run(["apt-ftparchive", *origin, "release", "."], cwd=folder, check=True, capture_output=True, text=True).stdout
    with tempfile.NamedTemporaryFile("w", suffix="Release") as file:
        file.write(release)
        file.flush()
        gpg(home, "--clearsign", "--output", str(folder / "InRelease"), file.name)


def main(target, versions):
    folder = Path(target)
    for name in ("repo", "keys/vendor", "keys/foreign"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "keys").chmod(0o700)
    keys = {}
    for who in ("vendor", "foreign"):
        home = folder / "keys" / who
        if not (home / "pubring.kbx").exists():
            home.chmod(0o700)
            gpg(home, "--passphrase", "", "--quick-generate-key", f"{who} <{who}@example.org>", "ed25519", "sign", "never")
        keys[who] = gpg(home, "--armor", "--export")
        listed = gpg(home, "--list-keys", "--with-colons").splitlines()
        (folder / f"{who}.fingerprint").write_text(next(line.split(":")[9] for line in listed if line.startswith("fpr")))
    (folder / "key.pub").write_text(keys["vendor"])
    (folder / "both.pub").write_text(keys["vendor"] + keys["foreign"])
    for version in versions:
        for name, what in packages(version).items():
            build(folder / "repo", name, *what)
    for name, what in OTHERS.items():
        build(folder / "repo", name, *what)
    (folder / "repo/InRelease").unlink(missing_ok=True)
    sign(folder / "repo", folder / "keys/vendor")
    shutil.copytree(folder / "repo", folder / "foreign", dirs_exist_ok=True)
    (folder / "foreign/InRelease").unlink()
    sign(folder / "foreign", folder / "keys/foreign")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
