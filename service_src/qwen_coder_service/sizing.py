"""What a model needs of a GPU's memory, and what fits: weights, KV cache, activations and graphs, CUDA context.

Only the standard library, and no other module of the service: the control machine loads this very file, without the service's
packages, to refuse an inventory that cannot work. Every figure is in bytes unless its name says otherwise. GiB is 2**30 bytes, GB is
10**9: the names ``*_gb`` of ``VLLM_CPU_OFFLOAD_GB`` and ``swap_space`` are GiB (vLLM reads them so), only ``min_headroom_gb`` is GB.

What is exact: parameters, weights, KV bytes per token, blocks and tokens; they follow the sources of vLLM 0.32 and are compared with
the running engine (tests/test_sizing.py). What is an estimate: activations, graphs, context and the processes' host memory; each
says where it comes from, and errs towards more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

MIB, GIB, GB = 1 << 20, 1 << 30, 10**9

BLOCK_SIZES = {"cuda": 16, "cpu": 128}
"""Tokens of a KV block where none are asked for (vLLM 0.32: config/cache.py, platforms/cpu.py)."""

VOCAB_PADDING = 64
"""Rows of the embeddings are filled up to a multiple of this (vLLM: vocab_parallel_embedding.py)."""

CUDA_CONTEXT_BYTES = int(1.79 * GIB)
"""A process's memory on a GPU beside its tensors: context, kernels, workspaces. 1.79 GiB as vLLM printed it for Llama-3-8B on one
80 GB card (non_torch_memory, vllm#10511); releases that load kernels lazily take less."""

COMMUNICATION_BYTES = int(1.79 * GIB)
"""What tensor parallelism adds to that on each GPU (NCCL, all-reduce buffers): 3.58 - 1.79 GiB, the same measurement with two GPUs."""

RESERVED_SHARE = 0.013
"""Of what nvidia-smi calls memory.total, the driver keeps this much from CUDA at most: 81920 MiB are 79.25 GiB to PyTorch, 46068 MiB are
44.4 GiB (1.3 %)."""

LEAST_CONTEXT_BYTES = 400 * MIB
"""The part of it that is there before anything is loaded, measured on a bare card (Sandermage/genesis-vllm-patches#24). vLLM takes its
share of the whole card and starts only if that much is still free."""

LEAST_COMMUNICATION_BYTES = 544 * MIB
"""The same with tensor parallelism: what NCCL took for one group of two A100 with NVLink (NVIDIA/nccl#964)."""

RUNTIME_BYTES = 256 * MIB
"""The part of it that vLLM counts against its share: what grows after the snapshot that it takes once context and NCCL stand
(gpu_worker.py). 0.05 to 0.23 GiB in logs of single GPUs (non_torch_memory, vLLM 0.7 and 0.8)."""

SAMPLER_BYTES = 40
"""Per sequence and entry of the vocabulary, at the sampler's peak: logits in 16 and 32 bits, their sorted copy with 64-bit indices,
probabilities, and the sort's own space. From logs: 1.26 GiB for 256 x 128256 (vllm#10511), 1.40 to 1.45 GiB for 256 x 151936."""

GRAPH_BYTES_PER_LAYER = int(0.4 * MIB)
"""Of one CUDA graph: 0.21 GiB for 35 graphs of 16 layers (vllm#11349), 26 MiB a graph (vllm#22897)."""

LARGEST_GRAPH = 512
"""Tokens of the largest graph that vLLM captures by itself (config/vllm.py; 1024 on Blackwell)."""

HOST_PROCESS_BYTES = 4 * GIB
"""Host memory of the service and of each engine process without offloaded weights: a guess, not measured on a GPU host."""

LEAST_USEFUL_TOKENS = 4096
"""Weights count as fitting when a sequence of this length (or of max_model_len, if that is shorter) fits beside them."""

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "half": 2, "float32": 4, "float": 4}
KV_ITEM_BYTES = {**ITEM_BYTES, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


class SizingError(ValueError):
    """A model or a value that no figure can be given for; the message is one sentence."""


def cuda_memory_bytes(total_mib: float) -> int:
    """A device's memory as CUDA sees it, from nvidia-smi's memory.total in MiB: the figure that vLLM takes its share of."""
    return int(total_mib * MIB * (1 - RESERVED_SHARE))


def _ceil(value: int, by: int) -> int:
    return -(-value // by)


def _gib(value: float) -> str:
    return f"{value / GIB:.1f} GiB"


def _gb(value: float) -> str:
    return f"{value / GB:.1f} GB"


def _round_down(tokens: int) -> int:
    """A length that a person would set: a multiple of 1024, or of 16 below that."""
    return tokens // 1024 * 1024 if tokens >= 1024 else tokens // 16 * 16


@dataclass(frozen=True)
class Quantisation:
    """AWQ: packed weights, and per group of inputs a 16-bit scale and a packed zero point for each output."""

    bits: int = 4
    group_size: int = 128


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer, in elements."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    native_length: int
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    head_norms: bool = False
    dtype: str = "bfloat16"
    quantisation: Quantisation | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a Hugging Face config.json.

        Raises:
            SizingError: a value is missing, or the model is of a kind whose memory is not worked out here.
        """
        kind = config.get("model_type", "qwen2")
        if kind not in ("qwen2", "qwen3", "llama", "mistral"):
            raise SizingError(f"model_type is '{kind}', and only qwen2, qwen3, llama and mistral are sized; use such a model.")
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            bias = kind == "qwen2" or bool(config.get("attention_bias", False))
            return cls(
                layers=int(config["num_hidden_layers"]),
                hidden=hidden,
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                intermediate=int(config["intermediate_size"]),
                vocab=int(config["vocab_size"]),
                native_length=int(config["max_position_embeddings"]),
                tied=bool(config.get("tie_word_embeddings", False)),
                qkv_bias=bias,
                output_bias=bias and kind != "qwen2",
                head_norms=kind == "qwen3",
                dtype=str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"),
                quantisation=_quantisation(config.get("quantization_config")),
            )
        except KeyError as error:
            raise SizingError(f"config.json has no {error.args[0]}; complete it from the model's repository.") from error

    @classmethod
    def from_directory(cls, path: Path) -> ModelShape:
        """Read the config.json of a model's directory.

        Raises:
            OSError: there is none.
            SizingError: as ``from_config``, or it is no JSON object.
        """
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise SizingError(f"{path / 'config.json'} is not JSON ({error}); copy it again from the model's repository.") from error
        if not isinstance(config, dict):
            raise SizingError(f"{path / 'config.json'} is no JSON object; copy it again from the model's repository.")
        return cls.from_config(config)

    def tensor_parallel_sizes(self) -> list[int]:
        """Numbers of devices that vLLM can split this model over.

        Heads, the MLP and the padded vocabulary are split evenly; KV heads are split or repeated evenly; of an AWQ weight that is
        split along its inputs, each device holds whole groups (vLLM: qwen2.py, linear.py, vocab_parallel_embedding.py, auto_awq.py).
        """
        vocab = _ceil(self.vocab, VOCAB_PADDING) * VOCAB_PADDING
        group = self.quantisation.group_size if self.quantisation else 1
        return [
            n
            for n in range(1, self.heads + 1)
            if self.heads % n == self.intermediate % n == vocab % n == 0
            and (self.kv_heads % n == 0 or n % self.kv_heads == 0)
            and self.intermediate // n % group == self.heads // n * self.head_dim % group == 0
        ]

    def parameters(self) -> int:
        """All parameters, as the model's card counts them: unpadded, before quantisation."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = self.hidden * (2 * width + 2 * kv_width + 3 * self.intermediate) + 2 * self.hidden
        layer += self.qkv_bias * (width + 2 * kv_width) + self.output_bias * self.hidden + self.head_norms * 2 * self.head_dim
        return self.layers * layer + (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden

    def item_bytes(self, dtype: str = "auto") -> int:
        """Bytes of an element that is not quantised. ``auto`` is the checkpoint's type, and 16 bits for one in float32, as in vLLM.

        Raises:
            SizingError: the type is unknown.
        """
        if self.quantisation:
            return 2  # AWQ is computed in float16
        if dtype == "auto":
            return 2
        if dtype not in ITEM_BYTES:
            raise SizingError(f"QWEN_DTYPE is '{dtype}'; set it to auto, bfloat16, float16 or float32.")
        return ITEM_BYTES[dtype]

    def _linear(self, inputs: int, outputs: int, item: int) -> int:
        if self.quantisation is None:
            return inputs * outputs * item
        groups, bits = _ceil(inputs, self.quantisation.group_size), self.quantisation.bits
        return (inputs + groups) * outputs * bits // 8 + groups * outputs * 2

    def _kv_heads_per_device(self, tensor_parallel_size: int) -> int:
        return max(1, self.kv_heads // tensor_parallel_size)

    def layer_bytes(self, dtype: str = "auto", tensor_parallel_size: int = 1) -> int:
        """Weights of one decoder layer on each device: projections are split, norms are not, KV heads at most down to one."""
        item, n = self.item_bytes(dtype), tensor_parallel_size
        width = self.heads // n * self.head_dim
        qkv = width + 2 * self._kv_heads_per_device(n) * self.head_dim
        inner = self.intermediate // n
        matrices = [(self.hidden, qkv), (width, self.hidden), (self.hidden, 2 * inner), (inner, self.hidden)]
        vectors = 2 * self.hidden + self.qkv_bias * qkv + self.output_bias * self.hidden + self.head_norms * 2 * self.head_dim
        return sum(self._linear(*sizes, item) for sizes in matrices) + vectors * item

    def weights_bytes(self, dtype: str = "auto", tensor_parallel_size: int = 1) -> int:
        """Weights on each device. Embeddings and the output layer are split by rows of the padded vocabulary and never quantised."""
        item = self.item_bytes(dtype)
        rows = _ceil(self.vocab, VOCAB_PADDING) * VOCAB_PADDING // tensor_parallel_size
        ends = (1 if self.tied else 2) * rows * self.hidden + self.hidden
        return self.layers * self.layer_bytes(dtype, tensor_parallel_size) + ends * item

    def kv_bytes_per_token(self, kv_dtype: str = "auto", dtype: str = "auto", tensor_parallel_size: int = 1) -> int:
        """Keys and values of one token on each device.

        Raises:
            SizingError: the type is unknown.
        """
        if kv_dtype not in ("auto", *KV_ITEM_BYTES):
            raise SizingError(f"kv_cache_dtype is '{kv_dtype}'; set it to auto, {', '.join(KV_ITEM_BYTES)}.")
        item = self.item_bytes(dtype) if kv_dtype == "auto" else KV_ITEM_BYTES[kv_dtype]
        return 2 * self.layers * self._kv_heads_per_device(tensor_parallel_size) * self.head_dim * item

    def activation_bytes(self, max_batch_tokens: int, max_num_seqs: int, dtype: str = "auto", tensor_parallel_size: int = 1) -> int:
        """The peak of what a step holds beside weights and KV cache, on each device: an estimate.

        The larger of two moments of vLLM's profiling run. In a layer: residual and input (both whole on each device), and either the
        MLP's gate, up and their product or the attention's q, k, v and output. In the sampler: the last layer's output and
        ``SAMPLER_BYTES`` for every sequence and entry of the vocabulary. For Llama-3-8B this gives 1.29 GiB; vLLM printed 1.26 GiB,
        with one GPU and with two (vllm#10511).
        """
        item, n = self.item_bytes(dtype), tensor_parallel_size
        mlp = 3 * self.intermediate // n
        attention = 2 * (self.heads // n + self._kv_heads_per_device(n)) * self.head_dim
        layer = max_batch_tokens * (2 * self.hidden + max(mlp, attention)) * item
        sampler = max_batch_tokens * self.hidden * item + max_num_seqs * self.vocab * SAMPLER_BYTES
        return max(layer, sampler)

    def graph_bytes(self, max_batch_tokens: int, max_num_seqs: int) -> int:
        """CUDA graphs on each device: an estimate. How many there are is vLLM's rule, what each takes is ``GRAPH_BYTES_PER_LAYER``.

        A graph per layer for every captured size, and another, of the whole model, for sizes that a step of decoding can have.
        """
        largest = min(2 * max_num_seqs, LARGEST_GRAPH, max_batch_tokens)
        sizes = {1, 2, 4, *range(8, 256, 8), *range(256, LARGEST_GRAPH + 1, 16), max_num_seqs}
        sizes = {size for size in sizes if size <= largest}
        count = len(sizes) + len([size for size in sizes if size <= max_num_seqs])
        return count * self.layers * GRAPH_BYTES_PER_LAYER


def _quantisation(config: Mapping[str, Any] | None) -> Quantisation | None:
    if not config:
        return None
    method = config.get("quant_method")
    if method != "awq":
        raise SizingError(f"quant_method is '{method}', and only awq is sized; use an AWQ checkpoint or an unquantised one.")
    kept = [str(name) for name in config.get("modules_to_not_convert") or [] if name != "lm_head"]
    if kept:
        raise SizingError(f"modules_to_not_convert is '{', '.join(kept)}', and only lm_head is sized; use a wholly quantised checkpoint.")
    return Quantisation(
        int(config.get("bits") or config.get("w_bit") or 4), int(config.get("group_size") or config.get("q_group_size") or 128)
    )


@dataclass(frozen=True)
class Problem:
    """A setting that does not work on these devices."""

    setting: str
    """The name in the service's environment."""
    seen: str
    working: str
    """The value that would work."""
    sentence: str


@dataclass(frozen=True)
class Demand:
    """What a configuration asks of each device, whatever the devices are."""

    parameters: int
    tensor_parallel_size: int
    max_model_len: int
    block_size: int
    weights_bytes: int
    """All of them, offloaded or not."""
    kv_bytes_per_token: int
    kv_bytes_per_block: int
    kv_bytes_per_sequence: int
    """Of one sequence of ``max_model_len`` tokens, in whole blocks."""
    activation_bytes: int
    graph_bytes: int
    context_bytes: int
    """CUDA context, and communication with the other devices."""
    runtime_bytes: int
    """The part of ``context_bytes`` that counts against vLLM's share."""
    offloadable_bytes: int
    """The most that can be offloaded: the decoder layers (vLLM wraps only these)."""

    @property
    def total_bytes(self) -> int:
        """Everything, with one sequence of full length and nothing offloaded."""
        return self.weights_bytes + self.kv_bytes_per_sequence + self.activation_bytes + self.graph_bytes + self.context_bytes

    def blocks(self, tokens: int) -> int:
        """KV blocks that hold so many tokens of one sequence."""
        return _ceil(tokens, self.block_size)


@dataclass(frozen=True)
class Fit:
    """A configuration on its devices. Where the tensor parallel size is a problem, all figures are for the size that would work."""

    demand: Demand
    devices: int
    device_memory_bytes: int
    share_bytes: int
    """What vLLM takes of each device for everything but context: device memory x utilisation."""
    kv_pool_bytes: int
    """What is left of the share for KV cache, or what was asked for; below 0 if the rest alone is too large."""
    kv_blocks: int
    kv_tokens: int
    """Blocks x block size: the engine's own figure."""
    full_sequences: float
    """Sequences of ``max_model_len`` that the cache holds at once."""
    longest_sequence: int
    """Tokens of the longest sequence that fits and leaves the headroom; not rounded."""
    headroom_bytes: int
    """Device memory - (weights + KV of one full-length sequence + activations + graphs + context); offloaded weights are not there."""
    min_headroom_bytes: int
    offload_bytes: int
    """Weights of each device that live in host memory: what the engine is to be given, not the budget."""
    host_memory_bytes: int
    """Host memory for the service and its engine processes, offloaded weights and the KV cache's own offloading: an estimate."""
    problems: list[Problem] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the engine starts and leaves the headroom."""
        return not self.problems

    @property
    def headroom_holds(self) -> bool:
        """Whether the headroom is what was asked for."""
        return self.headroom_bytes >= self.min_headroom_bytes

    def figures(self) -> dict[str, Any]:
        """All figures by name, flat, for JSON and for Ansible; problems as dictionaries."""
        flat = asdict(self)
        return {
            **flat.pop("demand"),
            "total_bytes": self.demand.total_bytes,
            **flat,
            "fits": self.fits,
            "headroom_holds": self.headroom_holds,
        }


def demand(
    shape: ModelShape,
    *,
    tensor_parallel_size: int = 1,
    max_model_len: int | None = None,
    max_batch_tokens: int = 8192,
    max_num_seqs: int = 64,
    dtype: str = "auto",
    kv_dtype: str = "auto",
    enforce_eager: bool = False,
    device: str = "cuda",
    block_size: int | None = None,
) -> Demand:
    """Work out what a configuration asks of each device.

    Args:
        shape: the model's.
        tensor_parallel_size: one of ``shape.tensor_parallel_sizes()``.
        max_model_len: tokens; the checkpoint's own length if None.
        max_batch_tokens: tokens of a step.
        max_num_seqs: sequences of a step.
        dtype: of the weights.
        kv_dtype: of the KV cache; ``auto`` is that of the weights.
        enforce_eager: no CUDA graphs.
        device: ``cuda`` or ``cpu``; a CPU has no context and no graphs.
        block_size: tokens of a KV block, if not the device's usual.

    Raises:
        SizingError: a value is out of its range, or a type is unknown.
    """
    if tensor_parallel_size not in shape.tensor_parallel_sizes():
        raise SizingError(_wrong_parallel_size(shape, tensor_parallel_size).sentence)
    length, block = max_model_len or shape.native_length, block_size or BLOCK_SIZES[device]
    per_token = shape.kv_bytes_per_token(kv_dtype, dtype, tensor_parallel_size)
    cuda = device == "cuda"
    return Demand(
        parameters=shape.parameters(),
        tensor_parallel_size=tensor_parallel_size,
        max_model_len=length,
        block_size=block,
        weights_bytes=shape.weights_bytes(dtype, tensor_parallel_size),
        kv_bytes_per_token=per_token,
        kv_bytes_per_block=per_token * block,
        kv_bytes_per_sequence=_ceil(length, block) * per_token * block,
        activation_bytes=shape.activation_bytes(max_batch_tokens, max_num_seqs, dtype, tensor_parallel_size),
        graph_bytes=shape.graph_bytes(max_batch_tokens, max_num_seqs) if cuda and not enforce_eager else 0,
        context_bytes=CUDA_CONTEXT_BYTES + (tensor_parallel_size > 1) * COMMUNICATION_BYTES if cuda else 0,
        runtime_bytes=RUNTIME_BYTES if cuda else 0,
        offloadable_bytes=shape.layers * shape.layer_bytes(dtype, tensor_parallel_size) if cuda else 0,
    )


@dataclass(frozen=True)
class _Room:
    """The arithmetic of one device: what is left for KV cache when so much is offloaded."""

    need: Demand
    memory: int
    share: int
    asked: int | None
    min_headroom: int

    def pool(self, offload: int = 0) -> int:
        need = self.need
        if self.asked is not None:
            return self.asked
        return self.share - (need.weights_bytes - offload) - need.activation_bytes - need.graph_bytes - need.runtime_bytes

    def fixed(self, offload: int = 0) -> int:
        need = self.need
        return need.weights_bytes - offload + need.activation_bytes + need.graph_bytes + need.context_bytes

    def slack_of_pool(self, tokens: int, offload: int = 0) -> int:
        # one block is the engine's own: BlockPool's null block (kv_cache_utils.py)
        return self.pool(offload) - (self.need.blocks(tokens) + 1) * self.need.kv_bytes_per_block

    def slack_of_headroom(self, tokens: int, offload: int = 0) -> int:
        return self.memory - self.fixed(offload) - self.need.blocks(tokens) * self.need.kv_bytes_per_block - self.min_headroom

    def slack(self, tokens: int, offload: int = 0) -> int:
        return min(self.slack_of_pool(tokens, offload), self.slack_of_headroom(tokens, offload))

    def longest(self, offload: int = 0) -> int:
        by_pool = self.pool(offload) // self.need.kv_bytes_per_block - 1
        by_headroom = (self.memory - self.fixed(offload) - self.min_headroom) // self.need.kv_bytes_per_block
        return max(0, min(by_pool, by_headroom)) * self.need.block_size

    def useful(self) -> int:
        return min(self.need.max_model_len, LEAST_USEFUL_TOKENS)

    def offload_needed(self) -> int:
        """Bytes to offload for the full length, in whole MiB; 0 if weights and a useful sequence fit: length is cut before weights go."""
        if self.slack(self.useful()) >= 0:
            return 0
        return _ceil(max(0, -self.slack(self.need.max_model_len)), MIB) * MIB


def _problem(setting: str, seen: object, why: str, working: object, to: str = "") -> Problem:
    return Problem(setting, str(seen), str(working), f"{setting} is '{seen}', {why}; set it to {to or working}.")


def _wrong_parallel_size(shape: ModelShape, seen: int) -> Problem:
    sizes = shape.tensor_parallel_sizes()
    if shape.heads % max(1, seen):
        why = f"which does not divide the model's {shape.heads} attention heads"
    else:
        why = "over which the model's KV heads, MLP and vocabulary cannot be split evenly"
    working = max((n for n in sizes if n <= seen), default=1)
    return _problem("VLLM_TENSOR_PARALLEL_SIZE", seen, why, working, f"one of {', '.join(map(str, sizes))}")


def _less_memory(
    here: _Room, room: Callable[..., _Room], shape: ModelShape, offload_gb: float, utilization: float, devices: int
) -> Problem:
    """What to change where the weights do not fit: the cheapest thing that works, host memory last."""
    need = here.need
    size, least = need.tensor_parallel_size, here.useful()
    held = f"{_gib(need.weights_bytes)} of weights and a sequence of {least:,} tokens"
    held += f" with {_gb(here.min_headroom)} to spare" if here.min_headroom else ""

    def holds(other: _Room) -> bool:
        return other.slack(least) >= 0

    shares = [percent / 100 for percent in range(math.floor(utilization * 100) + 1, 96)] if here.asked is None else []
    for tokens in (need.max_model_len, least):
        if share := next((share for share in shares if room(utilization=share).slack(tokens) >= 0), None):
            why = f"and that share of {_gib(here.memory)} does not hold {held}"
            return _problem("VLLM_GPU_MEMORY_UTILIZATION", utilization, why, f"{share:g}")
    why = f"and {'a device' if size == 1 else f'each of {size} devices'} of {_gib(here.memory)} does not hold {held}"
    larger = [n for n in shape.tensor_parallel_sizes() if n > size]
    working = next((n for n in larger if holds(room(n=n))), None)
    if working and working <= devices:
        return _problem("VLLM_TENSOR_PARALLEL_SIZE", size, why, working)
    if offload_gb == 0 and shape.quantisation is None:
        quantised = replace(shape, quantisation=Quantisation())
        if size in quantised.tensor_parallel_sizes() and holds(room(of=quantised)):
            return _problem("QWEN_MODEL_VARIANT", "full", why, "awq-4bit")
    needed = -here.slack(need.max_model_len)
    if needed <= need.offloadable_bytes:
        return _problem("VLLM_CPU_OFFLOAD_GB", f"{offload_gb:g}", why, _ceil(needed, GIB))
    if working:
        return _problem("VLLM_TENSOR_PARALLEL_SIZE", size, why, working, f"{working} on a host with {working} such devices")
    most = max(shape.tensor_parallel_sizes())
    there = room(n=most)
    memory = _ceil(there.memory - min(0, math.floor(there.slack(least) / min(utilization, 1))), GIB)
    return _problem("VLLM_TENSOR_PARALLEL_SIZE", size, why, most, f"{most} on a host with {most} devices of {memory} GiB")


def _length_problem(
    here: _Room, room: Callable[..., _Room], shape: ModelShape, offload: int, offload_gb: float, utilization: float, devices: int
) -> Problem:
    """What to change where a sequence of full length does not fit."""
    need = here.need
    length, longest = need.max_model_len, here.longest(offload)
    by_pool, by_headroom = here.slack_of_pool(length, offload), here.slack_of_headroom(length, offload)
    if here.asked is not None and by_pool < 0 <= by_headroom:
        wanted = here.asked - by_pool
        return _problem(
            "QWEN_KV_CACHE_MEMORY_BYTES",
            here.asked,
            f"which holds {longest:,} of a sequence's {length:,} tokens",
            wanted,
            f"at least {wanted}",
        )
    if longest < here.useful():
        return _less_memory(here, room, shape, offload_gb, utilization, devices)
    if by_pool <= by_headroom:
        of = f"a share of {utilization:g} of {_gib(here.memory)}" if here.asked is None else _gib(here.asked)
        why = f"and {of} has room for a sequence of {longest:,} tokens beside the weights"
    else:
        left = by_headroom + here.min_headroom
        why = f"and a sequence of that length leaves {_gb(max(0, left))} of the {_gb(here.min_headroom)} that are to stay free"
        if not here.min_headroom:
            why = f"and a device of {_gib(here.memory)} has room for a sequence of {longest:,} tokens beside the weights"
    return _problem("VLLM_MAX_MODEL_LEN", length, why, _round_down(longest))


def fit(
    shape: ModelShape,
    *,
    device_memory_bytes: int,
    devices: int = 1,
    tensor_parallel_size: int = 1,
    max_model_len: int | None = None,
    gpu_memory_utilization: float = 0.92,
    max_batch_tokens: int = 8192,
    max_num_seqs: int = 64,
    cpu_offload_gb: float = 0.0,
    cpu_offload_always: bool = False,
    swap_space_gb: float = 0.0,
    dtype: str = "auto",
    kv_dtype: str = "auto",
    kv_cache_memory_bytes: int | None = None,
    enforce_eager: bool = False,
    device: str = "cuda",
    block_size: int | None = None,
    min_headroom_gb: float = 0.0,
) -> Fit:
    """Say what fits, and which setting to change if it does not.

    Args:
        shape: the model's.
        device_memory_bytes: of the smallest device, as CUDA sees it (``cuda_memory_bytes``).
        devices: how many there are.
        tensor_parallel_size: VLLM_TENSOR_PARALLEL_SIZE.
        max_model_len: VLLM_MAX_MODEL_LEN; None is the checkpoint's own length.
        gpu_memory_utilization: VLLM_GPU_MEMORY_UTILIZATION.
        max_batch_tokens: tokens of a step.
        max_num_seqs: sequences of a step.
        cpu_offload_gb: VLLM_CPU_OFFLOAD_GB, the budget, in GiB for each device.
        cpu_offload_always: spend the budget, needed or not.
        swap_space_gb: swap_space, in GiB for all devices together.
        dtype: QWEN_DTYPE.
        kv_dtype: of the KV cache.
        kv_cache_memory_bytes: QWEN_KV_CACHE_MEMORY_BYTES, for each device; takes the place of the utilisation. 0 is None.
        enforce_eager: QWEN_ENFORCE_EAGER.
        device: ``cuda`` or ``cpu``.
        block_size: tokens of a KV block, if not the device's usual.
        min_headroom_gb: what is to stay free on each device (see ``Fit.headroom_bytes``), in GB; the caller's rule: 10 for full
            precision.

    Raises:
        SizingError: a value that no figure can be given for.
    """
    problems = []
    size = tensor_parallel_size
    if size not in shape.tensor_parallel_sizes():
        problems.append(_wrong_parallel_size(shape, size))
        size = int(problems[0].working)
    if size > devices:
        working = max(n for n in shape.tensor_parallel_sizes() if n <= max(1, devices))
        there = f"and there {'is 1 device' if devices == 1 else f'are {devices} devices'}"
        problems.append(_problem("VLLM_TENSOR_PARALLEL_SIZE", tensor_parallel_size, there, working))
        size = working

    common: dict[str, Any] = {
        "max_model_len": max_model_len,
        "max_batch_tokens": max_batch_tokens,
        "max_num_seqs": max_num_seqs,
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "enforce_eager": enforce_eager,
        "device": device,
        "block_size": block_size,
    }
    asked = kv_cache_memory_bytes or None
    min_headroom = int(min_headroom_gb * GB)

    def room(of: ModelShape = shape, n: int = size, utilization: float = gpu_memory_utilization) -> _Room:
        need = demand(of, tensor_parallel_size=n, **common)
        return _Room(need, device_memory_bytes, math.ceil(device_memory_bytes * utilization), asked, min_headroom)

    here = room()
    need = here.need
    budget = min(int(cpu_offload_gb * GIB), need.offloadable_bytes)
    offload = budget if cpu_offload_always else min(here.offload_needed(), budget)

    outside = LEAST_CONTEXT_BYTES + (size > 1) * LEAST_COMMUNICATION_BYTES
    most = math.floor((device_memory_bytes - outside) / device_memory_bytes * 100) / 100
    if device == "cuda" and asked is None and gpu_memory_utilization > most:
        left = f"which leaves {_gib(device_memory_bytes - here.share)} of {_gib(device_memory_bytes)} for the CUDA context"
        left += " and communication" * (size > 1)
        problems.append(_problem("VLLM_GPU_MEMORY_UTILIZATION", gpu_memory_utilization, left, f"{most:g}"))
    if asked is not None and here.slack_of_headroom(here.useful(), offload) >= 0 and here.fixed(offload) + asked > device_memory_bytes:
        working = max(0, device_memory_bytes - here.fixed(offload)) // MIB * MIB
        room_left = f"and {_gib(device_memory_bytes - here.fixed(offload))} of {_gib(device_memory_bytes)} are left beside the weights"
        problems.append(_problem("QWEN_KV_CACHE_MEMORY_BYTES", asked, room_left, working, f"at most {working}"))
    elif here.slack(need.max_model_len, offload) < 0:
        problems.append(_length_problem(here, room, shape, offload, cpu_offload_gb, gpu_memory_utilization, devices))

    kv_blocks = max(0, here.pool(offload) // need.kv_bytes_per_block)
    pinned = 2 * offload  # each tensor's pinned memory is rounded up to a power of two (PyTorch's CachingHostAllocator)
    return Fit(
        demand=need,
        devices=devices,
        device_memory_bytes=device_memory_bytes,
        share_bytes=here.share,
        kv_pool_bytes=here.pool(offload),
        kv_blocks=kv_blocks,
        kv_tokens=kv_blocks * need.block_size,
        full_sequences=round(kv_blocks / need.blocks(need.max_model_len), 2),
        longest_sequence=here.longest(offload),
        headroom_bytes=device_memory_bytes - here.fixed(offload) - need.kv_bytes_per_sequence,
        min_headroom_bytes=min_headroom,
        offload_bytes=offload,
        host_memory_bytes=(1 + size) * HOST_PROCESS_BYTES + size * pinned + int(swap_space_gb * GIB),
        problems=problems,
    )
