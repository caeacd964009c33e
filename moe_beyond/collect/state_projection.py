"""The projection that `collect` applies to hidden states: onto what the next routers read.

A router reads a state only through the products with its E rows. A projection onto the span of these rows therefore
keeps that router's logits exactly, where a random projection of the same width keeps a share of W / D of the state. The
residual stream changes slowly, so the rows of the layers that follow select the parts of an earlier state from which
their choice can be predicted.

The basis of a state is made of the rows of the routers that will read the residual stream next, halved in weight from
router to router. Its W rows are the leading right singular vectors of that matrix. It depends only on the width and on
the model's routers, so all sets of a model have the same one.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_beyond.traces.state_projection import StateProjection

FURTHER_ROUTERS = 2
"""Number of routers beyond those whose rows fill the width: weight for larger lookaheads in a narrow projection."""
SEED = 0
"""Seed of the random rows that complete a basis."""

Floats = npt.NDArray[np.float64]


def make_projection(
    routers: npt.NDArray[np.float32] | None, positions: Sequence[int], full_width: int, width: int
) -> StateProjection:
    """Make the projection of a model's hidden states.

    Args:
        routers: ``(L, E, D)`` float32, weights of all routers; None if they are unknown: then the rows are random.
        positions: S MoE layers, counted from 0.
        full_width: Width D of the model's hidden states.
        width: Width W of the projected states, less than D.
    """
    weights = np.zeros((0, 0, full_width)) if routers is None else routers.astype(np.float64)
    # The next router after layer l's router input is that of layer l + 1; after its layer input, that of layer l.
    starts = sorted({position + step for position in positions for step in (0, 1)})
    bases = {start: _basis(_next_rows(weights, start, width), full_width, width) for start in starts}
    return StateProjection(
        np.stack([bases[position + 1] for position in positions]), np.stack([bases[position] for position in positions])
    )


def _next_rows(routers: Floats, start: int, width: int) -> Floats:
    """Return the weighted rows of the routers from a layer on; after the last layer, those of the layers before it."""
    layers, experts, full_width = routers.shape
    if not layers:
        return np.zeros((0, full_width))
    order = [*range(start, layers), *range(start - 1, -1, -1)][: math.ceil(width / experts) + FURTHER_ROUTERS]
    rows: Floats = np.concatenate([routers[layer] * 0.5**rank for rank, layer in enumerate(order)])
    return rows


def _basis(rows: Floats, full_width: int, width: int) -> npt.NDArray[np.float16]:
    """Return W orthonormal rows: leading right singular vectors, completed by random directions.

    Half precision and a positive largest value in each row hide the last bits of a machine's linear algebra.
    """
    vectors = np.linalg.svd(rows, full_matrices=False)[2][:width] if len(rows) else rows
    if (missing := width - len(vectors)) > 0:
        random = np.random.default_rng(SEED).standard_normal((missing, full_width))
        vectors = np.linalg.qr(np.concatenate([vectors, random]).T)[0].T
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(1)[:, None], 1)
    basis: npt.NDArray[np.float16] = (vectors * np.sign(largest)).astype(np.float16)
    return basis
