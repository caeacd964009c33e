"""Sizing: the smallest budget of each strategy that meets a target, and the bottleneck if none does."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from moe_beyond.cache.pools import least_slots
from moe_beyond.errors import UserError
from moe_beyond.evaluation.engine import evaluate
from moe_beyond.evaluation.options import ReplayOptions
from moe_beyond.evaluation.resolve import (
    resolve_settings,
    resolve_strategies,
    resolve_text,
)
from moe_beyond.evaluation.results import Progress, Unavailable
from moe_beyond.evaluation.run import counted
from moe_beyond.evaluation.sources import ScoreSource
from moe_beyond.evaluation.strategies import (
    BASELINES,
    all_resident,
    clairvoyant,
    even_split,
    lru_in_windows,
    strategy,
)
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import ReplaySettings, Result
from moe_beyond.simulator.devices import device_slots
from moe_beyond.traces.reader import TraceSet

if TYPE_CHECKING:
    from moe_beyond.predictors.training_text import MeasuredText

STEPS = 20
"""Intervals of the first, evenly spaced budgets; the one below the smallest sufficient budget is then bisected."""


@dataclass(frozen=True)
class Target:
    """Figure that a budget has to reach: a hit rate or a speed.

    Attributes:
        text: The target as the user wrote it.
        hit_rate: Least hit rate, 0 to 1; None for a speed (default: None).
        tokens_per_second: Least speed; None for a hit rate (default: None).
    """

    text: str
    hit_rate: float | None = None
    tokens_per_second: float | None = None

    def reached(self, result: Result) -> bool:
        """Return whether a result reaches the target."""
        if self.hit_rate is not None:
            return result.hit_rate >= self.hit_rate
        assert self.tokens_per_second is not None
        return result.tokens_per_second is not None and result.tokens_per_second >= self.tokens_per_second

    def value(self, result: Result) -> float:
        """Return the targeted figure of a result."""
        return result.hit_rate if self.hit_rate is not None else result.tokens_per_second or 0.0

    def format(self, result: Result) -> str:
        """Return the targeted figure of a result with its unit."""
        return f"{result.hit_rate:.1%}" if self.hit_rate is not None else f"{self.value(result):.2f} tok/s"


def parse_target(text: str) -> Target:
    """Read a target: ``90%`` for a hit rate, or ``10tok/s``.

    Raises:
        UserError: The text is no target, or is out of range.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|tok/s)", text.strip(), re.ASCII)
    if match is None or float(match[1]) <= 0 or (match[2] == "%" and float(match[1]) > 100):
        raise UserError(f"--target: cannot be read (got {text!r}); write 90% for a hit rate, or 10tok/s")
    number = float(match[1])
    return Target(text, hit_rate=number / 100) if match[2] == "%" else Target(text, tokens_per_second=number)


@dataclass(frozen=True)
class SizingResult:
    """Smallest budget of one strategy.

    Attributes:
        strategy: Name of the strategy.
        result: Result at the smallest budget that reaches the target; if none does, the best result.
        bottleneck: Reason why no budget reaches the target; None if one does.
    """

    strategy: str
    result: Result
    bottleneck: str | None

    def to_json(self, bytes_per_expert: float) -> dict[str, Any]:
        """Return plain values."""
        budget = None if self.bottleneck else self.result.budget_slots
        return {
            "strategy": self.strategy,
            "budget_slots": budget,
            "budget_bytes": None if budget is None else math.ceil(budget * bytes_per_expert),
            "bottleneck": self.bottleneck,
            "result": self.result.to_json(),
        }


@dataclass(frozen=True)
class SizingReport:
    """Smallest budgets of all strategies.

    Attributes:
        target: Target to reach.
        measured_on: Split, and relation of its text to the predictors.
        sizings: One result per strategy.
        unavailable: Named strategies that cannot be sized.
        bytes_per_expert: Bytes of one expert, the mean where layers differ.
    """

    target: Target
    measured_on: MeasuredText
    sizings: Sequence[SizingResult]
    unavailable: Sequence[Unavailable]
    bytes_per_expert: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as ``--json`` writes them."""
        return {
            "target": self.target.text,
            "measured_on": self.measured_on.to_json(),
            "answers": [sizing.to_json(self.bytes_per_expert) for sizing in self.sizings],
            "unavailable": [each.to_json() for each in self.unavailable],
        }


def check_target(options: ReplayOptions, target: Target) -> None:
    """Check that options suit a target, before anything is read.

    Raises:
        UserError: The quotas are for one budget, or a speed has no device.
    """
    if options.quotas not in (None, "even", "proportional"):
        raise UserError(
            f"--quotas {options.quotas}: a list is for one budget, and sizing tries many; write even or proportional"
        )
    if target.tokens_per_second is not None and options.device is None:
        raise UserError(f"--target {target.text}: a speed needs the timing model; add --device")


def run_sizing(
    options: ReplayOptions,
    traces: TraceSet,
    target: Target,
    source: ScoreSource | None = None,
    *,
    split: str | None = None,
    progress: Progress | None = None,
) -> SizingReport:
    """Find the smallest budgets of strategies, of LRU, of Belady and, on a device, of clairvoyant prefetch.

    On a device, budgets stay within its memory.

    Args:
        options: Options of the replay; the budget is ignored.
        traces: Trace set to replay.
        target: Target to reach.
        source: Source of scores (default: none).
        split: Name of a split, or ``all`` (default: all; with a predictor, one that it was not fitted on, if any).
        progress: Function that receives the finished and the total number of tokens of a round of replays (default: no
            progress).

    Raises:
        UserError: An option cannot be read or excludes another, or the device has no memory for one event.
    """
    check_target(options, target)
    geometry = traces.geometry
    total = geometry.total_experts
    shared = resolve_settings(options, traces)
    common, quotas = shared.common, shared.quotas
    # Settings are resolved at all experts, and then moved from budget to budget.
    whole = replace(options, budget=[str(total)])
    resolved = resolve_strategies(whole, traces, replace(shared, quotas=even_split), source)
    text = resolve_text(traces, split, shared, resolved.sources)
    cacheless = [settings for settings in resolved.settings if settings.policy == "od_moe"]
    unavailable = [
        *resolved.unavailable,
        *(Unavailable(settings.strategy, "it keeps no cache, so it has no budget") for settings in cacheless),
    ]
    cold = replace(common, warm_start=False)
    settings = [settings for settings in resolved.settings if settings not in cacheless]
    settings += [strategy(cold, total, policy) for policy in BASELINES]
    settings += lru_in_windows(settings, cold, total)
    references = {"lru": strategy(cold, total, "lru")}
    if common.device is not None:
        settings.append(clairvoyant(cold, total))
        references |= {"clairvoyant": clairvoyant(cold, total), "all_resident": all_resident(cold, geometry)}

    def at(line: ReplaySettings, slots: int) -> ReplaySettings:
        return replace(line, slots=slots, quotas=quotas(slots))

    def replay(strategies: list[ReplaySettings]) -> list[Result]:
        advance = counted(progress, traces, text.split, len(strategies))
        return evaluate(
            traces, strategies, text.split, resolved.sources, profile=shared.profile, progress=advance
        ).results

    sizings = size_budgets(
        geometry,
        target,
        [partial(at, line) for line in dict.fromkeys(settings)],
        replay,
        min_slots=least_slots(geometry, common.scope),
        references=lambda: dict(zip(references, replay(list(references.values())), strict=True)),
        max_slots=None if common.device is None else device_slots(common.device, geometry, common.bits),
    )
    return SizingReport(target, text, sizings, unavailable, float(geometry.mean_expert_bytes(common.bits)))


def size_budgets(
    geometry: Geometry,
    target: Target,
    strategies: Sequence[Callable[[int], ReplaySettings]],
    replay: Callable[[list[ReplaySettings]], list[Result]],
    min_slots: int,
    references: Callable[[], dict[str, Result]],
    max_slots: int | None = None,
) -> list[SizingResult]:
    """Find the smallest budget of each strategy.

    A strategy is replayed at evenly spaced budgets. Then the gap below the smallest sufficient one is bisected down to
    a single slot. If a larger budget can be worse, as with ``lfu_in_cache``, a still smaller budget may suffice.

    Args:
        geometry: Geometry of the model.
        target: Target to reach.
        strategies: Functions from the number of slots to the settings of each strategy.
        replay: Function that replays several settings.
        min_slots: Slots for one token's event, K, or K per layer.
        references: Function that returns results with all slots: ``"lru"``, without hits on first uses, and on a
            device ``"all_resident"`` and ``"clairvoyant"``; called only if a strategy misses the target.
        max_slots: Slots that fit in a device's memory; a strategy that needs more is bound by memory (default: all
            experts).

    Raises:
        UserError: A token's event demands more than ``max_slots`` slots.
    """
    total = geometry.total_experts
    most = total if max_slots is None else max_slots
    tried: list[dict[int, Result]] = [{} for _ in strategies]
    budgets: list[tuple[int, int]] = []
    if min_slots > most:
        raise UserError(
            f"--device: its memory has room for {most} experts, fewer than the {min_slots} that an event may demand; "
            "name a device with more memory, or fewer bits (--quantization)"
        )
    for index in range(len(strategies)):
        budgets += [(index, max(min_slots, round(most * step / STEPS))) for step in range(STEPS + 1)]
    budgets = list(dict.fromkeys(budgets))
    while budgets:
        results = replay([strategies[index](slots) for index, slots in budgets])
        for (index, slots), result in zip(budgets, results, strict=True):
            tried[index][slots] = result
        budgets = [
            (index, middle) for index, of_one in enumerate(tried) if (middle := _middle(target, of_one)) is not None
        ]
    reference_results: dict[str, Result] = {}
    sizings = []
    for index, of_one in enumerate(tried):
        enough = _smallest(target, of_one)
        if enough is not None:
            sizings.append(SizingResult(of_one[enough].strategy, of_one[enough], None))
            continue
        reference_results = reference_results or references()
        best = max(of_one.values(), key=lambda result: (target.value(result), -result.budget_slots))
        beyond = replay([strategies[index](total)])[0] if most < total else None
        sizings.append(SizingResult(best.strategy, best, _bottleneck(target, best, reference_results, most, beyond)))
    return sizings


def _smallest(target: Target, results: dict[int, Result]) -> int | None:
    """Return the smallest number of slots that reaches the target; None without one."""
    return min((slots for slots, result in results.items() if target.reached(result)), default=None)


def _middle(target: Target, results: dict[int, Result]) -> int | None:
    """Return the middle of the gap below the smallest sufficient budget; None without a gap."""
    enough = _smallest(target, results)
    if enough is None:
        return None
    below = max((slots for slots in results if slots < enough), default=enough)
    return (enough + below) // 2 if enough - below > 1 else None


def _bottleneck(target: Target, best: Result, references: dict[str, Result], most: int, beyond: Result | None) -> str:
    """Name what keeps a strategy from a target at every budget.

    Args:
        target: Target to reach.
        best: Best result of the strategy.
        references: Results with all slots.
        most: Slots that fit in the device's memory.
        beyond: Result with all slots, if they do not fit in the device's memory; None if they do.
    """
    if beyond is not None and target.reached(beyond):
        return f"memory: room for {most:,} experts; all {beyond.budget_slots:,} would reach {target.format(beyond)}"
    if target.tokens_per_second is not None:
        resident, clairvoyant_result = references["all_resident"], references["clairvoyant"]
        if not target.reached(resident):
            return f"computing: {target.format(resident)} with all experts resident"
        if not target.reached(clairvoyant_result):
            return f"interconnect: {target.format(clairvoyant_result)} even with clairvoyant prefetch and all slots"
        return "policy: clairvoyant prefetch over the same interconnect would reach it"
    assert target.hit_rate is not None
    late = best.late_hits / max(best.accesses, 1)
    if late > 0 and best.hit_rate + late >= target.hit_rate:
        return f"interconnect: {late:.1%} of accesses are late hits"
    if not target.reached(references["lru"]):
        first_uses = 1 - references["lru"].hit_rate
        return f"working set: {first_uses:.1%} of accesses are first uses, which only prefetching turns into hits"
    return "policy: LRU with all slots would reach it"
