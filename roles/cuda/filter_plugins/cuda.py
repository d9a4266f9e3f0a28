"""What a host's GPUs mean for the service: what stands in its way, which GPUs it uses, which packages its driver is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import combinations
from typing import Any


def _numbers(indices: list[int]) -> str:
    """Name GPUs in a sentence."""
    if len(indices) == 1:
        return f"GPU {indices[0]}"
    return f"GPUs {', '.join(map(str, indices[:-1]))} and {indices[-1]}"


def _answer(count: int) -> str:
    return "1 GPU answers" if count == 1 else f"{count} GPUs answer"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _newer_driver(wanted: Mapping[str, Any], seen: int) -> str:
    """What to set where the driver is too old: a profile that runs on it, or another branch."""
    others = [name for name, floor in wanted["profiles"].items() if 0 < floor <= seen and name != wanted["profile"]]
    fitting = wanted["branch"] >= wanted["driver_floor"]
    branch = wanted["branch"] if fitting else max(wanted["profiles"].values())
    change = f"cuda_driver_branch to {branch}" + ("" if wanted["install"] else " and cuda_install to true")
    return f"qwen_service_profile to {' or '.join(sorted(others))}, or {change}" if others else change


def _silent(cuda: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """No GPU answers."""
    profile, why = wanted["profile"], cuda["why"]
    if cuda["on_bus"] == 0:
        without = sorted(name for name, floor in wanted["profiles"].items() if floor == 0)
        return [
            f"cuda_profile is '{profile}', which needs a GPU, and the PCI bus shows none of NVIDIA's; "
            f"set qwen_gpu_tier to a tier of a profile that needs none ({', '.join(without)})."
        ]
    if wanted["install"] and cuda["state"] != "hangs":
        return []
    if cuda["state"] in ("no_devices", "hangs"):
        return [f"the PCI bus shows {cuda['on_bus']} of NVIDIA's GPUs, and {why}; reboot the host or mend it (dmesg names the reason)."]
    if cuda["state"] == "mismatch":
        return [f"cuda_install is false, and {why}; reboot the host, or set cuda_install and cuda_reboot_allowed to true."]
    return [
        f"cuda_install is false, and {why}; set cuda_install to true, "
        f"or install a driver of branch {wanted['driver_floor']} or newer, which profile {profile} needs."
    ]


def _old(cuda: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The driver, or the CUDA that it runs, is below a floor."""
    if wanted["install"]:
        return []
    if cuda["branch"] < wanted["driver_floor"]:
        return [
            f"the driver is {cuda['driver']}, and profile {wanted['profile']} needs branch {wanted['driver_floor']} or newer; "
            f"set {_newer_driver(wanted, cuda['branch'])}."
        ]
    if not cuda["cuda"]:
        return ["the driver names no CUDA version, so its library libcuda is missing; set cuda_install to true, or install it."]
    if _version(cuda["cuda"]) < _version(wanted["cuda_floor"]):
        return [
            f"the driver's CUDA is {cuda['cuda']}, and at least {wanted['cuda_floor']} is needed; "
            f"set cuda_driver_branch to {wanted['branch']} and cuda_install to true."
        ]
    return []


def _unfit(cuda: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """GPUs that answer, or should, and cannot be used as they are."""
    found = []
    count = len(cuda["gpus"])
    if cuda["lost"]:
        found.append(f"the driver has lost GPU {' and '.join(cuda['lost'])}; reboot the host or mend it (dmesg names the Xid).")
    elif cuda["on_bus"] > count:
        found.append(
            f"the PCI bus shows {cuda['on_bus']} of NVIDIA's GPUs, and {_answer(count)}; reboot the host or mend it (dmesg names the reason)."
        )
    # said already, where the declared ones are on the bus or lost
    if wanted["gpu_count"] not in (0, count, max(cuda["on_bus"], count + len(cuda["lost"]))):
        found.append(f"cuda_gpu_count is {wanted['gpu_count']}, and {_answer(count)}; set cuda_gpu_count to {count}, or mend the host.")
    split = [gpu["index"] for gpu in cuda["gpus"] if gpu["mig"] == "enabled"]
    if split:
        found.append(f"MIG is on for {_numbers(split)}, which splits what the model needs whole; turn it off: nvidia-smi -mig 0.")
    unguarded = [gpu["index"] for gpu in cuda["gpus"] if gpu["ecc"] == "disabled"]
    if unguarded and wanted["require_ecc"]:
        found.append(
            f"cuda_require_ecc is true, and ECC is off for {_numbers(unguarded)}; "
            "set cuda_require_ecc to false, or turn it on: nvidia-smi -e 1, then reboot."
        )
    return found


def cuda_problems(cuda: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say what stands in the way of a service on this host.

    Args:
        cuda: what module ``cuda_facts`` found.
        wanted: ``host``; ``profile``, its ``driver_floor`` (a branch) and ``profiles`` (all names with their floors);
            ``cuda_floor``; ``gpu_count`` (0: not declared); ``require_ecc``; ``install`` (the role may install a
            driver) and the ``branch`` that it would.

    Returns:
        One sentence a problem: host, variable, value seen, value to set. Empty when nothing is wrong.
    """
    found = []
    if wanted["install"] and wanted["branch"] < wanted["driver_floor"]:
        found.append(
            f"cuda_driver_branch is {wanted['branch']}, and profile {wanted['profile']} needs {wanted['driver_floor']} or newer; "
            f"set {_newer_driver(wanted, wanted['branch'])}."
        )
    found += [*_old(cuda, wanted), *_unfit(cuda, wanted)] if cuda["found"] else _silent(cuda, wanted)
    return [f"{wanted['host']}: {sentence}" for sentence in found]


def _joined(cuda: Mapping[str, Any], gpus: tuple[int, ...]) -> bool:
    return all(cuda["links"].get(f"{one}-{other}", "").startswith("NV") for one, other in combinations(gpus, 2))


def cuda_gpus_for(cuda: Mapping[str, Any], size: int) -> list[int]:
    """Choose the GPUs of a service that splits each layer over ``size`` of them.

    Those that NVLink joins, each with each, a whole group of them before a part of a larger one; the lowest numbers where
    there is a choice or no NVLink. Fewer than ``size`` where the host has fewer.
    """
    numbers = sorted(gpu["index"] for gpu in cuda["gpus"])
    if size < 2 or size > len(numbers):
        return numbers[:size]
    linked = [gpus for gpus in combinations(numbers, size) if _joined(cuda, gpus)]
    whole = [gpus for gpus in linked if list(gpus) in cuda["nvlink_groups"]]
    return list(next(iter([*whole, *linked]), numbers[:size]))


def cuda_notices(cuda: Mapping[str, Any], size: int) -> list[str]:
    """Say what an operator should know about the GPUs that a service uses, and what no refusal is.

    Args:
        cuda: what module ``cuda_facts`` found.
        size: GPUs over which the service splits each layer.
    """
    chosen = cuda_gpus_for(cuda, size)
    if not chosen:
        return []
    rest = [gpu["index"] for gpu in cuda["gpus"] if gpu["index"] not in chosen]
    links = sorted({cuda["links"].get(f"{one}-{other}", "?") for one, other in combinations(chosen, 2)})
    if not links:
        said = f"The service uses {_numbers(chosen)}"
    elif _joined(cuda, tuple(chosen)):
        said = f"The service uses {_numbers(chosen)}, which NVLink joins ({', '.join(links)})"
    else:
        said = f"The service uses {_numbers(chosen)}, which NVLink does not join ({', '.join(links)}): tensor parallelism goes over PCIe"
    found = [f"{said}; {_numbers(rest)} {'stays' if len(rest) == 1 else 'stay'} free." if rest else f"{said}."]
    off = [gpu["index"] for gpu in cuda["gpus"] if not gpu["persistence"]]
    if off:
        found.append(f"Persistence mode is off for {_numbers(off)}: each start of the driver takes seconds more.")
    return found


def _offers(madison: str, repository: str) -> dict[str, list[str]]:
    """Versions of each package that a repository has, newest first as apt lists them."""
    offers: dict[str, list[str]] = {}
    for line in madison.splitlines():
        name, version, source = (part.strip() for part in line.split("|"))
        if source.startswith(repository.rstrip("/")):
            offers.setdefault(name, []).append(version)
    return offers


def _upstream(version: str) -> str:
    """580.65.06 of 580.65.06-1."""
    return version.rsplit("-", 1)[0]


def cuda_release(madison: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the packages of a driver.

    Args:
        madison: what ``apt-cache madison`` says of all packages in question.
        wanted: ``host``, ``repository`` (URL), ``branch``, ``version`` (empty: the newest of the branch), ``packages`` (the first is the
            one whose version is the driver's), ``others`` (variable -> package that is not of the driver's version).

    Returns:
        ``driver``: its version; ``packages``: names with versions for apt; ``problem``: a sentence where there is none to
        choose.
    """
    offers = _offers(madison, wanted["repository"])
    known = {line.split("|")[0].strip() for line in madison.splitlines()}
    main, *parts = wanted["packages"]
    branch, version, repository = str(wanted["branch"]), wanted["version"], wanted["repository"]
    there = list(dict.fromkeys(map(_upstream, offers.get(main, []))))
    of_branch = [offer for offer in there if offer.split(".")[0] == branch]
    problem = ""
    if not there:
        problem = f"cuda_repository_url is '{repository}', which has no package {main}; set it to a repository of NVIDIA's drivers."
    elif version and version.split(".")[0] != branch:
        problem = (
            f"cuda_driver_version is '{version}', and cuda_driver_branch is {branch}; set cuda_driver_branch to {version.split('.')[0]}."
        )
    elif not of_branch:
        branches = sorted({offer.split(".")[0] for offer in there})
        problem = f"cuda_driver_branch is {branch}, which {repository} does not have; set it to one of {', '.join(branches)}."
    elif version and version not in of_branch:
        problem = f"cuda_driver_version is '{version}', which {repository} does not have; set it to one of {', '.join(of_branch)}."
    driver = version or next(iter(of_branch), "")
    packages = []
    for name in [main, *parts]:
        fitting = [offer for offer in offers.get(name, []) if _upstream(offer) == driver]
        if fitting:
            packages.append(f"{name}={fitting[0]}")
        elif not problem:
            problem = f"cuda_driver_branch is {branch}, and {repository} has no {name} of {driver}; set cuda_driver_version to another one."
    for variable, name in wanted["others"].items():
        if name not in known and not problem:
            problem = f"{variable} needs the package {name}, which no repository of this host has; set {variable} to one that exists."
        packages.append(name)
    if problem:
        return {"driver": "", "packages": [], "problem": f"{wanted['host']}: {problem}"}
    return {"driver": driver, "packages": packages, "problem": ""}


class FilterModule:
    """Filters of role ``cuda``."""

    def filters(self) -> dict[str, Any]:
        """Names under which templates find them."""
        return {
            "cuda_problems": cuda_problems,
            "cuda_gpus_for": cuda_gpus_for,
            "cuda_notices": cuda_notices,
            "cuda_release": cuda_release,
        }
