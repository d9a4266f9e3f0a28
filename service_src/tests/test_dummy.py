"""A model whose weights are not there yet: its real shape, random weights, answers that mean nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from conftest import QWEN_32B, Running

from qwen_coder_service import tiny_model
from qwen_coder_service.settings import load
from qwen_coder_service.sizing import ModelShape

# the real vocabulary and proportions, in a size that a CPU computes: the tokenizer knows a few hundred of the tokens
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 320,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "intermediate_size": 1728,
}


def described(target: Path, dtype: str = "bfloat16", **changed: int) -> Path:
    """The directory that role qwen_service makes for such a model."""
    catalogue = {key: value for key, value in QWEN_32B.items() if key not in ("architectures", "torch_dtype")}
    assert tiny_model.main([str(target), "--like", json.dumps({**catalogue, **changed}), "--dtype", dtype]) == 0
    return target


def test_it_has_the_shape_of_the_model_and_no_weights(tmp_path: Path) -> None:
    target = described(tmp_path / "dummy")
    assert ModelShape.from_config(json.loads((target / "config.json").read_text())) == ModelShape.from_config(QWEN_32B)
    assert not list(target.glob("*.safetensors"))
    assert load({"QWEN_MODEL_PATH": str(target), "QWEN_LOAD_FORMAT": "dummy", "QWEN_DTYPE": "bfloat16"}).load_format == "dummy"


def test_a_model_with_fewer_tokens_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="vocab_size 100; set it to at least 512"):
        tiny_model.main([str(tmp_path / "x"), "--like", json.dumps({"vocab_size": 100, "max_position_embeddings": 64})])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.engine
@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_it_is_served_without_weights(start: Callable[..., Running], tmp_path: Path, backend: str) -> None:
    target = described(tmp_path / "dummy", **SMALL)
    running = start(
        QWEN_BACKEND=backend, QWEN_MODEL_PATH=str(target), QWEN_LOAD_FORMAT="dummy", QWEN_DTYPE="bfloat16", VLLM_MAX_MODEL_LEN="1024",
        max_num_seqs="4",
    )  # fmt: skip
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 16, "ignore_eos": True}
    answer = httpx.post(f"{running.url}/chat", json=body, timeout=120).json()
    assert answer["usage"]["completion_tokens"] == 16
    running.process.terminate()
    assert running.process.wait(90) == 0
