"""The log of a predictor that scores the decoded tokens of a run without acting on it.

A score counts at the lookahead at which it became available. The score of a layer that has no earlier layer at a
lookahead became available at the token's start. Prefetches are selected as a prefetcher selects them, but nothing is
moved: each one meets the cache as it is without prefetches.
"""

from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from moe_beyond.cache.cache import Cache
from moe_beyond.cache.prefetchers.scored import scored_at_start
from moe_beyond.cache.steps import Ahead, in_layers
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.runtime.stepping.observer import Half, Observed, make_observer
from moe_beyond.runtime.stepping.prediction_figures import Agreement, Prefetches, agreement, prefetches
from moe_beyond.runtime.strategy import RunStrategy

if TYPE_CHECKING:
    from moe_beyond.predictors.information import StateKind

Ints = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]

STEP_START = -1
SEED = 0
"""Random seed of the control."""


class PredictionLog:
    """Follows a run, and keeps the predictions, the routing and the prefetches of each decoded token and layer.

    Args:
        geometry: Geometry of the model.
        strategy: Strategy of the predictor, with the prefetcher whose bytes are counted.
        cache: Cache of the run.
        expert_bytes: Size of an expert of each layer in bytes.

    Attributes:
        predictor: Name of the predictor.
        prefetch: Prefetcher, as `parse_prefetch` reads it.
        lookahead: Lookahead of the scores that the prefetcher selects by.
        predictor_s: Seconds of stepping the predictor.
    """

    def __init__(self, geometry: Geometry, strategy: RunStrategy, cache: Cache, expert_bytes: Sequence[int]) -> None:
        settings = strategy.settings
        self.predictor, self.prefetch, self.lookahead = settings.predictor, settings.prefetch, settings.lookahead
        self.predictor_s = 0.0
        self._cache, self._expert_bytes, self._observer = cache, expert_bytes, make_observer(strategy)
        self._moe_layers, self._top_k, self._experts = geometry.moe_layers, geometry.top_k, geometry.num_experts
        self._lookaheads, self._prefetch = settings.lookaheads, settings.prefetch_settings(geometry)
        layers, behind = geometry.num_layers, in_layers(settings.lookaheads, geometry.num_layers).tolist()
        distance = min(self._prefetch.distance, layers)
        moments = [(layer, computed) for layer in range(STEP_START, layers) for computed in (False, True)]
        self._scored = {
            moment: [
                (index, later) for index, ahead in enumerate(behind) for later in _scored_layers(ahead, *moment, layers)
            ]
            for moment in moments
        }
        self._prefetched = {moment: _scored_layers(distance, *moment, layers) for moment in moments}
        self._named = np.full((layers, len(behind), geometry.top_k), -1, np.int16)  # for the next run of each layer
        self._moved = np.zeros((layers, geometry.num_experts), bool)
        self._entry = np.dtype(
            [
                ("named", np.int16, self._named.shape[1:]),
                ("routed", np.int16, geometry.top_k),
                ("weights", np.float32, geometry.top_k),
                ("moved", np.uint8, -(-geometry.num_experts // 8)),  # a bit for each expert
                ("missed", np.int16),
            ]
        )
        self._entries = [bytearray() for _ in range(layers)]

    def begin_step(self, token_ids: Ints | None, past: int) -> None:
        """Begin a forward of the model.

        Args:
            token_ids: Tokens of its sequence, ``(T,)``; None if it belongs to none.
            past: Number of tokens of the sequence that were read before.

        Raises:
            UserError: A token id is not in the predictor's vocabulary.
        """
        began = perf_counter()
        scores = self._observer.start(token_ids, past)
        seconds = perf_counter() - began
        if scores is None or past == 0:  # predictions of the last token are not for this one
            self._named[:], self._moved[:] = -1, False
        self._publish(Observed(STEP_START, scores, seconds))

    def end(self) -> None:
        """End the run, whose last tokens change online updates."""
        self._observer.end()

    def take_state(self, kind: "StateKind", layer: int, state: Half) -> None:
        """Take a hidden state of a single token that the predictor reads; see `Observer.take_state`."""
        self._publish(self._observer.take_state(kind, layer, state))

    def event(self, layer: int, routed: Ints, gate_weights: Tensor) -> None:
        """Compare the predictions for a layer with its routing, after its event.

        Args:
            layer: Position of the layer among the MoE layers.
            routed: Chosen experts, ``(N, K)``.
            gate_weights: Their weights, ``(N, K)``.
        """
        if self._observer.scored:
            entry = np.zeros((), self._entry)
            entry["named"], entry["moved"] = self._named[layer], np.packbits(self._moved[layer])
            entry["routed"], entry["weights"] = routed[0], gate_weights[0].float().numpy(force=True)
            entry["missed"] = self._cache.event_counts().misses
            self._entries[layer] += entry.tobytes()
            self._named[layer], self._moved[layer] = -1, False
        self._publish(self._observer.routed(layer, routed))
        self._publish(self._observer.computed(layer))

    def agreement(self) -> dict[Lookahead, list[Agreement]]:
        """Return the agreement of scores and routing by lookahead and layer."""
        return {
            lookahead: [
                agreement(rows["named"][:, index], rows["routed"], rows["weights"], SEED) for rows in self._arrays()
            ]
            for index, lookahead in enumerate(self._lookaheads)
        }

    def prefetches(self) -> list[Prefetches]:
        """Return the bytes that prefetches would move, by layer."""
        bits = [np.unpackbits(rows["moved"], axis=1, count=self._experts).astype(bool) for rows in self._arrays()]
        return [
            prefetches(moved, rows["routed"], rows["missed"], size, SEED)
            for moved, rows, size in zip(bits, self._arrays(), self._expert_bytes, strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the figures by lookahead and layer as plain values."""
        by_layer = self.prefetches()
        return {
            "predictor": self.predictor,
            "tokens": self.tokens,
            "k": self._top_k,
            "predictor_ms_per_token": 1e3 * self.predictor_s / self.tokens if self.tokens else None,
            "lookaheads": [
                {"lookahead": lookahead, **Agreement.total(rows).to_json(), "per_layer": self._per_layer(rows)}
                for lookahead, rows in self.agreement().items()
            ],
            "prefetch": {
                "prefetch": self.prefetch,
                "lookahead": self.lookahead,
                **Prefetches.total(by_layer).to_json(),
                "per_layer": self._per_layer(by_layer),
            },
            "shuffle_seed": SEED,
        }

    @property
    def tokens(self) -> int:
        """Number of decoded tokens with scores whose first layer has run."""
        return len(self._entries[0]) // self._entry.itemsize

    def _per_layer(self, rows: Sequence[Agreement | Prefetches]) -> list[dict[str, Any]]:
        return [{"layer": layer, **row.to_json()} for layer, row in zip(self._moe_layers, rows, strict=True)]

    def _arrays(self) -> list[npt.NDArray[Any]]:
        """Return the entries of each layer, ``(n,)`` with the fields of an entry."""
        return [np.frombuffer(bytes(rows), self._entry) for rows in self._entries]

    def _publish(self, observed: Observed | None) -> None:
        """Keep the predictions that become available, and select the prefetches that follow."""
        if observed is None:
            return
        layer, scores, seconds, computed = observed
        self.predictor_s += seconds
        if scores is None:
            return
        for index, later in self._scored[layer, computed]:
            if not np.isnan(scores[later, 0]):
                self._named[later, index] = _best(scores[later], self._top_k)
        for later in self._prefetched[layer, computed]:
            if not np.isnan(scores[later, 0]):
                best = _best(scores[later], self._prefetch.max_experts)
                self._moved[later] = False
                self._moved[later, best] = [self._would_move(later, expert, scores) for expert in best.tolist()]

    def _would_move(self, layer: int, expert: int, scores: Scores) -> bool:
        return scores[layer, expert] > self._prefetch.threshold and self._cache.slot(layer * self._experts + expert) < 0


def _scored_layers(ahead: int, layer: int, computed: bool, layers: int) -> range:
    """Return the layers whose scores become available with a lookahead after a layer, or at a token's start.

    Args:
        ahead: Lookahead as `in_layers` numbers it.
        layer: Layer that the predictor has observed; -1 at a token's start.
        computed: Whether it has observed the layer as computed.
        layers: Number of layers, L.
    """
    if layer == STEP_START and ahead <= layers:
        return range(scored_at_start(ahead, layers))
    if computed != (ahead == Ahead.COMPUTED):
        return range(0)
    if ahead > layers:
        return range(max(layer, 0), layer + 1)
    return range(layer + max(ahead, 1), min(layer + max(ahead, 1) + 1, layers))


def _best(scores: Scores, most: int) -> npt.NDArray[np.int64]:
    """Return the best-scored experts, ties by the lower id."""
    return np.argsort(-scores, kind="stable")[:most]
