"""Say whether a model fits on this host's GPUs with the headroom that is asked for: predicted, and, where there are GPUs, measured.

``--load-model`` loads it in vLLM with the KV cache of exactly one full-length sequence and makes it read a step's worth of tokens; what
nvidia-smi then calls free is the headroom itself. Without that, or without a GPU, the prediction of ``sizing`` is all there is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .settings import Settings, SettingsError, load, read_env_file
from .sizing import GB, GIB, MIB, Demand, Fit, ModelShape, SizingError, cuda_memory_bytes, demand, fit

ENV_FILE = Path("/opt/qwen-coder-service/qwen-coder.env")
QUERY = ["--query-gpu=index,name,memory.total,memory.free", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Gpu:
    """A device as nvidia-smi sees it; memory in MiB."""

    index: int
    name: str
    total_mib: float
    free_mib: float


@dataclass(frozen=True)
class Measured:
    """What loading the model took of each device, and left."""

    used_bytes: list[int]
    headroom_bytes: int
    """Of the fullest device: free memory beside the model and one full-length sequence."""
    predicted_bytes: int
    difference_percent: float
    """Of the fullest device's used memory from the predicted."""


class ProbeError(RuntimeError):
    """The model could not be loaded; the message is one sentence."""


def find_gpus() -> tuple[list[Gpu], str]:
    """Ask nvidia-smi for the GPUs that CUDA_VISIBLE_DEVICES leaves. Where there are none, one sentence says how that is known."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return [], "No GPU was found: there is no nvidia-smi on this host's PATH."
    try:
        answer = subprocess.run([command, *QUERY], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"No GPU was found: nvidia-smi does not answer ({error})."
    if answer.returncode:
        said = " ".join((answer.stdout + answer.stderr).split())
        return [], f"No GPU was found: nvidia-smi ends with {answer.returncode} ({said})."
    gpus = []
    for line in filter(None, map(str.strip, answer.stdout.splitlines())):
        try:
            index, *name, total, free = (part.strip() for part in line.split(","))
            gpus.append(Gpu(int(index), ", ".join(name), float(total), float(free)))
        except ValueError:
            return [], f"No GPU was found: nvidia-smi says '{line}', which is not an index, a name and two sizes in MiB."
    if not gpus:
        return [], "No GPU was found: nvidia-smi lists none."
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpus, ""
    try:
        return [next(gpu for gpu in gpus if gpu.index == int(word)) for word in visible.split(",")], ""
    except (ValueError, StopIteration):
        there = ", ".join(str(gpu.index) for gpu in gpus)
        return [], f"No GPU was found: CUDA_VISIBLE_DEVICES is '{visible}', and nvidia-smi lists {there}; set it to some of these."


def _wanted(settings: Settings) -> dict[str, Any]:
    return {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "max_model_len": settings.max_model_len,
        "max_batch_tokens": settings.max_batch_tokens,
        "max_num_seqs": settings.max_num_seqs,
        "dtype": settings.dtype,
        "enforce_eager": settings.enforce_eager,
    }


def foretell(settings: Settings, shape: ModelShape, gpus: list[Gpu], min_headroom_gb: float = 0.0) -> Fit:
    """How a model fits on these devices, with these settings.

    Raises:
        SizingError: as ``sizing.fit``.
    """
    return fit(
        shape,
        device_memory_bytes=cuda_memory_bytes(min(gpu.total_mib for gpu in gpus)),
        devices=len(gpus) * settings.hosts,  # which are alike
        gpu_memory_utilization=settings.gpu_memory_utilization,
        cpu_offload_gb=settings.cpu_offload_gb,
        cpu_offload_always=settings.cpu_offload == "always",
        swap_space_gb=settings.swap_space,
        kv_cache_memory_bytes=settings.kv_cache_memory_bytes,
        min_headroom_gb=min_headroom_gb,
        **_wanted(settings),
    )


def measure(settings: Settings, need: Demand, before: list[Gpu], dummy_weights: bool) -> Measured:
    """Load the model over the first devices and see what is gone. Not tried on a GPU by the tests.

    Raises:
        ProbeError: vLLM could not load it.
    """
    # nobody outside this host is asked or told anything; caches are left to this user's own directories
    local = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    os.environ.update({"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_STREAM": "ext://sys.stderr", **local})
    import vllm

    from .backends.vllm import engine_arguments

    arguments = engine_arguments(settings)
    del arguments["enable_log_requests"]  # of the asynchronous engine only
    # one sequence, and the block that the engine keeps for itself, in blocks of up to 256 tokens: attention backends choose their own
    spare = 2 * 256 * need.kv_bytes_per_token
    arguments["kv_cache_memory_bytes"] = need.kv_bytes_per_sequence + spare
    if dummy_weights:
        arguments["load_format"] = "dummy"
    sys.stdout.flush()
    report = os.dup(1)
    os.dup2(2, 1)  # libraries print; standard output is for the report
    try:
        engine = vllm.LLM(**arguments)
        tokens = max(1, min(settings.max_batch_tokens, need.max_model_len - 2))
        engine.generate(vllm.TokensPrompt(prompt_token_ids=[1] * tokens), vllm.SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    except (RuntimeError, ValueError, OSError) as error:
        raise ProbeError(f"The model was not loaded: {' '.join(str(error).split())}") from error
    finally:
        os.dup2(report, 1)
        os.close(report)
    after, problem = find_gpus()
    if problem:
        raise ProbeError(problem)
    pairs = list(zip(before, after, strict=True))[: need.tensor_parallel_size]
    used = [int((was.free_mib - now.free_mib) * MIB) - spare for was, now in pairs]
    predicted = need.total_bytes
    return Measured(
        used_bytes=used,
        headroom_bytes=int(min(now.free_mib for _, now in pairs) * MIB) + spare,
        predicted_bytes=predicted,
        difference_percent=round(100 * (max(used) - predicted) / predicted, 1),
    )


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """The service's settings as they are on this host, with the options over them."""
    file = options.env_file or (ENV_FILE if "QWEN_MODEL_PATH" not in os.environ and not options.model_path and ENV_FILE.exists() else None)
    values = read_env_file(file) if file else dict(os.environ)
    # the GPUs that the service uses are those to look at
    os.environ.update({name: value for name, value in values.items() if name in ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES")})
    given = {
        "QWEN_MODEL_PATH": options.model_path,
        "QWEN_DTYPE": options.dtype,
        "VLLM_TENSOR_PARALLEL_SIZE": options.tensor_parallel_size,
        "VLLM_MAX_MODEL_LEN": options.max_model_len,
        "VLLM_GPU_MEMORY_UTILIZATION": options.gpu_memory_utilization,
    }
    values.update({name: str(value) for name, value in given.items() if value is not None})
    if "QWEN_MODEL_PATH" in values and "QWEN_MODEL_VARIANT" not in values:
        shape = ModelShape.from_directory(Path(values["QWEN_MODEL_PATH"]))
        values["QWEN_MODEL_VARIANT"] = "awq-4bit" if shape.quantisation else "full"
    return values


def _amount(count: int | float) -> str:
    return f"{count / GIB:10.2f} GiB {count / GB:10.2f} GB"


def _rows(need: Demand, found: Fit | None, measured: Measured | None) -> list[tuple[str, str]]:
    devices = need.tensor_parallel_size
    rows = [
        (f"weights ({need.parameters / 1e9:.3f} B parameters over {devices} device{'s' * (devices > 1)})", _amount(need.weights_bytes)),
        (f"KV cache of one sequence of {need.max_model_len} tokens", _amount(need.kv_bytes_per_sequence)),
        ("activations (estimate)", _amount(need.activation_bytes)),
        ("CUDA graphs (estimate)", _amount(need.graph_bytes)),
        ("CUDA context and communication (estimate)", _amount(need.context_bytes)),
        ("together", _amount(need.total_bytes)),
    ]
    if found is not None:
        rows += [
            ("device memory", _amount(found.device_memory_bytes)),
            ("offloaded to host memory", _amount(found.offload_bytes)),
            ("headroom", _amount(found.headroom_bytes)),
            ("headroom asked for", _amount(found.min_headroom_bytes)),
            ("KV cache that the engine will have", f"{_amount(max(0, found.kv_pool_bytes))}"),
            ("  tokens", f"{found.kv_tokens:10d}"),
            ("  full-length sequences", f"{found.full_sequences:10.2f}"),
            ("host memory (estimate)", _amount(found.host_memory_bytes)),
        ]
    if measured is not None:
        rows += [
            ("measured: used on the fullest device", _amount(max(measured.used_bytes))),
            ("measured: difference from the prediction", f"{measured.difference_percent:+10.1f} %"),
            ("measured: headroom", _amount(measured.headroom_bytes)),
        ]
    return rows


def _report(
    sentences: list[str], gpus: list[Gpu], need: Demand, found: Fit | None, measured: Measured | None, holds: bool | None
) -> dict[str, Any]:
    return {
        "sentences": sentences,
        "gpus": [asdict(gpu) for gpu in gpus],
        "prediction": found.figures() if found else {**asdict(need), "total_bytes": need.total_bytes},
        "measured": asdict(measured) if measured else None,
        "headroom_holds": holds,
    }


def _print_table(report: Mapping[str, Any], need: Demand, found: Fit | None, measured: Measured | None) -> None:
    for gpu in report["gpus"]:
        print(f"GPU {gpu['index']}: {gpu['name']}, {gpu['total_mib']:.0f} MiB, {gpu['free_mib']:.0f} MiB free")
    print("\n".join(f"{name:<58}{value}" for name, value in _rows(need, found, measured)))
    print("\n".join(report["sentences"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwen-memory-probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit status: 0 the headroom is there, or nothing could be said of it; 1 it is not; 2 wrong use",
    )
    parser.add_argument("--model-path", type=Path, help="directory of the model (QWEN_MODEL_PATH, or the env file's)")
    parser.add_argument("--env-file", type=Path, help=f"the service's settings ({ENV_FILE}, if it is there and QWEN_MODEL_PATH is not set)")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float16", "float32"], help="of the weights")
    parser.add_argument("--load-model", action="store_true", help="load the model with vLLM and measure")
    parser.add_argument("--dummy-weights", action="store_true", help="with --load-model: only the model's config.json is needed")
    parser.add_argument("--tensor-parallel-size", type=int, help="devices that share the model")
    parser.add_argument("--max-model-len", type=int, help="tokens of a full-length sequence")
    parser.add_argument("--gpu-memory-utilization", type=float, help="vLLM's share of each device")
    parser.add_argument("--min-headroom-gb", type=float, help="GB that are to stay free on each device (10; 0 for quantised weights)")
    parser.add_argument("--format", choices=["table", "json"], default="table", help="of what is printed")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Predict, measure if asked to, and say whether the headroom is there."""
    options = _parser().parse_args(arguments)
    try:
        settings = load(_environment(options))
        shape = ModelShape.from_directory(settings.model_path)
        need = demand(shape, **_wanted(settings))
    except (SettingsError, SizingError, OSError) as error:
        print(error, file=sys.stderr)
        return 2

    gpus, sentence = find_gpus()
    sentences = [sentence] if sentence else []
    found: Fit | None = None
    measured: Measured | None = None
    holds: bool | None = None
    if gpus:
        headroom = options.min_headroom_gb if options.min_headroom_gb is not None else 0 if shape.quantisation else 10
        found = foretell(settings, shape, gpus, headroom)
        need, holds = found.demand, found.headroom_holds and found.fits
        sentences += [problem.sentence for problem in found.problems]
        if options.load_model and not found.problems:
            try:
                measured = measure(settings, need, gpus, options.dummy_weights)
                holds = measured.headroom_bytes >= found.min_headroom_bytes
            except ProbeError as error:
                sentences.append(str(error))
                holds = False
        elif options.load_model:
            sentences.append("Nothing was loaded: the model would not fit.")
        left, least = measured.headroom_bytes if measured else found.headroom_bytes, found.min_headroom_bytes
        kind = "measured" if measured else "predicted"
        sentences.append(
            f"The {kind} headroom is {left / GB:.1f} GB a device, {'at least' if left >= least else 'less than'} {least / GB:g} GB."
        )
    elif options.load_model:
        sentences.append("Nothing was loaded.")

    report = _report(sentences, gpus, need, found, measured, holds)
    if options.format == "json":
        print(json.dumps(report, indent=2))
    else:
        _print_table(report, need, found, measured)
    return 1 if holds is False else 0


if __name__ == "__main__":
    sys.exit(main())
