"""Plots of replays, recorded evaluations and trace sets, as matplotlib figures and PNG files."""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports

if TYPE_CHECKING:
    from moe_beyond.report.plots.files import replay_plots as replay_plots
    from moe_beyond.report.plots.files import write_plots as write_plots
    from moe_beyond.report.plots.inspection import inspection_plots as inspection_plots
    from moe_beyond.report.plots.recorded import recorded_plot as recorded_plot
    from moe_beyond.report.plots.replay import budgets_plot as budgets_plot
    from moe_beyond.report.plots.replay import frontier_plot as frontier_plot
    from moe_beyond.report.plots.replay import layers_plot as layers_plot
    from moe_beyond.report.plots.replay import render_png as render_png
    from moe_beyond.report.plots.replay import save_png as save_png
    from moe_beyond.report.plots.replay import timeline_plot as timeline_plot

__all__ = [
    "budgets_plot",
    "frontier_plot",
    "inspection_plots",
    "layers_plot",
    "recorded_plot",
    "render_png",
    "replay_plots",
    "save_png",
    "timeline_plot",
    "write_plots",
]

_MODULES = {
    "budgets_plot": "replay",
    "frontier_plot": "replay",
    "inspection_plots": "inspection",
    "layers_plot": "replay",
    "recorded_plot": "recorded",
    "render_png": "replay",
    "replay_plots": "files",
    "save_png": "replay",
    "timeline_plot": "replay",
    "write_plots": "files",
}

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
