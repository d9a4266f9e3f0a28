#!/usr/bin/env python3
"""Compare the metrics that rules and dashboards name with those that were scraped, and fail on a name that nobody gives.

    metric_names.py SCRAPED... [--without PREFIX]...

SCRAPED are files with a name a line, or with the answer of Prometheus' API (label/__name__/values, or metadata). What begins with a PREFIX
is not asked for: metrics of GPUs, where there are none.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from dashboards import expressions

RULES = Path(__file__).resolve().parent.parent / "roles/prometheus/files/rules"
# what a name can be taken for: aggregations' and matchings' words, and what follows them in brackets are labels
WORDS = {
    "and",
    "or",
    "unless",
    "bool",
    "offset",
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
    "inf",
    "nan",
    "start",
    "end",
}
LABELS = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
NAME = re.compile(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?!\s*\()(?![\w:])")
MATCHED = re.compile(r'__name__\s*(=~?)\s*"([^"]*)"')
# Prometheus' own, made of alerts
OWN = {"ALERTS", "ALERTS_FOR_STATE"}


def names(expression: str) -> set[str]:
    """The metrics that an expression asks for, each as a regular expression.

    Args:
        expression: PromQL.
    """
    found = {text if kind == "=~" else re.escape(text) for kind, text in MATCHED.findall(expression)}
    bare = re.sub(r"\{[^}]*\}", "", expression)
    bare = re.sub(r"\"[^\"]*\"|'[^']*'|\[[^\]]*\]", "", LABELS.sub("", bare))
    return found | {re.escape(name) for name in NAME.findall(bare) if name not in WORDS | OWN}


def _rules() -> list[dict[str, Any]]:
    files = sorted(RULES.glob("*.yml"))
    return [rule for file in files for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def asked() -> dict[str, list[str]]:
    """What rules and dashboards ask for, and where."""
    sources = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in _rules()]
    sources += [("a dashboard", query) for query in expressions()]
    found: dict[str, list[str]] = {}
    for source, expression in sources:
        for name in names(expression):
            found.setdefault(name, []).append(source)
    return found


def recorded() -> set[str]:
    """Names that the rules record: they are there, if empty while nobody asks anything; what they are made of is compared."""
    return {rule["record"] for rule in _rules() if "record" in rule}


def invented(scraped: Iterable[str], without: Iterable[str] = ()) -> list[str]:
    """One sentence for each metric that is asked for and was not scraped.

    Args:
        scraped: names of metrics.
        without: beginnings of names that are not asked for.
    """
    known, left_out = set(scraped) | recorded(), tuple(without)
    return [
        f"{name} is no metric that was scraped; {', '.join(sorted(set(sources)))} asks for it."
        for name, sources in sorted(asked().items())
        if not (left_out and name.replace("\\", "").startswith(left_out)) and not any(re.fullmatch(name, other) for other in known)
    ]


def read(text: str) -> set[str]:
    """Names of a file."""
    if text.lstrip().startswith("{"):
        return set(json.loads(text)["data"])
    return set(text.split())


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scraped", type=Path, nargs="+")
    parser.add_argument("--without", action="append", default=[], metavar="PREFIX")
    options = parser.parse_args()
    wrong = invented(set().union(*(read(path.read_text()) for path in options.scraped)), options.without)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
