"""Settings of a replay."""

from dataclasses import dataclass

import numpy as np

from moe_beyond.cache.misses import MISSES, MOVE
from moe_beyond.cache.policies import POLICIES, load_policy
from moe_beyond.cache.prefetchers import Prefetch, parse_prefetch
from moe_beyond.cache.prefetchers._inputs import PrefetchSettings
from moe_beyond.cache.steps import MANY_LAYERS, in_layers
from moe_beyond.errors import UserError, unknown
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead, parse_lookahead
from moe_beyond.simulator.computing import check_host
from moe_beyond.simulator.devices import Device

BOUNDS = ("static_hindsight", "all_resident", "od_moe")
"""Rows of a table that are computed without a cache, see `moe_beyond.simulator.bounds`; used like a policy."""


def reads_scores(policy: str) -> bool:
    """Return whether a policy reads scores."""
    return policy not in BOUNDS and bool(load_policy(policy).HOOKS.reads_scores)


def offers_scores(policy: str) -> bool:
    """Return whether a policy writes scores of its own that a prefetcher can read."""
    return policy not in BOUNDS and load_policy(policy).OFFERS_SCORES


@dataclass(frozen=True)
class ReplaySettings:
    """A strategy and its budget: one row of a replay table.

    Attributes:
        slots: Budget in slots, each for an expert of mean size where layers differ.
        policy: Eviction policy, or one of `BOUNDS` (default: ``"lru"``).
        scope: ``"global"`` or ``"per-layer"`` (default: ``"global"``).
        quotas: Slots of each layer for ``"per-layer"`` (default: an even split).
        prefetch: Prefetcher, as `parse_prefetch` reads it (default: ``"none"``).
        lookahead: Lookahead of the scores that top<m> and p><t> read; None without such a prefetcher.
        lookaheads: Lookaheads of all scores, in their order. Policies that read scores, and prefetchers, use all of
            them. A score is used as soon as its lookahead makes it available. After a layer, top<m> and p><t> read only
            the scores of ``lookahead``. At a token's start, layers without an earlier layer at their lookahead are
            prefetched by the scores of the first lookahead that covers them.
        predictor: Name of the source of the scores, for tables.
        causal: Whether the scores ignore later tokens (default: True).
        warm_start: Whether the cache starts with the experts that are most popular in training text. These transfers
            count at every sequence, also with a warm-up (default: False).
        warmup_tokens: Number of tokens at a sequence's start that are not counted. Sequences with no more tokens are
            left out (default: 0).
        first_layer_prefetch: Whether layers whose scores exist when a token starts are prefetched at that time; at
            lookahead 0, whether layer 0 is prefetched (default: True).
        sequential: Whether accesses are replayed one by one in the router's order, for comparison with other simulators
            (default: False).
        prefill_chunk: Number of tokens before ``decode_start`` that form a step; 0 makes every token a step. No step
            extends past the warm-up (default: 0).
        batch_size: Number of sequences that are decoded together. Each step has one step of every sequence; the longest
            sequence decides which steps count (default: 1).
        window: Number of drafted tokens that are verified together, all assumed to be correct. No window extends past
            the warm-up (default: 1).
        carry_over: Whether a sequence starts with the cache and host memory of the previous one (default: False).
        cold_host: Whether host memory in front of flash starts empty, instead of full (default: False).
        device: Device of the timing model (default: None, no times).
        bits: Bits per parameter (default: 16).
        name: Name of the strategy (default: None, the policy and the prefetcher).
        groups: Number of worker groups of ``od_moe`` (default: 4).
        note: Note for tables about substitutes and assumptions.
        budget_bytes: Exact budget in bytes where layers differ (default: None, the bytes of the slots).
        misses: Miss handling: ``"move"`` transfers a missing expert, ``"cpu"`` computes it on the host, ``"best"`` does
            the sooner of both (default: ``"move"``).
        measured_times: Whether a running model measures the times that a prefetcher needs, in place of a device
            (default: False).
    """

    slots: int
    policy: str = "lru"
    scope: str = "global"
    quotas: tuple[int, ...] | None = None
    prefetch: str = "none"
    lookahead: Lookahead | None = None
    lookaheads: tuple[Lookahead, ...] = ()
    predictor: str | None = None
    causal: bool = True
    warm_start: bool = False
    warmup_tokens: int = 0
    first_layer_prefetch: bool = True
    sequential: bool = False
    prefill_chunk: int = 0
    batch_size: int = 1
    window: int = 1
    carry_over: bool = False
    cold_host: bool = False
    device: Device | None = None
    bits: float = 16.0
    name: str | None = None
    groups: int = 4
    note: str | None = None
    budget_bytes: int | None = None
    misses: str = MOVE
    measured_times: bool = False

    def __post_init__(self) -> None:
        """Check everything that does not depend on the model.

        Raises:
            UserError: A setting cannot be parsed, or two settings contradict each other.
        """
        if self.policy not in POLICIES and self.policy not in BOUNDS:
            raise unknown("policy", self.policy, POLICIES)
        for option, number, minimum in (
            ("--warmup-tokens", self.warmup_tokens, 0),
            ("--prefill-chunk", self.prefill_chunk, 0),
            ("--batch-size", self.batch_size, 1),
            ("--window", self.window, 1),
        ):
            if number < minimum:
                raise UserError(f"{option} {number} is less than {minimum}")
        for lookahead in (self.lookahead, *self.lookaheads):
            if lookahead is not None:
                parse_lookahead(lookahead)
        if (np.diff(self.slices(MANY_LAYERS)) < 0).any():
            raise UserError(
                "lookaheads must be in the order 0, computed, 1, ..., token, next "
                f"(got {', '.join(map(str, self.lookaheads))})"
            )
        if self.quotas is not None and self.scope != "per-layer":
            raise UserError("quotas need --scope per-layer")
        self._check_prefetch(parse_prefetch(self.prefetch))
        if "scores" in self.needs and not self.lookaheads:
            raise UserError(f"policy {self.policy} needs scores; give --predictor eamc... (or another), or --scores")
        if self.misses != MOVE:
            self._check_misses()
        if self.sequential:
            self._check_sequential()

    def _check_misses(self) -> None:
        """Check miss handling on the host."""
        if self.misses not in MISSES:
            raise unknown("miss handling", self.misses, MISSES)
        if self.device is not None or not self.measured_times:
            check_host(self.device, self.misses)
        if self.policy in BOUNDS:
            raise UserError(
                f"--misses {self.misses}: a bound moves its experts (got policy {self.policy}); choose another policy"
            )

    def _check_prefetch(self, prefetch: Prefetch) -> None:
        """Check the prefetcher with its scores and the device."""
        prefetcher, start = prefetch.prefetcher, f"prefetch {self.prefetch!r}"
        needs_scores = prefetcher.reads_scores and not offers_scores(self.policy)
        if needs_scores and not self.lookaheads:
            raise UserError(f"{start} needs scores; give --predictor or --scores")
        if prefetcher.reads_scores and not prefetcher.reads_one_lookahead and self.lookaheads == (0,):
            raise UserError(
                f"{start} selects experts of later layers, but scores of lookahead 0 are only available when their "
                "layer is routed; give scores of another lookahead"
            )
        if prefetcher.needs_device and self.device is None and not self.measured_times:
            raise UserError(f"{start} needs the times of a device; give --device")
        if prefetch.distance is not None and self.lookahead not in ("token", None):
            raise UserError(
                f"{start}: a distance needs scores of lookahead token (got lookahead {self.lookahead}); "
                f"remove @{prefetch.distance}"
            )
        if needs_scores and prefetcher.reads_one_lookahead and self.lookahead not in self.lookaheads:
            available = ", ".join(map(str, self.lookaheads))
            raise UserError(f"{start}: there are no scores of lookahead {self.lookahead}; choose from {available}")
        if self.lookahead == "next":
            raise UserError(f"{start}: scores of lookahead next serve policies only; choose another lookahead")

    def _check_sequential(self) -> None:
        """Check that the policy and the other settings need no events."""
        if self.prefetch != "none" or self.device is not None or self.warm_start or self.misses != MOVE:
            raise UserError("--sequential counts accesses only; remove --prefetch, --device, --misses and --warm-start")
        if self.prefill_chunk or self.batch_size > 1 or self.window > 1:
            raise UserError("--sequential steps single accesses; remove --prefill-chunk, --batch-size and --window")
        if self.policy not in BOUNDS:
            hooks = load_policy(self.policy).HOOKS
            if hooks.reads_events or hooks.reads_scores:
                raise UserError(f"--sequential: policy {self.policy} needs whole events; choose another policy")

    @property
    def needs(self) -> tuple[str, ...]:
        """Required inputs, some of "future", "profile" and "scores"."""
        needs: tuple[str, ...] = () if self.policy in BOUNDS else tuple(load_policy(self.policy).NEEDS)
        needs += ("future",) * parse_prefetch(self.prefetch).prefetcher.knows_future
        return needs + ("profile",) * self.warm_start

    def check_sizes(self, geometry: Geometry) -> None:
        """Check that the strategy can count the bytes of a model whose layers differ in size.

        Raises:
            UserError: It counts experts, or decides about one expert in place of another.
        """
        if geometry.has_one_size:
            return
        if self.sequential:
            raise UserError(
                f"--sequential counts experts, but the layers of {geometry.model} differ in bytes; remove it"
            )
        if self.policy not in BOUNDS and load_policy(self.policy).HOOKS.bypass:
            raise UserError(
                f"policy {self.policy} compares one expert with another, but the layers of {geometry.model} differ in "
                "bytes; choose another policy"
            )

    def prefetch_settings(self, geometry: Geometry) -> PrefetchSettings:
        """Return the settings of the prefetcher for a model.

        Raises:
            UserError: The prefetcher selects more experts than a layer has.
        """
        prefetch = parse_prefetch(self.prefetch)
        prefetcher, experts = prefetch.prefetcher, geometry.num_experts
        if prefetch.max_experts is not None and prefetch.max_experts > experts:
            raise UserError(f"prefetch {self.prefetch!r} selects more than a layer's {experts} experts")
        return PrefetchSettings(
            prefetcher=int(prefetcher.id),
            max_experts=prefetcher.max_experts(geometry) if prefetch.max_experts is None else prefetch.max_experts,
            threshold=prefetch.threshold,
            distance=self.distance,
            first_layers=self.first_layer_prefetch,
            top_k=geometry.top_k,
            reads_deadlines=prefetcher.reads_deadlines,
            knows_future=prefetcher.knows_future,
            replaces_queue=prefetcher.replaces_queue,
        )

    @property
    def reads_all_scores(self) -> bool:
        """Whether the strategy reads the scores of every lookahead, not only of ``lookahead``."""
        prefetcher = parse_prefetch(self.prefetch).prefetcher
        prefetches = prefetcher.reads_scores and not prefetcher.reads_one_lookahead
        return bool(self.lookaheads) and (prefetches or reads_scores(self.policy))

    @property
    def distance(self) -> int:
        """Lookahead as `in_layers` numbers it; for lookahead token, the distance of the prefetcher, or 1."""
        if self.lookahead is None or self.lookahead == "token":
            return parse_prefetch(self.prefetch).distance or 1
        return int(in_layers([self.lookahead], MANY_LAYERS)[0])

    def slices(self, num_layers: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return the lookaheads as `in_layers` numbers them, ``(H,)`` int64."""
        return in_layers(self.lookaheads, num_layers)

    @property
    def strategy(self) -> str:
        """Short name for tables."""
        if self.name is not None:
            return self.name
        name = self.policy if self.prefetch == "none" else f"{self.policy} + {self.prefetch}"
        return name if self.misses == MOVE else f"{name}, misses {self.misses}"
