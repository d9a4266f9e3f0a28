"""Role cuda: what it records, and how a driver is kept at one version. The refusals are in side_effect.yml and tests/test_cuda.py.

The side effects left the host at 580.82.07; the vendor has 580.95.05 and 590.44.01 meanwhile.
"""

import json
import re

import pytest

DRIVER = ["libcuda1", "nvidia-driver-cuda", "nvidia-fabricmanager", "nvidia-kernel-open-dkms", "nvidia-persistenced"]


@pytest.fixture(scope="module")
def node(on):
    host = on("node1")
    host.check_output("apt-get update -q")
    return host


def test_one_version_of_all_that_is_the_drivers(node):
    assert {name: node.package(name).version for name in DRIVER} == dict.fromkeys(DRIVER, "580.82.07-1")


def test_headers_of_the_kernel_that_runs(node):
    assert node.package(f"linux-headers-{node.check_output('uname -r')}").is_installed


def test_what_is_known_of_the_gpus(node):
    facts = json.loads(node.file("/etc/ansible/facts.d/qwen_cuda.fact").content_string)
    assert (facts["driver"], facts["branch"], facts["cuda"], facts["on_bus"]) == ("580.82.07", 580, "13.0", 8)
    assert [gpu["index"] for gpu in facts["gpus"]] == list(range(8))
    assert facts["gpus"][7] == {
        "index": 7, "name": "NVIDIA H100 80GB HBM3", "uuid": "GPU-00000007-6b2f-4c1d-9e3a-000000000000", "bus_id": "0000:E3:00.0",
        "memory_total_mib": 81559, "mig": "disabled", "ecc": "enabled", "persistence": True, "compute_capability": "9.0",
    }  # fmt: skip
    assert facts["nvlink_groups"] == [list(range(8))]
    assert (facts["nvswitch"], facts["service_gpus"]) == (True, [0, 1])


@pytest.mark.parametrize(("name", "command"), [("list", "nvidia-smi -L"), ("topology", "nvidia-smi topo -m")])
def test_what_nvidia_smi_said(node, name, command):
    said = node.check_output(command).replace("\x1b[4m", "").replace("\x1b[0m", "")
    assert node.file(f"/etc/qwen-cuda/{name}.txt").content_string.strip("\n") == said.strip("\n")


def test_every_package_of_the_driver_is_held(node):
    assert node.check_output("apt-mark showhold").split() == DRIVER


@pytest.fixture(scope="module")
def without(node):
    """Run a command while something that keeps the driver is away."""
    away = {
        "holds": (f"apt-mark unhold {' '.join(DRIVER)}", f"apt-mark hold {' '.join(DRIVER)}"),
        "pins": ("mv /etc/apt/preferences.d/qwen-cuda /root/pins", "mv /root/pins /etc/apt/preferences.d/qwen-cuda"),
        "list": ("mv /etc/apt/apt.conf.d/52qwen-cuda /root/list", "mv /root/list /etc/apt/apt.conf.d/52qwen-cuda"),
    }

    def run(names, command):
        try:
            for name in names:
                node.check_output(away[name][0])
            return node.check_output(command)
        finally:
            for name in names:
                node.check_output(away[name][1])

    return run


@pytest.mark.parametrize(("names", "upgraded"), [([], False), (["holds"], False), (["pins"], False), (["holds", "pins"], True)])
def test_an_upgrade_leaves_the_driver(without, names, upgraded):
    """Holds and pins each suffice; without both, the vendor's newer version would come."""
    assert ("Inst libcuda1 [580.82.07-1] (590.44.01-1" in without(names, "apt-get -s upgrade")) is upgraded


def test_pins_keep_other_versions_out_and_nothing_else(node):
    driver, toolkit = node.check_output("apt-cache policy libcuda1 nvidia-container-toolkit").split("nvidia-container-toolkit:")
    priorities = dict(re.findall(r"(\d{3}\.[0-9.]+-1) (-?\d+)$", driver, re.MULTILINE))
    assert priorities == {"590.44.01-1": "-1", "580.95.05-1": "-1", "580.82.07-1": "1001", "580.65.06-1": "-1"} | {
        version: "-1" for version in ("570.124.06-1", "535.183.06-1")
    }
    assert "Candidate: 1.17.8-1" in toolkit


@pytest.mark.parametrize(("names", "taken"), [(["holds", "pins"], False), (["holds", "pins", "list"], True)])
def test_unattended_upgrades_leave_the_driver(without, names, taken):
    """Even where nothing else keeps it; and without this role's list they would take it."""
    said = without(names, "unattended-upgrade --dry-run --debug 2>&1")
    assert "pkgs that look like they should be upgraded" in said or "No packages found that can be upgraded unattended" in said
    assert ("libcuda1" in " ".join(re.findall(r"Packages that will be upgraded: (.*)", said))) is taken


def test_it_rebooted_once_allowed(node):
    assert node.check_output("cat /root/boot_id") != node.check_output("cat /proc/sys/kernel/random/boot_id")


def test_gpus_stay_initialised_after_a_reboot(node):
    assert node.service("qwen-cuda-persistence").is_enabled
    assert node.service("nvidia-persistenced").is_running
    assert set(node.check_output("nvidia-smi --query-gpu=persistence_mode --format=csv,noheader").split()) == {"Enabled"}


def test_the_fabric_manager_runs_and_is_of_the_drivers_version(node):
    assert node.service("nvidia-fabricmanager").is_running
    assert node.service("nvidia-fabricmanager").is_enabled
    assert node.package("nvidia-fabricmanager").version == node.package("nvidia-driver-cuda").version


def test_nouveau_is_off(node):
    assert "blacklist nouveau" in node.file("/etc/modprobe.d/qwen-cuda.conf").content_string


def test_the_key_is_the_only_one_that_the_repository_is_trusted_by(node):
    sources = node.file("/etc/apt/sources.list.d/qwen-cuda.sources").content_string
    key = sources.split("Signed-By: ")[1].strip()
    assert node.check_output(f"gpg --show-keys --with-colons {key} | grep -c ^pub:") == "1"
    assert key.endswith(f"{node.file('/srv/vendor/vendor.fingerprint').content_string}.asc")
