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
    if wanted.get("installed"):
        return [f"a driver of branch {wanted['branch']} is installed, and {why}; see what dmesg and `dkms status` say."]
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
    if wanted["install"] and not wanted.get("installed"):
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
            f"the PCI bus shows {cuda['on_bus']} of NVIDIA's GPUs, and {_answer(count)}; "
            "reboot the host or mend it (dmesg names the reason)."
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
            driver), the ``branch`` that it would, and ``installed``, whether it has.

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


def _link(cuda: Mapping[str, Any], one: int, other: int) -> str:
    link: str = cuda["links"].get(f"{min(one, other)}-{max(one, other)}", "?")
    return link


def _joined(cuda: Mapping[str, Any], gpus: tuple[int, ...]) -> bool:
    return all(_link(cuda, one, other).startswith("NV") for one, other in combinations(gpus, 2))


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


def cuda_notices(cuda: Mapping[str, Any], size: int, declared: list[int] | None = None) -> list[str]:
    """Say what an operator should know about the GPUs that a service uses, and what no refusal is.

    Args:
        cuda: what module ``cuda_facts`` found.
        size: GPUs over which the service splits each layer.
        declared: numbers of the GPUs that the service uses, where an operator chose them.
    """
    chosen = declared or cuda_gpus_for(cuda, size)
    if not chosen:
        return []
    rest = [gpu["index"] for gpu in cuda["gpus"] if gpu["index"] not in chosen]
    links = sorted({_link(cuda, one, other) for one, other in combinations(chosen, 2)})
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


def cuda_record(cuda: Mapping[str, Any], size: int, declared: list[int] | None = None) -> dict[str, Any]:
    """What of the findings stays true until somebody changes the host, and the GPUs that a service uses; see ``cuda_notices``."""
    stable = {name: value for name, value in cuda.items() if name not in ("state", "why", "raw")}
    gpus = [{name: value for name, value in gpu.items() if name != "memory_free_mib"} for gpu in cuda["gpus"]]
    return {**stable, "gpus": gpus, "service_gpus": declared or cuda_gpus_for(cuda, size)}


def _upstream(version: str) -> str:
    """580.65.06 of 580.65.06-1."""
    return version.rsplit("-", 1)[0]


def _fits(driver: str, asked: Mapping[str, Any]) -> bool:
    """Is it of the branch that is asked for, and the version where one is?"""
    return driver.split(".")[0] == str(asked["branch"]) and asked["version"] in ("", driver)


def cuda_state(dpkg: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What of a driver is installed.

    Args:
        dpkg: lines of name, version, selection and state.
        asked: see ``cuda_release``.

    Returns:
        ``driver``, its version or nothing; ``complete``, whether all that is asked for is there; ``installed``, names
        with versions; ``held`` and ``loose``, names of packages of the driver that are held and that are not.
    """
    rows = [line.split() for line in dpkg.splitlines()]
    installed = {name: version for name, version, _, state in rows if state == "installed"}
    driver = _upstream(installed.get(asked["packages"][0], ""))
    parts = [name for name, version in installed.items() if driver and _upstream(version) == driver]
    others = set(asked["others"].values())
    held = {name for name, _, selection, _ in rows if selection == "hold"} - others
    complete = _fits(driver, asked) and set(asked["packages"]) <= set(parts) and others <= set(installed)
    return {
        "driver": driver,
        "complete": complete,
        "installed": installed,
        "held": sorted(held & set(installed)),
        "loose": sorted(set(parts) - held),
    }


def _foreign_hold(state: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """A hold that somebody else put on another version; this role's own came with its pins."""
    held = [name for name in state["held"] if not _fits(_upstream(state["installed"][name]), asked)]
    if asked["pinned"] or not held:
        return []
    version = state["installed"][held[0]]
    return [
        f"cuda_driver_branch is {asked['branch']}, and the host holds {held[0]} at {version}; "
        f"set cuda_driver_branch to {version.split('.')[0]}, or release it: apt-mark unhold {' '.join(held)}."
    ]


def _choose(offered: str, state: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[str, list[str], str]:
    """Version of the driver, packages with their versions, and a sentence where there are none to choose."""
    offers: dict[str, list[str]] = {}
    for line in offered.splitlines():
        name, version, source = (part.strip() for part in line.split("|"))
        if source.startswith(asked["repository"].rstrip("/")):
            offers.setdefault(name, []).append(version)
    main, branch, repository = asked["packages"][0], str(asked["branch"]), asked["repository"]
    # what is installed stays, where it may
    version = asked["version"] or (state["driver"] if _fits(state["driver"], asked) else "")
    there = list(dict.fromkeys(map(_upstream, offers.get(main, []))))
    of_branch = [offer for offer in there if offer.split(".")[0] == branch]
    if not there:
        return "", [], f"cuda_repository_url is '{repository}', which has no package {main}; set it to a repository of NVIDIA's drivers."
    if version and version.split(".")[0] != branch:
        said = f"cuda_driver_version is '{version}', and cuda_driver_branch is {branch}"
        return "", [], f"{said}; set cuda_driver_branch to {version.split('.')[0]}."
    if not of_branch:
        branches = ", ".join(sorted({offer.split(".")[0] for offer in there}))
        return "", [], f"cuda_driver_branch is {branch}, which {repository} does not have; set it to one of {branches}."
    if version and version not in of_branch:
        return "", [], f"cuda_driver_version is '{version}', which {repository} does not have; set it to one of {', '.join(of_branch)}."
    driver = version or of_branch[0]
    packages = []
    for name in asked["packages"]:
        fitting = [offer for offer in offers.get(name, []) if _upstream(offer) == driver]
        if not fitting:
            said = f"cuda_driver_branch is {branch}, and {repository} has no {name} of {driver}"
            return "", [], f"{said}; set cuda_driver_version to another one, or cuda_packages to what it has."
        packages.append(f"{name}={fitting[0]}")
    return driver, packages, ""


def cuda_release(seen: Mapping[str, Any], state: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the packages of a host's driver.

    Args:
        seen: what module ``cuda_repository`` found; it was not asked where nothing is missing.
        state: what ``cuda_state`` says.
        asked: ``host``, ``repository`` (URL), ``branch``, ``version`` (empty: the newest of the branch), ``packages``
            (the first is the one whose version is the driver's), ``others`` (variable -> package that is not of the
            driver's version), ``pinned`` (this role installed a driver before).

    Returns:
        ``driver``: its version; ``packages``: names with versions for apt, none where nothing is missing; ``key``: the
        repository's, where it was asked for; ``problems``: a sentence each.
    """
    found = _foreign_hold(state, asked)
    driver: str = state["driver"]
    packages: list[str] = []
    if seen.get("problem"):
        found.append(seen["problem"])
    elif not state["complete"]:
        driver, packages, problem = _choose(seen["offers"], state, asked)
        known = {line.split("|")[0].strip() for line in (seen["offers"] + seen["known"]).splitlines()} | set(state["installed"])
        lacking = [] if seen["blind"] else [item for item in asked["others"].items() if item[1] not in known]
        found += [problem] if problem else []
        found += [
            f"{variable} asks for the package {name}, which no repository of this host has; set {variable} to one that exists."
            for variable, name in lacking
        ]
        packages += asked["others"].values()
    return {
        "driver": driver,
        "packages": packages,
        "key": seen.get("key", ""),
        "problems": [f"{asked['host']}: {sentence}" for sentence in found],
    }


class FilterModule:
    """Filters of role ``cuda``."""

    def filters(self) -> dict[str, Any]:
        """Names under which templates find them."""
        return {
            "cuda_problems": cuda_problems,
            "cuda_gpus_for": cuda_gpus_for,
            "cuda_notices": cuda_notices,
            "cuda_record": cuda_record,
            "cuda_state": cuda_state,
            "cuda_release": cuda_release,
        }
