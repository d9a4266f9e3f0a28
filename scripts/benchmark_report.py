#!/usr/bin/env python3
"""What benchmark runs say: a document with plots, a comparison of two runs, and whether two runs agree (docs/benchmark/README.md).

    scripts/benchmark_report.py document RESULT.json --document docs/benchmark/qwen_vllm_vs_transformers.md [--again RESULT.json]
    scripts/benchmark_report.py document --check          # is the project's document what its results give?
    scripts/benchmark_report.py compare BEFORE.json AFTER.json --slower 20
    scripts/benchmark_report.py agree FIRST.json SECOND.json --within 10

Exit status: 0; 1 if something is slower than allowed, disagrees or is out of date; 2 if the runs cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "docs/benchmark"
DOCUMENT = FOLDER / "qwen_vllm_vs_transformers.md"
# the runs that the project's document is made of; the second shows how far the first can be repeated
RESULTS = (FOLDER / "results/lab.json", FOLDER / "results/lab-again.json")

# what the chain may cost: at this concurrency, this share of throughput, or these milliseconds of the 99th percentile
CHAIN_LOSS = (32, 0.03)
CHAIN_P99_MS = (256, 5.0)
CHAIN_STREAMS = 1000

# what is compared, and how a sentence says it; less of the last two is better
FIGURES = {"output_throughput": "tokens/s", "p50_ttft_ms": "ms to the first token", "p50_itl_ms": "ms between tokens"}

Result = dict[str, Any]


class Incomparable(ValueError):
    """Two runs that say nothing about each other; the message says why."""


def load(path: Path) -> Result:
    """A run.

    Raises:
        Incomparable: the file is no result of a benchmark.
    """
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        result["runs"][0]["result"]["output_throughput"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Incomparable(f"{path} is no result of make benchmark ({error!r}).") from error
    return result


def _differences(name: str, a: Any, b: Any) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [line for key in sorted({*a, *b}) for line in _differences(f"{name}.{key}", a.get(key), b.get(key))]
    return [] if a == b else [f"{name} is '{a}' in one and '{b}' in the other"]


def check_comparable(before: Result, after: Result) -> None:
    """Two runs may differ in what is measured (releases, engines), and in nothing that it is measured with.

    Raises:
        Incomparable: hardware, settings, load or load generator differ.
    """
    found = [line for part in ("machine", "settings", "load", "generator") for line in _differences(part, before[part], after[part])]
    if found:
        raise Incomparable(f"'{before['label']}' and '{after['label']}' cannot be compared: {'; '.join(found)}.")


def check_equal_hardware(result: Result, names: Iterable[str]) -> None:
    """Targets that are set side by side run on nodes of equal hardware.

    Raises:
        Incomparable: they do not.
    """
    nodes = {result["targets"][name]["node"] for name in names}
    first, *others = sorted(nodes)
    for node in others:
        if found := _differences("machine", result["machine"]["nodes"][first], result["machine"]["nodes"][node]):
            raise Incomparable(f"{first} and {node} cannot be compared: {'; '.join(found)}.")


def rounds(result: Result, part: str, target: str, key: tuple[int, int]) -> list[Result]:
    """Figures of all rounds of a point (tokens in, requests at a time), in their order."""
    found = [r for r in result["runs"] if (r["part"], r["target"], r["input"], r["concurrency"]) == (part, target, *key)]
    return [run["result"] for run in sorted(found, key=lambda run: run["round"])]


def keys(result: Result, part: str) -> list[tuple[int, int]]:
    """The points of a part."""
    return sorted({(run["input"], run["concurrency"]) for run in result["runs"] if run["part"] == part})


def targets(result: Result, part: str) -> list[str]:
    """The targets of a part, in the plan's order."""
    return [name for name in result["targets"] if any(run["part"] == part and run["target"] == name for run in result["runs"])]


def median(runs: Sequence[Result], figure: str) -> float:
    """The median of the rounds."""
    return float(statistics.median(run[figure] for run in runs))


def middle(values: Sequence[float]) -> float:
    """The median of all pairs' means (Hodges and Lehmann): as deaf to single rounds as a median, and nearly as steady as a mean."""
    return statistics.median((x + y) / 2 for index, x in enumerate(values) for y in values[index:])


def ratio(result: Result, part: str, pair: tuple[str, str], key: tuple[int, int], figure: str) -> float:
    """The middle of the rounds' ratios: what slows the machine for a while slows both of a round."""
    a, b = (rounds(result, part, name, key) for name in pair)
    return middle([x[figure] / y[figure] for x, y in zip(a, b, strict=True)])


def throughput_ratio(result: Result, part: str, pair: tuple[str, str], key: tuple[int, int]) -> float:
    """All rounds' tokens in all rounds' time, of one target by the other's; it varies less than what is made of single rounds' ratios."""
    a, b = (rounds(result, part, name, key) for name in pair)
    x, y = (sum(run["total_output_tokens"] for run in runs) / sum(run["duration"] for run in runs) for runs in (a, b))
    return float(x / y)


def differences(result: Result, part: str, pair: tuple[str, str], key: tuple[int, int], figure: str) -> list[float]:
    """The rounds' differences."""
    a, b = (rounds(result, part, name, key) for name in pair)
    return [float(x[figure] - y[figure]) for x, y in zip(a, b, strict=True)]


def added(result: Result, part: str, pair: tuple[str, str], key: tuple[int, int], figure: str) -> float:
    """The median of the rounds' differences."""
    return statistics.median(differences(result, part, pair, key, figure))


def _of(result: Result, part: str, **wanted: str) -> str | None:
    return next((n for n in targets(result, part) if all(result["targets"][n][k] == v for k, v in wanted.items())), None)


def by_clock(result: Result) -> tuple[str, str] | None:
    """The two ways to an engine by the clock, where it was measured: through the gateway, and direct."""
    direct, gateway = _of(result, "paced", path="direct"), _of(result, "paced", path="gateway")
    return (gateway, direct) if direct and gateway else None


def pairs(result: Result) -> dict[str, tuple[str, tuple[str, str]]]:
    """What is set side by side: a title -> part, and the two targets."""
    found = {}
    standby = _of(result, "matrix", backend="transformers")
    vllm = _of(result, "matrix", backend="vllm", path="direct", node=result["targets"][standby]["node"]) if standby else None
    if standby and vllm:
        found["vLLM / transformers"] = ("matrix", (vllm, standby))
    direct, gateway = _of(result, "chain", path="direct"), _of(result, "chain", path="gateway")
    if direct and gateway:
        found["through the gateway / direct"] = ("chain", (gateway, direct))
    if clock := by_clock(result):
        found["through the gateway / direct, by the clock"] = ("paced", clock)
    for _, names in found.values():
        check_equal_hardware(result, names)
    return found


# --- plots: SVG, written here, so that the same results give the same bytes ---

COLOURS = ("#1f6feb", "#d1570b", "#1a7f37", "#8250df", "#6e7781")


def plot(title: str, unit: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    """Lines over concurrency; both axes begin at their smallest, each step of the first is a doubling as it is measured."""
    width, height, left, top, right, bottom = 720, 360, 70, 40, 230, 50
    xs = sorted({x for line in lines.values() for x, _ in line})
    highest = max(y for line in lines.values() for _, y in line) * 1.05 or 1
    plot_width, plot_height = width - left - right, height - top - bottom

    def at(x: float, y: float) -> tuple[float, float]:
        step = plot_width / max(1, len(xs) - 1)
        return round(left + xs.index(x) * step, 1), round(top + plot_height * (1 - y / highest), 1)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{left}" y="22" font-size="14">{title}, {unit}</text>',
    ]
    for index in range(5):
        value = highest * index / 4
        _, y = at(xs[0], value)
        out.append(f'<line x1="{left}" y1="{y}" x2="{left + plot_width}" y2="{y}" stroke="#d0d7de"/>')
        out.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{value:.3g}</text>')
    for x in xs:
        out.append(f'<text x="{at(x, 0)[0]}" y="{height - 28}" text-anchor="middle">{x:g}</text>')
    out.append(f'<text x="{left + plot_width / 2}" y="{height - 10}" text-anchor="middle">requests at a time</text>')
    for index, (name, line) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        dash = ' stroke-dasharray="5 3"' if index >= len(COLOURS) else ""
        path = " ".join(f"{x},{y}" for x, y in (at(*point) for point in line))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        out += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in (at(*point) for point in line)]
        y = top + 16 * index + 8
        out.append(
            f'<line x1="{width - right + 14}" y1="{y}" x2="{width - right + 36}" y2="{y}" stroke="{colour}" stroke-width="2"{dash}/>'
            f'<text x="{width - right + 42}" y="{y + 4}">{name}</text>'
        )
    return "\n".join([*out, "</svg>"]) + "\n"


def plots(result: Result) -> dict[str, str]:
    """File name -> SVG."""
    found = {}
    for figure, title, unit in (
        ("output_throughput", "Throughput", "tokens/s"),
        ("p50_ttft_ms", "Time to first token, median", "ms"),
        ("p50_itl_ms", "Time between tokens, median", "ms"),
    ):
        lines: dict[str, list[tuple[float, float]]] = {}
        for name in targets(result, "matrix"):
            for tokens, concurrency in keys(result, "matrix"):
                line = lines.setdefault(f"{name}, {tokens} in", [])
                line.append((concurrency, median(rounds(result, "matrix", name, (tokens, concurrency)), figure)))
        found[f"{result['label']}-{figure}.svg"] = plot(title, unit, lines)
    return found


# --- the document ---


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flat(data: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        rows += _flat(value, f"{prefix}{key}: ") if isinstance(value, dict) else [(prefix + key, _value(value))]
    return rows


def _matrix(result: Result) -> list[str]:
    rows = []
    for tokens, concurrency in keys(result, "matrix"):
        for name in targets(result, "matrix"):
            runs = rounds(result, "matrix", name, (tokens, concurrency))
            at = partial(median, runs)
            rows.append([
                str(tokens), str(concurrency), name, f"{at('request_throughput'):.1f}", f"{at('output_throughput'):.0f}",
                f"{at('p50_ttft_ms'):.0f} / {at('p99_ttft_ms'):.0f}", f"{at('p50_tpot_ms'):.1f}",
                f"{at('p50_itl_ms'):.1f} / {at('p99_itl_ms'):.1f}", f"{at('request_goodput'):.1f}", str(sum(r["failed"] for r in runs)),
            ])  # fmt: skip
    head = ["tokens in", "at a time", "target", "requests/s", "tokens/s", "TTFT p50 / p99, ms", "TPOT p50, ms", "ITL p50 / p99, ms",
            "goodput, requests/s", "failed"]  # fmt: skip
    return _table(head, rows)


def judged(limit: float, *figures: Sequence[float]) -> str:
    """Whether figures of several rounds each keep to a limit: missed by a median, met by every round; else nothing is decided."""
    if any(statistics.median(rounds_of) > limit for rounds_of in figures):
        return "missed"
    return "met" if all(max(rounds_of) <= limit for rounds_of in figures) else "not decided"


def chain_verdicts(result: Result) -> list[str]:
    """What the chain may cost, and whether it keeps to that here; a sentence each."""
    found = []
    for title, (part, ways) in pairs(result).items():
        if part == "matrix":
            continue
        how = title.removeprefix("through the gateway / direct")
        points_of = {concurrency: (tokens, concurrency) for tokens, concurrency in keys(result, part)}
        at, limit = CHAIN_LOSS
        if at in points_of:
            loss = 1 - throughput_ratio(result, part, ways, points_of[at])
            verdict = "met" if loss <= limit else "missed"
            found.append(f"at {at}{how}: {loss:.1%} of the throughput lost; at most {limit:.0%} wanted: **{verdict}**")
        at, limit = CHAIN_P99_MS
        if at in points_of:
            first, between = (differences(result, part, ways, points_of[at], f"p99_{name}_ms") for name in ("ttft", "itl"))
            found.append(
                f"at {at}{how}: p99 of the first token {statistics.median(first):+.0f} ms (rounds {min(first):+.0f} to {max(first):+.0f}), "
                f"between tokens {statistics.median(between):+.1f} ms (rounds {min(between):+.1f} to {max(between):+.1f}); "
                f"at most {limit:+.0f} ms wanted: **{judged(limit, first, between)}**"
            )
        if CHAIN_STREAMS in points_of:
            failed = [sum(run["failed"] for run in rounds(result, part, name, points_of[CHAIN_STREAMS])) for name in ways]
            found.append(
                f"{CHAIN_STREAMS} streams at a time{how}: {failed[0]} failed through the gateway, {failed[1]} direct; none wanted: "
                f"**{'met' if not failed[0] else 'missed'}**"
            )
    return found


def _chain(result: Result, part: str, pair: tuple[str, str]) -> list[str]:
    rows = []
    for key in keys(result, part):
        gateway, direct = (rounds(result, part, name, key) for name in pair)
        out = next(run["output"] for run in result["runs"] if (run["part"], run["input"], run["concurrency"]) == (part, *key))
        rows.append([
            str(key[1]), str(out), f"{median(direct, 'output_throughput'):.0f}", f"{median(gateway, 'output_throughput'):.0f}",
            f"{1 - throughput_ratio(result, part, pair, key):+.1%}",
            *(f"{median(direct, f'{p}_{name}_ms'):.1f} {added(result, part, pair, key, f'{p}_{name}_ms'):+.1f}"
              for name in ("ttft", "itl") for p in ("p50", "p99")),
            f"{sum(r['failed'] for r in direct)} / {sum(r['failed'] for r in gateway)}",
        ])  # fmt: skip
    head = ["at a time", "tokens out", "direct, tokens/s", "gateway, tokens/s", "lost", "TTFT p50, ms", "TTFT p99, ms", "ITL p50, ms",
            "ITL p99, ms", "failed, direct / gateway"]  # fmt: skip
    return _table(head, rows)


def agreement(first: Result, second: Result) -> list[tuple[str, tuple[int, int], float, float, float]]:
    """How far two runs' throughput ratios are apart: pair, point, both ratios, and their relative difference."""
    check_comparable(first, second)
    found = []
    for title, (part, pair) in pairs(first).items():
        for key in keys(first, part):
            a, b = (throughput_ratio(result, part, pair, key) for result in (first, second))
            found.append((title, key, a, b, abs(a - b) / min(a, b)))
    return found


def document(result: Result, again: Result | None = None) -> str:
    """The document, as Markdown."""
    sides = pairs(result)
    lines = [
        "# vLLM and transformers, direct and through the gateway",
        "",
        f"Made by scripts/benchmark_report.py from the raw results of run `{result['label']}` ({result['date']}); not edited by hand.",
        "How it is measured, and how to measure your own hosts: [README.md](README.md).",
        "",
    ]
    for title, (part, pair) in sides.items():
        low_high = sorted(throughput_ratio(result, part, pair, key) for key in keys(result, part))
        lines.append(f"- {title}: {low_high[0]:.2f} to {low_high[-1]:.2f} times the tokens/s, by load.")
    machine = {"load generator": result["machine"]["client"], **result["machine"]["nodes"]}
    if note := result.get("note"):
        lines += ["", note]
    lines += ["", "## Machine, versions, settings", "", *_table(["what", "value"], _flat(machine)), ""]
    versions = {**result["generator"], **result.get("versions", {})}
    lines += _table(["versions", ""], _flat(versions))
    lines += ["", *_table(["settings", ""], _flat(result["settings"])), ""]
    lines += ["| target | way | node | backend | weights |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {name} | {t['path']} | {t['node']} | {t['backend']} | {t['variant']} |" for name, t in result["targets"].items()]
    load_of, limits = result["load"]["matrix"], result["load"]["goodput"]
    lines += [
        "",
        "## Concurrency and input length",
        "",
        f"{load_of['output']} tokens out, greedy; the median of {load_of['rounds']} rounds"
        + (f" ({load_of['gateway_rounds']} through the gateway)" if "gateway_rounds" in load_of else "")
        + ". Goodput are the requests that kept to "
        + ", ".join(f"{metric.upper()} {limit:g} ms" for metric, limit in limits.items())
        + ".",
        "",
        *_matrix(result),
        "",
        *(f"![{name}]({name})" for name in plots(result)),
    ]
    if "vLLM / transformers" in sides:
        part, pair = sides["vLLM / transformers"]
        rows = [
            [str(k[0]), str(k[1]), f"{throughput_ratio(result, part, pair, k):.2f}",
             *(f"{ratio(result, part, pair, k, figure):.2f}" for figure in ("p50_ttft_ms", "p50_itl_ms"))]
            for k in keys(result, part)
        ]  # fmt: skip
        head = ["tokens in", "at a time", "tokens/s", "TTFT p50", "ITL p50"]
        lines += ["", "## vLLM against transformers", "", "vLLM's figure divided by transformers': of tokens/s over all rounds, and the "]
        lines[-1] += "middle of the rounds' ratios."
        lines += ["", *_table(head, rows)]
    if verdicts := chain_verdicts(result):
        lines += ["", "## What the chain costs", ""]
        lines += [
            "Gateway and mutual TLS against the service's own address. Times are direct, and what the way through the gateway adds (the "
            "median of the rounds' differences).",
        ]
        for part, pair in sides.values():
            if part == "matrix":
                continue
            load_of, how = result["load"][part], ""
            if part == "paced":
                lines += ["", "### By the clock"]
                how = (
                    "The same service with an engine by the clock in vLLM's place, which, as a GPU, takes no processor from the chain: "
                    f"each answer gets its first token after {load_of['first_ms']} ms, and then "
                    + ", ".join(
                        f"at {p['concurrency']} at a time another every {p['token_ms']} ms"
                        + (" (requests begin at random moments, as many a second as keep so many there)" if p["at_random"] else "")
                        for p in load_of["points"]
                    )
                    + ". "
                )
            lines += ["", f"{how}{load_of['input']} tokens in, the median of {load_of['rounds']} rounds, where a point has no others."]
            lines += ["", *_chain(result, part, pair)]
        lines += ["", *(f"- {line}" for line in verdicts)]
    if again is not None:
        apart = agreement(result, again)
        worst = max(difference for *_, difference in apart)
        lines += ["", "## Again", "", f"A second run, `{again['label']}` ({again['date']}); ratios of tokens/s.", ""]
        rows = [[t, str(k[0]), str(k[1]), f"{a:.2f}", f"{b:.2f}", f"{difference:.0%}"] for t, k, a, b, difference in apart]
        lines += _table(["ratio", "tokens in", "at a time", "first", "second", "apart"], rows)
        inside = sum(difference <= 0.1 for *_, difference in apart)
        lines += ["", f"{inside} of {len(apart)} ratios agree within 10 %; the worst are {worst:.0%} apart."]
    return "\n".join(lines) + "\n"


def regressions(before: Result, after: Result, percent: float) -> list[str]:
    """What became slower by more than so many percent; a sentence each.

    Raises:
        Incomparable: the runs cannot be compared.
    """
    check_comparable(before, after)
    found = []
    for part in ("matrix", "chain", "paced"):
        for name in targets(before, part):
            for key in keys(before, part):
                a, b = rounds(before, part, name, key), rounds(after, part, name, key)
                if not b:
                    continue
                at = f"{name}, {key[0]} tokens in, {key[1]} at a time"
                for figure, unit in FIGURES.items():
                    x, y = median(a, figure), median(b, figure)
                    worse = (x / y if figure == "output_throughput" else y / x) - 1 if x and y else 0
                    if worse > percent / 100:
                        found.append(f"{at}: {y:.1f} {unit} instead of {x:.1f}, {worse:.0%} worse")
                failed = sum(run["failed"] for run in b)
                if failed:
                    found.append(f"{at}: {failed} requests failed")
    return found


def write(result: Result, again: Result | None, path: Path) -> dict[Path, str]:
    """The files of a document: itself and its plots."""
    return {path: document(result, again)} | {path.parent / name: svg for name, svg in plots(result).items()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("document", help="write the document and its plots")
    making.add_argument("result", type=Path, nargs="?", default=RESULTS[0])
    making.add_argument("--again", type=Path, help="a second run of the same")
    making.add_argument("--document", type=Path, default=DOCUMENT)
    making.add_argument("--check", action="store_true", help="only say whether the project's document is up to date")
    comparing = commands.add_parser("compare", help="what became slower")
    agreeing = commands.add_parser("agree", help="whether two runs of the same say the same")
    for command in (comparing, agreeing):
        command.add_argument("before", type=Path)
        command.add_argument("after", type=Path)
    comparing.add_argument("--slower", type=float, default=20, help="percent that are too many (default: %(default)s)")
    agreeing.add_argument("--within", type=float, default=10, help="percent (default: %(default)s)")
    given = parser.parse_args(argv)
    try:
        if given.command == "document":
            second = given.again or (RESULTS[1] if given.result == RESULTS[0] and RESULTS[1].exists() else None)
            files = write(load(given.result), load(second) if second else None, given.document)
            if given.check:
                stale = [path.name for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
                if stale:
                    print(f"{', '.join(stale)}: not what the results give; run make docs", file=sys.stderr)
                return 1 if stale else 0
            for path, text in files.items():
                path.write_text(text, encoding="utf-8")
            print(f"{given.document} and {len(files) - 1} plots")
            return 0
        before, after = load(given.before), load(given.after)
        if given.command == "compare":
            found = regressions(before, after, given.slower)
            print("\n".join(found) or f"'{after['label']}' is nowhere more than {given.slower:g} % slower than '{before['label']}'")
            return 1 if found else 0
        apart = agreement(before, after)
        for title, key, a, b, difference in apart:
            print(f"{title:<42} in {key[0]:>5} c {key[1]:>4}  {a:.2f}  {b:.2f}  {difference:.1%} apart")
        return 1 if any(difference > given.within / 100 for *_, difference in apart) else 0
    except Incomparable as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
