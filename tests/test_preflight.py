"""Preflight on hosts with GPUs that nobody here owns: the real playbook and modules, over a fake nvidia-smi (molecule/resources/fake_gpu).

All hosts are this machine under other names. One run of the playbook judges all of them, which is also how refusals come together.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from plugins import load

from playbooks import ROOT, ansible_playbook

FAKE = ROOT / "molecule/resources/fake_gpu"
place: Any = load("molecule/resources/fake_gpu/place.py")


@dataclass
class Case:
    """A host: its GPUs, what its inventory says, and the verdict. A verdict without sentences means that it starts."""

    fixture: str
    tier: str = "dual-80gb"
    says: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    """Laid over the fixture."""
    refused: tuple[str, ...] = ()
    """Sentences without the host's name in front."""
    gpus: tuple[int, ...] | None = None
    """What the service is to use, where that is the question."""


MEMORY_GIB = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")) / 2**20
SHORTER = "set it to 18432, or qwen_gpu_tier to single-48gb-awq or single-80gb."
CASES = {
    "nvlink": Case("2x80-nvlink", gpus=(0, 1)),
    "pcie": Case("2x80-pcie", gpus=(0, 1)),
    "pairs": Case("4x80-pairs", gpus=(0, 1)),
    "crossed-pairs": Case("4x80-pairs-crossed", gpus=(0, 2)),
    "chosen": Case("4x80-pairs", says={"qwen_service_gpus": [2, 3]}, gpus=(2, 3)),
    "one-80": Case("1x80", "single-80gb", gpus=(0,)),
    "one-80-for-two": Case(
        "1x80",
        refused=(
            "qwen_service_tensor_parallel_size is '2', and there is 1 device; set it to 1.",
            "qwen_service_max_model_len is '131072', and a sequence of that length leaves 0.0 GB of the 10.0 GB that are to stay free; "
            + SHORTER,
        ),
    ),
    "one-48": Case("1x48-l40s", "single-48gb-awq", {"qwen_service_cpu_offload_gb": 0}),
    "one-48-long": Case(
        "1x48-l40s",
        "single-48gb-awq",
        {"qwen_service_cpu_offload_gb": 0, "qwen_service_max_model_len": 131072},
        refused=(
            "qwen_service_max_model_len is '131072', and a share of 0.92 of 44.4 GiB has room for a sequence of 85,488 tokens beside the "
            "weights; set it to 84992.",
        ),
    ),
    "one-24": Case(
        "1x24-geforce",
        "single-48gb-awq",
        {"qwen_service_cpu_offload_gb": 0, "cuda_require_ecc": False},
        refused=(
            "qwen_service_max_model_len is '65536', and a share of 0.92 of 23.7 GiB has room for a sequence of 7,392 tokens beside the "
            "weights; set it to 7168.",
        ),
    ),
    "utilisation": Case(
        "2x80-nvlink",
        says={"qwen_service_gpu_memory_utilization": 0.99},
        refused=(
            "qwen_service_gpu_memory_utilization is '0.99', which leaves 0.8 GiB of 79.0 GiB for the CUDA context and communication; "
            "set it to 0.98.",
        ),
    ),
    "three": Case(
        "4x80-pairs",
        says={"qwen_service_tensor_parallel_size": 3},
        refused=(
            "qwen_service_tensor_parallel_size is '3', which does not divide the model's 40 attention heads; set it to one of 1, 2, 4, 8.",
        ),
    ),
    # a filesystem without room that every machine has
    "disk": Case(
        "2x80-nvlink",
        says={"qwen_service_root": "/proc/qwen", "qwen_service_model_dir": "/proc/qwen/models/m"},
        refused=(
            "qwen_service_root is '/proc/qwen', whose filesystem /proc has 0.0 GB free, and the weights (65.5 GB) and a release (20.0 GB) "
            "need 85.5 GB; free 85.5 GB there, or set it to a directory with more room.",
        ),
    ),
    "offload": Case(
        "1x48-l40s",
        "single-48gb-awq",
        {"qwen_service_cpu_offload_gb": 4096},
        refused=(
            f"qwen_service_cpu_offload_gb is '4096', and the host has {MEMORY_GIB:.1f} GiB of memory, of which the service's processes "
            f"take 8.0 GiB; set it to at most {max(0, int(MEMORY_GIB - 8))}.",
        ),
    ),
}


def driver(version: str, profile: str, *refused: str) -> Case:
    """A host whose driver is the question."""
    return Case("2x80-nvlink", says={"qwen_service_profile": profile}, changes={"driver": version}, refused=refused)


OLD = "the driver is {}, and profile {} needs branch {} or newer;"
NEWER = "cuda_driver_branch to 580 and cuda_install to true"
OTHER = f"set qwen_service_profile to cuda12, or {NEWER}"
CASES |= {
    "mig": Case("2x80-mig", refused=("MIG is on for GPU 0, which splits what the model needs whole; turn it off: nvidia-smi -mig 0.",)),
    "no-ecc": Case(
        "2x80-ecc-off",
        refused=(
            "cuda_require_ecc is true, and ECC is off for GPUs 0 and 1; set cuda_require_ecc to false, or turn it on: nvidia-smi -e 1, "
            "then reboot.",
        ),
    ),
    "no-ecc-allowed": Case("2x80-ecc-off", says={"cuda_require_ecc": False}),
    "missing": Case(
        "2x80-missing",
        refused=("the PCI bus shows 2 of NVIDIA's GPUs, and 1 GPU answers; reboot the host or mend it (dmesg names the reason).",),
    ),
    "lost": Case("2x80-lost", refused=("the driver has lost GPU 0000:3B:00.0; reboot the host or mend it (dmesg names the Xid).",)),
    "no-driver": Case(
        "no-driver",
        refused=(
            "cuda_install is false, and nvidia-smi does not reach the NVIDIA driver; set cuda_install to true, or install a driver of "
            "branch 530 or newer, which profile cuda12 needs.",
        ),
    ),
    "no-driver-yet": Case("no-driver", says={"cuda_install": True}),
    "driver-525-cuda12": driver("525.147.05", "cuda12", f"{OLD.format('525.147.05', 'cuda12', 530)} set {NEWER}."),
    "driver-525-cuda13": driver("525.147.05", "cuda13", f"{OLD.format('525.147.05', 'cuda13', 580)} set {NEWER}."),
    "driver-530-cuda12": driver("530.30.02", "cuda12"),
    "driver-530-cuda13": driver("530.30.02", "cuda13", f"{OLD.format('530.30.02', 'cuda13', 580)} {OTHER}."),
    "driver-535-cuda12": driver("535.183.06", "cuda12"),
    "driver-535-cuda13": driver("535.183.06", "cuda13", f"{OLD.format('535.183.06', 'cuda13', 580)} {OTHER}."),
    "driver-570-cuda12": driver("570.124.06", "cuda12"),
    "driver-570-cuda13": driver("570.124.06", "cuda13", f"{OLD.format('570.124.06', 'cuda13', 580)} {OTHER}."),
    "driver-580-cuda12": driver("580.65.06", "cuda12"),
    "driver-580-cuda13": driver("580.65.06", "cuda13"),
}


@dataclass
class Verdicts:
    """What one run of preflight said of all hosts."""

    sentences: dict[str, list[str]]
    printed: dict[str, list[str]]
    report: str


def messages(output: str, task: str, role: str = "") -> list[Any]:
    """What a task said, as JSON, a value for each time that it said something."""
    part = output.split(f"TASK [{role} : {task}]" if role else f"TASK [{task}]")[1].split("\nTASK [")[0].split("\nPLAY ")[0]
    return [json.loads(match)["msg"] for match in re.findall(r"=> (\{.*?^\})", part, re.MULTILINE | re.DOTALL)]


def host(folder: Path, name: str, case: Case) -> dict[str, Any]:
    """What the inventory says of a host: this machine, with GPUs of its own. The weights and a release are there, so that this machine's
    disk is no question, and neither is its memory, unless the case asks.
    """
    program = place.place(folder / f"gpus/{name}", case.fixture, case.changes)
    tier = data("tiers")["__qwen_gpu_tiers"][case.tier]
    model, root = folder / f"models/{tier['model']}", folder / f"roots/{case.says.get('qwen_service_profile', tier['profile'])}"
    for directory in (model, root / "environments/one"):
        directory.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(data("models")["__qwen_models"][tier["model"]]["config"]))
    (root / "environments/one/environment.json").write_text(json.dumps({"profile": root.name}))
    return {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "cuda_nvidia_smi": str(program),
        "cuda_sysfs": str(program.parent / "sys"),
        "qwen_gpu_tier": case.tier,
        "qwen_service_root": str(root),
        "qwen_service_model_dir": str(model),
        "qwen_service_swap_space": 0,
        **case.says,
    }


def data(name: str) -> Any:
    return yaml.safe_load((ROOT / f"roles/qwen/vars/main/{name}.yml").read_text())


def preflight(folder: Path) -> subprocess.CompletedProcess[str]:
    vault = {
        "vault_pki_ca_passphrase": "twelve characters",
        "vault_caretakers_key_sha256": "0" * 64,
        "preflight_report": f"{folder}/report.md",
    }
    return ansible_playbook("-i", folder / "inventory", "playbooks/preflight.yml", "-e", json.dumps(vault))


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    """The example's inventory with the cases for nodes."""
    folder = tmp_path_factory.mktemp("preflight")
    shutil.copytree(ROOT / "inventories/example/group_vars", folder / "inventory/group_vars")
    inventory = yaml.safe_load((ROOT / "inventories/example/hosts.yml").read_text())
    inventory["qwen_nodes"]["hosts"] = {name: host(folder, name, case) for name, case in CASES.items()}
    (folder / "inventory/hosts.yml").write_text(yaml.safe_dump(inventory))
    result = preflight(folder)
    assert result.returncode == 2, result.stdout + result.stderr
    (refusals,) = messages(result.stdout, "Check that every node can start what is declared for it")
    sentences: dict[str, list[str]] = {name: [] for name in CASES}
    for refusal in refusals.splitlines():
        name, _, sentence = refusal.partition(": ")
        sentences[name].append(sentence)
    printed = dict(zip(sorted(CASES), messages(result.stdout, "What each node would run, and where that was said"), strict=True))
    return Verdicts(sentences, printed, (folder / "report.md").read_text())


@pytest.mark.parametrize("name", CASES)
def test_verdict(name: str, verdicts: Verdicts) -> None:
    case = CASES[name]
    assert verdicts.sentences[name] == list(case.refused)
    if case.gpus is not None:
        assert verdicts.printed[name][0] == f"tier {case.tier}, GPU {', '.join(map(str, case.gpus))} of {len(case_gpus(case))}"


def case_gpus(case: Case) -> list[Any]:
    gpus: list[Any] = json.loads((FAKE / f"fixtures/{case.fixture}.json").read_text())["gpus"]
    return gpus


def test_a_host_says_what_it_would_run_and_where_that_was_said(verdicts: Verdicts) -> None:
    lines = verdicts.printed["one-48-long"]
    assert lines[0] == "tier single-48gb-awq, GPU 0 of 1"
    assert "qwen_service_max_num_seqs: 16  <- tier single-48gb-awq" in lines
    (length,) = [line for line in lines if line.startswith("qwen_service_max_model_len: ")]
    assert re.fullmatch(r"qwen_service_max_model_len: 131072  <- .*/inventory/hosts.yml:\d+", length)
    assert "headroom 29.3 GB a GPU, 10.0 GB asked for; KV cache 330448 tokens, 2.52 sequences of full length" in verdicts.printed["nvlink"]


def test_notices_are_no_refusals(verdicts: Verdicts) -> None:
    assert [line for line in verdicts.printed["pcie"] if "PCIe" in line] == [
        "The service uses GPUs 0 and 1, which NVLink does not join (SYS): tensor parallelism goes over PCIe."
    ]
    assert verdicts.printed["no-driver-yet"][-1] == (
        "The GPUs cannot be seen before the driver is installed, so whether the model fits is not known."
    )


def test_the_report_holds_every_host_and_nothing_that_changes_by_itself(verdicts: Verdicts) -> None:
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in verdicts.report.splitlines() if line.startswith("| ")}
    assert rows["nvlink"].endswith("| 2 | 0, 1 | full | 2 | 131072 | 29.3 GB (least 10.0) | starts |")
    assert rows["mig"].endswith("| refused |")
    assert rows["no-driver-yet"].endswith("| not known yet |")
    for name in CASES:
        assert f"\n## {name}\n" in verdicts.report
    assert "NV12" in verdicts.report
    assert "MiB free" not in verdicts.report


def test_the_example_starts_on_the_gpus_that_it_declares(tmp_path: Path) -> None:
    """Its own files, and of what is not in them only where the hosts are and what they have."""
    shutil.copytree(ROOT / "inventories/example", tmp_path / "inventory")
    for name, fixture, tier in (
        ("node1", "2x80-nvlink", "dual-80gb"),
        ("node2", "2x80-pcie", "dual-80gb"),
        ("node3", "1x48-l40s", "single-48gb-awq"),
    ):
        says = host(tmp_path, name, Case(fixture, tier))
        says |= {"qwen_service_cpu_offload_gb": 0} if name == "node3" else {}
        del says["qwen_gpu_tier"]
        (tmp_path / f"inventory/host_vars/{name}").mkdir()
        file = tmp_path / f"inventory/host_vars/{name}.yml"
        if file.exists():
            file.rename(tmp_path / f"inventory/host_vars/{name}/example.yml")
        (tmp_path / f"inventory/host_vars/{name}/test.yml").write_text(yaml.safe_dump(says))
    result = preflight(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert messages(result.stdout, "Inventory | Check it", "qwen") == ["2 gateways, 3 nodes, 1 monitoring hosts"]
    assert "3 nodes can start what is declared for them" in result.stdout
    printed = messages(result.stdout, "What each node would run, and where that was said")
    assert [line for line in printed[2] if "max_num_seqs" in line and line.endswith("/host_vars/node3/example.yml:4")]
    before = (tmp_path / "report.md").read_text()
    again = preflight(tmp_path)
    assert "changed=0" in again.stdout.split("PLAY RECAP")[1].split("localhost")[1].splitlines()[0]
    assert (tmp_path / "report.md").read_text() == before


def test_a_node_that_is_not_reached_is_said_beside_what_is_wrong_with_others(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "inventories/example/group_vars", tmp_path / "inventory/group_vars")
    inventory = yaml.safe_load((ROOT / "inventories/example/hosts.yml").read_text())
    away = {
        **host(tmp_path, "away", Case("1x80", "single-80gb")),
        "ansible_connection": "ssh",
        "ansible_host": "127.0.0.1",
        "ansible_port": 1,
    }
    inventory["qwen_nodes"]["hosts"] = {"away": away, "mig": host(tmp_path, "mig", CASES["mig"])}
    (tmp_path / "inventory/hosts.yml").write_text(yaml.safe_dump(inventory))
    result = preflight(tmp_path)
    assert result.returncode != 0
    assert messages(result.stdout, "Check that every node can start what is declared for it") == [
        f"mig: {CASES['mig'].refused[0]}\naway: it could not be looked at, see above; make it reachable, or take it out of the inventory."
    ]
    assert "| away | | | | | | | | not reached |" in (tmp_path / "report.md").read_text()
