"""What is wrong with the kin clients of an inventory is said, and a key that stands there by mistake is not."""

from typing import Any

import pytest
from plugins import load

problems: Any = load("roles/gateway/filter_plugins/gateway_clients.py").gateway_client_problems
GOOD = {"name": "demo", "key_sha256": "0" * 64}


def test_good_clients_pass() -> None:
    assert problems([GOOD, {**GOOD, "name": "other", "key_sha256": "1" * 64, "concurrency": 0, "disabled": True}], "gw1") == []


@pytest.mark.parametrize(
    ("client", "sentence"),
    [
        ({"name": "a b"}, "gw1: gateway_clients has the name 'a b'; set it to 1 to 64 letters, digits, '.', '_' or '-'."),
        (
            {"key_sha256": "a-key-in-plain"},
            "gw1: gateway_clients has a key_sha256 of 14 characters for 'demo', which is no SHA-256; "
            'set it to the 64 lower-case hexadecimal digits that `printf %s "$KEY" | sha256sum` gives.',
        ),
        ({"concurrency": -1}, "gw1: gateway_clients has concurrency -1 for 'demo'; set it to 0 (no limit) or more."),
    ],
)
def test_a_wrong_client_is_said(client: dict[str, Any], sentence: str) -> None:
    assert problems([{**GOOD, **client}], "gw1") == [sentence]


def test_one_key_is_one_clients() -> None:
    assert problems([GOOD, {**GOOD, "name": "other"}], "gw1") == [
        "gw1: gateway_clients has one key_sha256 for 'demo' and 'other'; set one of them to another key's."
    ]
