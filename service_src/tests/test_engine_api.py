"""The service uses of vLLM only what every runtime profile's has: its source against engine_api/*.json, which was read from the wheels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from engine_wheel import Locked

import engine_api

SOURCE = Path(__file__).resolve().parents[1]


def recorded(profile: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((SOURCE / "engine_api" / f"{profile}.json").read_text())
    return result


def problems(package: Path, profile: str) -> list[str]:
    return engine_api.problems(profile, recorded(profile), engine_api.uses(package), package)


@pytest.fixture(params=engine_api.ENGINES)
def profile(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_every_profile_has_a_record() -> None:
    locks = {path.stem for path in SOURCE.glob("profiles/*.txt")} - {"test"}
    assert locks == set(engine_api.ENGINES) == {path.stem for path in SOURCE.glob("engine_api/*.json")}


def test_the_record_is_of_the_wheel_that_the_lock_names(profile: str) -> None:
    lock = Locked(SOURCE / f"profiles/{profile}.txt", engine_api.ENGINES[profile])
    read = recorded(profile)
    assert read["wheel"].split("-")[:2] == [lock.name.replace("-", "_"), lock.version], f"{profile}: run make engine-api"
    assert read["sha256"] in lock.hashes, f"{profile}: run make engine-api"


def test_all_that_is_used_is_there(profile: str) -> None:
    assert problems(SOURCE / engine_api.PACKAGE, profile) == []


ENGINE = "backends/vllm.py"
MUTANTS = {
    "an engine argument that is none": (
        ENGINE,
        '"enable_log_requests": False,',
        '"enable_log_requests": False, "warp_factor": 9,',
        "cuda12 cuda13 cpu",
        "vllm.engine.arg_utils.AsyncEngineArgs takes no argument 'warp_factor'.",
    ),
    "the engine argument that went away": (
        ENGINE,
        'arguments["kv_offloading_size"]',
        'arguments["swap_space"]',
        "cuda12 cuda13 cpu",
        "vllm.engine.arg_utils.AsyncEngineArgs takes no argument 'swap_space'.",
    ),
    "a keyword that 0.19.1 lacks": (
        ENGINE,
        "trace_headers=trace",
        'session_id="x", trace_headers=trace',
        "cuda12",
        'Unexpected keyword argument "session_id" for "generate" of "AsyncLLM".',
    ),
    "an attribute that 0.19.1 lacks": (
        ENGINE,
        "self._engine.output_processor.get_num_unfinished_requests()",
        "self._engine.get_num_unfinished_requests()",
        "cuda12",
        '"AsyncLLM" has no attribute "get_num_unfinished_requests".',
    ),
    "an attribute of what a request yields": (
        ENGINE,
        "part.finish_reason)",
        "part.end_reason)",
        "cuda12 cuda13 cpu",
        '"CompletionOutput" has no attribute "end_reason"',
    ),
    "a sampling parameter that is none": (
        ENGINE,
        '"ignore_eos": sampling',
        '"ignore_end": sampling',
        "cuda12 cuda13 cpu",
        "vllm.sampling_params.SamplingParams takes no argument 'ignore_end'.",
    ),
    "an import that is none": (
        ENGINE,
        "import tokens_input",
        "import token_input as tokens_input",
        "cuda12 cuda13 cpu",
        'Module "vllm.inputs" has no attribute "token_input"; maybe "tokens_input"?',
    ),
    "a statistic of a step": (
        ENGINE,
        "scheduler_stats.kv_cache_usage",
        "scheduler_stats.gpu_cache_usage",
        "cuda12 cuda13 cpu",
        '"SchedulerStats" has no attribute "gpu_cache_usage"',
    ),
    "the function that the plugin replaces": (
        "backends/vllm_plugin.py",
        "shm_broadcast.sched_yield",
        "shm_broadcast.sched_pause",
        "cuda12 cuda13 cpu",
        'Module has no attribute "sched_pause"',
    ),
    "a variable of vLLM's environment": (
        "settings.py",
        '"VLLM_CACHE_ROOT"',
        '"VLLM_CACHE_ROOF"',
        "cuda12 cuda13 cpu",
        "nobody has looked whether there is environment variable VLLM_CACHE_ROOF; run make engine-api.",
    ),
    "what is recorded, used further than it was followed": (
        ENGINE,
        "self._engine.model_config.max_model_len",
        "self._engine.vllm_config.model_config.max_model_len",
        "cuda12 cuda13 cpu",
        "what .vllm_config of vllm.v1.engine.async_llm gives is not recorded; run make engine-api.",
    ),
    "arguments that nobody looks at": (
        "memory_probe.py",
        "def measure(",
        "def weigh(",
        "cuda12 cuda13 cpu",
        "vllm.LLM gets a dictionary of arguments that nobody looks at; name the function weigh in KEYWORDS of scripts/engine_api.py.",
    ),
}


LINES = {"arguments that nobody looks at": 30}
"""How far from the change the line is that is named: there, where the arguments are given."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """A copy of the service with all of these, and what is said about it, by profile."""
    package = tmp_path_factory.mktemp("mutants") / engine_api.PACKAGE
    shutil.copytree(SOURCE / engine_api.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new, _, _ in MUTANTS.values():
        text = (package / file).read_text()
        assert text.count(old) == 1
        (package / file).write_text(text.replace(old, new))
    return package, {profile: problems(package, profile) for profile in engine_api.ENGINES}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_a_profile_lacks_is_named(mutant: str, profile: str, found: tuple[Path, dict[str, list[str]]]) -> None:
    """With profile, file and line; and where the profile has it, nothing is said."""
    package, said = found
    file, _, new, profiles, sentence = MUTANTS[mutant]
    text = (package / file).read_text()
    line = text[: text.index(new)].count("\n") + 1
    version = recorded(profile)["wheel"].split("-")[1]
    begins = f"profile {profile} (vLLM {version}): {engine_api.PACKAGE}/{file}:"
    told = [one for one in said[profile] if sentence in one]
    if profile not in profiles.split():
        assert told == []
        return
    assert len(told) == 1
    assert told[0].startswith(begins)
    assert abs(int(told[0].removeprefix(begins).split(":")[0]) - line) <= LINES.get(mutant, 0)


def test_a_metric_that_is_gone_is_named() -> None:
    read = recorded("cuda12")
    read["metrics"] |= {"vllm:kv_cache_usage_perc": False}
    found = engine_api.problems("cuda12", read, engine_api.uses(SOURCE / engine_api.PACKAGE), SOURCE / engine_api.PACKAGE)
    assert [line.split(": ")[0] for line in found] == ["profile cuda12 (vLLM 0.19.1)"]
    assert found[0].endswith(": there is no metric vllm:kv_cache_usage_perc.")
