"""How large a budget must be for a target, and what stands in the way where none will do."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.pools import most_used, pool_slots
from moe_beyond.errors import UserError
from moe_beyond.evaluation.strategies import Quotas
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import ReplaySettings, Result
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import expert_ids

STEPS = 20
"""Budgets, evenly spread, that are tried first; between the last that fails and the first that does, halves are."""


@dataclass(frozen=True)
class Target:
    """What is wanted: a hit rate (0..1), or tokens a second."""

    text: str
    hit_rate: float | None = None
    tokens_per_second: float | None = None

    def reached(self, result: Result) -> bool:
        """Tell whether a result is as good."""
        if self.hit_rate is not None:
            return result.hit_rate >= self.hit_rate
        assert self.tokens_per_second is not None
        return result.tokens_per_second is not None and result.tokens_per_second >= self.tokens_per_second

    def value(self, result: Result) -> float:
        """Return the figure that counts."""
        return result.hit_rate if self.hit_rate is not None else result.tokens_per_second or 0.0

    def words(self, result: Result) -> str:
        """Say the figure that counts."""
        return f"{result.hit_rate:.1%}" if self.hit_rate is not None else f"{self.value(result):.2f} tok/s"


def parse_target(text: str) -> Target:
    """Read a target: ``90%`` of hits, or ``10tok/s``.

    Raises:
        UserError: It cannot be read, or is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|tok/s)", text.strip(), re.ASCII)
    if match is None or float(match[1]) <= 0 or (match[2] == "%" and float(match[1]) > 100):
        raise UserError(f"--target {text!r} cannot be read; write 90% (of hits) or 10tok/s")
    number = float(match[1])
    return Target(text, hit_rate=number / 100) if match[2] == "%" else Target(text, tokens_per_second=number)


@dataclass(frozen=True)
class Answer:
    """What a strategy needs.

    Attributes:
        strategy: Its name.
        result: At the smallest budget that reaches the target; or, where none does, the best there is.
        binds: Where none does, what stands in the way; else None.
    """

    strategy: str
    result: Result
    binds: str | None

    def to_json(self, bytes_per_expert: float) -> dict[str, Any]:
        """Return plain values."""
        budget = None if self.binds else self.result.budget_slots
        return {
            "strategy": self.strategy,
            "budget_slots": budget,
            "budget_bytes": None if budget is None else math.ceil(budget * bytes_per_expert),
            "binds": self.binds,
            "result": self.result.to_json(),
        }


def plan(
    geometry: Geometry,
    target: Target,
    strategies: Sequence[Callable[[int], ReplaySettings]],
    replayed: Callable[[list[ReplaySettings]], list[Result]],
    fewest: int,
    bounds: Callable[[], dict[str, Result]],
    most: int | None = None,
) -> list[Answer]:
    """Find the smallest budget of every strategy.

    A strategy is tried at evenly spread budgets; then the gap below the first that reaches the target is halved until
    it is a single slot. Where a larger budget can be worse, as with ``lfu_in_cache``, a still smaller one might do.

    Args:
        geometry: The model.
        target: What is wanted.
        strategies: Each at a number of slots.
        replayed: Replays several.
        fewest: Slots at least, for one token's event: K, or K a layer; a strategy whose events demand more needs more.
        bounds: Gives, when asked, what is possible with all slots: results by the names ``"lru"`` (no first use is ever
            a hit), and on a device ``"all_resident"`` and ``"clairvoyant"``.
        most: Slots at most, those that a device's memory has room for; all experts by default. A strategy that reaches
            the target only beyond them is bound by memory.

    Raises:
        UserError: A strategy's events demand more than ``most`` slots.
    """
    total = geometry.total_experts
    most = total if most is None else most
    tried: list[dict[int, Result]] = [{} for _ in strategies]
    grid: list[tuple[int, int]] = []

    def attempt(wanted: list[tuple[int, int]]) -> None:
        for (index, slots), result in zip(
            wanted, replayed([strategies[index](slots) for index, slots in wanted]), strict=True
        ):
            tried[index][slots] = result

    for index, strategy in enumerate(strategies):
        least = max(fewest, strategy(total).most_demanded(geometry) * (fewest // geometry.top_k))
        if least > most:
            raise UserError(
                f"the device's memory has room for {most} experts, fewer than the {least} that an event may demand; "
                "name one with more memory, or fewer bits (--quantization)"
            )
        grid += [(index, max(least, round(most * step / STEPS))) for step in range(STEPS + 1)]
    attempt(list(dict.fromkeys(grid)))
    while True:
        gaps = []
        for index, results in enumerate(tried):
            good = min((slots for slots, result in results.items() if target.reached(result)), default=None)
            if good is not None:
                below = max((slots for slots in results if slots < good), default=good)
                if good - below > 1:
                    gaps.append((index, (good + below) // 2))
        if not gaps:
            break
        attempt(gaps)
    answers = []
    reference: dict[str, Result] = {}
    for index, results in enumerate(tried):
        good = min((slots for slots, result in results.items() if target.reached(result)), default=None)
        if good is not None:
            answers.append(Answer(results[good].strategy, results[good], None))
        else:
            reference = reference or bounds()
            best = max(results.values(), key=lambda result: (target.value(result), -result.budget_slots))
            beyond = replayed([strategies[index](total)])[0] if most < total else None
            answers.append(Answer(best.strategy, best, _binds(target, best, reference, most, beyond)))
    return answers


def _binds(target: Target, best: Result, bounds: dict[str, Result], most: int, beyond: Result | None) -> str:
    """Say what keeps a strategy from a target, whatever its budget; ``beyond`` is with more slots than a device has."""
    if beyond is not None and target.reached(beyond):
        return f"memory: room for {most:,} experts; with all {beyond.budget_slots:,} it makes {target.words(beyond)}"
    if target.tokens_per_second is not None:
        resident, clairvoyant = bounds["all_resident"], bounds["clairvoyant"]
        if not target.reached(resident):
            return f"computing: with all experts resident it is {target.words(resident)}"
        if not target.reached(clairvoyant):
            return f"link: even clairvoyant prefetch, all slots given, makes {target.words(clairvoyant)}"
        return "policy: clairvoyant prefetch over the same link would do"
    assert target.hit_rate is not None
    late = best.late_hits / max(best.accesses, 1)
    if late > 0 and best.hit_rate + late >= target.hit_rate:
        return f"link: {late:.1%} of accesses were asked for and came late"
    if not target.reached(bounds["lru"]):
        return (
            f"working set: {1 - bounds['lru'].hit_rate:.1%} of accesses are first uses, which only prefetch makes hits"
        )
    return "policy: with all slots LRU would do"


def pins(
    traces: TraceSet,
    split: str | None,
    slots: int,
    scope: str,
    quotas: Quotas,
    popularity: npt.NDArray[np.floating] | None,
) -> dict[str, list[int]]:
    """Choose the experts to pin at a budget: the most used of these traces, or of a profile.

    Args:
        traces: The traces.
        split: One split, or all.
        slots: The budget.
        scope: ``"global"``, or ``"per-layer"``.
        quotas: Slots of each layer.
        popularity: ``(L, E)`` to go by instead of the traces.

    Returns:
        For each model layer the experts, the most used first; ties by the lower (layer, expert).
    """
    geometry = traces.geometry
    layers, experts, _ = geometry.shape()
    uses = np.zeros((layers, experts)) if popularity is None else np.asarray(popularity, np.float64)
    if popularity is None:
        for trace in traces.traces(split):
            ids = expert_ids(trace.experts, experts)
            demanded = (ids + np.arange(layers)[:, None] * experts)[ids < experts]
            uses += np.bincount(demanded, minlength=layers * experts).reshape(layers, experts)
    chosen = most_used(uses.ravel(), pool_slots(geometry, slots, scope, quotas(slots)))
    return {
        str(geometry.moe_layers[layer]): [int(e) % experts for e in chosen if e // experts == layer]
        for layer in range(layers)
    }
