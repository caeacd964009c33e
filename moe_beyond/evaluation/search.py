"""The search of `moe-beyond tune`: candidates, their dimensions, and the order in which they are tried.

The search starts with every policy without prefetching. It then tries all candidates that differ in a single dimension
from one of the best few, or from the best of a prefetcher, until no such candidate is left. Numbers of prefetchers are
refined at the end. The result does not depend on the number of cores, nor on chance.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from moe_beyond.cache.misses import MOVE
from moe_beyond.cache.policies import POLICIES, load_policy
from moe_beyond.cache.prefetchers import parse_prefetch
from moe_beyond.errors import UserError
from moe_beyond.evaluation.options import SCOPES
from moe_beyond.evaluation.sources import ScoreSource
from moe_beyond.evaluation.strategies import Quotas, even_split, strategy
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.simulator import ReplaySettings, Result
from moe_beyond.simulator.settings import offers_scores
from moe_beyond.usage_profile import UsageProfile

WIDTH = 3
"""Number of candidates whose neighbours are tried, besides the best of each prefetcher."""
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Thresholds that are tried first."""
STEPS = (0.1, 0.05, 0.02)
"""Steps by which thresholds are refined."""
TOP = re.compile(r"top(\d+)")
THRESHOLD = re.compile(r"p>([\d.]+)")


@dataclass(frozen=True)
class Aim:
    """Figure that tuning improves.

    Attributes:
        field: Field of a `Result`.
        sign: 1 if a larger value is better, -1 if a smaller one is.
        unit: Text after a value.
        scale: Factor of a printed value (default: 1).
    """

    field: str
    sign: int
    unit: str
    scale: float = 1.0

    def value(self, result: Result) -> float:
        """Return the figure of a result.

        Raises:
            UserError: The result has no such figure.
        """
        value = getattr(result, self.field)
        if value is None:
            raise UserError("--for tokens: the sequences have no generated tokens; record some, or give --for hits")
        return float(value)

    def rank(self, result: Result) -> tuple[float, float]:
        """Return a key that sorts the best result first; of equal ones, that with fewer bytes."""
        return -self.sign * self.value(result), result.bytes_ratio

    def format(self, value: float) -> str:
        """Return a value with its unit."""
        return f"{self.scale * value:.2f} {self.unit}"

    def format_gain(self, low: float, high: float) -> str:
        """Return an interval of a difference with its unit."""
        return f"{self.scale * low:+.2f}..{self.scale * high:+.2f} {self.unit}"


AIMS = {
    "tokens": Aim("tokens_per_second", 1, "tok/s"),
    "hits": Aim("hit_rate", 1, "% hits", 100.0),
    "bytes": Aim("bytes_ratio", -1, "of the demanded bytes"),
}
"""Value of ``--for`` -> figure."""


@dataclass(frozen=True)
class Candidate:
    """A strategy that the search may try.

    Attributes:
        policy: Name of the eviction policy.
        scope: ``"global"`` or ``"per-layer"``.
        prefetch: Prefetcher (default: ``"none"``).
        lookahead: Lookahead that the prefetcher selects by; None if it selects by none (default: None).
        misses: Miss handling (default: ``"move"``).
    """

    policy: str
    scope: str
    prefetch: str = "none"
    lookahead: Lookahead | None = None
    misses: str = MOVE


@dataclass(frozen=True)
class Space:
    """Candidates of a model, a budget and a device.

    Attributes:
        geometry: Geometry of the model.
        common: Settings that all candidates share.
        slots: Number of slots.
        scope: Scope of all candidates; None to try both.
        source: Source of scores; None without scores.
        profile: Usage profile; None without one.
        quotas: Slots of each layer (default: an even split).
        misses: Miss handlings that are tried (default: ``"move"``).
    """

    geometry: Geometry
    common: ReplaySettings
    slots: int
    scope: str | None
    source: ScoreSource | None
    profile: UsageProfile | None
    quotas: Quotas = even_split
    misses: Sequence[str] = (MOVE,)

    def scopes(self) -> list[str]:
        """Return the scopes; without a choice, ``"per-layer"`` only if the slots suffice for an event of each layer."""
        if self.scope is not None:
            return [self.scope]
        return list(SCOPES if self.slots >= self.geometry.demand_per_token else SCOPES[:1])

    def policies(self) -> list[str]:
        """Return the policies that a run can have with the scores and the profile at hand, LRU first."""
        missing = {"future"}
        missing |= {"scores"} if self.source is None else set()
        missing |= {"profile"} if self.profile is None else set()
        loaded = {name: load_policy(name) for name in POLICIES}
        fitting = [name for name, each in loaded.items() if not missing & set(each.NEEDS) and not each.HOOKS.bypass]
        return sorted(fitting, key=lambda name: name != "lru")

    def lookaheads(self) -> list[Lookahead]:
        """Return the lookaheads that a prefetcher can select by."""
        return [] if self.source is None else [each for each in self.source.lookaheads if each != "next"]

    def plain(self) -> list[Candidate]:
        """Return every candidate without prefetching, LRU first, with miss handling ``"move"`` if it is tried."""
        pairs = [(policy, scope) for scope in self.scopes() for policy in self.policies()]
        handlings = sorted(self.misses, key=lambda misses: misses != MOVE)
        return [Candidate(policy, scope, misses=misses) for misses in handlings for policy, scope in pairs]

    def neighbours(self, candidate: Candidate) -> Iterator[Candidate]:
        """Yield candidates that differ in one dimension; a new dimension is one more line here."""
        changes = [{"policy": policy} for policy in self.policies()]
        changes += [{"scope": scope} for scope in self.scopes()]
        changes += [{"prefetch": prefetch} for prefetch in self._prefetches()]
        changes += [{"lookahead": lookahead} for lookahead in self.lookaheads()]  # type: ignore[dict-item]
        changes += [{"misses": misses} for misses in self.misses]
        for change in changes:
            yield from self._valid(replace(candidate, **change))  # type: ignore[arg-type]
        yield from self.nearby(candidate, STEPS[0])

    def nearby(self, candidate: Candidate, step: float) -> Iterator[Candidate]:
        """Yield candidates whose prefetcher has a slightly different number.

        Args:
            candidate: Candidate to change.
            step: Difference of thresholds; the largest number of experts differs by one.
        """
        text = candidate.prefetch
        if match := THRESHOLD.search(text):
            for threshold in (float(match[1]) - step, float(match[1]) + step):
                if 0 < threshold < 1:
                    changed = THRESHOLD.sub(f"p>{round(threshold, 3):g}", text)
                    yield from self._valid(replace(candidate, prefetch=changed))
        elif match := TOP.search(text):
            for number in (int(match[1]) - 1, int(match[1]) + 1):
                if 1 <= number <= self.geometry.num_experts:
                    yield from self._valid(replace(candidate, prefetch=f"top{number}"))

    def settings(self, candidate: Candidate) -> ReplaySettings:
        """Return the settings of a candidate; its name has the scope if that is not the usual one."""
        scope = candidate.scope
        common = replace(self.common, scope=scope, misses=candidate.misses)
        quotas = self.quotas if scope == "per-layer" else even_split
        made = strategy(
            common, self.slots, candidate.policy, candidate.prefetch, self.source, candidate.lookahead, quotas
        )
        return made if scope == self.scopes()[0] else replace(made, name=f"{made.strategy}, {scope}")

    def _prefetches(self) -> list[str]:
        """Return the prefetchers that are tried first."""
        top_k, experts = self.geometry.top_k, self.geometry.num_experts
        numbers = sorted({1, max(1, top_k // 2), top_k, min(2 * top_k, experts), min(4 * top_k, experts)})
        texts = ["none", *(f"top{number}" for number in numbers), *(f"p>{each:g}" for each in THRESHOLDS)]
        texts += ["moe_infinity"]
        return texts if self.common.device is None else [*texts, "adaptive", "adaptive,p>0.3"]

    def _valid(self, candidate: Candidate) -> Iterator[Candidate]:
        """Yield a candidate with the lookahead that its prefetcher needs; nothing if it lacks scores."""
        prefetcher = parse_prefetch(candidate.prefetch).prefetcher
        lookaheads = self.lookaheads()
        if prefetcher.reads_scores and not lookaheads and not offers_scores(candidate.policy):
            return
        if not lookaheads or not prefetcher.reads_one_lookahead:
            yield replace(candidate, lookahead=None)
        else:
            yield replace(candidate, lookahead=lookaheads[0] if candidate.lookahead is None else candidate.lookahead)


@dataclass
class Search:
    """Candidates tried so far.

    Attributes:
        space: Candidates to search.
        aim: Figure to improve.
        replay: Function that replays settings on the half that is tuned on.
        progress: Function that receives the number of candidates tried.
        tried: Candidate -> result, in the order of trial (default: none).
    """

    space: Space
    aim: Aim
    replay: Callable[[Sequence[ReplaySettings]], list[Result]]
    progress: Callable[[int], object]
    tried: dict[Candidate, Result] = field(default_factory=dict)

    def run(self) -> None:
        """Try candidates until no neighbour of the best few is left."""
        self._try(self.space.plain())
        while self._try(each for promising in self._promising() for each in self.space.neighbours(promising)):
            pass
        for step in STEPS:
            while self._try(each for promising in self._promising() for each in self.space.nearby(promising, step)):
                pass

    def best(self, number: int) -> list[Candidate]:
        """Return the best candidates; of equal ones, those tried first."""
        return sorted(self.tried, key=lambda each: self.aim.rank(self.tried[each]))[:number]

    def _promising(self) -> list[Candidate]:
        """Return the best few candidates, and the best one of each prefetcher: the best few are often alike."""
        ranked = self.best(len(self.tried))
        of_prefetcher = {parse_prefetch(each.prefetch).prefetcher.id: each for each in reversed(ranked)}
        return list(dict.fromkeys([*ranked[:WIDTH], *of_prefetcher.values()]))

    def _try(self, candidates: Iterator[Candidate] | list[Candidate]) -> bool:
        """Replay candidates that were not tried before, and return whether there were any."""
        new = [each for each in dict.fromkeys(candidates) if each not in self.tried]
        self.tried |= dict(zip(new, self.replay([self.space.settings(each) for each in new]), strict=True))
        self.progress(len(self.tried))
        return bool(new)
