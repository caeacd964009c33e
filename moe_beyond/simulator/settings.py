"""What to replay."""

from dataclasses import dataclass

import numpy as np

from moe_beyond.cache.core import ignore_event, ignore_scores
from moe_beyond.cache.policies import POLICIES, load_policy
from moe_beyond.cache.prefetchers.settings import ADAPTIVE, MOE_INFINITY, NONE, ORACLE, SCORED, Plan, parse_prefetch
from moe_beyond.errors import UserError, unknown
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead, parse_lookahead
from moe_beyond.simulator.devices import Device

MANY_LAYERS = 2**32  # more than any lookahead
BOUNDS = ("static_hindsight", "all_resident", "od_moe")
"""What stands in a table like a policy, and is computed without a cache: see `moe_beyond.simulator.bounds`."""


def reads_scores(policy: str) -> bool:
    """Tell whether a policy reads scores."""
    return policy not in BOUNDS and load_policy(policy).VERBS.learned is not ignore_scores


def offers_scores(policy: str) -> bool:
    """Tell whether a policy offers scores of its own, for a prefetcher to ask by."""
    return policy not in BOUNDS and load_policy(policy).OFFERS_SCORES


@dataclass(frozen=True)
class ReplaySettings:
    """One line of a replay table.

    Attributes:
        slots: The budget.
        policy: Eviction policy, or one of `BOUNDS`.
        scope: ``"global"``, or ``"per-layer"``.
        quotas: Slots of each layer for ``"per-layer"``; an even split where None.
        prefetch: As `parse_prefetch` reads it.
        lookahead: Of the scores that top<m> and p><t> ask by; None where there is no such prefetch.
        lookaheads: Lookaheads of the scores; all of them serve a policy that reads scores, and every prefetcher. A
            score is used as soon as its lookahead makes it available. Once a layer is through, top<m> and p><t> ask
            by the scores of ``lookahead`` only. At a token's start, layers before which no layer runs are prefetched
            by the scores of the smallest lookahead that covers them.
        available_after: Whether a score exists once a layer is ``"routed"``, or only once it is ``"computed"``.
        predictor: What to call where the scores come from.
        causal: Whether the scores ignore later tokens.
        warm_start: Whether the cache starts with the experts that were most popular in training. Moving them in counts,
            at every sequence, with a warm-up too.
        warmup_tokens: Tokens at a sequence's start that do not count. A sequence with no more tokens is left out.
        first_layer_prefetch: Whether layers whose scores exist when a token starts are prefetched then (at lookahead
            0: whether layer 0 is prefetched).
        sequential: Access by access in the router's order, not event by event: to compare with other simulators.
        prefill_chunk: Tokens before `decode_start` that make a step together; 0 makes every token a step. No step goes
            past the end of the warm-up.
        batch_size: Sequences that are decoded together. Their steps go side by side; those of the longest decide which
            of them count.
        window: Drafted tokens that are verified together, all taken to be right. No window goes past the end of the
            warm-up.
        carry_over: Whether a sequence finds the cache, and host memory, as the one before left them.
        cold_host: Whether host memory before flash begins empty, instead of with as many experts as fit.
        device: For the clock; None counts without time.
        bits: Bits per parameter.
        name: Of the strategy, where it has one.
        groups: Worker groups, for ``od_moe``.
        note: What stands in for what, for tables.
    """

    slots: int
    policy: str = "lru"
    scope: str = "global"
    quotas: tuple[int, ...] | None = None
    prefetch: str = "none"
    lookahead: Lookahead | None = None
    lookaheads: tuple[Lookahead, ...] = ()
    available_after: str = "routed"
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

    def __post_init__(self) -> None:
        """Check what does not depend on the model.

        Raises:
            UserError: A setting cannot be read, or two do not go together.
        """
        if self.policy not in (*POLICIES, *BOUNDS):
            raise unknown("policy", self.policy, POLICIES)
        kind = parse_prefetch(self.prefetch).kind
        for what, number, least in (
            ("--warmup-tokens", self.warmup_tokens, 0),
            ("--prefill-chunk", self.prefill_chunk, 0),
            ("--batch-size", self.batch_size, 1),
            ("--window", self.window, 1),
        ):
            if number < least:
                raise UserError(f"{what} {number} is less than {least}")
        for lookahead in (self.lookahead, *self.lookaheads):
            if lookahead is not None:
                parse_lookahead(lookahead)
        if (np.diff(self.slices(MANY_LAYERS)) < 0).any():
            raise UserError(
                f"lookaheads {', '.join(map(str, self.lookaheads))} are not in the order 0, 1, ..., token, next"
            )
        if self.quotas is not None and self.scope != "per-layer":
            raise UserError("quotas are for --scope per-layer")
        asks = kind in (SCORED, ADAPTIVE, MOE_INFINITY) and not offers_scores(self.policy)
        if asks and not self.lookaheads:
            raise UserError(f"prefetch {self.prefetch!r} needs scores; give --predictor or --scores")
        if kind in (ADAPTIVE, MOE_INFINITY) and self.lookaheads == (0,):
            raise UserError(
                f"prefetch {self.prefetch!r} asks layers ahead, but the scores have lookahead 0: they come when the "
                "layer is routed"
            )
        if kind == ADAPTIVE and self.device is None:
            raise UserError(f"prefetch {self.prefetch!r} asks for what the link can bring in; give --device")
        if parse_prefetch(self.prefetch).distance is not None and self.lookahead not in ("token", None):
            raise UserError(
                f"prefetch {self.prefetch!r}: a distance is for scores known for the whole token; "
                f"these are known {self.lookahead} layers ahead, and asked for then"
            )
        if asks and kind == SCORED and self.lookahead not in self.lookaheads:
            known = ", ".join(map(str, self.lookaheads))
            raise UserError(f"prefetch {self.prefetch!r} at lookahead {self.lookahead}: the scores have {known}")
        if self.lookahead == "next":
            raise UserError(f"prefetch {self.prefetch!r} at lookahead next: they say what to keep; ask by another")
        if "scores" in self.needs and not self.lookaheads:
            raise UserError(f"policy {self.policy} ranks by scores; give --predictor eamc... (or another), or --scores")
        if self.sequential:
            self._check_sequential(kind)

    def _check_sequential(self, kind: int) -> None:
        if kind != NONE or self.device is not None or self.warm_start:
            raise UserError("--sequential counts accesses alone: without prefetch, device and warm start")
        if self.prefill_chunk or self.batch_size > 1 or self.window > 1:
            raise UserError("--sequential goes access by access: without --prefill-chunk, --batch-size and windows")
        learns = self.policy not in BOUNDS and load_policy(self.policy).VERBS.routed is not ignore_event
        if learns or reads_scores(self.policy):
            raise UserError(f"--sequential: policy {self.policy} learns from whole events")

    @property
    def needs(self) -> tuple[str, ...]:
        """What the policy cannot do without: some of "future", "profile" and "scores"."""
        needs: tuple[str, ...] = () if self.policy in BOUNDS else load_policy(self.policy).NEEDS
        needs += ("future",) * (parse_prefetch(self.prefetch).kind == ORACLE)
        return needs + ("profile",) * self.warm_start

    def plan(self, geometry: Geometry) -> Plan:
        """Return what the engine is told of the prefetcher.

        Raises:
            UserError: It names more experts than a layer has.
        """
        asked = parse_prefetch(self.prefetch)
        top_k, experts = geometry.top_k, geometry.num_experts
        if asked.most is not None and asked.most > experts:
            raise UserError(f"prefetch {self.prefetch!r} names more than a layer's {experts} experts")
        default = {ADAPTIVE: min(2 * top_k, experts), MOE_INFINITY: top_k}.get(asked.kind, experts)
        return Plan(
            kind=asked.kind,
            most=default if asked.most is None else asked.most,
            threshold=asked.threshold,
            distance=self.distance,
            first_layers=self.first_layer_prefetch,
            top_k=top_k,
        )

    @property
    def reads_all_scores(self) -> bool:
        """Whether it reads scores of every lookahead there is, not only those that a prefetcher asks by."""
        reads = reads_scores(self.policy)
        return bool(self.lookaheads) and (reads or parse_prefetch(self.prefetch).kind in (ADAPTIVE, MOE_INFINITY))

    def most_demanded(self, geometry: Geometry) -> int:
        """Return how many experts of a layer an event may demand."""
        together = max(self.window, self.prefill_chunk, 1) * self.batch_size
        return min(geometry.top_k * together, geometry.num_experts)

    @property
    def distance(self) -> int:
        """Layers between asking and needing: the lookahead; for whole-token scores what the prefetcher says, or 1."""
        if self.lookahead in ("token", None):
            return parse_prefetch(self.prefetch).distance or 1
        return int(self.lookahead)

    def slices(self, num_layers: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return the lookaheads ``(H,)`` as the engine counts them: "token" is L, and "next" one more."""
        named = {"token": num_layers, "next": num_layers + 1}
        found = [named[h] if isinstance(h, str) else min(h, num_layers) for h in self.lookaheads]
        return np.array(found, np.int64)

    @property
    def strategy(self) -> str:
        """A short name for tables."""
        if self.name is not None:
            return self.name
        return self.policy if self.prefetch == "none" else f"{self.policy} + {self.prefetch}"
