from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from fastcolor.evaluation.chart import Line, line_chart, ticks


@pytest.mark.parametrize("low, high, expected", [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (20.8, 22.7, [21, 21.5, 22, 22.5]),
    (-0.05, 1.05, [0, 0.2, 0.4, 0.6, 0.8, 1]),
])  # fmt: skip
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_points_lie_where_they_should():
    """A square of 0..1: its corners are those of the axes; what is not finite is left out."""
    points = [(0, 0), (1, 1), (float("nan"), 0.5)]
    text = line_chart([Line("a < b", points, 0, marks=["x", "y"])], "x & x", "y", (0, 1), (0, 1), (True, False))
    svg, legend = ElementTree.fromstring(f"<div>{text}</div>")
    (line,) = [p for p in svg.findall("path") if p.get("class").startswith("line")]
    (axis,) = [p for p in svg.findall("path") if p.get("class") == "axis"]
    assert axis.get("d") == "M52 14V286H440" and line.get("d") == "M52.0 286.0L440.0 14.0"
    assert legend[0].find("svg").tail == "a < b"
    texts = [t.text for t in svg.findall("text")]
    assert "20 %" in texts and "0.2" in texts and texts[-2:] == ["x", "y"] and "x & x" in texts


def test_one_point_and_none():
    assert "circle" in line_chart([Line("a", [(1, 2)], 0)], "x", "y")
    assert "<svg" in line_chart([], "x", "y")
