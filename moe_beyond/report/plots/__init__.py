"""Plots of replays, recorded evaluations and trace sets, as matplotlib figures and PNG files."""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports

if TYPE_CHECKING:
    from moe_beyond.report.plots.files import replay_figures as replay_figures
    from moe_beyond.report.plots.files import write_figures as write_figures
    from moe_beyond.report.plots.inspection import inspection_figures as inspection_figures
    from moe_beyond.report.plots.recorded import recorded_figure as recorded_figure
    from moe_beyond.report.plots.replay import budgets_figure as budgets_figure
    from moe_beyond.report.plots.replay import frontier_figure as frontier_figure
    from moe_beyond.report.plots.replay import layers_figure as layers_figure
    from moe_beyond.report.plots.replay import render_png as render_png
    from moe_beyond.report.plots.replay import save_png as save_png
    from moe_beyond.report.plots.replay import timeline_figure as timeline_figure

__all__ = [
    "budgets_figure",
    "frontier_figure",
    "inspection_figures",
    "layers_figure",
    "recorded_figure",
    "render_png",
    "replay_figures",
    "save_png",
    "timeline_figure",
    "write_figures",
]

_MODULES = {
    "budgets_figure": "replay",
    "frontier_figure": "replay",
    "inspection_figures": "inspection",
    "layers_figure": "replay",
    "recorded_figure": "recorded",
    "render_png": "replay",
    "replay_figures": "files",
    "save_png": "replay",
    "timeline_figure": "replay",
    "write_figures": "files",
}

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
