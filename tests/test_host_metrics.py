"""roles/exporters/files/host_metrics.py: what it says of a machine's GPUs and release."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from plugins import load

metrics = load("roles/exporters/files/host_metrics.py")
place = load("molecule/resources/fake_gpu/place.py").place


def entry(message: str, second: int) -> str:
    return json.dumps({"MESSAGE": message, "__REALTIME_TIMESTAMP": str(second * 1_000_000)})


def gpus(directory: Path, fixture: str, log: tuple[str, ...] = (), **changes: Any) -> str:
    out = metrics.Exposition()
    metrics.describe_gpus(out, 2, str(place(directory, fixture, changes)), log)
    return str(out.text())


def series(text: str, name: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(name)]


def test_gpus_that_are_well(tmp_path: Path) -> None:
    text = gpus(tmp_path, "2x80-nvlink")
    assert "\nqwen_gpu_expected 2\n" in text
    assert "\nqwen_gpu_present 2\n" in text
    assert "\nqwen_gpu_driver_ok 1\n" in text
    assert series(text, "qwen_gpu_temperature_celsius") == [
        'qwen_gpu_temperature_celsius{gpu="0"} 31',
        'qwen_gpu_temperature_celsius{gpu="1"} 31',
    ]
    assert 'qwen_gpu_memory_total_bytes{gpu="0"} 85899345920' in text
    assert 'qwen_gpu_ecc_uncorrected_errors{gpu="1"} 0' in text
    assert all(line.endswith(" 0") for line in series(text, "qwen_gpu_throttled{"))
    assert "xid" not in text


@pytest.mark.parametrize(
    ("fixture", "present", "ok"), [("2x80-lost", 0, 0), ("2x80-missing", 1, 1), ("no-driver", 0, 0), ("mismatch", 0, 0)]
)
def test_gpus_that_are_gone(tmp_path: Path, fixture: str, present: int, ok: int) -> None:
    text = gpus(tmp_path, fixture)
    assert f"\nqwen_gpu_present {present}\n" in text
    assert f"\nqwen_gpu_driver_ok {ok}\n" in text


def test_one_of_two_is_lost_and_the_other_answers(tmp_path: Path) -> None:
    text = gpus(tmp_path, "2x80-lost", lost_shows_others=True)
    assert "\nqwen_gpu_present 1\n" in text
    assert "\nqwen_gpu_driver_ok 0\n" in text


def test_no_program_at_all(tmp_path: Path) -> None:
    out = metrics.Exposition()
    metrics.describe_gpus(out, 2, str(tmp_path / "nvidia-smi"), ())
    assert "\nqwen_gpu_present 0\n" in out.text()


def test_heat_errors_and_what_a_card_does_not_have(tmp_path: Path) -> None:
    card = {"name": "A", "memory": 24564, "ecc": None, "temperature": 91, "throttled": ["hw_thermal_slowdown"]}
    text = gpus(tmp_path, "2x80-nvlink", gpus=[card, {**card, "ecc": "Enabled", "uncorrected": 3}])
    assert 'qwen_gpu_temperature_celsius{gpu="0"} 91' in text
    assert 'qwen_gpu_throttled{gpu="0",reason="hw_thermal_slowdown"} 1' in text
    assert 'qwen_gpu_throttled{gpu="0",reason="sw_power_cap"} 0' in text
    assert series(text, "qwen_gpu_ecc_uncorrected_errors") == ['qwen_gpu_ecc_uncorrected_errors{gpu="1"} 3']


def test_xids_are_counted_and_dated(tmp_path: Path) -> None:
    log = (
        entry("NVRM: Xid (PCI:0000:17:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.", 100),
        entry("NVRM: Xid (PCI:0000:17:00): 79, pid=7, GPU has fallen off the bus.", 300),
        entry("NVRM: Xid (PCI:0000:3b:00): 31, pid=7, name=python, Ch 00000008", 200),
        json.dumps({"MESSAGE": [78, 255], "__REALTIME_TIMESTAMP": "1"}),
    )
    text = gpus(tmp_path, "2x80-nvlink", log)
    assert 'qwen_gpu_xid_errors{pci="0000:17:00",xid="79"} 2' in text
    assert 'qwen_gpu_xid_last_timestamp_seconds{pci="0000:17:00",xid="79"} 300' in text
    assert 'qwen_gpu_xid_last_timestamp_seconds{pci="0000:3b:00",xid="31"} 200' in text


def test_the_release_is_the_one_that_current_points_to(tmp_path: Path) -> None:
    (tmp_path / "releases/1.2.3").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    command: list[str | Path] = [
        sys.executable,
        str(metrics.__file__),
        "--directory",
        tmp_path / "out",
        "--root",
        tmp_path,
        "--tier",
        "t",
        "--profile",
        "p",
    ]
    subprocess.run(command, check=True)
    file = tmp_path / "out/qwen_host.prom"
    assert "qwen_release_info" not in file.read_text()
    (tmp_path / "current").symlink_to(tmp_path / "releases/1.2.3")
    subprocess.run(command, check=True)
    assert 'qwen_release_info{release="1.2.3",tier="t",profile="p"} 1' in file.read_text()
    assert "qwen_gpu" not in file.read_text()
    assert (file.stat().st_mode & 0o777, [other.name for other in file.parent.iterdir()]) == (0o644, [file.name])


def test_it_looks_again_and_again(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "1").mkdir()
    command = [sys.executable, str(metrics.__file__), "--directory", f"{tmp_path}/out", "--root", str(tmp_path)]
    with subprocess.Popen([*command, "--tier", "t", "--profile", "p", "--interval", "1"]) as process:
        try:
            (tmp_path / "current").symlink_to(tmp_path / "1")
            until(tmp_path / "out/qwen_host.prom", 'release="1"')
            (tmp_path / "current").unlink()
            (tmp_path / "current").symlink_to(tmp_path / "out")
            until(tmp_path / "out/qwen_host.prom", 'release="out"')
        finally:
            process.terminate()


def test_it_ends_where_nvidia_smi_fails(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    command = [sys.executable, str(metrics.__file__), "--directory", f"{tmp_path}/out", "--root", str(tmp_path), "--interval", "60"]
    nvidia_smi = str(place(tmp_path / "machine", "no-driver", {}))
    subprocess.run([*command, "--tier", "t", "--profile", "p", "--gpus", "2", "--nvidia-smi", nvidia_smi], check=True, timeout=30)
    assert "\nqwen_gpu_driver_ok 0\n" in (tmp_path / "out/qwen_host.prom").read_text()


def until(file: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while not (file.exists() and text in file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
