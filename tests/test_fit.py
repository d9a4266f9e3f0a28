"""What a host has against what its inventory declares: figures of hosts that nobody here owns, and every sentence to the letter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from plugins import load

from playbooks import ROOT


def data(path: str, name: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())[name]


FIT: Any = load("roles/qwen_service/filter_plugins/qwen_fit.py")
WORDS = {
    "source": str(ROOT / "service_src"),
    "variables": data("roles/qwen_service/vars/main.yml", "__qwen_service_variables"),
    "tiers": data("roles/qwen/vars/main/tiers.yml", "__qwen_gpu_tiers"),
    "models": data("roles/qwen/vars/main/models.yml", "__qwen_models"),
    "profiles": data("roles/qwen/vars/main/profiles.yml", "__qwen_runtime_profiles"),
    "span": 1,
}
A100, H100, L40S, A6000, RTX4090 = 81920, 81559, 46068, 49140, 24564
GIB, GB = 1 << 30, 10**9
ROOMY: dict[str, Any] = {
    "memory_bytes": 256 * GIB,
    "root": {"mount": "/", "free_bytes": 500 * GB},
    "model": {"mount": "/", "free_bytes": 500 * GB, "config": None, "bytes": 0},
    "profiles": [],
}


def fit(
    tier: str, devices: list[int], capacity: dict[str, Any] | None = None, seen: dict[str, Any] | None = None, span: int = 1, **changed: Any
) -> Any:
    """The verdict on node1 of a tier, with devices of so many MiB each, and what is said otherwise for it."""
    values = {f"qwen_service_{key}": value for key, value in WORDS["tiers"][tier].items()}
    values |= {
        "qwen_service_model_source": "hub",
        "qwen_service_cpu_offload": "needed",
        "qwen_service_gpus": [],
        "qwen_service_root": "/opt/q",
        "qwen_service_model_dir": "/opt/q/models/m",
    }
    values |= {f"qwen_service_{key}": value for key, value in changed.items()}
    found = [{"index": index, "memory_total_mib": mib} for index, mib in enumerate(devices)]
    cuda = {"gpus": found, "lost": [], "on_bus": len(devices)} if devices else None
    used = list(range(len(devices)))[: WORDS["tiers"][tier]["tensor_parallel_size"]]
    seen = {"capacity": capacity or ROOMY, "cuda": cuda, "gpus": used, **(seen or {})}
    return FIT.qwen_service_fit(values, "node1", seen, {**WORDS, "tier": tier, "span": span})


@pytest.mark.parametrize(
    ("tier", "gpus"),
    [
        ("dual-80gb", [A100, A100]),
        ("dual-80gb", [H100, H100]),
        ("single-80gb", [A100]),
        ("single-80gb", [H100]),
        ("single-48gb-awq", [L40S]),
        ("single-48gb-awq", [A6000]),
    ],
)
def test_every_tier_fits_the_gpus_that_it_is_named_for(tier: str, gpus: list[int]) -> None:
    verdict = fit(tier, gpus)
    assert verdict["problems"] == []
    assert verdict["figures"]["headroom_bytes"] >= WORDS["tiers"][tier]["min_headroom_gb"] * GB
    assert verdict["figures"]["full_sequences"] >= 1


def test_the_lab_needs_no_gpu() -> None:
    assert fit("cpu-lab", [], model_source="tiny") == {"figures": None, "problems": [], "notices": []}


def test_dummy_weights_take_memory_and_no_disk() -> None:
    room = small(model_free=1 * GB, model_mount="/models")
    assert any("the weights" in problem for problem in fit("dual-80gb", DUAL, room)["problems"])
    verdict = fit("dual-80gb", DUAL, room, model_source="dummy")
    assert verdict["problems"] == []
    assert verdict["figures"] == fit("dual-80gb", DUAL)["figures"]


def small(**changed: Any) -> dict[str, Any]:
    """A host with less than plenty: ``memory``, ``free``, ``model_free``, ``model_mount``, ``config``, ``bytes``, ``profiles``."""
    result = copy.deepcopy(ROOMY)
    result["memory_bytes"] = changed.get("memory", 256 * GIB)
    result["root"]["free_bytes"] = result["model"]["free_bytes"] = changed.get("free", 500 * GB)
    result["model"] |= {"config": changed.get("config"), "bytes": changed.get("bytes", 0), "mount": changed.get("model_mount", "/")}
    result["model"]["free_bytes"] = changed.get("model_free", result["model"]["free_bytes"])
    result["profiles"] = changed.get("profiles", [])
    return result


CONFIG = WORDS["models"]["Qwen/Qwen2.5-Coder-32B-Instruct"]["config"]
DUAL = [A100, A100]
REFUSED: dict[str, tuple[Any, list[str]]] = {
    "one GPU for two": (
        lambda: fit("dual-80gb", [A100]),
        [
            "node1: qwen_service_tensor_parallel_size is '2', and there is 1 device; set it to 1.",
            "node1: qwen_service_max_model_len is '131072', and a sequence of that length leaves 0.0 GB of the 10.0 GB that are to stay "
            "free; set it to 18432, or qwen_gpu_tier to single-48gb-awq or single-80gb.",
        ],
    ),
    "131072 tokens on 48 GB": (
        lambda: fit("single-48gb-awq", [L40S], max_model_len=131072),
        [
            "node1: qwen_service_max_model_len is '131072', and a share of 0.92 of 44.4 GiB has room for a sequence of 85,488 tokens "
            "beside the weights; set it to 84992.",
        ],
    ),
    "a GPU of 24 GB": (
        lambda: fit("single-48gb-awq", [RTX4090]),
        [
            "node1: qwen_service_max_model_len is '65536', and a share of 0.92 of 23.7 GiB has room for a sequence of 7,392 tokens "
            "beside the weights; set it to 7168.",
        ],
    ),
    "full precision on 48 GB": (
        lambda: fit("single-80gb", [L40S]),
        [
            "node1: qwen_service_model_variant is 'full', and a device of 44.4 GiB does not hold 61.0 GiB of weights and a sequence of "
            "4,096 tokens with 10.0 GB to spare; set it to awq-4bit, or qwen_gpu_tier to single-48gb-awq.",
        ],
    ),
    "utilisation 0.99": (
        lambda: fit("dual-80gb", DUAL, gpu_memory_utilization=0.99),
        [
            "node1: qwen_service_gpu_memory_utilization is '0.99', which leaves 0.8 GiB of 79.0 GiB for the CUDA context and "
            "communication; set it to 0.98.",
        ],
    ),
    "tensor parallel 3": (
        lambda: fit("dual-80gb", [A100] * 4, tensor_parallel_size=3),
        [
            "node1: qwen_service_tensor_parallel_size is '3', which does not divide the model's 40 attention heads; "
            "set it to one of 1, 2, 4, 8.",
        ],
    ),
    "GPUs that the host has not got": (
        lambda: fit("dual-80gb", [A100] * 4, gpus=[2, 7]),
        [
            "node1: qwen_service_gpus is '2, 7'; set it to 2 of the host's GPUs (0, 1, 2, 3; qwen_service_tensor_parallel_size is 2), or "
            "to [] to have them chosen.",
        ],
    ),
    "fewer GPUs than a layer is split over": (
        lambda: fit("dual-80gb", [A100] * 4, gpus=[2]),
        [
            "node1: qwen_service_gpus is '2'; set it to 2 of the host's GPUs (0, 1, 2, 3; qwen_service_tensor_parallel_size is 2), or to "
            "[] to have them chosen.",
        ],
    ),
    "longer than the checkpoint stretches": (
        lambda: fit("dual-80gb", DUAL, max_model_len=262144),
        [
            "node1: qwen_service_max_model_len is '262144', more than 4 times the checkpoint's own 32768 tokens; set it to at most 131072.",
        ],
    ),
    "no number": (
        lambda: fit("dual-80gb", DUAL, max_num_seqs="many", swap_space=-1, max_model_len=10.5, max_batch_tokens=True),
        [
            "node1: qwen_service_max_model_len is '10.5'; set it to a number of tokens, at least 16.",
            "node1: qwen_service_max_batch_tokens is 'True'; set it to a number of tokens, at least 16.",
            "node1: qwen_service_max_num_seqs is 'many'; set it to a number of requests, 1 or more.",
            "node1: qwen_service_swap_space is '-1'; set it to a number of GiB, 0 or more.",
        ],
    ),
    "offload beyond the memory": (
        lambda: fit("single-48gb-awq", [L40S], small(memory=64 * GIB)),
        [
            "node1: qwen_service_cpu_offload_gb is '64', and the host has 64.0 GiB of memory, of which the service's processes take "
            "8.0 GiB and swap_space 4.0 GiB; set it to at most 52.",
        ],
    ),
    "offload for each of two GPUs": (
        lambda: fit("dual-80gb", DUAL, small(memory=64 * GIB), cpu_offload_gb=32, swap_space=0),
        [
            "node1: qwen_service_cpu_offload_gb is '32' for each of 2 GPUs, and the host has 64.0 GiB of memory, of which the service's "
            "processes take 12.0 GiB; set it to at most 26.",
        ],
    ),
    "swap space beyond the memory": (
        lambda: fit("dual-80gb", DUAL, small(memory=14 * GIB)),
        [
            "node1: qwen_service_swap_space is '4', and the host has 14.0 GiB of memory, of which the service's processes take 12.0 GiB; "
            "set it to at most 2.",
        ],
    ),
    "a disk for neither weights nor release": (
        lambda: fit("dual-80gb", DUAL, small(free=50 * GB)),
        [
            "node1: qwen_service_root is '/opt/q', whose filesystem / has 50.0 GB free, and the weights (65.5 GB) and a release (20.0 GB) "
            "need 85.5 GB; free 35.5 GB there, or set it to a directory with more room.",
        ],
    ),
    "a disk of its own for models, too small": (
        lambda: fit("dual-80gb", DUAL, small(model_mount="/srv", model_free=60 * GB)),
        [
            "node1: qwen_service_model_dir is '/opt/q/models/m', whose filesystem /srv has 60.0 GB free, and the weights need 65.5 GB; "
            "free 5.5 GB there, or set it to a directory with more room.",
        ],
    ),
    "no room for a release beside the weights": (
        lambda: fit("dual-80gb", DUAL, small(free=5 * GB, config=CONFIG)),
        [
            "node1: qwen_service_root is '/opt/q', whose filesystem / has 5.0 GB free, and a release needs 20.0 GB; "
            "free 15.0 GB there, or set it to a directory with more room.",
        ],
    ),
    "weights that are not there": (
        lambda: fit("dual-80gb", DUAL, model_source="directory"),
        [
            "node1: qwen_service_model_dir is '/opt/q/models/m', which holds no config.json; put the files of "
            "Qwen/Qwen2.5-Coder-32B-Instruct there, or set qwen_service_model_dir to the directory that holds them.",
        ],
    ),
    "a model that nobody described": (
        lambda: fit("dual-80gb", DUAL, model="our/model"),
        [
            "node1: qwen_service_model is 'our/model', which the catalogue does not know; set it to one of "
            "Qwen/Qwen2.5-Coder-32B-Instruct, Qwen/Qwen2.5-Coder-32B-Instruct-AWQ, or describe it in qwen_models_extra.",
        ],
    ),
    "a model that nobody can size": (
        lambda: fit("dual-80gb", DUAL, small(config={"model_type": "mamba"})),
        [
            "node1: qwen_service_model is 'Qwen/Qwen2.5-Coder-32B-Instruct', whose model_type is 'mamba', and only qwen2, qwen3, llama and "
            "mistral are sized; use such a model.",
        ],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_start_is_refused_with_the_number_to_change(case: str) -> None:
    verdict, sentences = REFUSED[case]
    assert verdict()["problems"] == sentences


@pytest.mark.parametrize(
    ("case", "changed"),
    [
        ("131072 tokens on 48 GB", {"max_model_len": 84992}),
        ("a GPU of 24 GB", {"max_model_len": 7168}),
        ("utilisation 0.99", {"gpu_memory_utilization": 0.98}),
        ("offload beyond the memory", {"cpu_offload_gb": 52}),
        ("swap space beyond the memory", {"swap_space": 2}),
    ],
)
def test_the_number_that_is_named_works(case: str, changed: dict[str, Any]) -> None:
    again = {
        "131072 tokens on 48 GB": lambda: fit("single-48gb-awq", [L40S], **changed),
        "a GPU of 24 GB": lambda: fit("single-48gb-awq", [RTX4090], **changed),
        "utilisation 0.99": lambda: fit("dual-80gb", DUAL, **changed),
        "offload beyond the memory": lambda: fit("single-48gb-awq", [L40S], small(memory=64 * GIB), **changed),
        "swap space beyond the memory": lambda: fit("dual-80gb", DUAL, small(memory=14 * GIB), **changed),
    }
    assert again[case]()["problems"] == []


def test_what_is_on_the_host_needs_no_more_room() -> None:
    assert fit("dual-80gb", DUAL, small(free=GB, config=CONFIG, profiles=["cuda12"]))["problems"] == []
    half_fetched = small(free=50 * GB, bytes=40 * GB, profiles=["cuda12"])
    assert fit("dual-80gb", DUAL, half_fetched)["problems"] == []


def test_the_smallest_gpu_that_is_used_decides() -> None:
    assert fit("dual-80gb", [A100, L40S])["problems"] != []
    assert fit("dual-80gb", [A100, A100, L40S])["problems"] == []


def test_a_lost_gpu_is_no_reason_to_declare_the_host_smaller() -> None:
    """Role cuda says what is to be mended."""
    values = {"cuda": {"gpus": [{"index": 0, "memory_total_mib": A100}], "lost": ["0000:3B:00.0"], "on_bus": 2}}
    assert fit("dual-80gb", [A100])["problems"] != []
    assert fit("dual-80gb", [A100], seen=values)["problems"] == []


def test_without_a_driver_nothing_is_said_about_gpus_but_that() -> None:
    verdict = fit("dual-80gb", [])
    assert (verdict["figures"], verdict["problems"]) == (None, [])
    assert verdict["notices"] == ["The GPUs cannot be seen before the driver is installed, so whether the model fits is not known."]


def test_headroom_and_utilisation_are_two_figures() -> None:
    """The plan's 10 GB and its 0.92: the first before the rest goes to the KV cache, the second what the engine then fills."""
    figures = fit("dual-80gb", DUAL)["figures"]
    assert figures["headroom_bytes"] / GB == pytest.approx(29.3, abs=0.1)
    assert figures["share_bytes"] / figures["device_memory_bytes"] == pytest.approx(0.92, abs=0.001)
    assert figures["full_sequences"] == 2.52


def test_origins_name_tier_extra_and_inventory() -> None:
    values = {"qwen_service_max_num_seqs": 12, "qwen_service_max_model_len": 1024, "qwen_service_swap_space": 4}
    said = FIT.qwen_service_origins(values, {"qwen_service_max_num_seqs": 12}, "single", {"single": {"max_model_len": 1024}})
    assert [(entry["name"], entry["from"]) for entry in said] == [
        ("qwen_service_max_num_seqs", "inventory"),
        ("qwen_service_max_model_len", "qwen_gpu_tiers_extra (single)"),
        ("qwen_service_swap_space", "tier single"),
    ]


def test_gpus_of_all_hosts_of_an_engine_count() -> None:
    """What two GPUs of 80 GB hold, two hosts with one each hold; one of them alone does not."""
    alone = fit("dual-80gb", [A100])
    assert alone["problems"][0].startswith("node1: qwen_service_tensor_parallel_size is '2'")
    spanned = fit("dual-80gb", [A100], seen={"gpus": [0]}, span=2)
    assert spanned["problems"] == []
    assert spanned["figures"] == fit("dual-80gb", [A100, A100])["figures"]


@pytest.mark.parametrize(
    ("devices", "changed", "sentence"),
    [
        (
            [A100],
            {"tensor_parallel_size": 1},
            "node1: qwen_service_tensor_parallel_size is '1', which 2 hosts (qwen_engine_hosts) cannot share evenly; set it to a "
            "multiple of 2.",
        ),
        (
            [A100, A100],
            {"gpus": [0, 1]},
            "node1: qwen_service_gpus is '0, 1'; set it to 1 of the host's GPUs (0, 1; qwen_service_tensor_parallel_size is 2 over "
            "2 hosts), "
            "or to [] to have them chosen.",
        ),
    ],
)
def test_each_host_of_an_engine_has_its_share(devices: list[int], changed: dict[str, Any], sentence: str) -> None:
    assert fit("dual-80gb", devices, span=2, **changed)["problems"] == [sentence]


def test_hosts_of_an_engine_that_would_start_it_differently_are_named() -> None:
    def audit(length: int) -> dict[str, Any]:
        return {"settings": [{"name": "qwen_service_max_model_len", "value": length, "from": "x"}]}

    hostvars = {name: {"qwen_engine_hosts": ["node1", "worker1"]} for name in ("node1", "worker1")} | {"node2": {}}
    even = {"node1": audit(4096), "worker1": audit(4096), "node2": audit(1)}
    assert FIT.qwen_service_uneven(even, hostvars) == []
    assert FIT.qwen_service_uneven(even | {"worker1": audit(2048)}, hostvars) == [
        "worker1: qwen_service_max_model_len is '2048', and '4096' on node1, the head of its engine; set it to the same, best "
        "in a group that "
        "they share."
    ]
