"""Options of a replay by the names that the command line and `moe_beyond.replay` share."""

from collections.abc import Sequence
from dataclasses import dataclass

DEFAULT_BUDGET = "10%"
SCOPES = ("global", "per-layer")
"""Values of ``scope``."""
ALL_SPLITS = "all"
"""Value of ``split`` that measures every split."""


@dataclass(frozen=True)
class ReplayOptions:
    """Options of a replay, as text and numbers; `moe_beyond.evaluation.resolve` turns them into settings.

    Attributes:
        budget: Memory budgets: ``10%`` of all experts, ``166`` slots, ``2.9GB`` or ``2.7GiB`` (default: 10%).
        strategy: Names of strategies, or ``all``, in place of policies and prefetchers (default: none).
        policy: Names of eviction policies (default: lru).
        prefetch: Prefetchers (default: ``top<K>`` with scores, ``none`` without).
        lookahead: Lookaheads of the scores that prefetchers select by (default: the first of the predictor).
        misses: Miss handlings: ``move``, ``cpu`` or ``best`` (default: move).
        device: Device preset or JSON file; enables the timing model (default: no timing).
        scope: Scope of the cache, ``global`` or ``per-layer`` (default: global).
        quotas: Slots per layer with ``per-layer``: ``even``, ``proportional`` or a list such as ``10,8,8`` (default:
            even).
        profile: Fitted ``history`` or ``popularity`` predictor for policies that need a usage profile (default: none;
            with ``strategy``, the pretrained one).
        warm_start: Whether every sequence starts with the most popular experts of the profile (default: False).
        carry_over: Whether a sequence starts with the cache of the sequence before (default: False).
        cold_host: Whether host memory before flash starts empty (default: False).
        prefill_chunk: Prompt tokens per step; 0 makes every token a step (default: 0).
        batch_size: Sequences decoded together (default: 1).
        sequential: Whether to count access by access, as other simulators do (default: False).
        warmup_tokens: Tokens at the start of each sequence that are excluded from all counts (default: 0).
        no_first_layer_prefetch: Whether to skip prefetching for layers whose scores exist when the token starts
            (default: False).
        quantization: Bits per parameter (default: as recorded in the trace set).
    """

    budget: Sequence[str] = (DEFAULT_BUDGET,)
    strategy: Sequence[str] = ()
    policy: Sequence[str] = ()
    prefetch: Sequence[str] = ()
    lookahead: Sequence[str | int] = ()
    misses: Sequence[str] = ()
    device: str | None = None
    scope: str = "global"
    quotas: str | None = None
    profile: str | None = None
    warm_start: bool = False
    carry_over: bool = False
    cold_host: bool = False
    prefill_chunk: int = 0
    batch_size: int = 1
    sequential: bool = False
    warmup_tokens: int = 0
    no_first_layer_prefetch: bool = False
    quantization: float | None = None
