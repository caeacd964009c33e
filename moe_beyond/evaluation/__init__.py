"""Evaluation: from options to settings, from traces and scores to metrics and results; sizing of budgets.

.. include:: README.md
"""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports

if TYPE_CHECKING:
    from moe_beyond.evaluation.checkpoints import evaluate_run as evaluate_run
    from moe_beyond.evaluation.engine import evaluate as evaluate
    from moe_beyond.evaluation.named_strategies import STRATEGIES as STRATEGIES
    from moe_beyond.evaluation.named_strategies import NamedStrategy as NamedStrategy
    from moe_beyond.evaluation.options import ReplayOptions as ReplayOptions
    from moe_beyond.evaluation.pins import Pins as Pins
    from moe_beyond.evaluation.pins import choose_pins as choose_pins
    from moe_beyond.evaluation.pins import read_pins as read_pins
    from moe_beyond.evaluation.pins import write_pins as write_pins
    from moe_beyond.evaluation.results import Evaluation as Evaluation
    from moe_beyond.evaluation.results import Unavailable as Unavailable
    from moe_beyond.evaluation.run import ReplayOutcome as ReplayOutcome
    from moe_beyond.evaluation.run import ResolvedReplay as ResolvedReplay
    from moe_beyond.evaluation.run import resolve_evaluation as resolve_evaluation
    from moe_beyond.evaluation.run import resolve_replay as resolve_replay
    from moe_beyond.evaluation.run import run_evaluation as run_evaluation
    from moe_beyond.evaluation.run import run_replay as run_replay
    from moe_beyond.evaluation.score_store import ScoresFolder as ScoresFolder
    from moe_beyond.evaluation.score_store import writing_scores as writing_scores
    from moe_beyond.evaluation.sizing import SizingReport as SizingReport
    from moe_beyond.evaluation.sizing import Target as Target
    from moe_beyond.evaluation.sizing import parse_target as parse_target
    from moe_beyond.evaluation.sizing import run_sizing as run_sizing
    from moe_beyond.evaluation.sources import ScoreSource as ScoreSource
    from moe_beyond.evaluation.sources import from_predictor as from_predictor
    from moe_beyond.evaluation.sources import from_predictor_folder as from_predictor_folder
    from moe_beyond.evaluation.sources import from_scores_folder as from_scores_folder
    from moe_beyond.evaluation.sources import load_profile as load_profile
    from moe_beyond.evaluation.strategies import grid as grid
    from moe_beyond.evaluation.strategies import strategy as strategy
    from moe_beyond.evaluation.strategies import with_baselines as with_baselines

_MODULES = {
    "STRATEGIES": "named_strategies",
    "Evaluation": "results",
    "NamedStrategy": "named_strategies",
    "Pins": "pins",
    "ReplayOptions": "options",
    "ReplayOutcome": "run",
    "ResolvedReplay": "run",
    "ScoreSource": "sources",
    "ScoresFolder": "score_store",
    "SizingReport": "sizing",
    "Target": "sizing",
    "Unavailable": "results",
    "choose_pins": "pins",
    "evaluate": "engine",
    "evaluate_run": "checkpoints",
    "from_predictor": "sources",
    "from_predictor_folder": "sources",
    "from_scores_folder": "sources",
    "grid": "strategies",
    "load_profile": "sources",
    "parse_target": "sizing",
    "read_pins": "pins",
    "resolve_evaluation": "run",
    "resolve_replay": "run",
    "run_evaluation": "run",
    "run_replay": "run",
    "run_sizing": "sizing",
    "strategy": "strategies",
    "with_baselines": "strategies",
    "write_pins": "pins",
    "writing_scores": "score_store",
}
"""Public name -> module of this package; modules are imported on first use, because some need torch."""

__all__ = list(_MODULES)

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
