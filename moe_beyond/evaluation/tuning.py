"""Tuning: the best strategy of a budget, chosen on one half of the conversations and judged on the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moe_beyond.cache.misses import MOVE
from moe_beyond.errors import UserError, unknown
from moe_beyond.evaluation.engine import replay_sequences
from moe_beyond.evaluation.halves import Halves, halve
from moe_beyond.evaluation.options import ReplayOptions
from moe_beyond.evaluation.resolve import resolve_budgets, resolve_settings, resolve_text
from moe_beyond.evaluation.search import AIMS, Aim, Candidate, Search, Space
from moe_beyond.evaluation.sources import ScoreSource
from moe_beyond.evaluation.strategies import strategy
from moe_beyond.evaluation.strategy_file import StrategyChoice
from moe_beyond.simulator import Result
from moe_beyond.traces.reader import TraceSet

if TYPE_CHECKING:
    from moe_beyond.predictors.training_text import MeasuredText

DRAWS = 1000
"""Number of bootstrap draws of each interval."""


@dataclass(frozen=True)
class TuningReport:
    """Choice of a strategy.

    Attributes:
        aim: Figure that was improved.
        measured_on: Split, and relation of its text to the predictors.
        halves: Sequences to choose by and to judge by.
        tried: Results on the half to choose by, the best first.
        held_out: Results on the other half, with intervals: the choice, the best without prefetching, LRU and Belady.
        choice: Chosen strategy, by the names of options.
        sentences: Gain of the choice, and the reasons for it.
    """

    aim: Aim
    measured_on: MeasuredText
    halves: Halves
    tried: Sequence[Result]
    held_out: Sequence[Result]
    choice: StrategyChoice
    sentences: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as ``--json`` writes them."""
        return {
            "measured_on": self.measured_on.to_json(),
            "halves": str(self.halves),
            "choice": self.choice.options(),
            "notes": list(self.sentences),
            "bootstrap_draws": DRAWS,
            "results": [result.to_json() for result in self.held_out],
            "tried": [result.to_json() for result in self.tried],
        }


def resolve_aim(name: str | None, device: str | None) -> Aim:
    """Return the figure to improve.

    Args:
        name: Key of `AIMS`; None for tokens with a device and hits without.
        device: Device of the timing model; None without one.

    Raises:
        UserError: There is no such figure, or a speed has no device.
    """
    name = name or ("hits" if device is None else "tokens")
    if name not in AIMS:
        raise unknown("value of --for", name, AIMS)
    if name == "tokens" and device is None:
        raise UserError("--for tokens: a speed needs the timing model; add --device")
    return AIMS[name]


def run_tuning(
    options: ReplayOptions,
    traces: TraceSet,
    source: ScoreSource | None = None,
    *,
    aim: str | None = None,
    scope: str | None = None,
    predictor: str | None = None,
    split: str | None = None,
    progress: Callable[[int], object] = lambda tried: None,
) -> TuningReport:
    """Choose a strategy.

    The choice is LRU, unless another strategy is better on the half to choose by, by more than its spread.

    Args:
        options: Options of the replay, with one budget; policies, prefetchers, lookaheads and scope are searched.
        traces: Trace set to replay.
        source: Source of scores (default: none).
        aim: Figure to improve, a key of `AIMS` (default: tokens with a device, hits without).
        scope: Scope of the cache (default: both are tried).
        predictor: Name of the source's predictor, for the choice (default: none).
        split: Name of a split, or ``all`` (default: all; with a predictor, one that it was not fitted on, if any).
        progress: Function that receives the number of strategies tried (default: no progress).

    Raises:
        UserError: An option cannot be read or excludes another; the scores leak; or there are too few conversations.
    """
    improved = resolve_aim(aim, options.device)
    if options.sequential:
        raise UserError("--sequential: excludes prefetching, which tune tries; leave it out")
    if source is not None and (0 in source.lookaheads or not source.causal):
        raise UserError(f"{source.name}: reads what no run knows in time, so no run can use it; name another predictor")
    shared = resolve_settings(replace(options, scope=scope or options.scope), traces)
    slots = resolve_budgets(options, traces)
    if len(slots) != 1:
        raise UserError(f"--budget: tune is for one budget (got {len(slots)}); give it once")
    text = resolve_text(traces, split, shared, [] if source is None else [source])
    space = Space(
        traces.geometry,
        shared.common,
        slots[0],
        scope,
        source,
        shared.profile,
        shared.quotas,
        options.misses or (MOVE,),
    )
    halves = halve(traces, text.split, source, options.warmup_tokens, in_order=options.carry_over)

    def replay(half: str, candidates: Sequence[Any], draws: int = 0) -> list[Result]:
        return replay_sequences(traces.geometry, candidates, getattr(halves, half), shared.profile, draws)

    search = Search(space, improved, lambda settings: replay("tuning", settings), progress)
    search.run()
    lru = space.plain()[0]
    best, plain = search.best(1)[0], next(each for each in search.best(len(search.tried)) if each.prefetch == "none")
    spread = _gain(improved, *replay("tuning", [space.settings(best), space.settings(lru)], DRAWS))
    chosen = best if best != lru and spread[0] > 0 else lru
    settings = [space.settings(each) for each in dict.fromkeys((chosen, plain, lru))]
    belady = strategy(replace(settings[-1], warm_start=False, name=None), slots[0], "belady")
    held_out = replay("held_out", [*settings, belady], DRAWS)
    choice = StrategyChoice(
        options.budget[0], chosen.policy, chosen.prefetch, chosen.lookahead, chosen.scope,
        predictor if settings[0].predictor is not None else None, options.profile, chosen.misses,
    )  # fmt: skip
    return TuningReport(
        improved, text, halves, [search.tried[each] for each in search.best(len(search.tried))], held_out, choice,
        _sentences(search, chosen, lru, spread, held_out),
    )  # fmt: skip


def _gain(aim: Aim, result: Result, lru: Result) -> tuple[float, float]:
    """Return the interval of a result's gain over LRU; above 0 is better."""
    intervals = result.intervals or {}
    if "minus_lru" not in intervals:
        return 0.0, 0.0
    low, high = sorted(aim.sign * end for end in intervals["minus_lru"][aim.field])
    return low, high


def _sentences(
    search: Search, chosen: Candidate, lru: Candidate, spread: tuple[float, float], held_out: Sequence[Result]
) -> tuple[str, ...]:
    """Return the gain of the choice, and the reasons for it."""
    aim, best, first = search.aim, search.best(1)[0], held_out[0]
    name = first.strategy if first.lookahead is None else f"{first.strategy}, lookahead {first.lookahead}"
    reached = f"choice: {name}: {aim.format(aim.value(first))} on the held-out half"
    if chosen == lru:
        sentences = [reached]
    else:
        low, high = _gain(aim, first, held_out[-2])
        sentences = [f"{reached}, {aim.format_gain(low, high)} better than lru (95 % interval over sequences)"]
    if best not in (chosen, lru):
        sentences.append(
            f"{search.tried[best].strategy} is better on the tuning half by {aim.format_gain(*spread)}: that is within "
            "its spread, so lru is chosen"
        )
    prefetching = [each for each in search.best(len(search.tried)) if each.prefetch != "none"]
    if not prefetching:
        sentences.append("no prefetcher was tried: they need scores; give --predictor")
    elif chosen.prefetch == "none":
        result = search.tried[prefetching[0]]
        plain = search.tried[chosen]
        sentences.append(
            f"no prefetch is best: {result.strategy}, the best prefetcher, has {aim.format(aim.value(result))} on the "
            f"tuning half, and the choice without one {aim.format(aim.value(plain))}"
        )
    return tuple(sentences)
