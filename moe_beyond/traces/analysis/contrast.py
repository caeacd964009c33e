"""Which experts two texts use differently: the difference of activation rates between two trace sets of one model.

The rate of an expert is the share of tokens that activate it; rate minus other rate is the risk difference by which
SteerMoE (arXiv 2509.09660) finds experts to steer. How far that is from noise is said twice:

- ``z``: of two proportions, over the standard error sqrt(p (1 - p) (1/n + 1/m)), p being the rate in both together.
  It takes tokens to be independent, which the tokens of a text are not: it is too large.
- ``z_of_sequences``: over a standard error that takes only sequences to be independent. A rate is a ratio of two sums
  over S sequences, with the variance S / (S - 1) * sum of (activations - rate * tokens)^2 / (all tokens)^2 (Cochran,
  Sampling Techniques, 1977, on ratio estimates). Of a few sequences it is rough.
"""

from collections import Counter
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.traces.analysis.rounding import rounded
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import expert_ids
from moe_beyond.traces.steering import Steering

Floats = npt.NDArray[np.float64]

LEVEL = 0.05
"""How probable it may be that any expert at all seems to differ where none does (Bonferroni)."""


@dataclass(frozen=True)
class ActivationRates:
    """How often experts are active.

    Attributes:
        tokens: How many tokens there were.
        rates: ``(L, E)`` float64, the share of them that activate each expert; a layer's add up to K, or to less where
            slots hold none.
        variances: ``(L, E)`` float64, of the rates, from sequence to sequence; NaN of a single sequence.
    """

    tokens: int
    rates: Floats
    variances: Floats


def activation_rates(traces: TraceSet, split: str | None = None) -> ActivationRates:
    """Measure a split, or all of a set.

    Raises:
        UserError: There is no such split, it has no tokens, or a shard is damaged.
    """
    layers, experts, _ = traces.geometry.shape()
    first = np.arange(layers)[:, None] * (experts + 1)  # the last one of a layer is none
    activated, squares, products = np.zeros((3, layers * experts), np.int64)
    sequences = tokens = squared_tokens = 0
    for trace in traces.traces(split):
        ids = expert_ids(trace.experts, experts) + first
        counts = np.bincount(ids.ravel(), minlength=layers * (experts + 1))
        counts = counts.reshape(layers, -1)[:, :experts].ravel()
        activated += counts
        squares += counts**2
        products += counts * len(trace)
        sequences, tokens, squared_tokens = sequences + 1, tokens + len(trace), squared_tokens + len(trace) ** 2
    if not tokens:
        raise UserError(f"{traces.folder}: has no tokens to count; record some")
    rates = (activated / tokens).reshape(layers, experts)
    if sequences < 2:
        return ActivationRates(tokens, rates, np.full_like(rates, np.nan))
    # In whole numbers of any size: small differences of large sums.
    total, square, product = (sums.astype(object) for sums in (activated, squares, products))
    spread = tokens**2 * square - 2 * tokens * total * product + total**2 * squared_tokens
    variances = (spread / tokens**4).astype(np.float64) * sequences / (sequences - 1)
    return ActivationRates(tokens, rates, variances.reshape(layers, experts))


def check_comparable(traces: TraceSet, other: TraceSet) -> None:
    """Check that two sets are of one model, since an expert's number means nothing in another.

    Raises:
        UserError: They are not.
    """
    for what, ours, theirs in (
        ("model", traces.manifest.model_id, other.manifest.model_id),
        ("revision", traces.manifest.revision, other.manifest.revision),
        ("geometry", _geometry(traces), _geometry(other)),
    ):
        if ours != theirs and None not in (ours, theirs):
            raise UserError(
                f"--contrast {other.folder}: its {what} is {theirs}, that of {traces.folder} {ours}; experts compare "
                "within one model"
            )


def _geometry(traces: TraceSet) -> str:
    return f"{traces.geometry.describe_shape()} in layers {','.join(map(str, traces.geometry.moe_layers))}"


def contrast(traces: TraceSet, other: TraceSet, split: str | None = None) -> dict[str, Any]:
    """Compare the activation rates of two sets as JSON-able values.

    Args:
        traces: The one.
        other: What its rates are compared with.
        split: One split of each, or all.

    Returns:
        What the ``other`` is; ``beyond_noise``: the ``threshold`` that chance alone would have any expert at all pass
        in one case of twenty, up or down, and how many experts pass it by ``z`` and by ``z_of_sequences``; and
        ``by_layer``, for each MoE layer its index in the model and, an entry an expert, ``rate``, ``other_rate``,
        ``difference``, ``standard_error``, ``z`` and ``z_of_sequences``, None where an error is 0 or not known.

    Raises:
        UserError: The sets are not of one model, have no such split or no tokens, or are damaged.
    """
    check_comparable(traces, other)
    mine, theirs = activation_rates(traces, split), activation_rates(other, split)
    difference = mine.rates - theirs.rates
    pooled = (mine.rates * mine.tokens + theirs.rates * theirs.tokens) / (mine.tokens + theirs.tokens)
    error = np.sqrt(np.maximum(pooled * (1 - pooled), 0) * (1 / mine.tokens + 1 / theirs.tokens))
    columns = {
        "rate": mine.rates,
        "other_rate": theirs.rates,
        "difference": difference,
        "standard_error": error,
        "z": _over(difference, error),
        "z_of_sequences": _over(difference, np.sqrt(mine.variances + theirs.variances)),
    }
    threshold = NormalDist().inv_cdf(1 - LEVEL / 2 / difference.size)
    beyond = {name: int((np.abs(columns[name]) > threshold).sum()) for name in ("z", "z_of_sequences")}
    return {
        "other": {"traces": other.folder, **other.describe(split)},
        "beyond_noise": {"threshold": rounded(threshold), **beyond},
        "by_layer": [
            {"layer": model_layer, **{name: rounded(values[layer]) for name, values in columns.items()}}
            for layer, model_layer in enumerate(traces.geometry.moe_layers)
        ],
    }


def typical_experts(found: dict[str, Any], geometry: Geometry, on: int, off: int) -> Steering:
    """Choose experts to steer towards the one text: those that it uses most beyond the other on, the opposite ones off.

    Args:
        found: What `contrast` found.
        geometry: The model's shape: of a layer at most K are on, and K are left.
        on: How many.
        off: How many.

    Raises:
        UserError: There are not so many that differ.
    """
    rows = [
        (difference, (row["layer"], expert))
        for row in found["by_layer"]
        for expert, difference in enumerate(row["difference"])
    ]
    chosen = []
    for word, sign, wanted, most in (
        ("on", 1, on, geometry.top_k),
        ("off", -1, off, geometry.num_experts - geometry.top_k),
    ):
        ranked = sorted((-sign * difference, expert) for difference, expert in rows if sign * difference > 0)
        taken, by_layer = list[tuple[int, int]](), Counter[int]()
        for _, (layer, expert) in ranked:
            if len(taken) < wanted and by_layer[layer] < most:
                taken.append((layer, expert))
                by_layer[layer] += 1
        if len(taken) < wanted:
            raise UserError(f"--{word} {wanted}: no more than {len(taken)} experts can be chosen so; ask for fewer")
        chosen.append(tuple(sorted(taken)))
    return Steering(*chosen)


def _over(difference: Floats, error: Floats) -> Floats:
    """Divide, where there is anything to divide by; NaN where not."""
    return np.divide(difference, error, out=np.full_like(difference, np.nan), where=error > 1e-12)
