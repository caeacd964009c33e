"""Differences of expert selection rates between two trace sets of one model.

The rate of an expert is the share of tokens that activate it. The difference of two rates is the risk difference by
which SteerMoE (arXiv 2509.09660) finds experts to steer. Two scores compare it with noise:

- ``z``: the z-score of two proportions. Its standard error is sqrt(p (1 - p) (1/n + 1/m)), with p the rate in both
  sets together. It assumes independent tokens, which the tokens of a text are not, so it is too large.
- ``z_clustered``: assumes only independent sequences. A rate is a ratio of two sums over S sequences, with the variance
  S / (S - 1) * sum of (activations - rate * tokens)^2 / (all tokens)^2 (Cochran, Sampling Techniques, 1977, on ratio
  estimates). It is imprecise for few sequences.
"""

from collections import Counter
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.traces.analysis._json import rounded
from moe_beyond.traces.analysis.summary import Contrast, LayerContrast, Significance
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import expert_ids
from moe_beyond.traces.steering import Steering

Floats = npt.NDArray[np.float64]

SIGNIFICANCE_LEVEL = 0.05
"""Probability that any expert exceeds the threshold if no expert differs (Bonferroni)."""


@dataclass(frozen=True)
class ActivationRates:
    """Activation rates of the experts of a trace set.

    Attributes:
        tokens: Number of tokens.
        rates: ``(L, E)`` float64, share of tokens that activate each expert. The rates of a layer sum to K, or to less
            if entries have padding.
        variances: ``(L, E)`` float64, variance of each rate between sequences; NaN for a single sequence.
    """

    tokens: int
    rates: Floats
    variances: Floats


def activation_rates(traces: TraceSet, split: str | None = None) -> ActivationRates:
    """Measure the selection rates of a trace set.

    Args:
        traces: The trace set.
        split: Name of a split (default: all splits).

    Raises:
        UserError: The split does not exist or has no tokens, or a shard is damaged.
    """
    layers, experts, _ = traces.geometry.shape()
    first = np.arange(layers)[:, None] * (experts + 1)  # the last id of a layer is padding
    activations, squares, products = np.zeros((3, layers * experts), np.int64)
    sequences = tokens = squared_tokens = 0
    for trace in traces.traces(split):
        ids = expert_ids(trace.experts, experts) + first
        counts = np.bincount(ids.ravel(), minlength=layers * (experts + 1))
        counts = counts.reshape(layers, -1)[:, :experts].ravel()
        activations += counts
        squares += counts**2
        products += counts * len(trace)
        sequences, tokens, squared_tokens = sequences + 1, tokens + len(trace), squared_tokens + len(trace) ** 2
    if not tokens:
        raise UserError(f"{traces.folder}: the trace set has no tokens; record some")
    rates = (activations / tokens).reshape(layers, experts)
    if sequences < 2:
        return ActivationRates(tokens, rates, np.full_like(rates, np.nan))
    # Python integers, because the result is a small difference of large sums.
    total, square, product = (sums.astype(object) for sums in (activations, squares, products))
    spread = tokens**2 * square - 2 * tokens * total * product + total**2 * squared_tokens
    variances = (spread / tokens**4).astype(np.float64) * sequences / (sequences - 1)
    return ActivationRates(tokens, rates, variances.reshape(layers, experts))


def check_comparable(traces: TraceSet, other: TraceSet) -> None:
    """Check that two trace sets are of one model: expert ids have no meaning in another model.

    Args:
        traces: One trace set.
        other: The other trace set.

    Raises:
        UserError: The models, revisions or geometries differ.
    """
    for field, value, other_value in (
        ("model", traces.manifest.model_id, other.manifest.model_id),
        ("revision", traces.manifest.revision, other.manifest.revision),
        ("geometry", _geometry(traces), _geometry(other)),
    ):
        if value != other_value and None not in (value, other_value):
            raise UserError(
                f"--contrast {other.folder}: its {field} is not that of {traces.folder} "
                f"(got {other_value} and {value}); compare trace sets of one model"
            )


def _geometry(traces: TraceSet) -> str:
    return f"{traces.geometry.describe_shape()} in layers {','.join(map(str, traces.geometry.moe_layers))}"


def contrast_traces(traces: TraceSet, other: TraceSet, split: str | None = None) -> Contrast:
    """Compare the selection rates of two trace sets.

    Args:
        traces: The trace set whose rates are described.
        other: The trace set with which they are compared.
        split: Name of a split of both sets (default: all splits).

    Raises:
        UserError: The sets are of different models, lack the split, have no tokens, or are damaged.
    """
    check_comparable(traces, other)
    own, others = activation_rates(traces, split), activation_rates(other, split)
    difference = own.rates - others.rates
    pooled = (own.rates * own.tokens + others.rates * others.tokens) / (own.tokens + others.tokens)
    error = np.sqrt(np.maximum(pooled * (1 - pooled), 0) * (1 / own.tokens + 1 / others.tokens))
    columns = {
        "rate": own.rates,
        "other_rate": others.rates,
        "difference": difference,
        "standard_error": error,
        "z": _divided(difference, error),
        "z_clustered": _divided(difference, np.sqrt(own.variances + others.variances)),
    }
    threshold = NormalDist().inv_cdf(1 - SIGNIFICANCE_LEVEL / 2 / difference.size)
    exceeding = {name: int((np.abs(columns[name]) > threshold).sum()) for name in ("z", "z_clustered")}
    return Contrast(
        other={"traces": other.folder, **other.describe(split)},
        significant=Significance(rounded(threshold), **exceeding),
        by_layer=tuple(
            LayerContrast(model_layer, **{name: rounded(values[layer]) for name, values in columns.items()})
            for layer, model_layer in enumerate(traces.geometry.moe_layers)
        ),
    )


def most_different_experts(result: Contrast, geometry: Geometry, on: int, off: int) -> Steering:
    """Choose experts that steer a model towards the first of two contrasted sets.

    Experts that the first set activates more often are forced on, and those that it activates less often off.

    Args:
        result: Result of `contrast`.
        geometry: Shape of the model. At most K experts of a layer are forced on, and at least K are not forced off.
        on: Number of experts to force on.
        off: Number of experts to force off.

    Raises:
        UserError: Fewer experts differ in that direction.
    """
    differences = [(row.difference, (row.layer, row.expert)) for row in result.by_expert()]
    chosen = []
    for option, sign, number, most_per_layer in (
        ("on", 1, on, geometry.top_k),
        ("off", -1, off, geometry.num_experts - geometry.top_k),
    ):
        ranked = sorted((-sign * difference, expert) for difference, expert in differences if sign * difference > 0)
        experts, by_layer = list[tuple[int, int]](), Counter[int]()
        for _, (layer, expert) in ranked:
            if len(experts) < number and by_layer[layer] < most_per_layer:
                experts.append((layer, expert))
                by_layer[layer] += 1
        if len(experts) < number:
            raise UserError(f"--{option}: only {len(experts)} experts qualify (got {number}); choose a smaller number")
        chosen.append(tuple(sorted(experts)))
    return Steering(*chosen)


def _divided(difference: Floats, error: Floats) -> Floats:
    """Divide; NaN if the error is 0 or NaN."""
    return np.divide(difference, error, out=np.full_like(difference, np.nan), where=error > 1e-12)
