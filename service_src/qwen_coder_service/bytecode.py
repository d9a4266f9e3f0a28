"""Write the bytecode of what the service imports, and of no more, by who may write it.

``python -m qwen_coder_service.bytecode [ENVIRONMENTS...]``: these are folders of environments that stand side by side.

The service may not write into its environment, and would compile at every start, in each of its processes. Of the 21,000 modules of an
environment a start uses a quarter; to compile them all takes a minute and a half of processor time and more. Environments share the files
of equal packages (uv links them), and what one has compiled, another need not compile again.
"""

from __future__ import annotations

import importlib
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

MODULES = (
    "gunicorn.app.wsgiapp",
    "gunicorn.glogging",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
    "uvicorn_worker",
    "qwen_coder_service.app",
    "qwen_coder_service.backends.transformers",
    "qwen_coder_service.backends.vllm",
    "qwen_coder_service.backends.vllm_plugin",
    "qwen_coder_service.lifecycle",
    "qwen_coder_service.logs",
    "qwen_coder_service.memory_probe",
    "qwen_coder_service.tiny_model",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2.tokenization_qwen2",
    "vllm.engine.arg_utils",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.model_executor.models.qwen2",
    "vllm.renderers.hf",
    "vllm.triton_utils.dispatcher",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.flashinfer",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.gpu_worker",
)
"""What a start imports first, of all backends and kinds of processors; with these come the modules that they need."""


def share(folders: Iterable[str], own: str = sysconfig.get_path("purelib")) -> int:
    """Take the bytecode of other environments where its source is the same file.

    Args:
        folders: folders of environments, each with ``<name>/venv``; what is not there has none.
        own: where this environment's packages are.

    Returns:
        How many files were taken; they are links, as the packages' own files are.
    """
    own_packages, taken = Path(own), 0
    # <folder>/<name>/venv/lib/python3.x/site-packages
    within = Path(*own_packages.parts[-4:])
    for packages in (there for folder in folders for there in Path(folder).glob(f"*/{within}") if there != own_packages):
        for compiled in packages.rglob(f"__pycache__/*.{sys.implementation.cache_tag}.pyc"):
            name = compiled.relative_to(packages)
            source = name.parent.parent / f"{name.name.split('.')[0]}.py"
            try:
                if not (packages / source).samefile(own_packages / source):
                    continue
                (own_packages / name.parent).mkdir(exist_ok=True)
                (own_packages / name).hardlink_to(compiled)
            except OSError:  # only there, here already, or on another file system: it is compiled, if it is imported
                continue
            taken += 1
    return taken


def write(modules: tuple[str, ...] = MODULES) -> dict[str, str]:
    """Import modules, and let Python write their bytecode.

    Args:
        modules: their names; what is not installed, or not for this machine, is left out.

    Returns:
        What was left out, and why.
    """
    sys.dont_write_bytecode = False
    left: dict[str, str] = {}
    for name in modules:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (a module for another kind of processor may say anything)
            left[name] = f"{type(error).__name__}: {error}"
    return left


if __name__ == "__main__":
    print(f"shared with environments beside this one: {share(sys.argv[1:])}")
    for name, why in write().items():
        print(f"left out: {name}: {why.splitlines()[0][:200]}")
