"""Replaying sequences: every token a step, every layer an event, every sequence from a cold cache."""

import numpy as np
import numpy.typing as npt

from moe_beyond.cache import core
from moe_beyond.cache.cache import demands, quotas
from moe_beyond.cache.policies import load_policy
from moe_beyond.cache.prefetchers.top import candidates
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.replay.result import Result, make_result
from moe_beyond.replay.settings import ReplaySettings


class Replay:
    """Accumulates one strategy's counts over sequences.

    Args:
        geometry: The model.
        settings: The strategy and its budget.

    Raises:
        UserError: The strategy does not fit the model.
    """

    def __init__(self, geometry: Geometry, settings: ReplaySettings) -> None:
        self.geometry, self.settings = geometry, settings
        self._quotas = quotas(geometry, settings.slots, settings.scope)
        self._policy = load_policy(settings.policy)
        if settings.names > geometry.num_experts:
            raise UserError(f"prefetch {settings.prefetch!r} names more than a layer's {geometry.num_experts} experts")
        self.counts = np.zeros((geometry.num_layers, len(core.COUNTERS)), np.int64)

    def add(self, experts: npt.NDArray[np.integer], scores: npt.NDArray[np.float32] | None = None) -> None:
        """Replay one sequence.

        Args:
            experts: ``(T, L, K)`` expert ids.
            scores: ``(T, L, E)`` float32 probabilities of the settings' lookahead; needed only to prefetch.

        Raises:
            UserError: The experts do not fit the model, or the scores the sequence, or are no probabilities.
        """
        layers, num_experts, _ = self.geometry.shape()
        if experts.ndim != 3 or experts.shape[1:] != (layers, self.geometry.top_k):
            raise UserError(f"experts have shape {experts.shape}, expected (T, {layers}, {self.geometry.top_k})")
        if len(experts) <= self.settings.warmup_tokens:
            return
        if experts.min() < 0 or experts.max() >= num_experts:
            raise UserError(f"an expert id is out of range 0..{num_experts - 1}")
        named = np.empty((len(experts), layers, 0), np.int64)
        if self.settings.names:
            named = candidates(_checked(scores, (len(experts), layers, num_experts)), self.settings.names)
            named = named + np.arange(layers)[:, None] * num_experts
        future = demands(experts, self.geometry)
        demanded = np.sort(future[0].reshape(experts.shape), axis=-1)
        if (np.diff(demanded, axis=-1) == 0).any():
            raise UserError("an expert is named twice in one event")
        cache = core.empty_cache(layers, num_experts, self._quotas)
        core.step_sequence(
            cache,
            self._policy.state(self.geometry.total_experts, len(self._quotas), future),
            self._policy.VERBS,
            demanded,
            named,
            self.settings.distance,
            self.settings.first_layer_prefetch,
            self.settings.warmup_tokens,
        )
        self.counts += cache.counters

    def result(self) -> Result:
        """Return the record of what was added so far."""
        return make_result(self.geometry, self.settings, self.counts)


def _checked(scores: npt.NDArray[np.float32] | None, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    if scores is None:
        raise UserError("the prefetcher needs scores, and the sequence has none")
    if scores.shape != shape:
        raise UserError(f"scores have shape {scores.shape}, expected {shape}")
    if not (np.isfinite(scores).all() and scores.min() >= 0 and scores.max() <= 1):
        raise UserError("scores are not all finite and within 0..1")
    return scores
