"""Charts and what a page replays, by hand."""

from xml.etree import ElementTree

import numpy as np
import pytest
from _helpers.common import TINY
from _helpers.scoring import seer

from moe_beyond.geometry import load_preset
from moe_beyond.metrics import ReliabilityBin
from moe_beyond.report.html.sections.prediction import static_recall
from moe_beyond.report.html.strategies import default_slots, page_strategies
from moe_beyond.report.html.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    LINE_HEIGHT,
    TOP,
    WIDTH,
    Line,
    fit_axis,
    format_percent,
    heat_map,
    line_chart,
    reliability_chart,
)
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.devices import DEVICES


@pytest.mark.parametrize(
    ("values", "options", "ticks"),
    [
        ([0.05, 0.6], {"low": 0}, (0, 0.2, 0.4, 0.6)),
        ([0.0, 1.0], {"low": 0, "high": 1}, (0, 0.2, 0.4, 0.6, 0.8, 1)),
        ([1, 26], {"low": 1, "high": 26, "whole": True}, (5, 10, 15, 20, 25)),
        ([1, 2, 3], {"low": 1, "high": 3, "whole": True}, (1, 2, 3)),
        ([7], {"low": 7, "high": 7, "whole": True}, (6, 7, 8)),
        ([6.71, 14.5], {}, (6, 8, 10, 12, 14, 16)),
        ([1234, 98765], {}, (0, 20000, 40000, 60000, 80000, 100000)),
        ([float("nan")], {}, (0, 0.2, 0.4, 0.6, 0.8, 1)),
    ],
)
def test_ticks_are_round_and_hold_the_values(values, options, ticks):
    axis = fit_axis("", values, **options)
    assert axis.ticks == pytest.approx(ticks)
    assert axis.low <= min(ticks) < max(ticks) <= axis.high


def drawn(markup):
    return ElementTree.fromstring(str(markup))


def test_lines_go_where_their_points_are_and_names_stand_apart():
    x, y = fit_axis("x", (), low=0, high=1), fit_axis("y", (), low=0, high=1, format_tick=format_percent)
    lines = [Line(name, ((0, 0), (1, 0.5)), style, ("a", "b")) for name, style in (("one", "s0"), ("two", "lru"))]
    svg = drawn(line_chart("What it is", x, y, [*lines, Line("high", ((0, 1), (1, 1)), "s1", ("a", "b"))]))
    assert svg.get("aria-label") == "What it is"
    [first, second, third] = [[float(n) for n in line.get("points").replace(",", " ").split()]
                              for line in svg.iter("polyline")]  # fmt: skip
    middle = (TOP + HEIGHT - BOTTOM) / 2
    assert first == second
    assert (first[:2], first[3]) == ([LEFT, HEIGHT - BOTTOM], middle)
    assert (third[1], third[3]) == (TOP, TOP)
    names = {
        text.text: float(text.get("y")) for text in svg.iter("text") if (text.get("class") or "").startswith("name")
    }
    assert set(names) == {"one", "two", "high"}
    heights = sorted(names.values())
    assert min(np.diff(heights)) >= LINE_HEIGHT - 0.1
    assert heights[-1] <= HEIGHT - BOTTOM + 4
    assert [title.text for title in svg.iter("title")][:2] == ["one, a", "one, b"]


def test_a_calibration_chart_shows_the_bins_that_hold_labels():
    bins = [ReliabilityBin(0, 0.5, 1000, 0.1, 0.2), ReliabilityBin(0.5, 1, 0, None, None)]
    svg = drawn(reliability_chart("c", bins, "s2"))
    [bar] = [rect for rect in svg.iter("rect") if rect.get("class") == "bar"]
    assert bar.find("title").text == "predicted 10.0%, observed 20.0%, 1,000 labels from 0% to 50%"
    [point] = svg.find("g[@class='line s2']/polyline").get("points").split()
    across, up = map(float, point.split(","))
    assert across == pytest.approx(LEFT + 0.1 * (WIDTH - 18 - LEFT), abs=0.1)
    assert up == pytest.approx((HEIGHT - BOTTOM - 18) * 0.8 + TOP * 0.2, abs=0.1)


def test_a_heat_map_shades_by_multiples_of_an_even_share():
    values = np.array([[0.0, 0.1, 0.25, 0.99], [1.0, 1.5, 2.0, 4.0]])
    shades = {path.get("class"): path.get("d").count("M") for path in drawn(heat_map("h", values, [3, 4])).iter("path")}
    assert shades == {f"q{n}": 1 for n in range(8)}


def test_the_best_static_prediction_names_each_layers_most_used():
    # Ten tokens, top-2: the two most used experts of the layers have 16 and 20 of their 20 choices.
    assert static_recall(np.array([[6, 10, 4, 0], [0, 10, 0, 10]]), 2).tolist() == [0.8, 1.0]


def test_default_budgets_hold_one_event():
    assert default_slots(load_preset("deepseek-v2-lite").geometry) == [83, 166, 249, 332, 499, 665, 832, 998]
    assert default_slots(TINY) == [2, 3, 4, 6, 9, 12, 16, 19]


def strategies(lookaheads, *devices):
    common, source = ReplaySettings(32), seer("seer", lookaheads)
    found = page_strategies(common, [8], source, TINY, [DEVICES[name] for name in devices])
    return [(line.strategy, line.lookahead, line.device.name if line.device else None) for line in found]


def test_page_strategies():
    references = [("lru", None, None), ("belady", None, None), ("static_hindsight", None, None)]
    assert strategies(("token", "next")) == [
        ("belief + top2", "token", None),
        ("lru + top2", "token", None),
        *references,
    ]
    # Scores that only tell what to keep prefetch nothing.
    assert strategies(("next",)) == [("belief", None, None), *references]
    timed = [line for line in strategies((1, 2), "rtx3060") if line[2]]
    assert [name for name, *_ in timed] == ["belief + top2", "lru + top2", "belief", "lru", "belady",
                                            "clairvoyant prefetch", "all_resident"]  # fmt: skip
