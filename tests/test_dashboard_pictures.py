"""scripts/dashboard_pictures.py: values as people read them, and the pictures in docs show the dashboards that there are."""

import xml.etree.ElementTree as ET

import dashboard_pictures
import dashboards
import pytest


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0.9954, "percentunit", "99.5 %"),
        (0.0123, "s", "12.3 ms"),
        (90, "s", "90 s"),
        (1500, "s", "25 min"),
        (7200, "s", "2 h"),
        (3 * 2**30, "bytes", "3 GiB"),
        (1536, "Bps", "1.5 KiB/s"),
        (0, "reqps", "0 /s"),
        (12_345, "short", "12.3 k"),
        (float("nan"), "s", "-"),
    ],
)
def test_values_in_words(value: float, unit: str, words: str) -> None:
    assert dashboard_pictures.shown(value, unit) == words


@pytest.mark.parametrize(
    ("top", "unit", "last", "number"),
    [(0, "short", 1, 5), (0.97, "percentunit", 1, 5), (3.6, "s", 4, 5), (1500, "s", 1800, 4), (19 * 2**30, "bytes", 20 * 2**30, 5)],
)
def test_steps_of_an_axis_are_round_in_the_unit_and_reach_the_top(top: float, unit: str, last: float, number: int) -> None:
    steps = dashboard_pictures.round_steps(top, unit)
    assert (steps[0], steps[-1], len(steps)) == (0, last, number)


def test_series_are_drawn_with_gaps_and_single_points() -> None:
    span = dashboard_pictures.Span(0, 1200)
    graph = dashboard_pictures.lines([("a", [(0, 1), (10, 2), (100, 3)]), ("b<", [(50, float("nan"))])], "short", span, 400, 200)
    path = next(part for part in ET.fromstring(f"<g>{graph}</g>").iter("path") if part.get("fill") == "none")
    assert [letter for letter in path.get("d", "") if letter.isalpha()] == ["M", "h", "L", "M", "h"]
    assert "no data" in dashboard_pictures.lines([], "short", span, 400, 200)


def test_every_dashboard_has_a_picture_with_all_its_panels_and_data_in_each() -> None:
    """A panel that is new or renamed needs `make pictures` on a lab under load."""
    assert {file.stem for file in dashboard_pictures.TARGET.glob("*.svg")} == set(dashboards.BOARDS)
    for uid, (title, _, rows) in dashboards.BOARDS.items():
        file = dashboard_pictures.TARGET / f"{uid}.svg"
        words = [text.text or "" for text in ET.parse(file).iter("{http://www.w3.org/2000/svg}text")]
        assert {title, *(panel.title for row in rows for panel in row)} <= set(words)
        assert "no data" not in words
        assert file.stat().st_size < 100_000
