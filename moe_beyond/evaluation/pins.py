"""Experts to pin: the most used experts that fill a budget, and their JSON file."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.pools import most_used, pool_capacities
from moe_beyond.errors import UserError
from moe_beyond.evaluation.options import ALL_SPLITS, ReplayOptions
from moe_beyond.evaluation.resolve import resolve_budgets, resolve_settings
from moe_beyond.evaluation.strategies import Quotas
from moe_beyond.files import read_json, write_json
from moe_beyond.geometry import MOST_BYTES, Geometry
from moe_beyond.json_fields import FINITE, TEXT, FieldRule, check_fields, optional, whole
from moe_beyond.model_config import MOST_EXPERTS, MOST_LAYERS
from moe_beyond.safe_text import shown
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import expert_ids


@dataclass(frozen=True)
class Pins:
    """Experts to pin at a budget.

    Attributes:
        model: Id of the model.
        budget_slots: Number of slots.
        counted_on: Source of the counts: a profile, or the traces.
        num_experts: Experts per layer, E.
        expert_bytes: Stored bytes of one expert of each layer, where layers differ; None if all have the same size.
        uses_share: Share of the counted uses that the pinned experts have, 0 to 1.
        layers: Model layer, as text -> its experts, the most used first.
    """

    model: str
    budget_slots: int
    counted_on: str
    num_experts: int
    expert_bytes: list[int] | None
    uses_share: float
    layers: dict[str, list[int]]

    @property
    def experts(self) -> int:
        """Number of pinned experts."""
        return sum(map(len, self.layers.values()))


def choose_pins(options: ReplayOptions, traces: TraceSet, *, split: str | None = None) -> Pins:
    """Choose the experts to pin: the most used of the named profile, or otherwise of the traces.

    Args:
        options: Options of the replay, with one budget.
        traces: Trace set to replay.
        split: Name of a split, or ``all`` (default: all).

    Raises:
        UserError: There are several budgets, or an option cannot be read.
    """
    shared, budgets = resolve_settings(options, traces), resolve_budgets(options, traces)
    if len(budgets) != 1:
        raise UserError(f"--pins: the list is for one budget (got {len(budgets)}); give --budget once")
    if split == ALL_SPLITS and ALL_SPLITS not in traces.manifest.splits:
        split = None
    geometry = traces.geometry
    # The pretrained profile of named strategies serves their policies only.
    profile = None if options.profile is None else shared.profile
    uses = count_uses(traces, split) if profile is None else np.asarray(profile.popularity, np.float64)
    layers = fill_budget(geometry, uses, budgets[0], options.scope, shared.quotas)
    pinned = sum(float(row[experts].sum()) for row, experts in zip(uses, layers.values(), strict=True))
    return Pins(
        model=traces.manifest.model_id,
        budget_slots=budgets[0],
        counted_on=options.profile or traces.manifest.source,
        num_experts=geometry.num_experts,
        expert_bytes=None if geometry.has_one_size else list(geometry.expert_bytes or ()),
        uses_share=min(pinned / max(float(uses.sum()), 1e-300), 1.0),
        layers=layers,
    )


def count_uses(traces: TraceSet, split: str | None) -> npt.NDArray[np.float64]:
    """Count how often each expert is used.

    Args:
        traces: Trace set to count.
        split: Name of a split; None for all splits.

    Returns:
        Uses ``(L, E)`` float64.
    """
    layers, experts, _ = traces.geometry.shape()
    uses = np.zeros((layers, experts))
    for trace in traces.traces(split):
        ids = expert_ids(trace.experts, experts)
        demanded = (ids + np.arange(layers)[:, None] * experts)[ids < experts]
        uses += np.bincount(demanded, minlength=layers * experts).reshape(layers, experts)
    return uses


def fill_budget(
    geometry: Geometry, uses: npt.NDArray[np.float64], slots: int, scope: str, quotas: Quotas
) -> dict[str, list[int]]:
    """List the most used experts that fill a budget.

    Args:
        geometry: Geometry of the model.
        uses: Uses ``(L, E)`` of each expert.
        slots: Number of slots.
        scope: ``"global"`` or ``"per-layer"``.
        quotas: Function from a number of slots to the slots of each layer.

    Returns:
        Model layer, as text -> its experts, the most used first; ties by the lower (layer, expert).
    """
    pools = pool_capacities(geometry, slots, scope, quotas(slots))
    chosen = [divmod(int(each), geometry.num_experts) for each in most_used(uses.ravel(), pools, geometry.expert_units)]
    return {
        str(model_layer): [expert for layer, expert in chosen if layer == number]
        for number, model_layer in enumerate(geometry.moe_layers)
    }


def _is_layers(value: Any) -> bool:
    if not isinstance(value, dict) or not all(key.isascii() and key.isdecimal() and len(key) < 9 for key in value):
        return False
    numbers = [int(key) for key in value]
    ascending = all(layer < following for layer, following in pairwise(numbers))
    return 0 < len(numbers) and ascending and numbers[-1] < MOST_LAYERS and [str(n) for n in numbers] == list(value)


RULES = {
    "model": TEXT,
    "budget_slots": whole(1, MOST_LAYERS * MOST_EXPERTS),
    "counted_on": TEXT,
    "num_experts": whole(1, MOST_EXPERTS),
    "expert_bytes": optional(FieldRule("a list of bytes", lambda value: isinstance(value, list))),
    "uses_share": FieldRule("a number within 0..1", lambda value: FINITE.accepts(value) and 0 <= value <= 1),
    "layers": FieldRule("an object of model layers, ascending", _is_layers),
}
"""Field of the file -> permitted values."""


def write_pins(path: str | Path, pins: Pins) -> None:
    """Write pins as a JSON file; a file that exists is replaced."""
    write_json(path, vars(pins))


def read_pins(path: str | Path) -> Pins:
    """Read the file of `write_pins`.

    Args:
        path: Path of the JSON file.

    Raises:
        UserError: The file is not one of pins, or a field is wrong.
    """
    content = read_json(path)
    remedy = "write the file with moe-beyond plan --pins"
    if not isinstance(content, dict) or set(content) != set(RULES):
        raise UserError(f"{path}: is no list of experts to pin; {remedy}")
    try:
        check_fields(RULES, content)
        pins = Pins(**content)
        expert, size = whole(0, pins.num_experts - 1), whole(1, MOST_BYTES)
        for layer, experts in pins.layers.items():
            if not isinstance(experts, list) or not all(map(expert.accepts, experts)):
                raise UserError(f"layer {layer} must be a list of experts in 0..{pins.num_experts - 1}")
            if len(set(experts)) < len(experts):
                raise UserError(f"layer {layer} has an expert twice")
        if pins.expert_bytes is not None and not (
            len(pins.expert_bytes) == len(pins.layers) and all(map(size.accepts, pins.expert_bytes))
        ):
            raise UserError(f"expert_bytes must be {len(pins.layers)} sizes (got {shown(pins.expert_bytes)})")
    except UserError as error:
        raise UserError(f"{path}: {error}; {remedy}") from error
    return pins
