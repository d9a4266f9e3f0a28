"""Whether a host can start what its inventory declares: said on the control machine, before anything is downloaded or changed.

The arithmetic is the service's own (``service_src/qwen_coder_service/sizing.py``, which needs nothing but Python); this file puts the
inventory's names on it.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

GIB, GB = 1 << 30, 10**9

YARN_FACTOR = 4
"""Times its own length to which a checkpoint is stretched at most: what Qwen's model card validates."""

NUMBERS = {
    "qwen_service_tensor_parallel_size": (int, 1, "a number of GPUs, 1 or more"),
    "qwen_service_max_model_len": (int, 16, "a number of tokens, at least 16"),
    "qwen_service_gpu_memory_utilization": (float, 0.01, "a share of each GPU's memory, for example 0.92"),
    "qwen_service_max_batch_tokens": (int, 16, "a number of tokens, at least 16"),
    "qwen_service_max_num_seqs": (int, 1, "a number of requests, 1 or more"),
    "qwen_service_cpu_offload_gb": (float, 0, "a number of GiB, 0 or more"),
    "qwen_service_swap_space": (float, 0, "a number of GiB, 0 or more"),
    "qwen_service_kv_cache_memory_bytes": (int, 0, "a number of bytes, or 0 to derive it from the GPU memory"),
    "qwen_service_min_headroom_gb": (float, 0, "a number of GB, 0 or more"),
}


@cache
def _sizing(source: str) -> ModuleType:
    path = Path(source, "qwen_coder_service/sizing.py")
    spec = importlib.util.spec_from_file_location("qwen_sizing", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def _gb(count: float) -> str:
    return f"{count / GB:.1f} GB"


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"


def _origin(value: Any) -> str:
    """File and line that a value was written in, as far as Ansible (2.19 and newer) knows them."""
    try:
        from ansible._internal._datatag._tags import Origin

        tag = Origin.get_tag(value)
    except ImportError:
        return "inventory"
    if tag is None:
        return "inventory"  # booleans carry no origin
    if tag.path is None:
        return str(tag.description or "inventory").strip("<>")
    try:
        path = Path(tag.path).relative_to(Path.cwd())
    except ValueError:
        path = Path(tag.path)
    return f"{path}:{tag.line_num}" if tag.line_num else str(path)


def qwen_service_origins(
    values: Mapping[str, Any], inventory: Mapping[str, Any], tier: str, extra: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Say for each setting of a host what it is and where that was said.

    Args:
        values: effective values by variable.
        inventory: the host's ``hostvars``, in which role defaults do not show.
        tier: the host's tier.
        extra: ``qwen_gpu_tiers_extra``.

    Returns:
        ``{name, value, from}`` a setting; ``from`` is a file and line, the tier's name, or ``default``.
    """
    result = []
    changed = extra.get(tier) or {}
    for name, value in values.items():
        key = name.removeprefix("qwen_service_")
        if name in inventory:
            said = _origin(inventory[name])
        elif key in changed:
            said = f"qwen_gpu_tiers_extra ({tier})"
        elif name == "qwen_gpu_tier":
            said = "default"
        else:
            said = f"tier {tier}"
        result.append({"name": name, "value": value, "from": said})
    return result


def qwen_service_lines(audit: Mapping[str, Any]) -> list[str]:
    """Lines for a person: a node's settings, each with where it was said, and what they come to."""
    gpus = f"GPU {', '.join(map(str, audit['gpus']))} of {len(audit['cuda']['gpus'])}" if audit["cuda"] else "no GPU"
    lines = [f"tier {audit['tier']}, {gpus}"]
    lines += [f"{setting['name']}: {setting['value']}  <- {setting['from']}" for setting in audit["settings"]]
    if figures := audit["figures"]:
        lines.append(
            f"headroom {_gb(figures['headroom_bytes'])} a GPU, {_gb(figures['min_headroom_bytes'])} asked for; "
            f"KV cache {figures['kv_tokens']} tokens, {figures['full_sequences']} sequences of full length"
        )
    return lines + list(audit["notices"])


def _numbers(host: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values as numbers, and a sentence for each that is none."""
    numbers: dict[str, Any] = {}
    problems = []
    for name, (kind, least, to) in NUMBERS.items():
        try:
            numbers[name] = kind(values[name])
            wrong = isinstance(values[name], bool) or not numbers[name] >= least or (kind is int and float(values[name]) != numbers[name])
        except (TypeError, ValueError):
            wrong = True
        if wrong:
            problems.append(f"{host}: {name} is '{values[name]}'; set it to {to}.")
    return numbers, problems


def _arguments(values: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``sizing.fit`` beside the devices."""
    return {
        "tensor_parallel_size": numbers["qwen_service_tensor_parallel_size"],
        "max_model_len": numbers["qwen_service_max_model_len"],
        "gpu_memory_utilization": numbers["qwen_service_gpu_memory_utilization"],
        "max_batch_tokens": numbers["qwen_service_max_batch_tokens"],
        "max_num_seqs": numbers["qwen_service_max_num_seqs"],
        "cpu_offload_gb": numbers["qwen_service_cpu_offload_gb"],
        "cpu_offload_always": values["qwen_service_cpu_offload"] == "always",
        "swap_space_gb": numbers["qwen_service_swap_space"],
        "kv_cache_memory_bytes": numbers["qwen_service_kv_cache_memory_bytes"],
        "min_headroom_gb": numbers["qwen_service_min_headroom_gb"],
        "dtype": values["qwen_service_dtype"],
        "enforce_eager": bool(values["qwen_service_enforce_eager"]),
    }


def _devices(sizing: ModuleType, cuda: Mapping[str, Any], indices: list[int], span: int) -> dict[str, int]:
    """The devices for ``sizing.fit``: how many there are on hosts like this one, and the memory of the smallest that is used."""
    gpus = cuda["gpus"]
    used = [gpu for gpu in gpus if gpu["index"] in indices] or gpus
    return {"devices": len(gpus) * span, "device_memory_bytes": sizing.cuda_memory_bytes(min(gpu["memory_total_mib"] for gpu in used))}


def _tiers_that_fit(sizing: ModuleType, cuda: Mapping[str, Any], words: Mapping[str, Any]) -> list[str]:
    """Tiers of the catalogue that would start on these GPUs as they are."""
    found = []
    for name, tier in sorted(words["tiers"].items()):
        model = words["models"].get(tier.get("model"))
        if model is None:
            continue
        values = {f"qwen_service_{key}": value for key, value in tier.items()} | {"qwen_service_cpu_offload": "needed"}
        numbers, wrong = _numbers("", values)
        if wrong:
            continue
        fit = sizing.fit(
            sizing.ModelShape.from_config(model["config"]), **_devices(sizing, cuda, [], words["span"]), **_arguments(values, numbers)
        )
        if fit.fits:
            found.append(name)
    return found


def _memory(host: str, sizing: ModuleType, numbers: Mapping[str, Any], memory: int, span: int) -> list[str]:
    """Whether the host's memory holds the offload budget and the KV cache's swap, beside the processes."""
    size = numbers["qwen_service_tensor_parallel_size"] // span
    offload, swap = numbers["qwen_service_cpu_offload_gb"], numbers["qwen_service_swap_space"]
    processes = (1 + size) * sizing.HOST_PROCESS_BYTES
    if not offload and not swap:
        return []
    left = memory - processes - int(swap * GIB)
    if int(offload * size * GIB) <= left:
        return []
    has = f"and the host has {_gib(memory)} of memory, of which the service's processes take {_gib(processes)}"
    if offload and left >= 0:
        swapped = f" and swap_space {_gib(swap * GIB)}" if swap else ""
        each = f" for each of {size} GPUs" if size > 1 else ""
        return [
            f"{host}: qwen_service_cpu_offload_gb is '{offload:g}'{each}, {has}{swapped}; "
            f"set it to at most {max(0, math.floor(left / size / GIB))}."
        ]
    most = max(0, math.floor((memory - processes) / GIB))
    return [f"{host}: qwen_service_swap_space is '{swap:g}', {has}; set it to at most {most}."]


def _disk(host: str, values: Mapping[str, Any], seen: Mapping[str, Any], weights: int, release: int) -> list[str]:
    """Whether weights and a release find room; what is there already is not counted again."""
    root, model = seen["root"], seen["model"]
    needs = []
    if not model["config"] and weights:
        needs.append((model, "qwen_service_model_dir", "the weights", "need", max(0, weights - model["bytes"])))
    if values["qwen_service_profile"] not in seen["profiles"]:
        needs.append((root, "qwen_service_root", "a release", "needs", release))
    problems = []
    for mount in dict.fromkeys(place["mount"] for place, *_ in needs):
        here = [entry for entry in needs if entry[0]["mount"] == mount]
        free, wanted = here[-1][0]["free_bytes"], sum(size for *_, size in here)
        if wanted <= free:
            continue
        _, variable, what, verb, _ = here[-1]
        if len(here) > 1:
            what, verb = " and ".join(f"{name} ({_gb(size)})" for _, _, name, _, size in here), "need"
        problems.append(
            f"{host}: {variable} is '{values[variable]}', whose filesystem {mount} has {_gb(free)} free, and {what} {verb} {_gb(wanted)}; "
            f"free {_gb(wanted - free)} there, or set it to a directory with more room."
        )
    return problems


def qwen_service_fit(values: Mapping[str, Any], host: str, seen: Mapping[str, Any], words: Mapping[str, Any]) -> dict[str, Any]:
    """Compare what a host is to run with what it has.

    Args:
        values: effective values of the role's variables, by name.
        host: the host's name in the inventory.
        seen: what was found: ``capacity`` (module ``qwen_capacity``), ``cuda`` (module ``cuda_facts``; None where the profile needs no
            GPU, or none can be seen yet) and ``gpus`` (indices of those that the service is to use).
        words: ``source`` (the service's source directory), ``variables`` (the service's setting -> our variable), ``tiers``, ``models``
            and ``profiles`` of role ``qwen``, ``tier`` (the host's), and ``span`` (hosts, this one and others like it, over which its
            engine spans).

    Returns:
        ``figures`` (of ``sizing.Fit``, None where nothing was worked out), ``problems`` and ``notices``, each a list of sentences.
    """
    sizing = _sizing(words["source"])
    numbers, problems = _numbers(host, values)
    result: dict[str, Any] = {"figures": None, "problems": problems, "notices": []}
    if problems:
        return result
    size, span = numbers["qwen_service_tensor_parallel_size"], words["span"]
    if size % span:
        problems.append(
            f"{host}: qwen_service_tensor_parallel_size is '{size}', which {span} hosts (qwen_engine_hosts) cannot share evenly; "
            f"set it to a multiple of {span}."
        )
        return result
    capacity, cuda, profile = seen["capacity"], seen["cuda"], words["profiles"][values["qwen_service_profile"]]
    problems += _memory(host, sizing, numbers, capacity["memory_bytes"], words["span"])

    name = values["qwen_service_model"]
    known = words["models"].get(name)
    config = capacity["model"]["config"] or (known or {}).get("config")
    weights = 0
    if capacity["model"]["config"] is None and values["qwen_service_model_source"] == "directory":
        problems.append(
            f"{host}: qwen_service_model_dir is '{values['qwen_service_model_dir']}', which holds no config.json; put the files of {name} "
            "there, or set qwen_service_model_dir to the directory that holds them."
        )
    elif config is None and values["qwen_service_model_source"] != "tiny":
        problems.append(
            f"{host}: qwen_service_model is '{name}', which the catalogue does not know; set it to one of "
            f"{', '.join(sorted(words['models']))}, or describe it in qwen_models_extra."
        )
    elif config is not None:
        try:
            shape = sizing.ModelShape.from_config(config)
        except sizing.SizingError as error:
            problems.append(f"{host}: qwen_service_model is '{name}', whose {error}")
            shape = None
        if shape is not None:
            weights = shape.weights_bytes(values["qwen_service_dtype"])
            problems += _length(host, numbers, shape)
            if cuda and (cuda["lost"] or cuda["on_bus"] > len(cuda["gpus"])):
                pass  # a host that lacks GPUs it has is to be mended, not declared smaller: role cuda says so
            elif profile["driver"] and cuda:
                problems += _chosen(host, values["qwen_service_gpus"], size, span, cuda)
                figures, found = _gpu_memory(host, sizing, shape, values, numbers, seen, words)
                result["figures"] = figures
                problems += found
            elif profile["driver"]:
                result["notices"].append("The GPUs cannot be seen before the driver is installed, so whether the model fits is not known.")
    if values["qwen_service_model_source"] == "dummy":
        weights = 0  # none comes to the disk
    problems += _disk(host, values, capacity, weights, profile["release_gb"] * GB)
    return result


def _chosen(host: str, declared: list[int], size: int, span: int, cuda: Mapping[str, Any]) -> list[str]:
    """Whether the GPUs that an operator chose are there, and as many as a layer is split over, or this host's share of them."""
    there = [gpu["index"] for gpu in cuda["gpus"]]
    if not declared or (len(set(declared)) == len(declared) == size // span and set(declared) <= set(there)):
        return []
    over = f" over {span} hosts" if span > 1 else ""
    return [
        f"{host}: qwen_service_gpus is '{', '.join(map(str, declared))}'; set it to {size // span} of the host's GPUs "
        f"({', '.join(map(str, there))}; qwen_service_tensor_parallel_size is {size}{over}), or to [] to have them chosen."
    ]


def _length(host: str, numbers: Mapping[str, Any], shape: Any) -> list[str]:
    length, most = numbers["qwen_service_max_model_len"], YARN_FACTOR * shape.native_length
    if length <= most:
        return []
    return [
        f"{host}: qwen_service_max_model_len is '{length}', more than {YARN_FACTOR} times the checkpoint's own {shape.native_length} "
        f"tokens; set it to at most {most}."
    ]


def _gpu_memory(
    host: str, sizing: ModuleType, shape: Any, values: Mapping[str, Any], numbers: Mapping[str, Any], seen: Mapping[str, Any],
    words: Mapping[str, Any],
) -> tuple[dict[str, Any] | None, list[str]]:  # fmt: skip
    """Figures of the fit on the GPUs, and its problems under the inventory's names."""
    try:
        fit = sizing.fit(shape, **_devices(sizing, seen["cuda"], seen["gpus"], words["span"]), **_arguments(values, numbers))
    except sizing.SizingError as error:
        return None, [f"{host}: {error}"]
    problems = []
    for problem in fit.problems:
        sentence = problem.sentence.replace(problem.setting, words["variables"][problem.setting], 1)
        problems.append(f"{host}: {sentence}")
    if problems and (tiers := _tiers_that_fit(sizing, seen["cuda"], words)) and words["tier"] not in tiers:
        problems[-1] = problems[-1].removesuffix(".") + f", or qwen_gpu_tier to {' or '.join(tiers)}."
    return fit.figures(), problems


def qwen_service_uneven(audits: Mapping[str, Mapping[str, Any]], hostvars: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say where hosts of one engine would start it with other values than the one that answers.

    Args:
        audits: ``qwen_service_audit`` of each host.
        hostvars: Ansible's ``hostvars``, for ``qwen_engine_hosts``.

    Returns:
        One sentence a value.
    """
    found = []
    for host, audit in audits.items():
        head = next(iter(hostvars[host].get("qwen_engine_hosts") or []), host)
        if head == host or head not in audits:
            continue
        meant = {setting["name"]: setting["value"] for setting in audits[head]["settings"]}
        found += [
            f"{host}: {setting['name']} is '{setting['value']}', and '{meant[setting['name']]}' on {head}, the head of its engine; "
            "set it to "
            "the same, best in a group that they share."
            for setting in audit["settings"]
            if setting["value"] != meant[setting["name"]]
        ]
    return found


class FilterModule:
    """Filters of role ``qwen_service``."""

    def filters(self) -> dict[str, Any]:
        """Names under which templates find them."""
        return {
            "qwen_service_fit": qwen_service_fit,
            "qwen_service_origins": qwen_service_origins,
            "qwen_service_lines": qwen_service_lines,
            "qwen_service_uneven": qwen_service_uneven,
        }
