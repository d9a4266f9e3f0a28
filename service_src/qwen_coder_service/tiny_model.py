"""Make a tiny Qwen2 model with a ChatML tokenizer, for the lab and the tests: random weights, the real model's shape, no network.

The same arguments give the same bytes each time. Two choices matter: the heads have 32 dimensions, the smallest that vLLM's CPU
attention takes; weights are drawn wide (standard deviation 0.3), so that the best token stands clear of the second and greedy answers
of two engines in float32 are equal.

With ``--like`` it makes what another model is before its weights are there: config.json of that shape, the same small tokenizer, and no
weights, for a service with QWEN_LOAD_FORMAT=dummy (docs/benchmark/README.md).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# ChatML as Qwen2.5 uses it, with that model's default system message
CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# how Qwen2's tokenizer cuts text before it looks for merges (tokenizer.json of the model)
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# enough text to learn a few hundred merges from
TEXT = """
def add(a: int, b: int) -> int: return a + b
class Stack: def push(self, item): self.items.append(item)
for index, value in enumerate(values): print(index, value)
if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
import json, os, re, sys; with open(path) as file: data = json.load(file)
I am a careful coding companion. I answer with working code and say what I am not sure of.
Write a function that returns the sum of two numbers. Explain what this program does, step by step.
system user assistant tool message content role true false null None return yield async await
"""


def _tokenizer(target: Path, vocabulary: int, max_position: int) -> Any:
    """Train and save the tokenizer; gives it back as the tokenizers library knows it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END_OF_TEXT, IM_START, IM_END]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(special),
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        model_max_length=max_position,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(target)
    tokenizer.model.save(str(target))
    # in the form of the real repository, which transformers 4 and 5 both load: template inside, class by name
    path = target / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"tokenizer_class": "Qwen2Tokenizer", "chat_template": CHAT_TEMPLATE}
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (target / "chat_template.jinja").unlink(missing_ok=True)
    return tokenizer


# what Qwen2.5-Instruct ships
GENERATION = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


def _shape(target: Path, tokenizer: Any, like: dict[str, Any], dtype: str) -> None:
    """config.json and generation_config.json of a model without weights.

    Raises:
        SystemExit: the tokenizer has more tokens than the model.
    """
    if like["vocab_size"] < tokenizer.get_vocab_size():
        raise SystemExit(f"--like says vocab_size {like['vocab_size']}; set it to at least {tokenizer.get_vocab_size()}.")
    ids = {token: tokenizer.token_to_id(token) for token in (END_OF_TEXT, IM_END)}
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "torch_dtype": dtype,
        **like,
        "bos_token_id": ids[END_OF_TEXT],
        "eos_token_id": ids[IM_END],
    }
    generation = {
        **GENERATION,
        "bos_token_id": ids[END_OF_TEXT],
        "pad_token_id": ids[END_OF_TEXT],
        "eos_token_id": list(ids.values())[::-1],
    }
    for name, data in (("config.json", config), ("generation_config.json", generation)):
        (target / name).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _model(target: Path, tokenizer: Any, options: argparse.Namespace) -> None:
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    ids = {token: tokenizer.token_to_id(token) for token in (END_OF_TEXT, IM_END)}
    rows = -(-tokenizer.get_vocab_size() // 64) * 64
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=32 * options.heads,
        intermediate_size=64 * options.heads,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=options.max_position,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=ids[END_OF_TEXT],
        eos_token_id=ids[IM_END],
        pad_token_id=ids[END_OF_TEXT],
    )
    torch.manual_seed(options.seed)
    model = Qwen2ForCausalLM(config).to(getattr(torch, options.dtype)).eval()
    with torch.no_grad():  # rows beyond the vocabulary, which only fill it up, are never the best
        model.lm_head.weight[tokenizer.get_vocab_size() :] = 0
    model.generation_config = GenerationConfig(
        bos_token_id=ids[END_OF_TEXT], pad_token_id=ids[END_OF_TEXT], eos_token_id=[ids[IM_END], ids[END_OF_TEXT]], **GENERATION
    )
    model.save_pretrained(target)
    path = target / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    for name in ("rope_parameters", "layer_types", "dtype"):  # transformers 5's spelling
        written.pop(name, None)
    written |= {"rope_theta": 1000000.0, "torch_dtype": options.dtype}
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Make the model, unless it is there."""
    parser = argparse.ArgumentParser(prog="qwen_coder_service.tiny_model", description="Make a tiny Qwen2 model and its tokenizer.")
    parser.add_argument("target", type=Path, help="directory to make")
    parser.add_argument("--max-position", type=int, default=2048, help="tokens that the model is made for")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4, help="attention heads, of 32 dimensions each")
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--like", type=json.loads, help="no weights, but a model of this config.json (JSON); --dtype is what it says of itself"
    )
    options = parser.parse_args(arguments)
    target: Path = options.target.absolute()
    if (target / "config.json").exists():
        print(f"{target} exists")
        return 0
    os.environ["HF_HUB_OFFLINE"] = "1"
    target.parent.mkdir(parents=True, exist_ok=True)
    # appears whole or not at all
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=".tiny-"))
    try:
        if options.like:
            _shape(work, _tokenizer(work, options.vocabulary, options.like["max_position_embeddings"]), options.like, options.dtype)
        else:
            _model(work, _tokenizer(work, options.vocabulary, options.max_position), options)
        for path in (work, *work.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{target} made")
    return 0


if __name__ == "__main__":
    sys.exit(main())
