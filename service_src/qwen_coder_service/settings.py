"""Settings of the service, from its environment: read, checked, and kept away from the engine's own.

``VLLM_TENSOR_PARALLEL_SIZE`` and its like look like variables of vLLM and are not: the service reads them, translates them to
engine arguments and takes them out of the environment, because vLLM warns about names of its prefix that it does not know.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

EX_CONFIG = 78
"""Exit status of a service that was configured wrongly (sysexits.h): systemd is told not to try again."""

# variables with the service's prefix that are set for it, not by an operator
_INTERNAL = {"QWEN_ARBITER_PID", "QWEN_NOTIFY_SOCKET"}


class SettingsError(ValueError):
    """A setting that the service cannot start with; the message is one sentence: name, value seen, value to set."""


def _setting(name: str, to: str, default: Any = ..., **limits: Any) -> Any:
    """A field with the environment's name for it, and what a sentence about a wrong value ends with."""
    return Field(default, alias=name, description=to, **limits)


class Settings(BaseModel):
    """All settings, by their name in the environment (upper and lower case are the same there)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["vllm", "transformers"] = _setting("QWEN_BACKEND", "vllm or transformers", "vllm")
    model_path: Path = _setting("QWEN_MODEL_PATH", "the directory that holds the model's config.json and weights")
    model_name: str = _setting("QWEN_MODEL_NAME", "the name that clients see", "Qwen/Qwen2.5-Coder-32B-Instruct", min_length=1)
    model_variant: Literal["full", "awq-4bit"] = _setting("QWEN_MODEL_VARIANT", "full or awq-4bit", "full")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _setting("QWEN_DTYPE", "auto, bfloat16, float16 or float32", "auto")
    persona_prompt: str = _setting(
        "QWEN_PERSONA_PROMPT", "the system message of chats that bring none", "I am Qwen-Coder, a careful coding companion.", min_length=1
    )
    metrics_bind: Annotated[str, Field(pattern=r"^[^\s:]+:\d{1,5}$")] = _setting(
        "QWEN_METRICS_BIND", "an address and a port, for example 127.0.0.1:9090", "127.0.0.1:9090"
    )
    enforce_eager: bool = _setting("QWEN_ENFORCE_EAGER", "true or false", False)
    kv_cache_memory_bytes: int | None = _setting("QWEN_KV_CACHE_MEMORY_BYTES", "a number of bytes, at least 1048576", None, ge=1 << 20)
    drain_timeout_s: int = _setting("QWEN_DRAIN_TIMEOUT_S", "a number of seconds, 0 to 86400", 300, ge=0, le=86400)
    max_queued_requests: int = _setting("QWEN_MAX_QUEUED_REQUESTS", "a number of requests, 0 or more", 256, ge=0)
    max_body_bytes: int = _setting("QWEN_MAX_BODY_BYTES", "a number of bytes, at least 1024", 4 << 20, ge=1024)
    log_prompts: bool = _setting("QWEN_LOG_PROMPTS", "true or false", False)

    tensor_parallel_size: int = _setting("VLLM_TENSOR_PARALLEL_SIZE", "a number of GPUs, 1 or more", 1, ge=1)
    max_model_len: int | None = _setting("VLLM_MAX_MODEL_LEN", "a number of tokens, at least 16", None, ge=16)
    gpu_memory_utilization: float = _setting(
        "VLLM_GPU_MEMORY_UTILIZATION", "a share of the GPU's memory above 0 and at most 0.99, for example 0.92", 0.92, gt=0, le=0.99
    )
    cpu_offload_gb: float = _setting("VLLM_CPU_OFFLOAD_GB", "a number of GiB, 0 or more", 0, ge=0)
    cache_dir: Path = _setting("VLLM_CACHE_DIR", "a directory that the service may write to", Path("/opt/qwen-coder-service/cache"))
    max_batch_tokens: int = _setting("max_batch_tokens", "a number of tokens, at least 16, for example 8192", 8192, ge=16)
    max_num_seqs: int = _setting("max_num_seqs", "a number of requests, 1 or more", 64, ge=1)
    swap_space: float = _setting("swap_space", "a number of GiB, 0 or more", 0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not (self.model_path / "config.json").is_file():
            raise ValueError(
                f"QWEN_MODEL_PATH is '{self.model_path}', which holds no config.json; "
                "set it to the directory that holds the model's config.json and weights."
            )
        awq = "awq" in self.model_name.lower() or "awq" in self.model_path.name.lower()
        if awq and self.model_variant == "full":
            raise ValueError(f"QWEN_MODEL_VARIANT is 'full' for the quantised model '{self.model_name}'; set it to awq-4bit.")
        return self


NAMES = {field.alias or name: name for name, field in Settings.model_fields.items()}
"""The environment's name of every setting -> the attribute."""


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    if not first["loc"]:
        return str(first["msg"]).removeprefix("Value error, ")
    name = str(first["loc"][0])
    to = Settings.model_fields[NAMES[name]].description
    if first["type"] == "missing":
        return f"{name} is not set; set it to {to}."
    return f"{name} is '{first['input']}'; set it to {to}."


def load(environment: Mapping[str, str]) -> Settings:
    """Read the settings.

    Args:
        environment: names and values, as in ``os.environ``; names of the service are found in any case.

    Raises:
        SettingsError: a value is missing, malformed or contradicts another, or a name with the service's prefix is unknown.
    """
    canonical = {name.upper(): name for name in NAMES}
    values: dict[str, str] = {}
    for name, value in environment.items():
        if name.upper() in canonical:
            values[canonical[name.upper()]] = value
        elif name.upper().startswith("QWEN_") and name not in _INTERNAL:
            raise SettingsError(f"{name} is no setting of this service; remove it, or set one of {', '.join(sorted(NAMES))}.")
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(_sentence(error)) from error


def claim(settings: Settings, environment: MutableMapping[str, str]) -> None:
    """Make the process's environment the engine's: our names go, its own are set.

    Everything that libraries write by themselves is put below the cache directory, the only place that the unit lets the service
    write to. Hubs are never asked: a start does not depend on somebody else's server.
    """
    canonical = {name.upper() for name in NAMES}
    for name in [name for name in environment if name.upper() in canonical]:
        del environment[name]
    cache = settings.cache_dir
    environment.update(
        {
            "VLLM_CACHE_ROOT": str(cache / "vllm"),
            "VLLM_NO_USAGE_STATS": "1",
            # what the engine's processes say to each other stays on this host
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_LOOPBACK_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(cache / "huggingface"),
            "HOME": str(cache),
            "XDG_CACHE_HOME": str(cache),
            "XDG_CONFIG_HOME": str(cache),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "NUMBA_CACHE_DIR": str(cache / "numba"),
        }
    )


def read_env_file(path: Path) -> dict[str, str]:
    """Read a file as systemd's ``EnvironmentFile=`` does, as far as the service's role writes it: comments, NAME=value, quotes."""
    values = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"^\s*([A-Za-z_][A-Za-z0-9_]*)=(.*?)\s*$", line)
        if match is None:
            continue
        name, value = match.groups()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = re.sub(r"\\(.)", r"\1", value[1:-1]) if value[0] == '"' else value[1:-1]
        values[name] = value
    return values


def main(arguments: list[str] | None = None) -> int:
    """Check settings without starting anything: ``python -m qwen_coder_service.settings --check [--env-file FILE]``."""
    parser = argparse.ArgumentParser(prog="qwen_coder_service.settings", description=main.__doc__)
    parser.add_argument("--check", action="store_true", required=True, help="exit 0 if the service would start, 78 if not")
    parser.add_argument("--env-file", type=Path, help="read this file instead of the environment")
    options = parser.parse_args(arguments)
    try:
        load(read_env_file(options.env_file) if options.env_file else os.environ)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return EX_CONFIG
    return 0


if __name__ == "__main__":
    sys.exit(main())
