"""Inputs of the compiled prefetchers."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class PrefetchSettings(NamedTuple):
    """Settings of a prefetcher for one model.

    Attributes:
        prefetcher: Number of the prefetcher, a `moe_beyond.cache.prefetchers.PrefetcherId`.
        max_experts: Largest number of experts that it selects per layer (moe_infinity: of all layers).
        threshold: Score that the selected experts exceed.
        distance: Lookahead to select by, as `moe_beyond.cache.steps.in_layers` numbers it; for lookahead ``"token"``,
            the number of layers between the selection and the demand.
        first_layers: Whether layers whose scores exist when the step starts are prefetched at that time (at lookahead
            0: layer 0 just before its event).
        top_k: Number of experts per token and layer.
        reads_deadlines: Whether the prefetcher reads `FutureView.deadline`.
        knows_future: Whether the prefetcher reads future demand; the policy must admit its prefetches.
        replaces_queue: Whether each selection replaces the queued prefetches.
    """

    prefetcher: int
    max_experts: int
    threshold: float
    distance: int
    first_layers: bool
    top_k: int
    reads_deadlines: bool
    knows_future: bool
    replaces_queue: bool


class FutureView(NamedTuple):
    """Deadlines of later layers, and the demand of all events for the oracle.

    Attributes:
        deadline: Time at which each layer of this step will be routed without further stalls, ``(L,)`` float64, in
            seconds of the interconnect.
        ids: Experts that all events demand, ``(n,)`` int64.
        offsets: Index of each event's first expert, ``(events + 1,)`` int64.
        event: Number of the next event, from 0, ``(1,)`` int64.
    """

    deadline: npt.NDArray[np.float64]
    ids: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    event: npt.NDArray[np.int64]
