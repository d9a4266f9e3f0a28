"""What every role promises its user: documented inputs, equal to their defaults."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
ROLES = sorted(p.parent.parent for p in ROOT.glob("roles/*/meta/main.yml"))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text()) or {}


@pytest.fixture(params=ROLES, ids=lambda role: role.name)
def role(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def options(role: Path) -> dict[str, dict[str, Any]]:
    specs = load(role / "meta/argument_specs.yml")["argument_specs"]
    result: dict[str, dict[str, Any]] = specs["main"]["options"]
    return result


def test_argument_specs_equal_defaults(role: Path) -> None:
    documented = {name: option["default"] for name, option in options(role).items() if "default" in option}
    assert documented == load(role / "defaults/main.yml")


def test_an_input_without_default_is_required(role: Path) -> None:
    without = {name for name, option in options(role).items() if "default" not in option}
    assert without == {name for name, option in options(role).items() if option.get("required")}


def test_inputs_bear_the_name_of_their_role(role: Path) -> None:
    assert [name for name in options(role) if not name.startswith(f"{role.name}_")] == []


def test_every_input_is_described(role: Path) -> None:
    assert [name for name, option in options(role).items() if not option.get("description") or not option.get("type")] == []


def test_every_role_has_a_scenario_with_tests(role: Path) -> None:
    scenario = ROOT / "molecule" / role.name
    assert (scenario / "molecule.yml").exists()
    assert list(scenario.glob("tests/test_*.py"))


def test_tasks_have_names_of_their_phase(role: Path) -> None:
    """`file | Do x`, so that output says where a task stands."""
    wrong = []
    for path in role.glob("tasks/*.yml"):
        if path.name == "main.yml":
            continue
        wrong += [f"{path.name}: {task['name']}" for task in load(path) if task["name"].split(" | ")[0].lower() != path.stem]
    assert wrong == []
