#!/usr/bin/env python3
"""Draw the dashboards as they are on a fleet now: every panel's queries through Prometheus' API, one SVG each in docs/dashboards.

    ssh -N -L 9091:127.0.0.1:9091 root@<monitoring host> &
    scripts/dashboard_pictures.py --url http://127.0.0.1:9091 --minutes 15

Needs no Grafana; what a panel has no data for stands there as "no data".
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
BOARDS = ROOT / "roles/prometheus/files/dashboards"
TARGET = ROOT / "docs/dashboards"
# pixels of one step of Grafana's grid, between panels, and above them
COLUMN, ROW, GAP, HEAD = 50, 28, 8, 44
POINTS = 120
# of names below a graph; what has none there is not drawn
ROWS = 3
COLOURS = ("#3274d9", "#56a64b", "#f2cc0c", "#e0226e", "#8f3bb8", "#ff780a", "#37872d", "#5195ce", "#b877d9", "#806eb7")
STEPS = {"green": "#37872d", "yellow": "#c69b06", "red": "#c4162a", "blue": "#1f60c4"}
# what a line of text can have besides
MIDDLE, END, BOLD = ' text-anchor="middle"', ' text-anchor="end"', ' font-weight="bold"'
# labels that say nothing in a table
DULL = {"__name__", "job"}

Ask = Callable[[str, dict[str, str]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Span:
    """The time that is drawn, in seconds since 1970."""

    start: float
    end: float

    @property
    def step(self) -> float:
        """Seconds between two points."""
        return (self.end - self.start) / POINTS


def prometheus(url: str) -> Ask:
    """A function that asks the API: path and parameters -> the result's series."""

    def ask(path: str, parameters: dict[str, str]) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=60) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return result

    return ask


def shown(value: float, unit: str) -> str:
    """A value in a unit of Grafana's, for people."""
    if not math.isfinite(value):
        return "-"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "s" and abs(value) >= 120:
        return f"{value / 3600:.3g} h" if abs(value) >= 7200 else f"{value / 60:.3g} min"
    if unit == "s" and 0 < abs(value) < 1:
        return f"{value * 1000:.3g} ms"
    base, names = (1024, ("", "Ki", "Mi", "Gi", "Ti")) if unit in ("bytes", "Bps") else (1000, ("", "k", "M", "G", "T"))
    power = min(int(math.log(abs(value), base)), 4) if abs(value) >= base else 0
    after = {"bytes": "B", "Bps": "B/s", "reqps": "/s", "ops": "/s", "celsius": "°C", "watt": "W", "s": "s", "d": "d"}.get(unit, "")
    return f"{value / base**power:.3g} {names[power]}{after}".rstrip()


def legend(template: str, labels: dict[str, str]) -> str:
    """What a line is called."""
    if template:
        return re.sub(r"\{\{(\w+)\}\}", lambda word: labels.get(word[1], ""), template).strip()
    return ", ".join(f"{name}={value}" for name, value in labels.items() if name not in DULL)


def text(x: float, y: float, words: str, size: int = 11, fill: str = "#444", more: str = "") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"{more}>{escape(words)}</text>'


def round_steps(top: float, unit: str) -> list[float]:
    """Up to five values from 0 to ``top`` or a little more, which are round in the unit's size."""
    size = 1.0
    if unit in ("bytes", "Bps") and top >= 1024:
        size = 1024.0 ** int(math.log(top, 1024))
    elif unit == "s" and top >= 120:
        size = 3600.0 if top >= 7200 else 60.0
    top = top if top > 0 else 1.0
    rough = top / size / 4
    power = 10 ** math.floor(math.log10(rough))
    step = size * next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [step * at for at in range(max(1, math.ceil(top / step - 1e-9)) + 1)]


def lines(series: Sequence[tuple[str, list[tuple[float, float]]]], unit: str, span: Span, width: float, height: float) -> str:
    """A graph: axes, a line for each series, their names below."""
    # names in rows, as wide as they are
    places: list[tuple[str, float, int]] = []
    x, rows = 10.0, 1
    for name, _ in series:
        wide = 24 + len(name or "value") * 6.2
        if x + wide > width and x > 10:
            x, rows = 10.0, rows + 1
        if rows > ROWS or len(places) == len(COLOURS):
            break
        places.append((name or "value", x, rows))
        x += wide
    rows, drawn = places[-1][2] if places else 1, series[: len(places)]
    finite = [value for _, points in drawn for _, value in points if math.isfinite(value)]
    if not finite:
        return text(width / 2, height / 2, "no data", 13, "#999", MIDDLE)
    left, top, right, bottom = 52.0, 30.0, width - 10, height - 16 - 14 * rows
    ticks = round_steps(max(finite), unit)
    low = min(0.0, min(finite))

    def at(when: float, value: float) -> str:
        across = left + (when - span.start) / (span.end - span.start) * (right - left)
        up = bottom - (value - low) / (ticks[-1] - low) * (bottom - top)
        return f"{across:.1f},{up:.1f}"

    parts = []
    for tick in ticks:
        y = float(at(span.start, tick).split(",")[1])
        parts.append(f'<path d="M{left} {y}H{right:.0f}" stroke="#e4e4e4"/>')
        parts.append(text(left - 5, y + 3.5, shown(tick, unit), 10, "#777", END))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        moment = time.strftime("%H:%M", time.gmtime(span.start + share * (span.end - span.start)))
        anchor = {0.0: "start", 1.0: "end"}.get(share, "middle")
        parts.append(text(left + share * (right - left), bottom + 12, moment, 10, "#777", f' text-anchor="{anchor}"'))
    for number, (_, points) in enumerate(drawn):
        path, before = "", None
        for when, value in points:
            if not math.isfinite(value):
                before = None
                continue
            # a gap where nothing was scraped
            path += f"L{at(when, value)}" if before is not None and when - before < span.step * 1.5 else f"M{at(when, value)}h0"
            before = when
        parts.append(f'<path d="{path}" fill="none" stroke="{COLOURS[number]}" stroke-width="1.5" stroke-linecap="round"/>')
    for number, (name, across, row) in enumerate(places):
        y = bottom + 12 + row * 14
        parts.append(f'<path d="M{across:.0f} {y - 4:.0f}h12" stroke="{COLOURS[number]}" stroke-width="3"/>')
        parts.append(text(across + 16, y, name, 10))
    if len(series) > len(drawn):
        parts.append(text(right, 20, f"and {len(series) - len(drawn)} more", 10, "#999", END))
    return "".join(parts)


def figure(value: float | None, unit: str, steps: Sequence[dict[str, Any]], width: float, height: float) -> str:
    """A tile: a figure in the colour of its step."""
    if value is None:
        return text(width / 2, height / 2, "no data", 13, "#999", MIDDLE)
    colour = [step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]
    return text(width / 2, height / 2 + 20, shown(value, unit), 34, STEPS[colour], MIDDLE + BOLD)


def table(series: Sequence[dict[str, str]], width: float, height: float) -> str:
    """Labels of the series; those that are the same in all stand in one line below."""
    if not series:
        return text(width / 2, height / 2, "no data", 13, "#999", MIDDLE)
    names = sorted({name for labels in series for name in labels} - DULL, key=lambda name: (name != "instance", name))
    # a column is as wide as its longest word, and what does not fit is cut
    longest = {name: max([len(name), *(len(labels.get(name, "")) for labels in series)]) for name in names}
    share = (width - 20) / sum(longest.values())
    parts, x = [], 10.0
    for name in names:
        wide = longest[name] * share
        fits = max(3, int(wide / 5.8) - 1)
        for row, word in enumerate([name, *(labels.get(name, "") for labels in series)]):
            if (y := 42 + row * 16) < height - 6:
                word = word if len(word) <= fits else word[: fits - 1] + "…"
                parts.append(text(x, y, word, 10, "#777" if row == 0 else "#333", BOLD if row == 0 else ""))
        x += wide
    return "".join(parts)


def draw(panel: dict[str, Any], fill_in: Callable[[str], str], ask: Ask, span: Span) -> str:
    """A panel with its frame."""
    place, defaults = panel["gridPos"], panel["fieldConfig"]["defaults"]
    x, y = place["x"] * COLUMN + GAP / 2, HEAD + place["y"] * ROW + GAP / 2
    width, height = place["w"] * COLUMN - GAP, place["h"] * ROW - GAP
    found: list[tuple[str, dict[str, Any]]] = []
    for target in panel["targets"]:
        query = {"query": fill_in(target["expr"])}
        if target["instant"]:
            result = ask("query", query | {"time": f"{span.end}"})
        else:
            result = ask("query_range", query | {"start": f"{span.start}", "end": f"{span.end}", "step": f"{span.step}"})
        found += [(target["legendFormat"], series) for series in result]
    if panel["type"] == "table":
        inside = table([series["metric"] for _, series in found], width, height)
    elif panel["type"] == "stat":
        value = float(found[0][1]["value"][1]) if found else None
        inside = figure(value, defaults["unit"], defaults["thresholds"]["steps"], width, height)
    else:
        named = [
            (legend(template, series["metric"]), [(when, float(value)) for when, value in series["values"]]) for template, series in found
        ]
        inside = lines(sorted(named), defaults["unit"], span, width, height)
    frame = f'<rect width="{width}" height="{height}" rx="3" fill="#fff" stroke="#d8d8d8"/>'
    title = text(10, 18, panel["title"], 11, "#222", BOLD)
    return f'<g transform="translate({x:g} {y:g})">{frame}{title}{inside}</g>\n'


def picture(board: dict[str, Any], ask: Ask, span: Span) -> str:
    """A dashboard as SVG."""
    values: dict[str, str] = {}
    for variable in board["templating"]["list"]:
        if found := re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]):
            series = ask("query", {"query": f"group by ({found[2]}) ({found[1]})", "time": f"{span.end}"})
            values[variable["name"]] = "|".join(sorted(one["metric"][found[2]] for one in series))

    def fill_in(query: str) -> str:
        """All values of the variables, as Grafana's "All"."""
        for name, all_of_them in values.items():
            query = query.replace(f"${name}", all_of_them)
        return query

    width = 24 * COLUMN
    height = HEAD + max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"]) * ROW + GAP
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(span.end))
    head = text(GAP, 28, board["title"], 18, "#222")
    head += text(width - GAP, 28, f"{(span.end - span.start) / 60:.0f} minutes until {when}", 12, "#777", END)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif">\n'
        f'<rect width="{width}" height="{height}" fill="#f4f5f5"/>\n'
        f"{head}\n"
        f"{''.join(draw(panel, fill_in, ask, span) for panel in board['panels'])}</svg>\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:9091", help="Prometheus (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=15, help="how far back (default: %(default)s)")
    parser.add_argument("--target", type=Path, default=TARGET, help="folder of the pictures (default: %(default)s)")
    options = parser.parse_args(argv)
    end = time.time()
    span, ask = Span(end - options.minutes * 60, end), prometheus(options.url.rstrip("/"))
    options.target.mkdir(parents=True, exist_ok=True)
    for file in sorted(BOARDS.glob("*.json")):
        try:
            drawn = picture(json.loads(file.read_text()), ask, span)
        except OSError as error:
            sys.exit(f"--url is '{options.url}', where Prometheus does not answer ({error}); set it to its address, through ssh -L.")
        (options.target / f"{file.stem}.svg").write_text(drawn)


if __name__ == "__main__":
    main()
