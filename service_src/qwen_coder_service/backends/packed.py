"""A model of the transformers library that computes many requests at once, without padding.

The tokens of all requests lie behind each other in one row, as if they were one text: everything but attention looks at single tokens
and does not notice. Attention is ours (an attention implementation registered with the library), and goes request by request, each with
its own keys and values. So a request's answer does not depend on its neighbours' lengths, and parts of prompts and single tokens of
answers share a step.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from ..settings import Settings
from .rope import yarn

log = logging.getLogger(__name__)

_ATTENTION = "request_by_request"
# keys and values grow by this many tokens at least
_BLOCK = 256
# memory for keys and values on a CPU when nothing says how much (vLLM's own default)
_CPU_CACHE_BYTES = 4 << 30
# below this vLLM takes the best token; and no temperature above it is less than the other
_GREEDY_BELOW, _LEAST_TEMPERATURE = 1e-5, 1e-2


@dataclass(slots=True)
class Drawing:
    """How tokens are drawn; the values here change nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken."""
        return self.temperature < _GREEDY_BELOW


@dataclass(slots=True, eq=False)
class Row:
    """The tokens of a request, and what the model knows of them."""

    ids: list[int]
    drawing: Drawing
    random: random.Random
    slot: int = -1
    done: int = 0
    """Tokens whose keys and values are there."""
    capacity: int = 0
    keys: list[Any] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    @property
    def pending(self) -> int:
        """Tokens that the model has not seen yet."""
        return len(self.ids) - self.done

    def forget(self) -> None:
        """Give the memory back; all tokens are computed again."""
        self.done = self.capacity = 0
        self.keys, self.values = [], []

    def append(self, layer: int, key: Any, value: Any) -> tuple[Any, Any]:
        """Keep a layer's keys and values of new tokens (heads, tokens, dimensions); gives back all so far."""
        if layer == len(self.keys):
            self.keys.append(key.new_empty(key.shape[0], self.capacity, key.shape[2]))
            self.values.append(value.new_empty(value.shape[0], self.capacity, value.shape[2]))
        for store in (self.keys, self.values):
            if store[layer].shape[1] < self.capacity:
                old = store[layer]
                store[layer] = old.new_empty(old.shape[0], self.capacity, old.shape[2])
                store[layer][:, : self.done] = old[:, : self.done]
        end = self.done + key.shape[1]
        self.keys[layer][:, self.done : end] = key
        self.values[layer][:, self.done : end] = value
        return self.keys[layer][:, :end], self.values[layer][:, :end]


@dataclass(slots=True)
class Part:
    """What a step computes of a request."""

    row: Row
    count: int
    mask: Any = None

    @property
    def last(self) -> bool:
        """Whether the next token is known after it."""
        return self.count == self.row.pending


def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> tuple[Any, None]:
    """Attention, request by request; the transformers library calls it in every layer."""
    output = torch.empty_like(query)
    begin = 0
    for part in options["parts"]:
        new = slice(begin, begin + part.count)
        begin += part.count
        keys, values = part.row.append(module.layer_idx, key[0, :, new], value[0, :, new])
        mask = part.mask
        if mask is not None:
            # kernels that take a mask want as many heads of keys as of queries
            groups = query.shape[1] // keys.shape[0]
            keys, values, mask = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0), mask.to(query.device)
        output[:, :, new] = scaled_dot_product_attention(
            query[:, :, new],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None and part.count > 1,
            scale=options.get("scaling"),
            enable_gqa=mask is None,
        )
    return output.transpose(1, 2).contiguous(), None


class Network:
    """The model, its memory for keys and values, and the drawing of tokens."""

    def __init__(self, settings: Settings) -> None:
        """Load the model.

        Raises:
            ValueError: the settings ask for what this machine or the transformers library has not; one sentence.
        """
        transformers.utils.logging.disable_progress_bar()
        transformers.AttentionInterface.register(_ATTENTION, attend)
        if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
            # a core is the server's, as vLLM leaves it one: threads that wait for each other are slow where one has to share
            torch.set_num_threads(max(1, torch.get_num_threads() - 1))
        config = transformers.AutoConfig.from_pretrained(settings.model_path)
        config.update(yarn(settings))
        if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
            raise ValueError("QWEN_BACKEND is 'transformers', which serves models with full attention only; set it to vllm.")
        self.max_model_len: int = settings.max_model_len or config.max_position_embeddings
        placed = _placement(settings)
        if settings.load_format == "dummy":
            if placed:
                raise ValueError("QWEN_LOAD_FORMAT is 'dummy', and the transformers backend makes weights for one device; set it to auto.")
            dtype = getattr(config, "dtype", torch.float32) if settings.dtype == "auto" else getattr(torch, settings.dtype)
            self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_ATTENTION).eval()
            self.model.generation_config = transformers.GenerationConfig.from_pretrained(settings.model_path)
        else:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                settings.model_path, config=config, dtype=settings.dtype, attn_implementation=_ATTENTION, **placed
            ).eval()
        if torch.cuda.is_available() and not placed:
            self.model.to("cuda")
        self.device = self.model.get_input_embeddings().weight.device
        self.defaults: dict[str, Any] = self.model.generation_config.to_diff_dict()
        self.capacity = self._tokens_that_fit(settings, config)
        if self.capacity < self._blocks(self.max_model_len):
            raise ValueError(
                f"VLLM_MAX_MODEL_LEN is {self.max_model_len}; set it to {self.capacity // _BLOCK * _BLOCK} at most, "
                "which is what the memory for keys and values holds."
            )
        rows = self.model.get_output_embeddings().weight.shape[0]
        # which tokens each request has had: the repetition penalty counts the prompt's too
        self._seen = torch.zeros(settings.max_num_seqs, rows, dtype=torch.bool, device=self.device)

    def _tokens_that_fit(self, settings: Settings, config: Any) -> int:
        heads = config.num_key_value_heads
        dimensions = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * dimensions * self.model.dtype.itemsize
        devices = sorted({parameter.device.index for parameter in self.model.parameters() if parameter.device.type == "cuda"})
        if settings.kv_cache_memory_bytes:
            return int(settings.kv_cache_memory_bytes * max(1, len(devices)) // token)
        if not devices:
            return int(_CPU_CACHE_BYTES // token)
        room = []
        for device in devices:
            free, total = torch.cuda.mem_get_info(device)
            room.append(total * settings.gpu_memory_utilization - (total - free))
        # layers are spread evenly, so the fullest device decides; a tenth is for what a step needs for itself
        return max(0, int(min(room) * len(devices) * 0.9 // token))

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // _BLOCK) * _BLOCK

    def needs(self, tokens: int) -> int:
        """Tokens to reserve for a request of so many: some more, so that it is not moved at every step."""
        return min(self._blocks(tokens + tokens // 8), self._blocks(self.max_model_len))

    def place(self, row: Row, slot: int) -> None:
        """Give a request a slot of its own."""
        row.slot = slot
        self._seen[slot] = False
        self._seen[slot, torch.tensor(row.ids, device=self.device)] = True

    def step(self, parts: list[Part]) -> list[tuple[Row, int]]:
        """Compute some tokens of some requests; gives the next token of those that are at their end."""
        ids: list[int] = []
        positions: list[int] = []
        ends: list[int] = []
        with torch.inference_mode():
            for part in parts:
                row, begin, end = part.row, part.row.done, part.row.done + part.count
                if end > row.capacity:
                    row.capacity = self.needs(end)
                if begin and part.count > 1:
                    part.mask = torch.ones(part.count, end, dtype=torch.bool, device=self.device).tril(begin)
                ids += row.ids[begin:end]
                positions += range(begin, end)
                if part.last:
                    ends.append(len(ids) - 1)
            logits = self.model(
                input_ids=torch.tensor([ids], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                logits_to_keep=ends,  # a list: no tensor on a GPU that the last layer is not on
                use_cache=False,
                parts=parts,
            ).logits[0]
            ended = [part.row for part in parts if part.last]
            for part in parts:
                part.row.done += part.count
            if not ended:
                return []
            logits = logits.to(self.device, torch.float32)
            slots = torch.tensor([row.slot for row in ended], device=self.device)
            tokens = draw(logits, self._seen[slots], [row.drawing for row in ended], [row.random for row in ended])
            self._seen[slots, tokens] = True
        return list(zip(ended, tokens.tolist(), strict=True))

    def close(self) -> None:
        """Free the model."""
        del self.model, self._seen
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _placement(settings: Settings) -> dict[str, Any]:
    """Where the model goes: one device, or spread over as many GPUs as the settings say."""
    wanted, there = settings.tensor_parallel_size, torch.cuda.device_count()
    if wanted > max(1, there):
        raise ValueError(f"VLLM_TENSOR_PARALLEL_SIZE is {wanted} on a machine with {there} GPUs; set it to {max(1, there)} at most.")
    accelerate = importlib.util.find_spec("accelerate") is not None
    if wanted == 1:
        return {"device_map": {"": 0}} if there and accelerate else {}
    if not accelerate:
        raise ValueError(
            f"VLLM_TENSOR_PARALLEL_SIZE is {wanted}, for which the transformers library needs the package accelerate; set it to 1."
        )
    share = settings.gpu_memory_utilization
    memory = {device: int(torch.cuda.get_device_properties(device).total_memory * share) for device in range(wanted)}
    return {"device_map": "auto", "max_memory": memory}


def draw(logits: Any, seen: Any, drawings: Sequence[Drawing], randoms: Sequence[random.Random]) -> Any:
    """The next token of every row, in the order that vLLM and the transformers library both apply their parameters in.

    Args:
        logits: (rows, vocabulary), float32.
        seen: (rows, vocabulary), which tokens a row has had.
        drawings: how, for each row.
        randoms: each row's own source of randomness, so that neighbours change nothing.
    """

    def column(values: list[float]) -> Any:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    if any(drawing.repetition_penalty != 1 for drawing in drawings):
        penalty = column([drawing.repetition_penalty for drawing in drawings])
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    tokens = logits.argmax(-1)
    rows = [index for index, drawing in enumerate(drawings) if not drawing.greedy]
    if not rows:
        return tokens
    chosen = [drawings[index] for index in rows]
    index = torch.tensor(rows, device=logits.device)
    vocabulary = logits.shape[1]
    scores = logits[index] / column([max(drawing.temperature, _LEAST_TEMPERATURE) for drawing in chosen])
    limits = [drawing.top_k if 0 < drawing.top_k < vocabulary else vocabulary for drawing in chosen]
    # best first, and no more than any row may choose from
    scores, candidates = scores.topk(max(limits), dim=-1)
    least = column([math.log(drawing.min_p) if drawing.min_p > 0 else -math.inf for drawing in chosen])
    out = (torch.arange(scores.shape[1], device=logits.device) >= column([float(limit) for limit in limits])) | (
        scores - scores[:, :1] < least
    )
    chances = scores.masked_fill(out, -math.inf).softmax(-1)
    before = chances.cumsum(-1) - chances
    chances = chances.masked_fill(before >= column([drawing.top_p if drawing.top_p < 1 else math.inf for drawing in chosen]), 0)
    total = chances.cumsum(-1)
    point = column([randoms[row].random() for row in rows]) * total[:, -1:]
    picked = torch.searchsorted(total, point, right=True)
    # a point that rounding put on the end belongs to the last that can be chosen
    picked = torch.minimum(picked, (chances > 0).sum(-1, keepdim=True) - 1)
    tokens[index] = candidates.gather(1, picked)[:, 0]
    return tokens
