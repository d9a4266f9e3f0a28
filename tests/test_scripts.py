"""The scripts behind ``make test``: what fails is named at the end, with its reason, and ends the run."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(tmp_path: Path, jobs: dict[str, str], number: int) -> subprocess.CompletedProcess[str]:
    """``jobs_at_a_time`` over stand-in scenarios: a name, and the shell command that its run is."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for name in ("lib.sh", "job"):
        (scripts / name).write_text((ROOT / "scripts" / name).read_text())
        (scripts / name).chmod(0o755)
    stand_in = "".join(f"[ $1 != {name} ] || {{ {command}; exit; }}\n" for name, command in jobs.items())
    (scripts / "run-scenario").write_text(f"#!/bin/bash\n{stand_in}")
    (scripts / "run-scenario").chmod(0o755)
    (scripts / "all").write_text(f'. "$(dirname "$0")/lib.sh"\njobs_at_a_time {number} {" ".join(jobs)}\nsummary\n')
    return subprocess.run(["bash", str(scripts / "all")], capture_output=True, text=True, check=False)


def test_everything_passed(tmp_path: Path) -> None:
    done = run(tmp_path, {"one": "echo fine", "two": "echo fine"}, number=2)
    assert done.returncode == 0, done.stderr
    assert "one: passed" in done.stdout and "two: passed" in done.stdout and "FAILED" not in done.stdout


def test_a_failure_does_not_stop_the_others_and_is_named_last_with_its_reason(tmp_path: Path) -> None:
    broken = "seq 20; echo 'FAILED tests/test_x.py::test_y - assert 1 == 2'; false"
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        done = run(folder, {"one": broken, "two": "echo fine"}, number)
        assert done.returncode == 1
        assert "two: passed" in done.stdout
        end = done.stdout.split("in all\n")[1].strip()
        assert end == "FAILED: one\nFAILED tests/test_x.py::test_y - assert 1 == 2"
        assert done.stderr == "error: failed: one\n"


def test_a_failure_without_a_known_form_shows_its_last_lines(tmp_path: Path) -> None:
    done = run(tmp_path, {"one": "seq 100; exit 3"}, number=1)
    assert done.returncode == 1
    assert done.stdout.rstrip().endswith("\n".join(str(number) for number in range(86, 101)))


def test_a_job_that_is_killed_is_a_failure(tmp_path: Path) -> None:
    done = run(tmp_path, {"one": "kill -9 $PPID"}, number=2)
    assert done.returncode == 1
    assert done.stdout.rstrip().endswith("a job of these was killed, and no other was begun: one")


def test_whatever_status_a_job_ends_with_the_others_are_run(tmp_path: Path) -> None:
    done = run(tmp_path, {"one": "exit 255", "two": "echo fine"}, number=2)
    assert done.returncode == 1
    assert "one: FAILED" in done.stdout and "two: passed" in done.stdout
