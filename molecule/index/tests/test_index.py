"""Role qwen_service with packages from an index: the environment is the one that a wheelhouse gives, and the password is nowhere."""

import json

import pytest

ROOT = "/opt/qwen-coder-service"


@pytest.fixture(scope="module")
def node(on):
    return on("node1")


@pytest.fixture(scope="module")
def environment(node):
    return node.check_output(f"echo {ROOT}/environments/*")


def test_only_lock_and_service_were_copied(node):
    assert node.check_output(f"find {ROOT}/wheelhouse -type f -printf '%f\\n' | sort").split() == [
        "cpu.txt",
        "installer.txt",
        "qwen_coder_service-0.1.0-py3-none-any.whl",
    ]


def test_every_locked_package_is_installed_in_its_version(node, environment):
    lock = node.file(f"{ROOT}/wheelhouse/cpu.txt").content_string
    locked = {line.split(" ")[0].lower().replace("_", "-") for line in lock.splitlines() if "==" in line and line[0].isalnum()}
    listed = json.loads(node.check_output(f"{environment}/venv/bin/uv pip list --format json --python {environment}/venv/bin/python"))
    installed = {f"{package['name'].lower().replace('_', '-')}=={package['version']}" for package in listed}
    assert locked
    assert locked <= installed
    assert "qwen-coder-service==0.1.0" in installed


def test_the_service_can_be_imported(node, environment):
    assert node.run(f"{environment}/venv/bin/python -c 'import qwen_coder_service.app, vllm'").rc == 0


def test_its_name_is_that_of_an_environment_from_a_wheelhouse(node, environment, inventory):
    about = json.loads(node.file(f"{environment}/environment.json").content_string)
    assert environment == f"{ROOT}/environments/{about['id']}"
    assert about["lock"] == "cpu.txt"
    assert set(about) == {"id", "profile", "lock", "installer", "service"}


def test_the_password_is_nowhere(node):
    assert node.run(f"grep -rl '[p]4ss-of' {ROOT} /etc /root /var/log /srv").stdout == ""
