"""Start vLLM's engine with dummy weights, one configuration after another, and print what it made of each: a line of JSON.

Run by test_sizing.py in a process of its own: ``engine_sizes.py FOLDER JSON``. Workers import this module too (``Recorder``).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }
)


class Recorder:
    """Part of each worker: what its weights took before the CPU engine repacked them, which hides the linear layers' own."""

    @staticmethod
    def install() -> None:
        from vllm.model_executor.model_loader import base_loader

        real = base_loader.process_weights_after_loading

        def counting(model: Any, *rest: Any, **named: Any) -> Any:
            Recorder.weights = sum(p.numel() * p.element_size() for p in model.parameters())
            return real(model, *rest, **named)

        base_loader.process_weights_after_loading = counting

    weights = 0

    def weights_bytes(self) -> int:
        return Recorder.weights


if "vllm" in sys.modules:  # a worker: vLLM imports this module before it loads the model
    Recorder.install()


def main(folder: Path, configurations: list[dict[str, Any]]) -> None:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    for number, configuration in enumerate(configurations):
        model = folder / str(number)
        model.mkdir()
        (model / "config.json").write_text(json.dumps(configuration["config"]))
        try:
            engine = LLM(
                str(model),
                load_format="dummy",
                skip_tokenizer_init=True,
                enforce_eager=True,
                worker_extension_cls="engine_sizes.Recorder",
                **configuration["arguments"],
            )
        except ValueError as error:
            print(json.dumps({"refused": str(error)}), flush=True)
        else:
            cache = engine.llm_engine.vllm_config.cache_config
            seen = {"tokens": cache.num_gpu_blocks * cache.block_size, "block_size": cache.block_size}
            print(json.dumps({**seen, "weights": engine.collective_rpc("weights_bytes")}), flush=True)
            del engine
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
