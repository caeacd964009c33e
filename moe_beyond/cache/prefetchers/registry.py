"""Table of the prefetchers, and the parser of their texts in options."""

import re
from dataclasses import dataclass
from enum import IntEnum

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.safe_text import shown

NO_THRESHOLD = -1.0
"""Threshold below every score."""

_NUMBER = r"-?(?:\d{1,18}(?:\.\d{1,18})?|\.\d{1,18})"
_THRESHOLD = rf"p>(?P<threshold>{_NUMBER})"


class PrefetcherId(IntEnum):
    """Number of each prefetcher, for the compiled dispatch."""

    NONE = 0
    SCORED = 1
    ADAPTIVE = 2
    MOE_INFINITY = 3
    ORACLE = 4


@dataclass(frozen=True)
class Prefetcher:
    """Properties of a prefetcher.

    Attributes:
        id: Number of its compiled function.
        summary: Experts that it selects, in one line.
        examples: Texts in options, without a distance.
        pattern: Regular expression of all texts; its groups ``max``, ``threshold`` and ``distance`` are optional.
        default_max: Largest number of experts that it selects unless the text has one, as a multiple of top-k; None for
            all experts of a layer (default: None).
        reads_scores: Whether it reads scores (default: False).
        reads_one_lookahead: Whether it reads the scores of only one lookahead (default: False).
        reads_deadlines: Whether it reads the times at which later layers will be routed (default: False).
        needs_device: Whether it needs the timing of a device (default: False).
        knows_future: Whether it reads future demand; the policy must admit its prefetches (default: False).
        replaces_queue: Whether each selection replaces the queued prefetches (default: False).
    """

    id: PrefetcherId
    summary: str
    examples: tuple[str, ...]
    pattern: str
    default_max: int | None = None
    reads_scores: bool = False
    reads_one_lookahead: bool = False
    reads_deadlines: bool = False
    needs_device: bool = False
    knows_future: bool = False
    replaces_queue: bool = False

    def max_experts(self, geometry: Geometry) -> int:
        """Return the default number of experts that it selects at most."""
        multiple = geometry.num_experts if self.default_max is None else self.default_max * geometry.top_k
        return min(multiple, geometry.num_experts)


PREFETCHERS: dict[str, Prefetcher] = {
    "none": Prefetcher(PrefetcherId.NONE, "no prefetching", ("none",), "none"),
    "scored": Prefetcher(
        PrefetcherId.SCORED,
        "the best-scored experts of a layer, with a maximum, a threshold or both; @N: N layers ahead",
        ("top6", "p>0.5", "top6,p>0.1"),
        rf"(?=top|p>)(?:top(?P<max>[1-9]\d{{0,8}}))?(?:(?:^|(?<=\d),){_THRESHOLD})?(?:@(?P<distance>[1-9]\d{{0,8}}))?",
        reads_scores=True,
        reads_one_lookahead=True,
    ),
    "adaptive": Prefetcher(
        PrefetcherId.ADAPTIVE,
        "as many experts as the interconnect transfers before their layer runs, best first",
        ("adaptive", "adaptive,p>0.1"),
        rf"adaptive(?:,{_THRESHOLD})?",
        default_max=2,
        reads_scores=True,
        reads_deadlines=True,
        needs_device=True,
        replaces_queue=True,
    ),
    "moe_infinity": Prefetcher(
        PrefetcherId.MOE_INFINITY,
        "experts of all later layers by score and distance, as MoE-Infinity does",
        ("moe_infinity",),
        "moe_infinity",
        default_max=1,
        reads_scores=True,
        reads_deadlines=True,
        replaces_queue=True,
    ),
    "oracle": Prefetcher(
        PrefetcherId.ORACLE,
        "the experts of the next events, from the recording",
        ("oracle",),
        "oracle",
        knows_future=True,
        replaces_queue=True,
    ),
}
"""Prefetchers by name."""

SYNTAX = tuple(text for prefetcher in PREFETCHERS.values() for text in prefetcher.examples)
"""Examples of all texts that `parse_prefetch` reads."""


@dataclass(frozen=True)
class Prefetch:
    """A prefetcher with the numbers of its text.

    Attributes:
        prefetcher: Properties of the prefetcher.
        max_experts: Largest number of experts that it selects per layer, or None.
        threshold: Score that the selected experts exceed (`NO_THRESHOLD`: none).
        distance: Number of layers ahead, or None.
    """

    prefetcher: Prefetcher
    max_experts: int | None = None
    threshold: float = NO_THRESHOLD
    distance: int | None = None


def parse_prefetch(text: str) -> Prefetch:
    """Parse the text of a prefetcher.

    Args:
        text: One of `SYNTAX` with other numbers; top<m> and p><t> also with a distance in layers, such as ``top6@2``.

    Raises:
        UserError: The text cannot be parsed, or the threshold is not within 0..1.
    """
    for prefetcher in PREFETCHERS.values():
        match = re.fullmatch(prefetcher.pattern, text, re.ASCII)
        if match is None:
            continue
        numbers = {name: number for name, number in match.groupdict().items() if number is not None}
        threshold = float(numbers.get("threshold", NO_THRESHOLD))
        if "threshold" in numbers and not 0 <= threshold <= 1:
            raise UserError(f"prefetch {shown(text)}: the threshold must be a probability, 0 to 1 (got {threshold:g})")
        max_experts, distance = (int(numbers[name]) if name in numbers else None for name in ("max", "distance"))
        return Prefetch(prefetcher, max_experts, threshold, distance)
    *examples, last = SYNTAX
    raise UserError(f"prefetch {shown(text)} cannot be parsed; write {', '.join(examples)} or {last}")
