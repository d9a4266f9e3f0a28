"""Settings: every wrong one stops the start with one sentence; none reaches vLLM's environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QWEN_32B

from qwen_coder_service import settings
from qwen_coder_service.backends.vllm import engine_arguments, offload_gib
from qwen_coder_service.memory_probe import Gpu
from qwen_coder_service.settings import SettingsError, claim, load, place


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"QWEN_BACKEND": "llama"}, "QWEN_BACKEND is 'llama'; set it to vllm or transformers."),
        ({"QWEN_MODEL_VARIANT": "gptq"}, "QWEN_MODEL_VARIANT is 'gptq'; set it to full or awq-4bit."),
        ({"VLLM_TENSOR_PARALLEL_SIZE": "0"}, "VLLM_TENSOR_PARALLEL_SIZE is '0'; set it to a number of GPUs, 1 or more."),
        ({"VLLM_TENSOR_PARALLEL_SIZE": "two"}, "VLLM_TENSOR_PARALLEL_SIZE is 'two'; set it to a number of GPUs, 1 or more."),
        ({"VLLM_MAX_MODEL_LEN": "8"}, "VLLM_MAX_MODEL_LEN is '8'; set it to a number of tokens, at least 16."),
        (
            {"VLLM_GPU_MEMORY_UTILIZATION": "92"},
            "VLLM_GPU_MEMORY_UTILIZATION is '92'; set it to a share of the GPU's memory above 0 and at most 0.99, for example 0.92.",
        ),
        ({"max_batch_tokens": "-1"}, "max_batch_tokens is '-1'; set it to a number of tokens, at least 16, for example 8192."),
        ({"swap_space": "lots"}, "swap_space is 'lots'; set it to a number of GiB, 0 or more."),
        ({"QWEN_METRICS_BIND": "9090"}, "QWEN_METRICS_BIND is '9090'; set it to an address and a port, for example 127.0.0.1:9090."),
        (
            {"max_batch_tokens": "16", "max_num_seqs": "17"},
            "max_batch_tokens is '16', fewer than the 17 requests of a step (max_num_seqs), each of which needs one; "
            "set it to at least 17.",
        ),
        (
            {"VLLM_TENSOR_PARALLEL_SIZE": "3"},
            "VLLM_TENSOR_PARALLEL_SIZE is '3', over which this model cannot be split evenly; set it to one of 1, 2, 4.",
        ),
        (
            {"QWEN_CPU_OFFLOAD": "always"},
            "QWEN_CPU_OFFLOAD is 'always' without a budget; set VLLM_CPU_OFFLOAD_GB to a number of GiB above 0.",
        ),
        ({"QWEN_STALL_TIMEOUT_S": "1"}, "QWEN_STALL_TIMEOUT_S is '1'; set it to a number of seconds, 5 to 3600."),
        (
            {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "collector"},
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is 'collector'; set it to the URL of an OTLP receiver, for example http://127.0.0.1:4317.",
        ),
    ],
)
def test_a_wrong_value_is_named_with_the_value_to_set(environment: dict[str, str], change: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingsError) as error:
        load(environment | change)
    assert str(error.value) == sentence


def test_a_missing_model_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    del environment["QWEN_MODEL_PATH"]
    with pytest.raises(SettingsError, match=r"^QWEN_MODEL_PATH is not set; set it to the directory that holds"):
        load(environment)
    with pytest.raises(SettingsError, match=rf"^QWEN_MODEL_PATH is '{tmp_path}', which holds no config.json; set it to the directory"):
        load(environment | {"QWEN_MODEL_PATH": str(tmp_path)})


def test_an_unknown_name_of_ours_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=r"^QWEN_MAX_LENGTH is no setting of this service; remove it, or set one of QWEN_BACKEND, "):
        load(environment | {"QWEN_MAX_LENGTH": "1"})


def test_a_slip_in_a_name_of_the_engines_is_refused_and_a_name_that_it_has_is_not(environment: dict[str, str]) -> None:
    with pytest.raises(
        SettingsError, match=r"^VLLM_MAX_MODEL_LENGTH is no setting of this service or of vLLM; remove it, or set VLLM_MAX_MODEL_LEN.$"
    ):
        load(environment | {"VLLM_MAX_MODEL_LENGTH": "1"})
    assert load(environment | {"VLLM_LOGGING_LEVEL": "DEBUG"})


def test_the_variant_is_what_the_weights_are(environment: dict[str, str]) -> None:
    folder = environment["QWEN_MODEL_PATH"]
    with pytest.raises(
        SettingsError, match=rf"^QWEN_MODEL_VARIANT is 'awq-4bit', and the weights in '{folder}' are not quantised; set it to"
    ):
        load(environment | {"QWEN_MODEL_VARIANT": "awq-4bit"})
    config = Path(folder, "config.json")
    config.write_text(config.read_text()[:-1] + ', "quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(
        SettingsError, match=rf"^QWEN_MODEL_VARIANT is 'full', and the weights in '{folder}' are quantised \(awq\); set it to"
    ):
        load(environment)
    awq = environment | {"QWEN_MODEL_VARIANT": "awq-4bit"}
    assert load(awq).model_variant == "awq-4bit"
    with pytest.raises(
        SettingsError, match=r"^QWEN_DTYPE is 'bfloat16', and AWQ weights are computed in float16; set it to auto or float16.$"
    ):
        load(awq | {"QWEN_DTYPE": "bfloat16"})


def test_a_kv_cache_that_holds_no_whole_sequence_is_refused(environment: dict[str, str]) -> None:
    Path(environment["QWEN_MODEL_PATH"], "config.json").write_text(json.dumps(QWEN_32B))
    with pytest.raises(
        SettingsError,
        match=r"^QWEN_KV_CACHE_MEMORY_BYTES is '1048576', and one sequence of 8192 tokens \(VLLM_MAX_MODEL_LEN\) takes 2147483648; "
        r"set it to at least 2181038080\.$",
    ):
        load(environment | {"QWEN_KV_CACHE_MEMORY_BYTES": "1048576", "VLLM_MAX_MODEL_LEN": "8192"})
    assert load(environment | {"QWEN_KV_CACHE_MEMORY_BYTES": "2181038080", "VLLM_MAX_MODEL_LEN": "8192"})


def test_names_are_found_in_any_case(environment: dict[str, str]) -> None:
    found = load(environment | {"MAX_BATCH_TOKENS": "4096", "vllm_max_model_len": "512"})
    assert (found.max_batch_tokens, found.max_model_len) == (4096, 512)


def test_ours_leave_the_environment_and_the_engines_own_are_set(environment: dict[str, str]) -> None:
    environment |= {"VLLM_TENSOR_PARALLEL_SIZE": "2", "VLLM_LOGGING_LEVEL": "DEBUG", "HF_HUB_OFFLINE": "0"}
    found = load(environment)
    claim(found, environment)
    assert not {name for name in environment if name.upper() in {ours.upper() for ours in settings.NAMES}}
    assert environment["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert environment["VLLM_CACHE_ROOT"] == f"{found.cache_dir}/vllm"
    assert environment["HF_HUB_OFFLINE"] == "1"


TWO_HOSTS = {"QWEN_ENGINE_HOSTS": "198.51.100.1, 127.0.0.1", "VLLM_TENSOR_PARALLEL_SIZE": "4", "QWEN_ENGINE_PORT": "29600"}


def test_hosts_of_an_engine_know_their_place_by_their_addresses(environment: dict[str, str]) -> None:
    assert place(load(environment)) == (0, "lo")
    worker = load(environment | TWO_HOSTS)
    assert place(worker) == (1, "lo")
    arguments = engine_arguments(worker)
    told = {name: arguments[name] for name in ("nnodes", "node_rank", "master_addr", "master_port", "distributed_executor_backend")}
    assert told == {"nnodes": 2, "node_rank": 1, "master_addr": "198.51.100.1", "master_port": 29600, "distributed_executor_backend": "mp"}
    head = load(environment | TWO_HOSTS | {"QWEN_ENGINE_HOSTS": "127.0.0.1,198.51.100.1"})
    assert engine_arguments(head)["node_rank"] == 0
    claim(worker, environment)
    assert (environment["VLLM_HOST_IP"], environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == ("127.0.0.1", "lo", "lo")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"QWEN_ENGINE_HOSTS": "198.51.100.1,node2"},
            "QWEN_ENGINE_HOSTS is 'node2'; set it to the addresses of the engine's hosts, the one that answers first, for example "
            "10.0.0.1,10.0.0.2.",
        ),
        (
            {"QWEN_ENGINE_HOSTS": "198.51.100.1,198.51.100.1"},
            "QWEN_ENGINE_HOSTS is '198.51.100.1,198.51.100.1', with a host twice; set it to one address of each.",
        ),
        (
            {"VLLM_TENSOR_PARALLEL_SIZE": "1"},
            "VLLM_TENSOR_PARALLEL_SIZE is '1', which 2 hosts (QWEN_ENGINE_HOSTS) cannot share evenly; set it to a multiple of 2.",
        ),
        (
            {"QWEN_BACKEND": "transformers"},
            "QWEN_BACKEND is 'transformers', which answers from one host; set it to vllm, or remove QWEN_ENGINE_HOSTS.",
        ),
        ({"QWEN_ENGINE_PORT": "22"}, "QWEN_ENGINE_PORT is '22'; set it to the port at which an engine's hosts meet, 1024 to 65535."),
    ],
)
def test_an_engine_over_hosts_that_cannot_be_is_refused(environment: dict[str, str], change: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load(environment | TWO_HOSTS | change)
    assert str(refused.value) == sentence


def test_a_host_without_any_of_the_addresses_says_so(environment: dict[str, str]) -> None:
    with pytest.raises(SettingsError) as refused:
        place(load(environment | TWO_HOSTS | {"QWEN_ENGINE_HOSTS": "198.51.100.1,198.51.100.2"}))
    assert (
        str(refused.value)
        == "QWEN_ENGINE_HOSTS is '198.51.100.1,198.51.100.2', and this host has none of them; set it to one address of each host."
    )


def test_settings_become_engine_arguments(environment: dict[str, str]) -> None:
    found = load(
        environment
        | {
            "VLLM_TENSOR_PARALLEL_SIZE": "2",
            "VLLM_MAX_MODEL_LEN": "1024",
            "max_batch_tokens": "4096",
            "max_num_seqs": "16",
            "swap_space": "4",
        }
    )
    arguments = engine_arguments(found)
    assert arguments["tensor_parallel_size"] == 2
    assert arguments["max_model_len"] == 1024
    assert arguments["max_num_batched_tokens"] == 4096
    assert arguments["max_num_seqs"] == 16
    assert arguments["kv_offloading_size"] == 4
    assert "hf_overrides" not in arguments


def test_more_tokens_than_native_bring_yarn(environment: dict[str, str]) -> None:
    found = load(environment | {"VLLM_MAX_MODEL_LEN": "8192"})
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "rope_theta": 1000000.0}
    assert engine_arguments(found)["hf_overrides"] == {"max_position_embeddings": 8192, "rope_parameters": scaling}


@pytest.mark.parametrize(
    ("settings_more", "gpus", "given"),
    [
        ({}, [48 * 1024], None),  # the weights fit: nothing is moved, whatever the budget
        ({}, [], None),  # no GPU
        ({}, [12 * 1024], 10.0),  # they do not: what is missing, and no more than the budget
        ({"VLLM_CPU_OFFLOAD_GB": "3"}, [12 * 1024], 3.0),
        ({"QWEN_CPU_OFFLOAD": "always"}, [48 * 1024], 15.1),  # all that can be moved: the layers
    ],
)
def test_the_engine_gets_the_part_of_the_offload_budget_that_it_needs(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, settings_more: dict[str, str], gpus: list[float], given: float | None
) -> None:
    """The AWQ checkpoint of the 32B model, on GPUs of some MiB."""
    config = {**QWEN_32B, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
    Path(environment["QWEN_MODEL_PATH"], "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("qwen_coder_service.backends.vllm.find_gpus", lambda: ([Gpu(0, "a card", mib, mib) for mib in gpus], ""))
    awq = {"QWEN_MODEL_VARIANT": "awq-4bit", "VLLM_CPU_OFFLOAD_GB": "64", "VLLM_MAX_MODEL_LEN": "4096", "max_batch_tokens": "2048"}
    found = offload_gib(load(environment | awq | settings_more))
    if given is None:
        assert found == 0
    else:
        assert found == pytest.approx(given, abs=1.0)
    arguments = engine_arguments(load(environment | awq | settings_more), found)
    assert arguments.get("cpu_offload_gb", 0) == found


def test_check_reads_a_file_as_systemd_does(environment: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "env"
    environment["QWEN_PERSONA_PROMPT"] = '"I am \\"quoted\\"."'
    file.write_text("# a comment\n" + "".join(f"{name}={value}\n" for name, value in environment.items()))
    assert settings.read_env_file(file)["QWEN_PERSONA_PROMPT"] == 'I am "quoted".'
    assert settings.main(["--check", "--env-file", str(file)]) == 0
    file.write_text(file.read_text() + "swap_space=-1\n")
    result = subprocess.run(
        [sys.executable, "-m", "qwen_coder_service.settings", "--check", "--env-file", file], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (78, "swap_space is '-1'; set it to a number of GiB, 0 or more.\n")


@pytest.mark.parametrize(
    ("change", "arguments", "sentence"),
    [
        ({"QWEN_BACKEND": "llama"}, [], "QWEN_BACKEND is 'llama'; set it to vllm or transformers.\n"),
        ({}, ["--workers", "2"], "--workers is 2; set it to 1, as every worker would load the model again.\n"),
    ],
)
def test_a_wrong_start_ends_with_one_sentence_and_78(
    environment: dict[str, str], change: dict[str, str], arguments: list[str], sentence: str
) -> None:
    command = [Path(sys.executable).parent / "gunicorn", "--config", "python:qwen_coder_service.gunicorn_conf", "--bind", "127.0.0.1:0"]
    result = subprocess.run(
        [*command, *arguments, "qwen_coder_service.main:app"],
        env={"PATH": os.environ["PATH"], **environment, **change},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr.splitlines(keepends=True)[-1]) == (78, sentence)
