"""The plot on a card shows the recorded values and marks leaks."""

import pytest
from _helpers.publishing import FIGURES

from moe_beyond.report.labels import recorded_label
from moe_beyond.report.plots.recorded import recorded_plot
from moe_beyond.report.plots.replay import render_png


def test_one_panel_per_evaluation_and_one_line_per_strategy() -> None:
    larger = [row | {"budget_slots": 16, "budget_share": 0.5, "hit_rate": 0.9} for row in FIGURES["replay"]]
    other = FIGURES | {"source": "other", "replay": [*larger, *FIGURES["replay"]]}
    figure = recorded_plot([FIGURES, other], "tiny")
    assert render_png(figure).startswith(b"\x89PNG")
    panels = figure.axes
    assert [axes.get_title().split(";")[1] for axes in panels] == [
        " cache of 25 % of all experts",
        " cache of 25 %, 50 % of all experts",
    ]
    for axes, hits in zip(panels, ([80, 30, 50], [[80, 90], [30, 90], [50, 90]]), strict=True):
        names = [line.get_label() for line in axes.get_lines()]
        assert names == ["lru + top2, lookahead 1", "LRU", "Belady (optimum without prefetching)"]
        assert [line.get_ydata().tolist() for line in axes.get_lines()] == [
            pytest.approx([one] if isinstance(one, int) else one) for one in hits
        ]
    assert panels[0].get_lines()[0].get_xdata().tolist() == [1.1]


def test_leaks_are_marked() -> None:
    own = FIGURES["replay"][0]
    assert recorded_label(own) == "lru + top2, lookahead 1"
    assert recorded_label(own | {"lookahead": None}) == "lru + top2, all lookaheads"
    assert recorded_label(own | {"leaks": True}) == "lru + top2, lookahead 1 (LEAK: reads the router's input)"
    assert recorded_label(own | {"causal": False}) == "lru + top2, lookahead 1 (LEAK: sees later tokens)"
    # Recorded before leaks were.
    earlier = {name: value for name, value in own.items() if name not in ("leaks", "causal")}
    assert recorded_label(earlier | {"lookahead": 0}) == "lru + top2, lookahead 0 (LEAK: reads the router's input)"
