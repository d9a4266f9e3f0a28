"""Refusals of the proxies, from `roles/qwen/vars/main/refusals.yml` to HAProxy's rules."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


def qwen_refusal(reason: str, refusals: Mapping[str, Mapping[str, Any]]) -> str:
    """The answer to a request that is refused: JSON, as a format of HAProxy.

    Args:
        reason: key of ``refusals``.
        refusals: reason -> status, type, message and the variables of HAProxy whose values the answer names.
    """
    entry = refusals[reason]
    message = re.sub(r"\{([a-z._]+)\}", r"%[var(\1)]", entry["message"])
    error = {"message": message, "type": entry["type"], "code": entry["status"], "param": None, "reason": reason}
    values = "".join(f', "{name}": %[var({variable})]' for name, variable in entry.get("values", {}).items())
    return json.dumps({"error": error}).removesuffix("}}") + values + ', "request_id": "%[var(txn.id)]"}}'


def qwen_refuse(reason: str, refusals: Mapping[str, Mapping[str, Any]], condition: str, headers: str = "") -> str:
    """Rules that refuse a request under a condition: the reason for the log, then the answer.

    Args:
        reason: key of ``refusals``.
        refusals: see ``qwen_refusal``.
        condition: HAProxy's, with its ``if`` or ``unless``.
        headers: HAProxy's ``hdr NAME VALUE``, as often as wanted.
    """
    rules = [
        f"http-request set-var(txn.reason) str({reason}) {condition}",
        f"http-request return status {refusals[reason]['status']} content-type application/json {headers} "
        f"lf-string '{qwen_refusal(reason, refusals)}' if {{ var(txn.reason) -m str {reason} }}",
    ]
    return "".join(f"    {' '.join(rule.split())}\n" for rule in rules)


def qwen_body_rules(refusals: Mapping[str, Mapping[str, Any]], limit: int, unsized: int, seconds: int) -> str:
    """Rules that bound a request's body.

    A body without a length cannot be refused for its size when the node already reads it, so it has to fit a buffer. (HAProxy's own
    ``req.body_size`` is of no use for one with a length: with HTTP/2 it is 0 until the first piece arrived.)

    Args:
        refusals: see ``qwen_refusal``.
        limit: bytes of a body with a length.
        unsized: bytes of one without.
        seconds: how long to wait for the latter.
    """
    length, no_length = "{ req.hdr(content-length) -m found }", "!{ req.hdr(content-length) -m found }"
    rules = [
        f"http-request set-var(txn.body) req.hdr(content-length),add(0) if {length}",
        f"http-request set-var(txn.body_limit) int({limit}) if {length}",
        f"http-request wait-for-body time {seconds}s if {no_length}",
        f"http-request set-var(txn.body) req.body_len if {no_length}",
        f"http-request set-var(txn.body_limit) int({unsized}) if {no_length}",
    ]
    too_large = "{ var(txn.body),sub(txn.body_limit) -m int gt 0 }"
    return (
        "".join(f"    {rule}\n" for rule in rules)
        + qwen_refuse("body_too_large", refusals, f"if {length} {too_large}")
        + qwen_refuse("length_required", refusals, f"if {no_length} {too_large}")
    )


class FilterModule:
    """Filters of role ``qwen``."""

    def filters(self) -> dict[str, Any]:
        """Names under which templates find them."""
        return {"qwen_refusal": qwen_refusal, "qwen_refuse": qwen_refuse, "qwen_body_rules": qwen_body_rules}
