"""The benchmark's arithmetic and pictures: what it says of given turns is what the turns say."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.bench import report, svg
from tests.bench.lines import Turn
from tests.bench.report import Contender, Row

NATIVE: Contender = ("native", "off")
OURS: Contender = ("ours", "on")
SVG = "{http://www.w3.org/2000/svg}"


@given(st.lists(st.floats(0.01, 1e4), min_size=1), st.floats(0.0, 1.0))
def test_a_percentile_is_one_of_the_values_and_not_exceeded_by_its_share(values: list[float], share: float) -> None:
    found = report.percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) <= max(share * len(values), 0)


def test_a_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        report.percentile([], 0.5)


def test_a_line_gives_the_median_of_its_turns_and_its_ratio() -> None:
    turns = {NATIVE: [Turn(s, 10) for s in (4.0, 9.0, 2.0)], OURS: [Turn(s, 10) for s in (1.0, 2.0, 8.0)]}
    (row,) = report.rows_of("mail", "mails", turns, latency=False)
    assert row.figures == {NATIVE: 4.0, OURS: 2.0}
    assert report.ratio(row, NATIVE, OURS) == 2.0
    assert report.ratio(row, ("native", "on"), OURS) is None
    text = report.table([row], [NATIVE, ("native", "on"), ("ours", "off"), OURS])
    assert text.splitlines()[0].endswith("| native off / ours off | native off / ours on | native on / ours on |")
    assert text.splitlines()[2] == "| mails | s | 4.00 |  |  | 2.00 |  | 2.00 |  |"


def test_a_latency_line_gives_median_and_99th() -> None:
    turns = {OURS: [Turn(0.0, 100, latencies_ms=[float(n) for n in range(1, 101)])]}
    median, high = report.rows_of("single", "one", turns, latency=True)
    assert (median.figures[OURS], high.figures[OURS]) == (50.0, 99.0)


def test_costs_are_for_100_000_changes() -> None:
    turns = {OURS: [Turn(1.0, 50_000, cpu_s={"slave: apply": 1.5, "master: broker": 0.001})]}
    text = report.costs(turns)
    assert "| ours on | slave: apply | 3.00 |" in text
    assert "master: broker" not in text
    assert "| ours on | all | 3.00 |" in text


@given(st.floats(0.001, 1e5), st.floats(1.0001, 1e4), st.booleans())
def test_ticks_cover_the_range(low: float, factor: float, logarithmic: bool) -> None:
    found = svg.ticks(low, low * factor, logarithmic=logarithmic)
    assert found == sorted(found)
    assert found[0] <= low * (1 + 1e-9)
    assert found[-1] >= low * factor * (1 - 1e-9)


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=2000), st.booleans())
@example([9999.999999999998], True)
def test_a_picture_has_every_line_within_its_frame(latencies: list[float], logarithmic: bool) -> None:
    points = svg.distribution(latencies)
    assert points[-1] == (max(latencies), 100.0)
    assert len(points) <= svg.MOST_POINTS
    picture = svg.chart("a < b", "ms", "%", {"ours & on": points, "native": points[-1:]}, logarithmic=logarithmic)
    lines = list(ElementTree.fromstring(picture).iter(f"{SVG}polyline"))
    assert len(lines) == 2
    for line in lines:
        for pair in line.attrib["points"].split():
            x, y = map(float, pair.split(","))
            assert svg.LEFT - 0.1 <= x <= svg.WIDTH - svg.RIGHT + 0.1
            assert svg.TOP - 0.1 <= y <= svg.HEIGHT - svg.BOTTOM + 0.1


def test_a_picture_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        svg.chart("", "", "", {"ours": []})


def test_a_row_without_a_contender_has_an_empty_cell() -> None:
    assert "|  |" in report.table([Row("x", "x", "s", {OURS: 1.0})], [NATIVE, OURS])
