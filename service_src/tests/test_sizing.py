"""What fits on a GPU: figures of the real models, every sentence to the letter, and the engine's own figures for small ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import QWEN_32B

from qwen_coder_service import sizing
from qwen_coder_service.sizing import GIB, MIB, Fit, ModelShape, SizingError, cuda_memory_bytes, fit

QWEN = QWEN_32B
AWQ = {
    **QWEN,
    "torch_dtype": "float16",
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "modules_to_not_convert": None},
}
FULL, QUANTISED = ModelShape.from_config(QWEN), ModelShape.from_config(AWQ)
A100 = int(79.25 * GIB)  # as PyTorch sees the 80 GB card
L40S = int(44.4 * GIB)
A6000 = int(47.5 * GIB)


def dual(**changes: Any) -> Fit:
    """The plan's tier: full precision over two 80 GB cards."""
    usual = {"devices": 2, "tensor_parallel_size": 2, "max_model_len": 131072, "min_headroom_gb": 10}
    return fit(FULL, **{"device_memory_bytes": A100, **usual, **changes})


def single(**changes: Any) -> Fit:
    """Full precision on one 80 GB card."""
    usual = {"max_model_len": 16384, "max_num_seqs": 16, "min_headroom_gb": 10}
    return fit(FULL, **{"device_memory_bytes": A100, **usual, **changes})


def awq(**changes: Any) -> Fit:
    """Quantised, on one 48 GB card."""
    usual = {"max_model_len": 65536, "max_num_seqs": 16, "cpu_offload_gb": 64}
    return fit(QUANTISED, **{"device_memory_bytes": L40S, **usual, **changes})


def test_parameters_and_weights_are_the_model_cards() -> None:
    assert FULL.parameters() == 32_763_876_352
    assert FULL.weights_bytes() / GIB == pytest.approx(61.0, abs=0.05)
    assert FULL.weights_bytes("float32") == 2 * FULL.weights_bytes()
    assert QUANTISED.weights_bytes() / GIB == pytest.approx(18.0, abs=0.05)
    assert QUANTISED.parameters() == FULL.parameters()


def test_kv_cache_is_256_kib_a_token_and_half_of_it_over_two_devices() -> None:
    assert FULL.kv_bytes_per_token() == 256 << 10
    assert FULL.kv_bytes_per_token(tensor_parallel_size=2) == 128 << 10
    assert FULL.kv_bytes_per_token("fp8") == 128 << 10
    # vLLM gives each device at least one KV head
    assert replace(FULL, kv_heads=2).kv_bytes_per_token(tensor_parallel_size=4) == replace(FULL, kv_heads=2).kv_bytes_per_token() // 2


def test_the_tiers_fit_with_the_figures_of_the_documentation() -> None:
    two = dual()
    assert two.problems == []
    assert two.demand.weights_bytes / GIB == pytest.approx(30.5, abs=0.05)
    assert two.demand.kv_bytes_per_sequence == 16 * GIB
    assert two.kv_tokens == pytest.approx(322_000, rel=0.05)
    assert two.full_sequences == pytest.approx(2.46, rel=0.05)
    assert two.headroom_holds
    one = single()
    assert one.problems == [] and one.headroom_holds
    assert one.demand.kv_bytes_per_sequence == 4 * GIB
    quantised = awq()
    assert quantised.problems == []
    assert quantised.kv_tokens == pytest.approx(85_000, rel=0.02)
    assert awq(device_memory_bytes=A6000).kv_tokens == pytest.approx(97_000, rel=0.02)
    # weights fit: the budget is not touched, unless that is asked for
    assert quantised.offload_bytes == 0
    assert awq(cpu_offload_always=True).offload_bytes == quantised.demand.offloadable_bytes


def test_headroom_is_counted_before_the_rest_becomes_kv_cache() -> None:
    two = dual()
    need = two.demand
    parts = need.weights_bytes + need.kv_bytes_per_sequence + need.activation_bytes + need.graph_bytes + need.context_bytes
    assert two.headroom_bytes == A100 - parts == A100 - need.total_bytes
    # what vLLM leaves of the card is less, and is no figure of this rule
    assert A100 - two.share_bytes < 10 * sizing.GB < two.headroom_bytes


def test_activations_are_what_vllm_printed_for_llama_3_8b() -> None:
    llama = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    shape = ModelShape.from_config({**llama, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192})
    assert shape.parameters() == 8_030_261_248
    assert shape.weights_bytes() / GIB == pytest.approx(14.96, abs=0.01)  # vllm#10511, as the next two
    assert shape.weights_bytes(tensor_parallel_size=2) / GIB == pytest.approx(7.48, abs=0.01)
    for size in (1, 2):
        assert shape.activation_bytes(8192, 256, tensor_parallel_size=size) / GIB == pytest.approx(1.26, rel=0.05)


def test_offloading_takes_what_is_missing_and_no_more() -> None:
    cards = {"device_memory_bytes": L40S, "max_model_len": 32768, "min_headroom_gb": 0}
    found = single(**cards, cpu_offload_gb=64)
    assert found.problems == []
    assert 0 < found.offload_bytes < 64 * GIB
    assert found.longest_sequence >= 32768
    assert single(**cards, cpu_offload_gb=64, max_batch_tokens=16384).offload_bytes > found.offload_bytes
    # the headroom counts too
    assert single(**{**cards, "min_headroom_gb": 10}, cpu_offload_gb=64).offload_bytes > found.offload_bytes
    assert found.host_memory_bytes == 2 * sizing.HOST_PROCESS_BYTES + 2 * found.offload_bytes
    assert single(**cards, cpu_offload_gb=64, swap_space_gb=4).host_memory_bytes == found.host_memory_bytes + 4 * GIB


def test_a_cpu_has_no_context_no_graphs_and_larger_blocks() -> None:
    found = fit(FULL, device_memory_bytes=256 * GIB, device="cpu", kv_cache_memory_bytes=GIB, max_model_len=2048)
    assert (found.demand.context_bytes, found.demand.graph_bytes, found.demand.block_size) == (0, 0, 128)
    assert found.kv_tokens == 4096  # measured with a 64-layer dummy


@pytest.mark.parametrize(
    ("found", "sentences"),
    [
        (
            lambda: dual(tensor_parallel_size=3),
            [
                "VLLM_TENSOR_PARALLEL_SIZE is '3', which does not divide the model's 40 attention heads; set it to one of 1, 2, 4, 8.",
            ],
        ),
        (
            lambda: dual(tensor_parallel_size=5, devices=5),
            [
                "VLLM_TENSOR_PARALLEL_SIZE is '5', over which the model's KV heads, MLP and vocabulary cannot be split evenly; "
                "set it to one of 1, 2, 4, 8.",
            ],
        ),
        (
            lambda: dual(devices=1, max_model_len=16384),
            [
                "VLLM_TENSOR_PARALLEL_SIZE is '2', and there is 1 device; set it to 1.",
            ],
        ),
        (
            lambda: single(tensor_parallel_size=8, devices=3, min_headroom_gb=0),
            [
                "VLLM_TENSOR_PARALLEL_SIZE is '8', and there are 3 devices; set it to 2.",
            ],
        ),
        (
            lambda: awq(max_model_len=131072),
            [
                "VLLM_MAX_MODEL_LEN is '131072', and a share of 0.92 of 44.4 GiB has room for a sequence of 85,472 tokens beside "
                "the weights; set it to 84992.",
            ],
        ),
        (
            lambda: single(max_model_len=32768),
            [
                "VLLM_MAX_MODEL_LEN is '32768', and a sequence of that length leaves 7.2 GB of the 10.0 GB that are to stay free; "
                "set it to 21504.",
            ],
        ),
        (
            lambda: single(max_model_len=65536, gpu_memory_utilization=0.99, min_headroom_gb=0),
            [
                "VLLM_MAX_MODEL_LEN is '65536', and a device of 79.2 GiB has room for a sequence of 60,240 tokens beside the weights; "
                "set it to 59392.",
            ],
        ),
        (
            lambda: single(gpu_memory_utilization=0.5),
            [
                "VLLM_GPU_MEMORY_UTILIZATION is '0.5', and that share of 79.2 GiB does not hold 61.0 GiB of weights and a sequence of "
                "4,096 tokens with 10.0 GB to spare; set it to 0.85.",
            ],
        ),
        (
            lambda: awq(device_memory_bytes=24 * GIB, max_model_len=4096, gpu_memory_utilization=0.99),
            [
                "VLLM_GPU_MEMORY_UTILIZATION is '0.99', which leaves 0.2 GiB of 24.0 GiB for the CUDA context; set it to 0.98.",
            ],
        ),
        (
            lambda: dual(gpu_memory_utilization=0.99),
            [
                "VLLM_GPU_MEMORY_UTILIZATION is '0.99', which leaves 0.8 GiB of 79.2 GiB for the CUDA context and communication; "
                "set it to 0.98.",
            ],
        ),
        (
            lambda: single(device_memory_bytes=L40S, devices=4),
            [
                "VLLM_TENSOR_PARALLEL_SIZE is '1', and a device of 44.4 GiB does not hold 61.0 GiB of weights and a sequence of "
                "4,096 tokens with 10.0 GB to spare; set it to 4.",
            ],
        ),
        (
            lambda: single(device_memory_bytes=L40S, min_headroom_gb=0),
            [
                "QWEN_MODEL_VARIANT is 'full', and a device of 44.4 GiB does not hold 61.0 GiB of weights and a sequence of "
                "4,096 tokens; set it to awq-4bit.",
            ],
        ),
        (
            lambda: single(device_memory_bytes=L40S, min_headroom_gb=0, cpu_offload_gb=10),
            [
                "VLLM_CPU_OFFLOAD_GB is '10', and a device of 44.4 GiB does not hold 61.0 GiB of weights and a sequence of "
                "4,096 tokens; set it to 27.",
            ],
        ),
        (
            lambda: dual(device_memory_bytes=12 * GIB, min_headroom_gb=0, max_model_len=2048),
            [
                "VLLM_CPU_OFFLOAD_GB is '0', and each of 2 devices of 12.0 GiB does not hold 30.5 GiB of weights and a sequence of "
                "2,048 tokens; set it to 24.",
            ],
        ),
        (
            lambda: awq(device_memory_bytes=12 * GIB, max_model_len=131072, cpu_offload_gb=0),
            [
                "VLLM_TENSOR_PARALLEL_SIZE is '1', and a device of 12.0 GiB does not hold 18.0 GiB of weights and a sequence of "
                "4,096 tokens; set it to 4 on a host with 4 such devices.",
            ],
        ),
        (
            lambda: awq(device_memory_bytes=5 * GIB, max_model_len=131072, cpu_offload_gb=0),
            [
                "VLLM_TENSOR_PARALLEL_SIZE is '1', and a device of 5.0 GiB does not hold 18.0 GiB of weights and a sequence of "
                "4,096 tokens; set it to 8 on a host with 8 devices of 7 GiB.",
            ],
        ),
        (
            lambda: awq(kv_cache_memory_bytes=GIB, max_model_len=8192),
            [
                "QWEN_KV_CACHE_MEMORY_BYTES is '1073741824', which holds 4,080 of a sequence's 8,192 tokens; "
                "set it to at least 2151677952.",
            ],
        ),
        (
            lambda: awq(kv_cache_memory_bytes=40 * GIB),
            [
                "QWEN_KV_CACHE_MEMORY_BYTES is '42949672960', and 22.9 GiB of 44.4 GiB are left beside the weights; "
                "set it to at most 24574427136.",
            ],
        ),
    ],
)
def test_what_does_not_fit_is_named_with_the_value_that_would(found: Any, sentences: list[str]) -> None:
    assert [problem.sentence for problem in found().problems] == sentences


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (awq, {"max_model_len": 131072}),
        (awq, {"max_model_len": 131072, "device_memory_bytes": A6000}),
        (single, {"max_model_len": 131072}),
        (single, {"max_model_len": 32768, "min_headroom_gb": 0, "gpu_memory_utilization": 0.85}),
        (dual, {"max_model_len": 1 << 20}),
    ],
)
def test_the_length_that_is_named_fits_and_is_nearly_the_longest(make: Any, changes: dict[str, Any]) -> None:
    before = make(**changes)
    working = int(before.problems[0].working)
    assert working % 1024 == 0
    assert make(**{**changes, "max_model_len": working}).problems == []
    assert make(**{**changes, "max_model_len": before.longest_sequence}).problems == []
    assert make(**{**changes, "max_model_len": before.longest_sequence + 1}).problems
    assert before.longest_sequence - working < 1024


@pytest.mark.parametrize(
    "changes",
    [
        {"gpu_memory_utilization": 0.5},
        {"device_memory_bytes": L40S, "devices": 4},
        {"device_memory_bytes": L40S, "cpu_offload_gb": 10},
        {"kv_cache_memory_bytes": GIB},
    ],
)
def test_other_values_that_are_named_work_too(changes: dict[str, Any]) -> None:
    names = {
        "VLLM_GPU_MEMORY_UTILIZATION": ("gpu_memory_utilization", float),
        "VLLM_TENSOR_PARALLEL_SIZE": ("tensor_parallel_size", int),
        "VLLM_CPU_OFFLOAD_GB": ("cpu_offload_gb", float),
        "QWEN_KV_CACHE_MEMORY_BYTES": ("kv_cache_memory_bytes", int),
    }
    (problem,) = single(**changes).problems
    name, kind = names[problem.setting]
    assert single(**{**changes, name: kind(problem.working)}).problems == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral', and only qwen2, qwen3, llama and mistral are sized; use such a model."),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quant_method is 'gptq', and only awq is sized; use an AWQ checkpoint or an unquantised one.",
        ),
        (
            {"quantization_config": {"quant_method": "awq", "modules_to_not_convert": ["visual"]}},
            "modules_to_not_convert is 'visual', and only lm_head is sized; use a wholly quantised checkpoint.",
        ),
        ({"hidden_size": None}, "config.json has no hidden_size; complete it from the model's repository."),
    ],
)
def test_models_that_cannot_be_sized_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SizingError) as error:
        ModelShape.from_config({name: value for name, value in {**QWEN, **change}.items() if value is not None})
    assert str(error.value) == sentence


def test_types_that_are_unknown_are_refused() -> None:
    with pytest.raises(SizingError) as error:
        fit(FULL, device_memory_bytes=A100, dtype="int4")
    assert str(error.value) == "QWEN_DTYPE is 'int4'; set it to auto, bfloat16, float16 or float32."


def test_the_file_needs_no_package_and_no_other_module() -> None:
    code = (
        "import importlib.util, json, sys\n"
        "spec = importlib.util.spec_from_file_location('sizing', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['sizing'] = module\n"
        "spec.loader.exec_module(module)\n"
        "shape = module.ModelShape.from_config(json.loads(sys.argv[2]))\n"
        "print(json.dumps(module.fit(shape, device_memory_bytes=48 << 30, max_model_len=131072).figures()))\n"
        "assert not {'pydantic', 'torch', 'vllm', 'qwen_coder_service'} & set(sys.modules)\n"
    )
    # -I -S: neither this environment's packages nor the current directory
    command = [sys.executable, "-I", "-S", "-c", code, str(Path(sizing.__file__)), json.dumps(AWQ)]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert figures["parameters"] == 32_763_876_352
    assert figures["problems"][0]["setting"] == "VLLM_MAX_MODEL_LEN"
    assert figures["fits"] is False and figures["headroom_holds"] is False


def test_a_driver_keeps_some_of_what_it_calls_total() -> None:
    # nvidia-smi's MiB, and GiB as PyTorch prints them
    for total, seen in ((81920, 79.25), (81559, 79.1), (46068, 44.4), (49140, 47.5)):
        assert cuda_memory_bytes(total) / GIB == pytest.approx(seen, rel=0.011)
        assert cuda_memory_bytes(total) / GIB <= seen + 0.01


def small(layers: int = 2, heads: int = 4, kv_heads: int = 2, vocab: int = 320, **more: Any) -> dict[str, Any]:
    """The config.json of a model that the CPU engine starts in a second: heads of 32 dimensions are its smallest."""
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab}
    rest = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1}
    shape = {"hidden_size": 32 * heads, "intermediate_size": 64 * heads, "max_position_embeddings": 2048}
    return {**QWEN, **sizes, **shape, **rest, **more}


# model, arguments of the engine
ENGINES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (small(), {"dtype": "float32", "kv_cache_memory_bytes": 16 * MIB}),
    (small(), {"dtype": "bfloat16", "kv_cache_memory_bytes": 16 * MIB}),
    (small(layers=7, heads=6, kv_heads=3), {"dtype": "float32", "kv_cache_memory_bytes": 33 * MIB + 12345}),
    (small(layers=5, heads=8, kv_heads=1, vocab=310), {"dtype": "bfloat16", "kv_cache_memory_bytes": 10 * MIB, "block_size": 32}),
    (small(layers=64, kv_heads=4), {"dtype": "float32", "kv_cache_memory_bytes": 64 * MIB, "max_model_len": 640}),
    (small(tie_word_embeddings=True), {"dtype": "float32", "kv_cache_memory_bytes": 5 * MIB, "block_size": 64}),
    (
        small(heads=8, kv_heads=2, intermediate_size=1024, quantization_config={**AWQ["quantization_config"], "zero_point": True}),
        {"dtype": "bfloat16", "kv_cache_memory_bytes": 16 * MIB},
    ),
    # the longest sequence that fits: one block is the engine's own
    (small(max_position_embeddings=8192), {"dtype": "float32", "kv_cache_memory_bytes": 4 * MIB - 1, "max_model_len": 3840}),
]
# one token more than that
REFUSED = (small(max_position_embeddings=8192), {"dtype": "float32", "kv_cache_memory_bytes": 4 * MIB - 1, "max_model_len": 3841})
PARALLEL: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (small(heads=4, kv_heads=2, vocab=310), {"dtype": "float32", "kv_cache_memory_bytes": 16 * MIB, "tensor_parallel_size": 2}),
    (small(heads=4, kv_heads=1), {"dtype": "bfloat16", "kv_cache_memory_bytes": 16 * MIB, "tensor_parallel_size": 2}),
]


def start_engines(folder: Path, configurations: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """What the engine says of each configuration."""
    script = Path(__file__).with_name("engine_sizes.py")
    given = json.dumps([{"config": config, "arguments": arguments} for config, arguments in configurations])
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(script.parent), "VLLM_CACHE_ROOT": str(folder)}
    done = subprocess.run([sys.executable, str(script), str(folder), given], capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def predict(config: dict[str, Any], arguments: dict[str, Any]) -> Fit:
    """What this service says of it."""
    size = arguments.get("tensor_parallel_size", 1)
    return fit(ModelShape.from_config(config), device_memory_bytes=8 * GIB, devices=size, device="cpu", **arguments)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All of them, in one process: importing vLLM takes longer than most starts."""
    return start_engines(tmp_path_factory.mktemp("engines"), [*ENGINES, REFUSED, *PARALLEL])


@pytest.mark.engine
def test_the_engine_has_the_tokens_and_the_weights_that_are_predicted(engines: list[dict[str, Any]]) -> None:
    for (config, arguments), seen in zip(ENGINES, engines[: len(ENGINES)], strict=True):
        predicted = predict(config, arguments)
        assert predicted.problems == []
        assert predicted.demand.block_size == seen["block_size"]
        assert predicted.kv_tokens == pytest.approx(seen["tokens"], rel=0.03)
        assert seen["weights"] == [predicted.demand.weights_bytes]


@pytest.mark.engine
def test_and_so_have_two_devices_together(engines: list[dict[str, Any]]) -> None:
    for (config, arguments), seen in zip(PARALLEL, engines[-len(PARALLEL) :], strict=True):
        predicted = predict(config, arguments)
        assert predicted.problems == []
        assert predicted.kv_tokens == pytest.approx(seen["tokens"], rel=0.03)
        assert seen["weights"] == [predicted.demand.weights_bytes] * 2


@pytest.mark.engine
def test_and_refuses_one_token_more_than_the_longest_sequence(engines: list[dict[str, Any]]) -> None:
    predicted = predict(*REFUSED)
    assert [problem.setting for problem in predicted.problems] == ["QWEN_KV_CACHE_MEMORY_BYTES"]
    refused = engines[len(ENGINES)]["refused"]
    assert re.findall(r"estimated maximum model length is (\d+)", refused) == [str(predicted.longest_sequence)]
