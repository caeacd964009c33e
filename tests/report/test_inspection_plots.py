"""Plots of a trace set show the measured values."""

import numpy as np
import pytest
from _helpers.common import TINY, tiny_trace, tiny_traces

from moe_beyond.geometry import Geometry
from moe_beyond.report.plots.inspection import inspection_plots
from moe_beyond.report.plots.replay import render_png
from moe_beyond.traces.analysis.contrast import contrast_traces
from moe_beyond.traces.analysis.statistics import summarize
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer


def image(figure):
    return np.ma.filled(figure.axes[0].get_images()[0].get_array(), np.nan)


def lines(axes):
    return {line.get_label(): line.get_ydata() for line in axes.get_lines() if len(line.get_xdata()) == 4}


def test_every_figure_draws_its_figures(tmp_path):
    rng = np.random.default_rng(0)
    with open_writer(
        tmp_path / "set", Manifest(TINY, Tokenizer("t", 32), "tiny", 16.0, "mixed", "tests", "0")
    ) as writer:
        for i in range(3):
            trace = tiny_trace(f"s{i}", 10, rng)
            writer.write(Trace(trace.sequence_id, "tests", trace.token_ids, trace.experts, 4))
    traces = TraceSet(str(tmp_path / "set"))
    result, other = summarize(traces), contrast_traces(traces, tiny_traces(tmp_path / "other"))
    drawn = inspection_plots(result, other)
    summary = result.to_json() | {"contrast": other.to_json()}
    layers = summary["by_layer"]
    assert list(drawn) == ["popularity", "locality", "reuse_distance", "dependence", "phases", "contrast"]
    np.testing.assert_allclose(
        image(drawn["popularity"]), [[8 * share for share in row["popularity"]] for row in layers]
    )
    np.testing.assert_allclose(image(drawn["dependence"]), np.array(summary["dependence"], float))
    difference = [[100 * share for share in row["difference"]] for row in summary["contrast"]["by_layer"]]
    np.testing.assert_allclose(image(drawn["contrast"]), difference)
    low, high = drawn["contrast"].axes[0].get_images()[0].get_clim()
    assert -low == high == np.abs(difference).max()  # no difference is white
    for name in ("popularity", "dependence", "contrast"):
        assert [label.get_text() for label in drawn[name].axes[0].get_yticklabels()] == ["1", "2", "3", "4"]
    entropy, reuse, alike, dependence = drawn["locality"].axes
    assert list(lines(entropy)["measured"]) == [row["normalized_entropy"] for row in layers]
    assert list(lines(reuse)["measured"]) == [row["token_to_token_reuse"] for row in layers]
    assert list(lines(alike)["measured"]) == [row["jaccard"] for row in layers]
    assert list(lines(alike)["by chance"]) == [row["jaccard_by_chance"] for row in layers]
    told = list(lines(dependence)["measured"])
    assert told[:3] == [row["next_layer"]["dependence"] for row in layers[:3]]
    assert np.isnan(told[3])
    again = drawn["reuse_distance"].axes[0].get_lines()
    for line, row in zip(again, layers, strict=True):
        within = row["reuse_distance"]["within"]
        np.testing.assert_allclose(line.get_xdata(), [int(tokens) for tokens in within])
        np.testing.assert_allclose(line.get_ydata(), [100 * share for share in within.values()])
    entropy, reuse, apart = drawn["phases"].axes
    for phase in ("prefill", "decode"):
        assert list(lines(entropy)[phase]) == [row["phases"][phase]["normalized_entropy"] for row in layers]
        assert list(lines(reuse)[phase]) == [row["phases"][phase]["token_to_token_reuse"] for row in layers]
    assert list(lines(apart)["measured"]) == [row["phases"]["total_variation"] for row in layers]
    assert list(lines(apart)["by chance"]) == [row["phases"]["total_variation_by_chance"] for row in layers]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layers", [1, 2])
def test_sets_with_little_to_draw_are_drawn(layers, tmp_path):
    geometry = Geometry("g", tuple(range(layers)), 2, 2, 1000, 0)
    with open_writer(
        tmp_path / "set", Manifest(geometry, Tokenizer("t", 9), "g", 16.0, "dataset", "tests", "0")
    ) as writer:
        writer.write(Trace("a", "tests", np.zeros(1, np.int32), np.array([[[0, 1]] * layers]), 1))
    drawn = inspection_plots(summarize(TraceSet(str(tmp_path / "set"))))
    assert list(drawn) == ["popularity", "locality", "reuse_distance", *["dependence"] * (layers > 1)]
    for figure in drawn.values():
        assert render_png(figure).startswith(b"\x89PNG")
