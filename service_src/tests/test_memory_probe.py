"""The memory probe: its table, its JSON and its exit statuses, with and without GPUs; what it would load is not loaded here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_sizing import AWQ, QWEN

from qwen_coder_service import memory_probe
from qwen_coder_service.memory_probe import Gpu, Measured, ProbeError
from qwen_coder_service.sizing import GIB, MIB

A100S = "0, NVIDIA A100 80GB PCIe, 81920, 81050\n1, NVIDIA A100 80GB PCIe, 81920, 81050\n"
NO_COMMAND = "No GPU was found: there is no nvidia-smi on this host's PATH."

Probe = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a command of that name on an otherwise empty PATH; it answers to one question only."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("QWEN_MODEL_PATH", "QWEN_MODEL_VARIANT", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(memory_probe, "ENV_FILE", tmp_path / "none.env")

    def put(answer: str, status: int = 0) -> None:
        command = folder / "nvidia-smi"
        question = "--query-gpu=index,name,memory.total,memory.free --format=csv,noheader,nounits"
        lines = ["#!/bin/sh", f'[ "$*" = "{question}" ] || exit 9', f"printf '%s' '{answer}'", f"exit {status}"]
        command.write_text("\n".join(lines) + "\n")
        command.chmod(0o755)

    return put


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with the real model's config.json, and nothing else."""
    model = tmp_path / "Qwen2.5-Coder-32B-Instruct"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(QWEN))
    return model


@pytest.fixture
def probe(folder: Path, capsys: pytest.CaptureFixture[str], nvidia_smi: Callable[..., None]) -> Probe:
    def run(*options: str) -> tuple[int, dict[str, Any]]:
        status = memory_probe.main(["--model-path", str(folder), "--format", "json", *options])
        return status, json.loads(capsys.readouterr().out)

    return run


DUAL = ("--tensor-parallel-size", "2", "--max-model-len", "131072", "--dtype", "bfloat16")


def test_without_a_gpu_it_predicts_and_says_why(probe: Probe) -> None:
    status, report = probe(*DUAL)
    assert status == 0
    assert report["sentences"] == [NO_COMMAND]
    assert report["headroom_holds"] is None and report["measured"] is None and report["gpus"] == []
    assert report["prediction"]["kv_bytes_per_sequence"] == 16 * GIB
    status, report = probe(*DUAL, "--load-model")
    assert (status, report["sentences"]) == (0, [NO_COMMAND, "Nothing was loaded."])


@pytest.mark.parametrize(
    ("answer", "status", "sentence"),
    [
        ("", 0, "No GPU was found: nvidia-smi lists none."),
        ("No devices were found", 6, "No GPU was found: nvidia-smi ends with 6 (No devices were found)."),
        (
            "0, Tesla, [N/A], 5",
            0,
            "No GPU was found: nvidia-smi says '0, Tesla, [N/A], 5', which is not an index, a name and two sizes in MiB.",
        ),
    ],
)
def test_an_nvidia_smi_that_knows_no_gpu_is_quoted(
    probe: Probe, nvidia_smi: Callable[..., None], answer: str, status: int, sentence: str
) -> None:
    nvidia_smi(answer, status)
    exit_status, report = probe(*DUAL)
    assert (exit_status, report["sentences"]) == (0, [sentence])


@pytest.mark.parametrize(
    ("visible", "gpus", "sentence"),
    [
        ("1", [1], ""),
        ("1,0", [1, 0], ""),
        ("2", [], "No GPU was found: CUDA_VISIBLE_DEVICES is '2', and nvidia-smi lists 0, 1; set it to some of these."),
        ("GPU-6b2f", [], "No GPU was found: CUDA_VISIBLE_DEVICES is 'GPU-6b2f', and nvidia-smi lists 0, 1; set it to some of these."),
    ],
)
def test_only_the_gpus_that_the_service_sees_count(
    nvidia_smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch, visible: str, gpus: list[int], sentence: str
) -> None:
    nvidia_smi(A100S)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found, said = memory_probe.find_gpus()
    assert ([gpu.index for gpu in found], said) == (gpus, sentence)


def test_the_env_files_choice_of_gpus_is_the_probes(
    folder: Path, nvidia_smi: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvidia_smi(A100S)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # put back by monkeypatch, whatever the probe sets
    env = tmp_path / "qwen-coder.env"
    env.write_text(f"QWEN_MODEL_PATH={folder}\nVLLM_MAX_MODEL_LEN=16384\nCUDA_VISIBLE_DEVICES=1\n")
    assert memory_probe.main(["--env-file", str(env), "--format", "json"]) == 0
    assert [gpu["index"] for gpu in json.loads(capsys.readouterr().out)["gpus"]] == [1]


def test_with_gpus_the_headroom_is_the_exit_status(probe: Probe, nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi(A100S)
    status, report = probe(*DUAL)
    assert status == 0 and report["headroom_holds"] is True
    assert report["gpus"][1] == {"index": 1, "name": "NVIDIA A100 80GB PCIe", "total_mib": 81920.0, "free_mib": 81050.0}
    assert report["sentences"] == ["The predicted headroom is 29.3 GB a device, at least 10 GB."]
    assert report["prediction"]["devices"] == 2
    status, report = probe(*DUAL, "--min-headroom-gb", "30")
    assert status == 1 and report["headroom_holds"] is False
    assert report["sentences"] == [
        "VLLM_MAX_MODEL_LEN is '131072', and a sequence of that length leaves 29.3 GB of the 30.0 GB that are to stay free; "
        "set it to 125952.",
        "The predicted headroom is 29.3 GB a device, less than 30 GB.",
    ]


def test_what_would_not_fit_is_not_loaded(probe: Probe, nvidia_smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi("0, NVIDIA A100 80GB PCIe, 81920, 81050\n")
    monkeypatch.setattr(memory_probe, "measure", None)
    status, report = probe("--max-model-len", "32768", "--load-model")
    assert status == 1
    assert report["sentences"][1] == "Nothing was loaded: the model would not fit."


def test_quantised_weights_need_no_headroom_unless_it_is_asked_for(probe: Probe, nvidia_smi: Callable[..., None], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(AWQ))
    nvidia_smi("0, NVIDIA L40S, 46068, 45400\n")
    status, report = probe("--max-model-len", "65536")
    assert (status, report["prediction"]["min_headroom_bytes"]) == (0, 0)
    status, report = probe("--max-model-len", "65536", "--min-headroom-gb", "10")
    assert status == 1


def test_what_was_measured_counts_more_than_the_prediction(
    probe: Probe, nvidia_smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(settings: Any, need: Any, before: list[Gpu], dummy_weights: bool) -> Measured:
        assert dummy_weights and len(before) == 2
        return Measured([70 * GIB, 71 * GIB], 8 * GIB, need.total_bytes, 37.5)

    nvidia_smi(A100S)
    monkeypatch.setattr(memory_probe, "measure", measure)
    status, report = probe(*DUAL, "--load-model", "--dummy-weights")
    assert status == 1 and report["headroom_holds"] is False
    assert report["measured"]["difference_percent"] == 37.5
    assert report["sentences"] == ["The measured headroom is 8.6 GB a device, less than 10 GB."]

    def fail(*_: Any) -> Measured:
        raise ProbeError("The model was not loaded: no weights.")

    monkeypatch.setattr(memory_probe, "measure", fail)
    status, report = probe(*DUAL, "--load-model")
    assert status == 1
    assert report["sentences"][0] == "The model was not loaded: no weights."


def test_the_table_has_every_figure_in_both_units(
    folder: Path, nvidia_smi: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    nvidia_smi(A100S)
    assert memory_probe.main(["--model-path", str(folder), *DUAL]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "GPU 0: NVIDIA A100 80GB PCIe, 81920 MiB, 81050 MiB free"
    assert table[2] == "weights (32.764 B parameters over 2 devices)                   30.51 GiB      32.76 GB"
    assert table[3] == "KV cache of one sequence of 131072 tokens                      16.00 GiB      17.18 GB"
    assert [line.split("  ")[0] for line in table[4:10]] == [
        "activations (estimate)",
        "CUDA graphs (estimate)",
        "CUDA context and communication (estimate)",
        "together",
        "device memory",
        "offloaded to host memory",
    ]
    assert table[-1] == "The predicted headroom is 29.3 GB a device, at least 10 GB."


def test_settings_come_from_the_env_file(folder: Path, nvidia_smi: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    file = folder.parent / "qwen-coder.env"
    file.write_text(f'QWEN_MODEL_PATH="{folder}"\nVLLM_MAX_MODEL_LEN=65536\nVLLM_TENSOR_PARALLEL_SIZE=2\n')
    assert memory_probe.main(["--env-file", str(file), "--format", "json", "--max-model-len", "8192"]) == 0
    prediction = json.loads(capsys.readouterr().out)["prediction"]
    assert (prediction["max_model_len"], prediction["tensor_parallel_size"]) == (8192, 2)


def test_wrong_use_is_status_2(folder: Path, nvidia_smi: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    assert memory_probe.main([]) == 2
    assert capsys.readouterr().err == (
        "QWEN_MODEL_PATH is not set; set it to the directory that holds the model's config.json and weights.\n"
    )
    assert memory_probe.main(["--model-path", str(folder), "--tensor-parallel-size", "5"]) == 2
    assert memory_probe.main(["--model-path", str(folder / "none")]) == 2
    (folder / "config.json").write_text("{")
    assert memory_probe.main(["--model-path", str(folder)]) == 2
    with pytest.raises(SystemExit) as error:
        memory_probe.main(["--format", "xml"])
    assert error.value.code == 2


def test_the_script_runs_from_a_checkout(folder: Path) -> None:
    script = Path(__file__).parent.parent / "scripts" / "qwen_memory_probe.py"
    command = [sys.executable, str(script), "--model-path", str(folder), "--load-model", "--dtype", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(folder)}, check=True, cwd=folder)
    assert done.stdout.splitlines()[-2:] == [NO_COMMAND, "Nothing was loaded."]


@pytest.mark.engine
def test_what_nvidia_smi_says_before_and_after_loading_is_the_measure(model: Path, tmp_path: Path) -> None:
    """The engine is the CPU's and nvidia-smi a script: this shows that the model is loaded and the numbers are told apart, no more."""
    command = tmp_path / "nvidia-smi"
    command.write_text('#!/bin/sh\n[ -e "$HOME/asked" ] && free=13000 || free=16000\n: > "$HOME/asked"\necho "0, Fake, 16384, $free"\n')
    command.chmod(0o755)
    options = ["--model-path", str(model), "--max-model-len", "2048", "--dtype", "float32", "--dummy-weights"]
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "QWEN_ENFORCE_EAGER": "true",  # what is compiled for processors is not what is compiled for GPUs, and takes a minute
    }
    probe = [sys.executable, "-m", "qwen_coder_service.memory_probe", *options, "--load-model", "--format", "json"]
    done = subprocess.run(probe, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)  # and nothing of the engine's log
    spare = 512 * report["prediction"]["kv_bytes_per_token"]
    used = 3000 * MIB - spare
    assert report["measured"]["used_bytes"] == [used]
    assert report["measured"]["headroom_bytes"] == 13000 * MIB + spare
    predicted = report["prediction"]["total_bytes"]
    assert report["measured"]["difference_percent"] == round(100 * (used - predicted) / predicted, 1)
    assert report["sentences"] == ["The measured headroom is 13.6 GB a device, at least 10 GB."]
