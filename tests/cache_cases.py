"""Random small replays, and their counts by the package and by the plain reference."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from reference_cache import COUNTERS, ReferenceCache, best, moments, split_slots

from moe_beyond.cache.policies import POLICIES
from moe_beyond.geometry import Geometry
from moe_beyond.replay import Replay, ReplaySettings, Result


def small_geometry(layers: int, experts: int, top_k: int) -> Geometry:
    return Geometry("small", tuple(range(layers)), experts, top_k, params_per_expert=10, other_params_per_layer=10)


@dataclass(frozen=True)
class Case:
    """A replay: the sequences ``(T, L, K)``, their scores ``(T, L, E)``, and what to do with them."""

    geometry: Geometry
    settings: ReplaySettings
    distance: int
    sequences: list[np.ndarray]
    scores: list[np.ndarray]

    def replayed(self) -> Replay:
        replaying = Replay(self.geometry, self.settings)
        for experts, scores in zip(self.sequences, self.scores, strict=True):
            replaying.add(experts, scores if self.settings.names else None)
        return replaying

    def moments(self, length: int) -> Iterator[tuple[str, int, int]]:
        return moments(
            length,
            self.geometry.num_layers,
            self.settings.names > 0,
            self.distance,
            self.settings.first_layer_prefetch,
        )

    def reference(self, experts: np.ndarray) -> ReferenceCache:
        pools = split_slots(self.settings.slots, self.geometry.num_layers, self.settings.scope)
        return ReferenceCache(pools, self.settings.policy, experts.tolist())

    def reference_counts(self) -> list[list[int]]:
        """Counts by layer, summed over the sequences."""
        total = [[0] * len(COUNTERS) for _ in range(self.geometry.num_layers)]
        for experts, scores in zip(self.sequences, self.scores, strict=True):
            warmup = self.settings.warmup_tokens
            if len(experts) <= warmup:
                continue
            cache = self.reference(experts)
            for what, token, layer in self.moments(len(experts)):
                if what == "token":
                    cache.start_token()
                elif what == "prefetch":
                    cache.prefetch(layer, best(scores[token, layer].tolist(), self.settings.names), token >= warmup)
                else:
                    cache.demand(layer, experts[token, layer].tolist(), token >= warmup)
            cache.finish()
            for layer, row in enumerate(total):
                for column, name in enumerate(COUNTERS):
                    row[column] += cache.counts[layer][name]
        return total


@st.composite
def cases(
    draw: Callable,
    *,
    policies: tuple[str, ...] = POLICIES,
    prefetching: bool | None = None,
    longest_warmup: int = 4,
    scopes: tuple[str, ...] = ("global", "per-layer"),
) -> Case:
    """Draw a case; ``prefetching`` fixes whether it prefetches."""
    layers, num_experts = draw(st.sampled_from([3, 2, 4, 1])), draw(st.sampled_from([4, 5, 6, 3, 2, 1]))
    top_k = draw(st.integers(1, min(3, num_experts)))
    scope = draw(st.sampled_from(scopes))
    fewest = top_k * (layers if scope == "per-layer" else 1)
    slots = fewest + draw(st.sampled_from([0, 1, 2, 3, 4, *range(5, layers * num_experts)]))
    slots = min(slots, layers * num_experts)
    names = draw(st.integers(1, num_experts))
    if prefetching is None:
        prefetching = draw(st.sampled_from([True, True, True, False]))  # most of what can go wrong is there
    prefetch, lookahead, distance = "none", None, 0
    if prefetching:
        lookahead = draw(st.sampled_from(["token", *range(layers + 2)]))
        distance = 1 if lookahead == "token" else lookahead
        prefetch = f"top{names}"
        if lookahead == "token" and draw(st.booleans()):
            distance = draw(st.integers(1, layers + 1))
            prefetch += f"@{distance}"
    settings = ReplaySettings(
        slots,
        policy=draw(st.sampled_from(policies)),
        scope=scope,
        prefetch=prefetch,
        lookahead=lookahead,
        warmup_tokens=draw(st.sampled_from([0, 0, 0, *range(longest_warmup + 1)])),
        first_layer_prefetch=draw(st.booleans()),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))  # hypothesis leans to monotonous lists
    levels = draw(st.sampled_from([3, 2, 1000]))  # few: ties are common
    sequences, scores = [], []
    for length in draw(st.lists(st.sampled_from([3, 4, 5, 6, 8, 0, 1, 2]), min_size=1, max_size=3)):
        gates = rng.random((length, layers, num_experts))
        sequences.append(np.argsort(gates, axis=-1)[..., :top_k].astype(np.uint8))  # in any order, as a router's
        scores.append((rng.integers(0, levels + 1, gates.shape) / levels).astype(np.float32))
    return Case(small_geometry(layers, num_experts, top_k), settings, distance, sequences, scores)


def replay(
    geometry: Geometry, settings: ReplaySettings, experts: list[list[list[int]]], scores: np.ndarray | None = None
) -> Result:
    """Replay one sequence."""
    replaying = Replay(geometry, settings)
    replaying.add(np.array(experts, np.uint8), scores)
    return replaying.result()


def scored(geometry: Geometry, predicted: list[list[list[int]]]) -> np.ndarray:
    """Scores that rank, at every (token, layer), the listed experts in their order and all others at 0."""
    scores = np.zeros((len(predicted), geometry.num_layers, geometry.num_experts), np.float32)
    for token, layers in enumerate(predicted):
        for layer, experts in enumerate(layers):
            for rank, expert in enumerate(experts):
                scores[token, layer, expert] = 1 - rank / 16
    return scores
