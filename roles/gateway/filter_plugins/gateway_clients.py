"""Checks of the kin clients that an inventory names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# words of the map stand between blanks, and the name stands in the log
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
HASH = re.compile(r"[0-9a-f]{64}")


def gateway_client_problems(clients: Sequence[Mapping[str, Any]], host: str) -> list[str]:
    """Say what is wrong with ``gateway_clients``: one sentence a problem. A hash is not shown: it may be a key, put there by mistake.

    Args:
        clients: the list.
        host: whose it is.
    """
    found = []
    keys: dict[str, str] = {}
    for client in clients:
        name, key = str(client["name"]), str(client["key_sha256"])
        if not NAME.fullmatch(name):
            found.append(f"{host}: gateway_clients has the name '{name}'; set it to 1 to 64 letters, digits, '.', '_' or '-'.")
        if not HASH.fullmatch(key):
            found.append(
                f"{host}: gateway_clients has a key_sha256 of {len(key)} characters for '{name}', which is no SHA-256; "
                'set it to the 64 lower-case hexadecimal digits that `printf %s "$KEY" | sha256sum` gives.'
            )
        elif key in keys:
            found.append(f"{host}: gateway_clients has one key_sha256 for '{keys[key]}' and '{name}'; set one of them to another key's.")
        keys.setdefault(key, name)
        for limit in ("requests_per_minute", "concurrency"):
            value = client.get(limit)
            if value is not None and int(value) < 0:
                found.append(f"{host}: gateway_clients has {limit} {value} for '{name}'; set it to 0 (no limit) or more.")
    return found


class FilterModule:
    """Filters of role ``gateway``."""

    def filters(self) -> dict[str, Any]:
        """Names under which templates find them."""
        return {"gateway_client_problems": gateway_client_problems}
