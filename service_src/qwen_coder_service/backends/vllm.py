"""vLLM in this process (AsyncLLM). Measured faster than `vllm serve` behind a proxy, and one thing less to watch."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any

from ..memory_probe import find_gpus, foretell
from ..persona import Tokenizer
from ..settings import Settings, place
from ..sizing import GIB, ModelShape, SizingError
from .base import BackendDead, Piece, Sampling
from .fork import forked_core
from .rope import yarn

log = logging.getLogger(__name__)


def offload_gib(settings: Settings) -> float:
    """GiB of weights, for each GPU, that move to host memory: what is needed and no more than the budget; with ``always``, all of it.

    vLLM would move the whole budget, needed or not, and then fetch those weights over PCIe for every token.
    """
    if not settings.cpu_offload_gb:
        return 0
    gpus, _ = find_gpus()
    if not gpus:
        return 0
    try:
        found = foretell(settings, ModelShape.from_config(settings.checkpoint), gpus)
    except SizingError as error:
        log.warning("what must be offloaded is not known: %s", error)
        return settings.cpu_offload_gb if settings.cpu_offload == "always" else 0
    for problem in found.problems:  # foretold; whether it is so, the engine finds out
        log.warning("%s", problem.sentence)
    return found.offload_bytes / GIB


def engine_arguments(settings: Settings, offload: float = 0) -> dict[str, Any]:
    """Our settings in vLLM's words.

    Args:
        settings: the service's.
        offload: GiB of weights, for each GPU, to keep in host memory.
    """
    arguments: dict[str, Any] = {
        "model": str(settings.model_path),
        "served_model_name": settings.model_name,
        "dtype": settings.dtype,
        "load_format": settings.load_format,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "max_model_len": settings.max_model_len,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_num_batched_tokens": settings.max_batch_tokens,
        "max_num_seqs": settings.max_num_seqs,
        "enforce_eager": settings.enforce_eager,
        "enable_log_requests": False,
    }
    if overrides := yarn(settings):
        arguments["hf_overrides"] = overrides
    if settings.otlp_traces_endpoint:
        arguments["otlp_traces_endpoint"] = settings.otlp_traces_endpoint
    if offload:
        arguments["cpu_offload_gb"] = offload
    if settings.kv_cache_memory_bytes:
        arguments["kv_cache_memory_bytes"] = settings.kv_cache_memory_bytes
    if settings.hosts > 1:
        # vLLM's own way over several hosts, without Ray: each is told the same and its rank
        arguments |= {
            "distributed_executor_backend": "mp",
            "nnodes": settings.hosts,
            "node_rank": place(settings)[0],
            "master_addr": str(settings.engine_hosts[0]),
            "master_port": settings.engine_port,
        }
    if settings.swap_space:
        # vLLM's own swap_space went away in 0.18; offloaded KV cache is what took its place
        arguments["kv_offloading_size"] = settings.swap_space
    return arguments


def limit_threads() -> None:
    """Leave a core to the service where OpenMP computes, as vLLM does for its workers; ``OMP_NUM_THREADS`` in the environment stands."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))


class VllmBackend:
    """An AsyncLLM and what the service needs around it."""

    tokenizer: Tokenizer
    max_model_len: int

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.progress = time.monotonic()
        self._running: set[str] = set()

    async def start(self) -> None:
        """Load the model. Blocks the loop until the engine core is up: nothing else is to be done before that."""
        # imported here: an engine core that is spawned imports this process's main module again
        from vllm import envs
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.loggers import StatLoggerBase
        from vllm.v1.metrics.stats import IterationStats, SchedulerStats

        backend = self

        class Progress(StatLoggerBase):  # type: ignore[misc]
            """Called after each step of the engine with what it did."""

            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                self.usage = 0.0

            def record(
                self, scheduler_stats: SchedulerStats | None, iteration_stats: IterationStats | None, *rest: Any, **more: Any
            ) -> None:
                # a step that makes no token may still work through a part of a long prompt, which fills KV cache
                usage = scheduler_stats.kv_cache_usage if scheduler_stats is not None else self.usage
                if iteration_stats is not None or usage != self.usage:
                    self.usage, backend.progress = usage, time.monotonic()

            def log_engine_initialized(self) -> None: ...

        arguments = AsyncEngineArgs(**engine_arguments(self._settings, offload_gib(self._settings)))
        config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
        alone = current_platform.is_cpu() and config.parallel_config.world_size == 1
        if alone:
            config.parallel_config.distributed_executor_backend = "uni"
        with forked_core(force=current_platform.is_cpu(), first=limit_threads if alone else None):
            self._engine = AsyncLLM.from_vllm_config(config, stat_loggers=[Progress])
        self.tokenizer = self._engine.get_tokenizer()
        self.max_model_len = int(self._engine.model_config.max_model_len)
        envs.enable_envs_cache()  # else the environment is read anew for every request
        # `vllm serve` applies the model's generation_config by itself, AsyncLLM does not
        self._defaults = dict(self._engine.model_config.get_diff_sampling_param())

    async def stop(self) -> None:
        """Free the engine."""
        if hasattr(self, "_engine"):
            self._engine.shutdown()

    @property
    def unfinished(self) -> int:
        """Requests that the engine core has not finished."""
        return int(self._engine.output_processor.get_num_unfinished_requests())

    async def check(self) -> None:
        """Look whether the engine core lives.

        Raises:
            BackendDead: it does not.
        """
        with _death("the engine core is dead"):
            await self._engine.check_health()

    async def ping(self) -> None:
        """Ask the engine core something that costs it nothing; it answers between two steps, and of several hosts, when all have answered.

        Raises:
            BackendDead: it does not live.
        """
        with _death("the engine core is dead"):
            if self._settings.hosts > 1:  # vLLM itself watches the processes of this host
                await self._engine.collective_rpc("check_health")
            else:
                await self._engine.is_sleeping()

    def kill(self) -> None:
        """Kill the engine core, which takes its workers with it. vLLM then fails every request that runs."""
        for process in multiprocessing.active_children():
            process.kill()

    async def abort_all(self) -> None:
        """Give up what runs; each request ends with finish_reason ``abort``."""
        await self._engine.abort(list(self._running))

    def _parameters(self, sampling: Sampling, stream: bool) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        asked = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        return SamplingParams(
            **{
                **self._defaults,
                **{name: value for name, value in asked.items() if value is not None},
                "max_tokens": sampling.max_tokens,
                "stop": list(sampling.stop),
                "ignore_eos": sampling.ignore_eos,
                "output_kind": RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
            }
        )

    async def generate(
        self, request_id: str, prompt: list[int], sampling: Sampling, *, stream: bool, trace: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Piece]:
        """Answer a prompt. vLLM merges what was made while the caller was busy, so a slow reader gets larger pieces.

        Raises:
            BackendDead: the engine core died meanwhile.
        """
        from vllm.inputs import tokens_input

        self._running.add(request_id)
        # with its type: what is ready for the engine needs no thread to be made so
        outputs = self._engine.generate(tokens_input(prompt), self._parameters(sampling, stream), request_id, trace_headers=trace)
        try:
            with _death("the engine core died"):
                async for output in outputs:
                    part = output.outputs[0]
                    yield Piece(part.text, list(part.token_ids), part.finish_reason)
        finally:
            self._running.discard(request_id)
            # now, and not when the garbage collector comes by: this is what tells the engine that nobody waits any more
            await outputs.aclose()


@contextlib.contextmanager
def _death(message: str) -> Iterator[None]:
    """vLLM's word for a dead engine, in ours."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise BackendDead(message) from error
