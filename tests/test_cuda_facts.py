"""What module cuda_facts reads from nvidia-smi and the PCI bus, through the fake one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plugins import load

FACTS = load("roles/cuda/library/cuda_facts.py")
PLACE = load("molecule/resources/fake_gpu/place.py").place
FIXTURES = sorted(path.stem for path in Path(PLACE.__code__.co_filename).parent.glob("fixtures/*.json"))
SILENT = {"no-devices": "no_devices", "mismatch": "mismatch", "no-driver": "unreachable"}


def see(folder: Path, fixture: str, **changes: Any) -> dict[str, Any]:
    program = PLACE(folder, fixture, changes)
    result: dict[str, Any] = FACTS.facts(str(program), str(folder / "sys"))
    return result


def test_two_gpus_as_they_are(tmp_path: Path) -> None:
    seen = see(tmp_path, "2x80-nvlink")
    raw = seen.pop("raw")
    assert seen == {
        "found": True,
        "state": "ok",
        "why": "",
        "driver": "535.183.06",
        "branch": 535,
        "cuda": "12.2",
        "gpus": [
            {
                "index": index,
                "name": "NVIDIA A100-SXM4-80GB",
                "uuid": f"GPU-0000000{index}-6b2f-4c1d-9e3a-000000000000",
                "bus_id": bus,
                "memory_total_mib": 81920,
                "memory_free_mib": 81316,
                "mig": "disabled",
                "ecc": "enabled",
                "persistence": True,
                "compute_capability": "8.0",
            }
            for index, bus in enumerate(["0000:17:00.0", "0000:3B:00.0"])
        ],
        "lost": [],
        "on_bus": 2,
        "links": {"0-1": "NV12"},
        "nvlink_groups": [[0, 1]],
        "nvswitch": False,
    }
    assert raw["list"].startswith("GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-")
    assert raw["topology"].startswith("\tGPU0\tGPU1\tCPU Affinity")


@pytest.mark.parametrize(
    ("fixture", "gpus", "groups", "pairs"),
    [
        ("2x80-pcie", 2, [], {"0-1": "SYS"}),
        ("4x80-pairs", 4, [[0, 1], [2, 3]], {"0-1": "NV12", "0-2": "SYS", "2-3": "NV12"}),
        ("4x80-pairs-crossed", 4, [[0, 2], [1, 3]], {"0-1": "SYS", "0-2": "NV12", "1-3": "NV12"}),
        ("8x80-nvswitch", 8, [list(range(8))], {"0-7": "NV18"}),
        ("1x80", 1, [], {}),
    ],
)
def test_topology(fixture: str, gpus: int, groups: list[list[int]], pairs: dict[str, str], tmp_path: Path) -> None:
    seen = see(tmp_path, fixture)
    assert (len(seen["gpus"]), seen["on_bus"]) == (gpus, gpus)
    assert len(seen["links"]) == gpus * (gpus - 1) // 2
    assert seen["links"].items() >= pairs.items()
    assert seen["nvlink_groups"] == groups
    assert seen["nvswitch"] == (fixture == "8x80-nvswitch")


@pytest.mark.parametrize(
    ("fixture", "mig", "ecc"),
    [
        ("2x80-mig", ["enabled", "disabled"], ["enabled", "enabled"]),
        ("2x80-ecc-off", ["disabled", "disabled"], ["disabled", "disabled"]),
        ("1x48-a6000", ["unsupported"], ["disabled"]),
        ("1x48-l40s", ["unsupported"], ["enabled"]),
    ],
)
def test_modes(fixture: str, mig: list[str], ecc: list[str], tmp_path: Path) -> None:
    gpus = see(tmp_path, fixture)["gpus"]
    assert [gpu["mig"] for gpu in gpus] == mig
    assert [gpu["ecc"] for gpu in gpus] == ecc


@pytest.mark.parametrize("fixture", SILENT)
def test_nobody_answers(fixture: str, tmp_path: Path) -> None:
    seen = see(tmp_path, fixture)
    assert (seen["found"], seen["state"], seen["gpus"], seen["on_bus"]) == (False, SILENT[fixture], [], 2)
    assert seen["why"]


def test_there_is_no_program(tmp_path: Path) -> None:
    PLACE(tmp_path, "2x80-nvlink")
    seen = FACTS.facts(None, str(tmp_path / "sys"))
    assert (seen["found"], seen["state"], seen["why"], seen["on_bus"]) == (False, "missing", "there is no nvidia-smi", 2)


def test_a_failure_without_a_name(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho Insufficient Permissions; exit 4\n")
    program.chmod(0o755)
    seen = FACTS.facts(str(program), str(tmp_path))
    assert (seen["state"], seen["why"]) == ("error", "nvidia-smi ends with 4 and says: Insufficient Permissions")


def test_a_program_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(FACTS, "PATIENCE_SECONDS", 0.2)
    assert FACTS.facts(str(program), str(tmp_path))["state"] == "hangs"


@pytest.mark.parametrize("others", [False, True])
def test_a_lost_gpu(others: bool, tmp_path: Path) -> None:
    """It silences the others in older drivers, and not in newer ones."""
    seen = see(tmp_path, "2x80-lost", lost_shows_others=others)
    assert (seen["found"], seen["driver"], seen["cuda"]) == (True, "535.183.06", "12.2")
    assert [gpu["index"] for gpu in seen["gpus"]] == [0]
    assert (seen["lost"], seen["on_bus"]) == (["0000:3B:00.0"], 2)


@pytest.mark.parametrize(
    "text",
    [
        "Unable to determine the device handle for GPU 0000:3B:00.0: Unknown Error",
        "Unable to determine the device handle for GPU0000:3B:00.0: GPU is lost.  Reboot the system to recover this GPU",
        "Unable to determine the device handle for GPU1: 0000:3B:00.0: Unknown Error",
        "Unable to determine the device handle for gpu 00000000:3b:00.0: Unknown Error",
    ],
)
def test_how_drivers_say_that_one_is_lost(text: str) -> None:
    assert FACTS.parse_lost(f"{text}\n{text}") == ["0000:3B:00.0"]


def test_a_gpu_that_does_not_answer_but_is_on_the_bus(tmp_path: Path) -> None:
    seen = see(tmp_path, "2x80-missing")
    assert (len(seen["gpus"]), seen["on_bus"], seen["lost"]) == (1, 2, [])


@pytest.mark.parametrize(("driver", "cuda"), [("525.147.05", "12.0"), ("530.30.02", "12.1"), ("570.124.06", "12.8"), ("580.65.06", "13.0")])
def test_versions(driver: str, cuda: str, tmp_path: Path) -> None:
    seen = see(tmp_path, "1x80", driver=driver)
    assert (seen["driver"], seen["branch"], seen["cuda"]) == (driver, int(driver[:3]), cuda)


def test_versions_as_newer_drivers_name_them() -> None:
    head = "| NVIDIA-SMI 610.57.04              KMD Version: 610.57.04     CUDA UMD Version: 13.3     |"
    assert FACTS.parse_versions(head) == ("610.57.04", "13.3")


def test_a_driver_without_its_cuda_library(tmp_path: Path) -> None:
    assert see(tmp_path, "1x80", cuda="N/A")["cuda"] == ""


def test_an_old_driver_does_not_know_every_field(tmp_path: Path) -> None:
    program = PLACE(tmp_path, "1x80")
    program.write_text(program.read_text().replace('"compute_cap": gpu', '"compute_capability": gpu'))
    gpu = FACTS.facts(str(program), str(tmp_path / "sys"))["gpus"][0]
    assert (gpu["memory_total_mib"], gpu["compute_capability"]) == (81920, "")


def test_network_cards_in_the_topology_are_no_gpus() -> None:
    topology = "\tGPU0\tGPU1\tNIC0\tCPU Affinity\nGPU0\t X \tNV4\tPIX\t0-15\nGPU1\tNV4\t X \tSYS\t0-15\nNIC0\tPIX\tSYS\t X \t\n"
    assert FACTS.parse_links(topology) == {"0-1": "NV4"}


def test_gpus_joined_by_way_of_others_are_one_group() -> None:
    assert FACTS.nvlink_groups({"0-1": "NV2", "2-3": "NV2", "1-2": "NV1", "4-5": "NV2", "0-4": "SYS"}) == [[0, 1, 2, 3], [4, 5]]


def test_virtual_functions_and_other_vendors_are_not_counted(tmp_path: Path) -> None:
    PLACE(tmp_path, "8x80-nvswitch")
    assert FACTS.pci_devices(str(tmp_path / "sys")) == (8, 4)
    (tmp_path / "sys/bus/pci/devices/0000:17:00.0/physfn").mkdir()
    assert FACTS.pci_devices(str(tmp_path / "sys")) == (7, 4)


@pytest.mark.parametrize("fixture", FIXTURES)
def test_the_module_answers_ansible(fixture: str, tmp_path: Path) -> None:
    """As Ansible calls it, in check mode; every fixture is read, and reading changes none."""
    program = PLACE(tmp_path, fixture)
    before = (tmp_path / "gpus.json").read_text()
    arguments = {"nvidia_smi": str(program), "sysfs": str(tmp_path / "sys"), "_ansible_check_mode": True}
    run = subprocess.run(
        [sys.executable, str(FACTS.__file__)],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(run.stdout)
    assert answer["changed"] is False
    assert answer["cuda"] == FACTS.facts(str(program), str(tmp_path / "sys"))
    assert (tmp_path / "gpus.json").read_text() == before
    assert answer["cuda"]["found"] is (fixture not in SILENT)
