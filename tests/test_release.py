"""The releases of a host: put together whole or not at all, switched by a rename, kept in number."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from plugins import load

module = load("roles/qwen_service/library/qwen_release.py")
ACCEPT = [sys.executable, "-c", "import sys; sys.exit('nonsense' in open(sys.argv[1]).read())", "{}"]


@pytest.fixture
def releases(tmp_path: Path) -> Any:
    for name in ("environments/1-a/venv/bin", "environments/2-b/venv/bin", "releases", "units"):
        (tmp_path / name).mkdir(parents=True)
    return module.Releases(tmp_path)


def prepare(releases: Any, env: str = "x=1\n", environment: str = "1-a", dry: bool = False) -> tuple[str, bool, list[dict[str, str]]]:
    files = {"q.env": env, "q.service": f"[Service]\nExecStart={releases.root}/current/venv/bin\nEnvironmentFile={env!r}\n"}
    result: tuple[str, bool, list[dict[str, str]]] = releases.prepare(environment, files, {"q.env": ACCEPT}, {"tier": "t"}, dry)
    return result


def switch(releases: Any, name: str, dry: bool = False) -> tuple[str, str, bool]:
    result: tuple[str, str, bool] = releases.switch(name, releases.root / "units", dry)
    return result


def tree(root: Path) -> dict[str, str]:
    """Every path with what it is."""
    return {
        str(path.relative_to(root)): str(path.readlink()) if path.is_symlink() else path.read_text() if path.is_file() else ""
        for path in root.rglob("*")
    }


def test_it_is_put_together_once(releases: Any) -> None:
    name, changed, differences = prepare(releases)
    assert changed
    assert differences[0]["after"] == "x=1\n"
    folder = releases.releases / name
    assert json.loads((folder / "release.json").read_text()) == {"id": name, "environment": "1-a", "tier": "t"}
    assert (folder / "venv").resolve() == releases.environments / "1-a/venv"
    assert name.startswith("1-a-")
    assert prepare(releases) == (name, False, [])
    assert [path.name for path in releases.releases.iterdir()] == [name]


def test_what_differs_has_another_name_and_shows_the_difference_to_the_current_one(releases: Any) -> None:
    first = prepare(releases)[0]
    switch(releases, first)
    second, _, differences = prepare(releases, "x=2\n")
    assert second != first
    assert (differences[0]["before"], differences[0]["after"]) == ("x=1\n", "x=2\n")
    assert prepare(releases, environment="2-b")[0] not in (first, second)


@pytest.mark.parametrize("dry", [False, True])
def test_a_file_that_is_refused_changes_nothing(releases: Any, dry: bool) -> None:
    switch(releases, prepare(releases)[0])
    before = tree(releases.root)
    with pytest.raises(module.ReleaseError, match=r"^q\.env of release 1-a-\w{8} is refused, and nothing was changed: "):
        prepare(releases, "nonsense\n", dry=dry)
    assert tree(releases.root) == before


def test_a_dry_run_changes_nothing(releases: Any) -> None:
    before = tree(releases.root)
    name, changed, differences = prepare(releases, dry=True)
    assert (changed, len(differences)) == (True, 2)
    assert switch(releases, name, dry=True) == (name, "", True)
    assert tree(releases.root) == before
    assert prepare(releases)[0] == name


def test_a_release_that_was_cut_off_or_changed_is_made_whole(releases: Any) -> None:
    name = prepare(releases)[0]
    whole = tree(releases.root)
    (releases.releases / name / "release.json").unlink()
    assert name not in releases.complete()
    assert prepare(releases)[1]
    assert tree(releases.root) == whole
    (releases.releases / name / "q.env").write_text("y\n")
    assert prepare(releases)[1]
    assert tree(releases.root) == whole


def test_current_previous_and_unit_change_together_and_back(releases: Any) -> None:
    first, second = prepare(releases)[0], prepare(releases, "x=2\n", "2-b")[0]
    assert switch(releases, first) == (first, "", True)
    assert switch(releases, first) == (first, first, False)
    assert switch(releases, second) == (second, first, True)
    assert (releases.named("current"), releases.named("previous")) == (second, first)
    assert (releases.root / "units/q.service").read_text() == releases.file(second, "q.service")
    assert switch(releases, "previous") == (first, second, True)
    assert (releases.named("current"), releases.named("previous")) == (first, second)
    assert (releases.root / "units/q.service").read_text() == releases.file(first, "q.service")


def test_a_unit_that_somebody_changed_is_put_back(releases: Any) -> None:
    name = prepare(releases)[0]
    switch(releases, name)
    (releases.root / "units/q.service").write_text("other\n")
    assert switch(releases, name) == (name, name, True)
    assert releases.named("previous") == ""


@pytest.mark.parametrize("asked", ["none", "previous", ""])
def test_what_is_not_there_is_refused_with_what_is(releases: Any, asked: str) -> None:
    name = prepare(releases)[0]
    switch(releases, name)
    wanted = "" if asked == "previous" else asked
    with pytest.raises(
        module.ReleaseError, match=f"^there is no release '{wanted}' on this host; set it to one of those that are: {name}.$"
    ):
        switch(releases, asked)


def test_old_releases_go_and_with_them_what_only_they_used(releases: Any) -> None:
    names = []
    for index, environment in enumerate(["1-a", "2-b", "2-b", "2-b"]):
        names.append(prepare(releases, f"x={index}\n", environment)[0])
        os.utime(releases.releases / names[-1] / "release.json", (index, index))
        switch(releases, names[-1])
    assert releases.forget(4, False) == (names[::-1], [])
    before = tree(releases.root)
    assert releases.forget(3, True) == (names[:0:-1], names[:1])
    assert tree(releases.root) == before
    assert releases.forget(3, False) == (names[:0:-1], names[:1])
    assert [path.name for path in releases.environments.iterdir()] == ["2-b"]
    assert releases.forget(1, False) == ([names[3], names[2]], [names[1]])
    assert releases.complete() == [names[3], names[2]]


def test_a_roll_out_that_did_not_end_knows_what_served(releases: Any) -> None:
    first, second, third = (prepare(releases, f"x={number}\n")[0] for number in range(3))
    switch(releases, first)
    assert (releases.rollout(), releases.good()) == ({}, first)
    measured = {"ttft_ms": 1.0}
    assert releases.begin(second, {}, True)["from"] == first
    assert not releases.memory.exists()
    releases.begin(second, {}, False)
    assert releases.begin(second, measured, False) == {"from": first, "previous": "", "to": second, "asked": second, "measured": measured}
    switch(releases, second)
    # killed here; what the next run is to do may be another release
    assert (releases.good(), releases.named("current")) == (first, second)
    assert releases.begin(third, {}, False) == {"from": first, "previous": "", "to": third, "asked": third, "measured": measured}
    assert releases.forget(1, True)[1] == [third]
    assert first in releases.forget(1, True)[0]
    releases.end(False)
    assert (releases.rollout(), releases.good()) == ({}, second)


@pytest.mark.parametrize("left", ["", "{", "[]", '{"from": 1}'])
def test_what_is_no_memory_of_a_roll_out_is_none(releases: Any, left: str) -> None:
    first = prepare(releases)[0]
    switch(releases, first)
    releases.memory.write_text(left)
    assert (releases.rollout(), releases.good()) == ({}, first)


def test_the_release_before_stays_the_same_over_a_roll_back_that_was_killed(releases: Any) -> None:
    first, second = prepare(releases)[0], prepare(releases, "x=2\n")[0]
    switch(releases, first)
    switch(releases, second)
    releases.begin("previous", {}, False)
    assert switch(releases, "previous") == (first, second, True)
    assert releases.named("previous") == second
    assert releases.known("previous") == first


@pytest.mark.parametrize("switched", [False, True])
def test_back_from_an_upgrade_that_was_killed_is_what_ran_before_it(releases: Any, switched: bool) -> None:
    first, second, third = (prepare(releases, f"x={number}\n")[0] for number in range(3))
    for name in (first, second):
        switch(releases, name)
    releases.begin(third, {}, False)
    if switched:
        switch(releases, third)
    assert releases.known("previous") == second


def test_a_release_that_was_refused_does_not_become_the_one_before(releases: Any) -> None:
    first, second, third = (prepare(releases, f"x={number}\n")[0] for number in range(3))
    units = releases.root / "units"
    switch(releases, first)
    switch(releases, second)
    assert releases.switch(first, units, False, "") == (first, second, True)
    assert releases.named("previous") == ""
    switch(releases, second)
    switch(releases, third)
    releases.switch(second, units, False, first)
    assert (releases.named("current"), releases.named("previous")) == (second, first)
