"""Settings of the service, from its environment: read, checked, and kept away from the engine's own.

``VLLM_TENSOR_PARALLEL_SIZE`` and its like look like variables of vLLM and are not: the service reads them, translates them to
engine arguments and takes them out of the environment, because vLLM warns about names of its prefix that it does not know.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, IPvAnyAddress, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from .sizing import BLOCK_SIZES, ModelShape, SizingError

EX_CONFIG = 78
"""Exit status of a service that was configured wrongly (sysexits.h): systemd is told not to try again."""

# variables with the service's prefix that are set for it, not by an operator
_INTERNAL = {"QWEN_NOTIFY_SOCKET"}


class SettingsError(ValueError):
    """A setting that the service cannot start with; the message is one sentence: name, value seen, value to set."""


def _setting(name: str, to: str, default: Any = ..., **limits: Any) -> Any:
    """A field with the environment's name for it, and what a sentence about a wrong value ends with."""
    return Field(default, alias=name, description=to, **limits)


class _Environment(EnvSettingsSource):
    """pydantic's reading of an environment, of one that is given to it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._given = environment
        super().__init__(Settings)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name.lower(): value for name, value in self._given.items()}


class Settings(BaseSettings):
    """All settings, by their name in the environment (upper and lower case are the same there)."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, case_sensitive=False)

    backend: Literal["vllm", "transformers"] = _setting("QWEN_BACKEND", "vllm or transformers", "vllm")
    model_path: Path = _setting("QWEN_MODEL_PATH", "the directory that holds the model's config.json and weights")
    model_name: str = _setting("QWEN_MODEL_NAME", "the name that clients see", "Qwen/Qwen2.5-Coder-32B-Instruct", min_length=1)
    model_variant: Literal["full", "awq-4bit"] = _setting("QWEN_MODEL_VARIANT", "full or awq-4bit", "full")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _setting("QWEN_DTYPE", "auto, bfloat16, float16 or float32", "auto")
    load_format: Literal["auto", "dummy"] = _setting("QWEN_LOAD_FORMAT", "auto, or dummy for random weights", "auto")
    persona_prompt: str = _setting(
        "QWEN_PERSONA_PROMPT", "the system message of chats that bring none", "I am Qwen-Coder, a careful coding companion.", min_length=1
    )
    metrics_bind: Annotated[str, Field(pattern=r"^[^\s:]+:\d{1,5}$")] = _setting(
        "QWEN_METRICS_BIND", "an address and a port, for example 127.0.0.1:9090", "127.0.0.1:9090"
    )
    enforce_eager: bool = _setting("QWEN_ENFORCE_EAGER", "true or false", False)
    kv_cache_memory_bytes: int | None = _setting("QWEN_KV_CACHE_MEMORY_BYTES", "a number of bytes, at least 1048576", None, ge=1 << 20)
    stall_timeout_s: int = _setting("QWEN_STALL_TIMEOUT_S", "a number of seconds, 5 to 3600", 20, ge=5, le=3600)
    drain_timeout_s: int = _setting("QWEN_DRAIN_TIMEOUT_S", "a number of seconds, 0 to 86400", 300, ge=0, le=86400)
    max_queued_requests: int = _setting("QWEN_MAX_QUEUED_REQUESTS", "a number of requests, 0 or more", 256, ge=0)
    max_body_bytes: int = _setting("QWEN_MAX_BODY_BYTES", "a number of bytes, at least 1024", 4 << 20, ge=1024)
    cpu_offload: Literal["needed", "always"] = _setting("QWEN_CPU_OFFLOAD", "needed or always", "needed")
    otlp_traces_endpoint: Annotated[str | None, Field(pattern=r"^https?://[^\s/]+")] = _setting(
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "the URL of an OTLP receiver, for example http://127.0.0.1:4317", None
    )
    log_prompts: bool = _setting("QWEN_LOG_PROMPTS", "true or false", False)
    engine_hosts: Annotated[tuple[IPvAnyAddress, ...], NoDecode] = _setting(
        "QWEN_ENGINE_HOSTS", "the addresses of the engine's hosts, the one that answers first, for example 10.0.0.1,10.0.0.2", ()
    )
    engine_port: int = _setting("QWEN_ENGINE_PORT", "the port at which an engine's hosts meet, 1024 to 65535", 29501, ge=1024, le=65535)

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

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What ``load`` was given is all that counts; nothing is read behind its back."""
        return (init_settings,)

    @cached_property
    def checkpoint(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        config: dict[str, Any] = json.loads((self.model_path / "config.json").read_text(encoding="utf-8"))
        return config

    def _shape(self) -> ModelShape | None:
        """The model's sizes; None for one of a kind that nobody sized."""
        try:
            return ModelShape.from_config(self.checkpoint)
        except SizingError:
            return None

    @field_validator("engine_hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @property
    def hosts(self) -> int:
        """How many hosts the engine spans."""
        return max(1, len(self.engine_hosts))

    def _spanned(self) -> None:
        """Check what is said of the engine's hosts."""
        said = ",".join(map(str, self.engine_hosts))
        if self.hosts != len(set(self.engine_hosts) or {None}):
            raise ValueError(f"QWEN_ENGINE_HOSTS is '{said}', with a host twice; set it to one address of each.")
        if self.hosts > 1 and self.backend != "vllm":
            raise ValueError(f"QWEN_BACKEND is '{self.backend}', which answers from one host; set it to vllm, or remove QWEN_ENGINE_HOSTS.")
        if self.tensor_parallel_size % self.hosts:
            raise ValueError(
                f"VLLM_TENSOR_PARALLEL_SIZE is '{self.tensor_parallel_size}', which {self.hosts} hosts (QWEN_ENGINE_HOSTS) cannot share "
                f"evenly; set it to a multiple of {self.hosts}."
            )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not (self.model_path / "config.json").is_file():
            raise ValueError(
                f"QWEN_MODEL_PATH is '{self.model_path}', which holds no config.json; "
                "set it to the directory that holds the model's config.json and weights."
            )
        method = self.checkpoint.get("quantization_config", {}).get("quant_method")
        kind = "awq-4bit" if method == "awq" else "full"
        if kind != self.model_variant:
            raise ValueError(
                f"QWEN_MODEL_VARIANT is '{self.model_variant}', and the weights in '{self.model_path}' are "
                f"{'quantised (awq)' if method == 'awq' else 'not quantised'}; set it to {kind}."
            )
        if self.model_variant == "awq-4bit" and self.dtype in ("bfloat16", "float32"):
            raise ValueError(f"QWEN_DTYPE is '{self.dtype}', and AWQ weights are computed in float16; set it to auto or float16.")
        if self.max_batch_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batch_tokens is '{self.max_batch_tokens}', fewer than the {self.max_num_seqs} requests of a step (max_num_seqs), "
                f"each of which needs one; set it to at least {self.max_num_seqs}."
            )
        self._spanned()
        if self.tensor_parallel_size > 1:
            if (shape := self._shape()) is not None:
                fitting = shape.tensor_parallel_sizes()
            else:  # its attention heads at least must be split
                heads = int(self.checkpoint.get("num_attention_heads", 1))
                fitting = [n for n in range(1, heads + 1) if heads % n == 0]
            if self.tensor_parallel_size not in fitting:
                raise ValueError(
                    f"VLLM_TENSOR_PARALLEL_SIZE is '{self.tensor_parallel_size}', over which this model cannot be split evenly; "
                    f"set it to one of {', '.join(map(str, fitting))}."
                )
        if self.kv_cache_memory_bytes is not None and (shape := self._shape()) is not None:
            tokens = self.max_model_len or shape.native_length
            a_token, block = shape.kv_bytes_per_token("auto", self.dtype, self.tensor_parallel_size), max(BLOCK_SIZES.values())
            if self.kv_cache_memory_bytes < tokens * a_token:
                raise ValueError(
                    f"QWEN_KV_CACHE_MEMORY_BYTES is '{self.kv_cache_memory_bytes}', and one sequence of {tokens} tokens "
                    f"(VLLM_MAX_MODEL_LEN) takes {tokens * a_token}; set it to at least {(-(-tokens // block) + 1) * block * a_token}."
                )
        if self.cpu_offload == "always" and not self.cpu_offload_gb:
            raise ValueError("QWEN_CPU_OFFLOAD is 'always' without a budget; set VLLM_CPU_OFFLOAD_GB to a number of GiB above 0.")
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
    ours = [name for name in sorted(NAMES) if not name.startswith("OTEL_")]
    engine: set[str] | None = None
    for name in environment:
        upper = name.upper()
        if upper in canonical or name in _INTERNAL or not upper.startswith(("QWEN_", "VLLM_")):
            continue
        if upper.startswith("VLLM_"):
            engine = _engine_variables() if engine is None else engine
            if not engine or name in engine:
                continue
        of = "this service or of vLLM" if upper.startswith("VLLM_") else "this service"
        close = difflib.get_close_matches(upper, canonical, 1, cutoff=0.8)
        near = canonical[close[0]] if close else f"one of {', '.join(ours)}"
        raise SettingsError(f"{name} is no setting of {of}; remove it, or set {near}.")
    try:
        return Settings(**_Environment(environment)())
    except ValidationError as error:
        raise SettingsError(_sentence(error)) from error


def _engine_variables() -> set[str]:
    """Names of vLLM's own environment variables, read from its source: importing it takes seconds. Empty where it is not installed."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        return set()
    source = Path(found.origin).with_name("envs.py")
    return set(re.findall(r'"(VLLM_[A-Z0-9_]+)"', source.read_text(encoding="utf-8")))


def place(settings: Settings) -> tuple[int, str]:
    """Which of the engine's hosts this one is, and the network interface at which the others find it.

    Returns:
        The rank, 0 for the head, and the interface's name; of an engine on one host, 0 and ``lo``.

    Raises:
        SettingsError: this host has none of the addresses.
    """
    if settings.hosts == 1:
        return 0, "lo"
    import psutil  # comes with vLLM, which alone spans hosts

    # an alias has a label behind a colon, an address of IPv6 a scope behind a percent sign
    names = {found.address.partition("%")[0]: name.partition(":")[0] for name, all_of in psutil.net_if_addrs().items() for found in all_of}
    said = [str(host) for host in settings.engine_hosts]
    for rank, address in enumerate(said):
        if address in names:
            return rank, names[address]
    raise SettingsError(f"QWEN_ENGINE_HOSTS is '{','.join(said)}', and this host has none of them; set it to one address of each host.")


def claim(settings: Settings, environment: MutableMapping[str, str]) -> None:
    """Make the process's environment the engine's: our names go, its own are set.

    Everything that libraries write by themselves is put below the cache directory, the only place that the unit lets the service
    write to. Hubs are never asked: a start does not depend on somebody else's server.

    Raises:
        SettingsError: as ``place``.
    """
    rank, interface = place(settings)
    address = str(settings.engine_hosts[rank]) if settings.hosts > 1 else "127.0.0.1"
    # OTEL_* are names that OpenTelemetry's own library reads
    ours = {name.upper() for name in NAMES if not name.startswith("OTEL_")}
    for name in [name for name in environment if name.upper() in ours]:
        del environment[name]
    cache = settings.cache_dir
    environment.update(
        {
            "VLLM_CACHE_ROOT": str(cache / "vllm"),
            "VLLM_NO_USAGE_STATS": "1",
            # what the engine's processes say to each other stays on this host, or among its hosts
            "VLLM_HOST_IP": address,
            "VLLM_LOOPBACK_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": interface,
            "NCCL_SOCKET_IFNAME": interface,
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
        place(load(read_env_file(options.env_file) if options.env_file else os.environ))
    except SettingsError as error:
        print(error, file=sys.stderr)
        return EX_CONFIG
    return 0


if __name__ == "__main__":
    sys.exit(main())
