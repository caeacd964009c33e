"""The rules of the cache in plain Python, written from DESIGN.md and the docstrings, to check the package against.

An expert is a pair (layer, expert). Nothing here is shared with the package, and nothing is fast: a policy ranks by
looking through the whole history of an expert, and the future is searched from its beginning. Sizes of pools, experts
and host memory are in units, which are slots where all experts have the same size.
"""

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod

COUNTERS = (
    "accesses",
    "hits",
    "late_hits",
    "misses",
    "demand_transfers",
    "prefetch_transfers",
    "useful_prefetches",
    "wasted_prefetches",
    "on_host",
)

Expert = tuple[int, int]
Scores = list[list[float]]
"""[layer][expert]"""


@dataclass
class Rules:
    """What is replayed, and how; times are in seconds."""

    layers: int
    experts: int
    top_k: int
    pools: list[int]
    policy: str = "lru"
    prefetch: str = "none"  # none, scored, adaptive, moe_infinity, oracle
    most: int | None = None
    threshold: float | None = None
    lookahead: int | str | None = None  # that "scored" selects by
    distance: int = 1
    first_layers: bool = True
    lookaheads: list = field(default_factory=list)
    warmup: int = 0
    warm_start: bool = False
    chunk: int = 0
    window: int = 1
    popularity: list[list[float]] | None = None
    hazard: list[list[float]] | None = None
    age_edges: list[float] = field(default_factory=list)
    rate_edges: list[float] = field(default_factory=list)
    transfer: float = 0
    flash: float = 0
    host_slots: int = 0
    cold_host: bool = False
    other: float = 0
    cached: float = 0  # reading the keys and values of one token, by layer
    outside: float = 0
    expert: float = 0
    flops: float = 0  # of one expert for one token
    misses: str = "move"  # move, cpu, best
    host: float = 0  # an expert on the host
    host_flops: float = 0  # and of it for one token
    units: list[int] = field(default_factory=list)  # of an expert by layer; empty: 1

    @property
    def after_computing(self) -> bool:
        """Whether scores may come, and prefetches are selected, when a layer is computed."""
        return "computed" in self.lookaheads

    @property
    def after_routing(self) -> bool:
        """The same when it is routed; also without any scores."""
        return not self.after_computing or not set(self.lookaheads) <= {0, "computed"}

    @property
    def instant(self) -> bool:
        return self.transfer == self.flash == 0

    def size(self, expert: Expert) -> int:
        return self.units[expert[0]] if self.units else 1

    def relative(self, expert: Expert) -> float:
        """Size of an expert in units of the mean."""
        return self.units[expert[0]] * len(self.units) / sum(self.units) if self.units else 1


@dataclass
class Step:
    """Tokens that are computed together: of every layer how many tokens demand each expert, and what is predicted."""

    demands: list[dict[int, int]]
    scores: dict  # lookahead -> Scores; empty without scores
    counted: bool
    tokens: int
    context: int  # tokens up to its end
    first: bool  # of its sequences


def split_slots(slots: int, layers: int, scope: str) -> list[int]:
    """Slots of every pool: one pool, or one a layer with the remainder in the first layers."""
    if scope == "global":
        return [slots]
    return [slots // layers + (1 if layer < slots % layers else 0) for layer in range(layers)]


def chunks(length: int, decode_start: int, chunk: int, window: int, warmup: int) -> list[list[int]]:
    """The tokens of every step of a sequence: prompt chunks, if any, then windows; none goes past the warm-up."""
    steps: list[list[int]] = []
    read = min(decode_start, length) if chunk else 0
    for token in range(length):
        size = chunk if token < read else window
        if not steps or len(steps[-1]) == size or token in (read, warmup):
            steps.append([])
        steps[-1].append(token)
    return steps


def union_steps(rules: Rules, batch: list[tuple]) -> list[Step]:
    """Put sequences together, step by step; of each: [token][layer] -> experts, [token][slice] -> Scores, start."""
    split = [chunks(len(experts), start, rules.chunk, rules.window, rules.warmup) for experts, _, start in batch]
    longest = max(split, key=len)
    steps = []
    for i in range(len(longest)):
        present = [
            (experts, scores, parts[i])
            for (experts, scores, _), parts in zip(batch, split, strict=True)
            if i < len(parts)
        ]
        demands: list[dict[int, int]] = [defaultdict(int) for _ in range(rules.layers)]
        for experts, _, tokens in present:
            for token in tokens:
                for layer in range(rules.layers):
                    for expert in experts[token][layer]:
                        demands[layer][expert] += 1
        predicted = {}
        if all(len(tokens) == 1 for _, _, tokens in present):
            for place, lookahead in enumerate(rules.lookaheads):
                predicted[lookahead] = [
                    [
                        1 - prod(1 - scores[tokens[0]][place][layer][expert] for _, scores, tokens in present)
                        for expert in range(rules.experts)
                    ]
                    for layer in range(rules.layers)
                ]
        size = sum(len(tokens) for _, _, tokens in present)
        context = sum(tokens[-1] + 1 for _, _, tokens in present)
        counted = longest[i][0] >= rules.warmup
        steps.append(Step([dict(d) for d in demands], predicted, counted, size, context, i == 0))
    return steps


@dataclass
class Use:
    """An expert was demanded, selected while it was resident, or came in."""

    moment: int
    event: int
    step: int
    entry: bool


class ReferenceCache:
    """A cold cache, and its clock.

    Args:
        rules: Rules of the cache, and the sizes of the model.
        future: The demands of every event to come, for those who know it.
    """

    def __init__(self, rules: Rules, future: list[set[Expert]]) -> None:
        self.rules, self.future = rules, future
        self.resident: set[Expert] = set()
        self.pinned: set[Expert] = set()  # no victims: computing now, or prefetched since that began
        self.open: set[Expert] = set()  # counted prefetches not demanded yet
        self.event = self.moment = self.step = 0  # numbers of the last event; of the last event or question
        self.layer = -1  # of the last event; -1 between steps
        self.counted = True
        self.uses: dict[Expert, list[Use]] = defaultdict(list)
        self.runs: list[list[dict[int, int]]] = [[] for _ in range(rules.layers)]  # all demands of each layer
        self.known: dict[Expert, float] = {}  # for the next time its layer runs
        self.last_known: dict[Expert, float] = {}
        self.next_score: dict[Expert, float] = {}  # of the next run, when the layer had just run
        self.has_fresh_score: dict[Expert, bool] = {}  # whether a score came after the layer's last run
        self.level: dict[Expert, int] = defaultdict(int)
        self.counts = [dict.fromkeys(COUNTERS, 0) for _ in range(rules.layers)]
        # The interconnect, flash, and host memory.
        self.now = self.free = self.flash_free = self.busy = 0.0
        self.gap = (0.0, 0.0)  # when the link is idle before its last copy
        self.arrives: dict[Expert, float] = {}
        self.queue: list[Expert] = []
        self.fills: list[Expert] = []  # computed on the host; behind the queue
        # Host memory, the most recently moved last. Unless it is cold it begins with expert 0 of every layer, which
        # leave last, then expert 1, ...
        every = [(layer, expert) for expert in range(rules.experts) for layer in range(rules.layers)]
        hosted = range(len(every) + 1)
        fitting = max(count for count in hosted if self.total(every[:count]) <= rules.host_slots)
        self.host: list[Expert] = [] if rules.cold_host else every[:fitting][::-1]
        self.need: list[float] = []

    # Pools and the policy.

    def pool_of(self, expert: Expert) -> int:
        return 0 if len(self.rules.pools) == 1 else expert[0]

    def members(self, pool: int) -> set[Expert]:
        return {expert for expert in self.resident if self.pool_of(expert) == pool}

    def total(self, experts: Iterable[Expert]) -> int:
        return sum(self.rules.size(expert) for expert in experts)

    def room(self, pool: int, among: set[Expert]) -> int:
        """Units that the residents of a pool leave, counting only those ``among`` some experts."""
        return self.rules.pools[pool] - self.total(self.members(pool) & among)

    def is_full(self, expert: Expert) -> bool:
        """Whether an expert has no room in its pool without an eviction."""
        return self.room(self.pool_of(expert), self.resident) < self.rules.size(expert)

    def ahead(self, expert: Expert) -> int:
        """In how many events its layer runs."""
        gap = expert[0] - self.layer
        return gap if gap > 0 else gap + self.rules.layers

    def next_use(self, expert: Expert) -> float:
        later = (number for number, demand in enumerate(self.future, 1) if number > self.event and expert in demand)
        return next(later, math.inf)

    def priority(self, expert: Expert) -> tuple:
        """What leaves first sorts first."""
        uses, rules = self.uses[expert], self.rules
        last = uses[-1]
        entry = max(place for place, use in enumerate(uses) if use.entry)
        popularity = 0.0 if rules.popularity is None else rules.popularity[expert[0]][expert[1]]
        match rules.policy:
            case "lru":
                rank, tie = 0, last.moment
            case "lfu":
                rank, tie = len(uses), last.moment
            case "lfu_in_cache":
                rank, tie = len(uses) - entry, last.moment
            case "lfru":
                rank, tie = Fraction(len(uses), self.event - last.event + 1), last.moment
            case "class_lru":
                frequency = sum(2.0 ** ((use.step - last.step) / 128) for use in uses)
                rank, tie = -(self.event - last.event) / 2 ** min(math.floor(math.log2(frequency)), 7), last.moment
            case "static":
                rank, tie = popularity, last.moment
            case "least_stale":
                rank, tie = (last.step == self.step, -self.ahead(expert)), uses[entry].moment
            case "moe_infinity":
                score = self.last_known.get(expert, 0.0)
                rank, tie = (score + 1e-8) * (1 - expert[0] / rules.layers), last.moment
            case "moe_spac":
                rank, tie = self.level[expert] if expert[0] > self.layer else 0, last.moment
            case "hobbit":
                used = Fraction(last.step + 2 * len(uses), self.step)
                rank, tie = used + 1 - Fraction(self.ahead(expert) - 1, rules.layers), last.moment
            case "belief":
                rank, tie = -self.wait(expert), last.moment
            case "belady" | "belady_bypass":
                rank, tie = -self.next_use(expert), 0  # ties by the lowest expert only
            case _:
                raise ValueError(f"the reference does not know the policy {rules.policy!r}")
        return rank, tie, expert

    def wait(self, expert: Expert) -> float:
        """Belief's events that a hit takes."""
        hazard = self.hazard(expert)
        probability = self.last_known[expert] if self.has_fresh_score.get(expert) else hazard
        wait = self.rules.layers * (1 - probability) / max(hazard, self.next_score.get(expert, 0.0))
        ahead = self.ahead(expert)
        return min(ahead * (1 / max(probability, 1e-9)), ahead + wait)

    def hazard(self, expert: Expert) -> float:
        layer, number = expert
        runs, rules = self.runs[layer], self.rules
        popularity = rules.top_k / rules.experts if rules.popularity is None else rules.popularity[layer][number]
        uses = total = 0.0
        age = 0
        for demand in runs:
            used = number in demand
            uses, total = uses * 0.97 + used, total * 0.97 + 1
            age = 1 if used else age + (age > 0)
        rate = (24 * popularity + uses) / (24 + total)
        row, column = bisect.bisect_right(rules.age_edges, age), bisect.bisect_right(rules.rate_edges, rate)
        return rules.hazard[row][column]

    def victim(self, pool: int) -> Expert:
        return min(self.members(pool) - self.pinned, key=self.priority)

    def is_more_popular(self, expert: Expert, victim: Expert) -> bool:
        (layer, number), (other, its) = expert, victim
        return self.rules.popularity[layer][number] > self.rules.popularity[other][its]

    def admit(self, expert: Expert, victim: Expert) -> bool:
        """Whether a prefetch is let in for a victim (for belady_bypass, a demanded expert too)."""
        match self.rules.policy:
            case "belief":
                return self.wait(expert) < self.wait(victim)
            case "belady_bypass":
                return self.next_use(expert) < self.next_use(victim)
            case "moe_infinity":
                value, other = (
                    (self.last_known.get(e, 0.0) + 1e-8) * (1 - e[0] / self.rules.layers) for e in (expert, victim)
                )
                return value > other
        return True

    def use(self, expert: Expert, *, entry: bool = False) -> None:
        self.uses[expert].append(Use(self.moment, self.event, self.step, entry))

    def evict(self, expert: Expert) -> None:
        self.resident.remove(expert)
        if expert in self.open:
            self.open.remove(expert)
            self.counts[expert[0]]["wasted_prefetches"] += 1

    def evict_for(self, expert: Expert, victim: Expert) -> None:
        """Evict a victim, and then as many more as an expert needs."""
        self.evict(victim)
        while self.is_full(expert):
            self.evict(self.victim(self.pool_of(expert)))

    def enter(self, expert: Expert) -> None:
        assert not self.is_full(expert)
        self.resident.add(expert)
        self.use(expert, entry=True)

    # The link.

    def copying(self, expert: Expert) -> float:
        return self.rules.transfer * self.rules.relative(expert)

    def reading(self, expert: Expert) -> float:
        return self.rules.flash * self.rules.relative(expert)

    def duration(self, expert: Expert) -> float:
        return self.copying(expert) + (0 if expert in self.host else self.reading(expert))

    def way(self, expert: Expert, since: float) -> tuple[float, float]:
        """When a transfer would begin, and when its copy would."""
        if not self.rules.flash:
            begins = max(self.free, since)
            return begins, begins
        if expert not in self.host:
            begins = max(self.flash_free, since)
            return begins, max(self.free, begins + self.reading(expert))
        since = max(since, self.arrives.get(expert, 0.0) - self.copying(expert))  # its read may not have ended
        early = max(self.gap[0], since)
        begins = early if early + self.copying(expert) <= self.gap[1] else max(self.free, since)
        return begins, begins

    def send(self, expert: Expert, since: float) -> float:
        begins, copies = self.way(expert, since)
        if self.rules.flash and expert not in self.host:
            self.flash_free = begins + self.reading(expert)
            if max(self.free, since) < self.flash_free:
                self.gap = (max(self.free, since), self.flash_free)
        elif copies < self.free:
            self.gap = (copies + self.copying(expert), self.gap[1])
        self.busy += self.copying(expert)
        self.arrives[expert] = copies + self.copying(expert)
        self.free = max(self.free, self.arrives[expert])
        if self.rules.size(expert) <= self.rules.host_slots:  # larger ones pass through
            self.host = [*(other for other in self.host if other != expert), expert]
            while self.total(self.host) > self.rules.host_slots:
                self.host.pop(0)
        return self.arrives[expert]

    def advance(self, until: float) -> None:
        """Let time pass; what waits begins, in its order, if its way is free before the end, and finds room."""
        rules, since, self.now = self.rules, self.now, until
        for expert in [*self.queue, *self.fills]:
            waits = self.queue if expert in self.queue else self.fills
            pool = self.pool_of(expert)
            if not rules.instant and self.way(expert, since)[0] >= self.now:
                continue
            if self.room(pool, self.pinned) < rules.size(expert):
                continue
            waits.remove(expert)
            if self.is_full(expert):
                victim = self.victim(pool)
                stays = rules.policy == "static" and waits is self.fills and not self.is_more_popular(expert, victim)
                if rules.prefetch != "oracle" and (stays or not self.admit(expert, victim)):
                    continue
                self.evict_for(expert, victim)
            self.enter(expert)
            self.pinned.add(expert)
            self.send(expert, since)
            if self.counted:
                self.open.add(expert)
                self.counts[expert[0]]["prefetch_transfers"] += 1

    # What happens.

    def start_step(self, counted: bool) -> None:
        self.step += 1
        self.layer = -1
        self.pinned = set()
        self.counted = counted

    def preload(self) -> None:
        """Move those of the most uses per unit in, the best last."""
        ranked = sorted(
            ((layer, e) for layer in range(self.rules.layers) for e in range(self.rules.experts)),
            key=lambda expert: (-self.rules.popularity[expert[0]][expert[1]] / self.rules.size(expert), expert),
        )
        chosen: list[Expert] = []
        for expert in ranked:
            pool = self.pool_of(expert)
            of_pool = [other for other in chosen if self.pool_of(other) == pool]
            if self.total([*of_pool, expert]) <= self.rules.pools[pool]:
                chosen.append(expert)
        arrivals = [self.now]
        for expert in reversed(chosen):
            self.moment += 1
            self.enter(expert)
            self.open.add(expert)
            arrivals.append(self.send(expert, self.now))
            self.counts[expert[0]]["prefetch_transfers"] += 1
        self.now = max(arrivals)

    def learn(self, layer: int, scores: list[float]) -> None:
        for expert, score in enumerate(scores):
            self.known[layer, expert] = self.last_known[layer, expert] = score
            self.has_fresh_score[layer, expert] = True

    def enqueue_prefetch(self, selected: list[Expert]) -> None:
        if not selected:
            return
        self.moment += 1
        for expert in selected:
            if expert in self.resident:
                self.pinned.add(expert)
                self.use(expert)
            elif expert not in self.queue:
                self.queue.append(expert)
                self.fills = [fill for fill in self.fills if fill != expert]
        self.advance(self.now)

    def choose_host(self, layer: int, tokens: dict[int, int], each: float) -> set[Expert]:
        """What the host computes of an event; `hosting` is when it has done so."""
        rules, chosen = self.rules, set()
        away = {(layer, e) for e in tokens if (layer, e) not in self.resident or self.arrives[layer, e] > self.now}
        self.hosting, link = self.now, max(self.free, self.now)
        device = self.now + each * (len(tokens) - len(away))
        for expert in sorted(away, key=lambda e: (-tokens[e[1]], e)):
            by_host = self.hosting + max(rules.host, rules.host_flops * tokens[expert[1]])
            comes = self.arrives[expert] if expert in self.resident else link + self.copying(expert)
            by_device = max(device, comes) + each
            if rules.misses == "best" and by_device <= by_host:
                device, link = by_device, max(link, comes)
            else:
                self.hosting = by_host
                chosen.add(expert)
        return chosen

    def demand(self, layer: int, tokens: dict[int, int], each: float = 0) -> None:
        """Begin an event."""
        self.event += 1
        self.moment += 1
        self.layer = layer
        demanded = {(layer, expert) for expert in tokens}
        here = demanded & self.resident
        late = {expert for expert in here if self.arrives[expert] > self.now}
        self.on_host = set() if self.rules.misses == "move" else self.choose_host(layer, tokens, each)
        waiting = (demanded - here - self.on_host) & set(self.queue)
        missed = demanded - here - waiting
        row = self.counts[layer]
        for name, number in (
            ("accesses", len(demanded)),
            ("hits", len(here - late)),
            ("late_hits", len(late | waiting)),
            ("misses", len(missed)),
            ("demand_transfers", len(missed - self.on_host)),
            ("prefetch_transfers", len(waiting)),
            ("on_host", len(self.on_host)),
        ):
            row[name] += number if self.counted else 0
        row["useful_prefetches"] += len((here - late) & self.open)
        self.open -= here
        self.pinned = set(here)
        for expert in here:
            self.use(expert)
        self.queue = [expert for expert in self.queue if expert[0] != layer]
        self.fills = [expert for expert in self.fills if expert[0] != layer] + sorted(self.on_host - here)
        self.runs[layer].append(tokens)
        for expert in range(self.rules.experts):
            self.known.pop((layer, expert), None)
            self.has_fresh_score[layer, expert] = False
            self.next_score.pop((layer, expert), None)
            if self.rules.policy == "moe_spac":
                count, level = tokens.get(expert, 0), self.level[layer, expert]
                if count - level >= 5:
                    self.level[layer, expert] = min(level + 1, 5)
                elif level - count >= 1:
                    self.level[layer, expert] = level - 1
                self.known[layer, expert] = self.level[layer, expert] / 5

    def wave(self, missing: list[Expert]) -> list[Expert]:
        """The first of the missing: those that fit next to what is pinned, such as the demanded residents."""
        if not missing or self.rules.policy == "belady_bypass":
            return missing
        return missing[: self.room(self.pool_of(missing[0]), self.pinned) // self.rules.size(missing[0])]

    def transfer(self, missing: list[Expert]) -> None:
        """Move in what a wave lacks."""
        for expert in missing:
            self.send(expert, self.now)
        if self.rules.policy == "belady_bypass" and missing:
            self.pinned = set()
        for expert in missing:
            if self.is_full(expert):
                victim = self.victim(self.pool_of(expert))
                if self.rules.policy == "belady_bypass" and not self.admit(expert, victim):
                    continue
                self.evict_for(expert, victim)
            self.enter(expert)
            if self.rules.policy != "belady_bypass":
                self.pinned.add(expert)

    def finish(self) -> None:
        for layer, _ in self.open:
            self.counts[layer]["wasted_prefetches"] += 1
        self.open, self.queue, self.fills = set(), [], []

    # Prefetchers.

    def best(self, layer: int, most: int | None, threshold: float | None) -> list[Expert]:
        """The best-scored of a layer, ties by the lower id."""
        found = [(layer, e) for e in range(self.rules.experts) if (layer, e) in self.known]
        found = [expert for expert in found if threshold is None or self.known[expert] > threshold]
        return sorted(found, key=lambda expert: (-self.known[expert], expert))[:most]

    def select(self, layer: int, *, computed: bool = False) -> list[Expert]:
        """What the prefetcher wants once a layer is routed or computed, or at -1 when the step starts."""
        rules = self.rules
        if rules.prefetch == "oracle":
            return self.oracle()
        if rules.prefetch == "none" or (layer < 0 and not rules.first_layers):
            return []
        if rules.prefetch == "adaptive":
            return self.adaptive(layer)
        if rules.prefetch == "moe_infinity":
            return self.moe_infinity(layer)
        if layer < 0:
            layers = range(min(rules.distance, rules.layers))
        elif rules.distance == 0 or computed != (rules.lookahead == "computed"):
            layers = ()
        else:
            layers = range(layer + rules.distance, min(layer + rules.distance + 1, rules.layers))
        return [expert for later in layers for expert in self.best(later, rules.most, rules.threshold)]

    def oracle(self) -> list[Expert]:
        """The next demands that fit into their pools, out of as many events as could fill the cache."""
        selected: list[Expert] = []
        smallest = min(self.rules.units, default=1)
        horizon = sum(self.rules.pools) // (smallest * self.rules.top_k) + 1
        for demand in self.future[self.event : self.event + horizon]:
            for expert in sorted(demand):
                pool = self.pool_of(expert)
                taken = self.total(other for other in selected if self.pool_of(other) == pool)
                if expert not in selected and taken + self.rules.size(expert) <= self.rules.pools[pool]:
                    selected.append(expert)
        return selected

    def adaptive(self, layer: int) -> list[Expert]:
        """The best-scored that still fit among the jobs taken, each done by its layer's routing."""
        candidates = []
        for later in range(layer + 1, self.rules.layers):
            for rank, expert in enumerate(self.best(later, 2 * self.rules.top_k, self.rules.threshold)):
                if expert not in self.resident or rank < self.rules.top_k:
                    candidates.append((later, rank, expert))
        jobs: list[tuple[int, int, Expert]] = []
        for job in sorted(candidates, key=lambda c: (-self.known[c[2]], c)):
            if self.fits([*jobs, job]):
                jobs.append(job)
        return [expert for _, _, expert in sorted(jobs)]

    def fits(self, jobs: list[tuple[int, int, Expert]]) -> bool:
        """Whether all that have to cross the link can, each before its layer needs it, in the order of layers."""
        time = max(self.free, self.now)
        for layer, _, expert in sorted(jobs):
            if expert not in self.resident:
                time += self.duration(expert)
                if time > self.need[layer]:
                    return False
        return True

    def moe_infinity(self, layer: int) -> list[Expert]:
        rules = self.rules
        room = rules.top_k
        if not rules.instant and layer + 1 < rules.layers:
            gap = self.need[layer + 1] - max(self.free, self.now)
            room = min(math.floor(max(gap, 0) / rules.transfer) + rules.top_k, 64)
        found = [expert for expert in self.known if expert[0] > layer and expert not in self.resident]

        def priority(expert: Expert) -> float:
            return (self.known[expert] + 1e-8) * (1 - (expert[0] - layer) / rules.layers)

        return sorted(found, key=lambda expert: (-priority(expert), expert))[:room]

    # A sequence.

    def publish_scores(self, step: Step, following: Step | None, layer: int, *, computed: bool = False) -> None:
        """Take in what is known once a layer is routed or computed, or at -1 when the step starts."""
        rules = self.rules
        behind = {h: min(h, rules.layers) for h in rules.lookaheads if isinstance(h, int)}
        behind |= {"computed": 1, "token": rules.layers, "next": rules.layers + 1}
        if layer >= 0 and not computed and following and not following.first and "next" in following.scores:
            self.learn(layer, following.scores["next"][layer])
            self.next_score |= {(layer, expert): score for expert, score in enumerate(following.scores["next"][layer])}
        for later in range(layer + 1, rules.layers):
            # Whole-token scores come as if from L layers before. The shortest lookahead among the scores that come now
            # is used; of two of one layer, that which waits for computing. Scores of the next run came with the step
            # before, unless there is none.
            fresh = [
                h
                for h in rules.lookaheads
                if h in step.scores and h != 0 and max(later - behind[h], -1) == layer and (h != "next" or step.first)
                if layer < 0 or computed == (h == "computed")
            ]
            if fresh:
                chosen = min(fresh, key=lambda h: (behind[h], h != "computed"))
                self.learn(later, step.scores[chosen][later])

    def issue_prefetches(self, layer: int, *, computed: bool = False) -> None:
        """Ask for what is selected once a layer is routed or computed, or at -1 when the step starts."""
        rules = self.rules
        selected = self.select(layer, computed=computed)
        if rules.prefetch in ("adaptive", "moe_infinity", "oracle"):
            self.queue = []
        self.enqueue_prefetch(selected)

    def run(self, steps: list[Step]) -> list[tuple[float, float]]:
        """Step a sequence; return each step's seconds of stall and of computing."""
        rules, spent = self.rules, []
        for step, following in itertools.zip_longest(steps, steps[1:]):
            begins, stall = self.now, 0.0
            other = rules.other + step.context * rules.cached
            self.start_step(step.counted)
            self.need = [begins + (i + 1) * other + i * rules.top_k * rules.expert for i in range(rules.layers)]
            self.publish_scores(step, following, -1)
            self.issue_prefetches(-1)
            for layer, tokens in enumerate(step.demands):
                self.advance(self.now + other)
                if 0 in rules.lookaheads:  # a policy may offer scores where a window has none of its own
                    if 0 in step.scores:
                        self.learn(layer, step.scores[0][layer])
                    if rules.prefetch == "scored" and rules.distance == 0 and (layer > 0 or rules.first_layers):
                        self.enqueue_prefetch(self.best(layer, rules.most, rules.threshold))
                each = rules.expert
                if tokens:
                    each = max(each, rules.flops * sum(tokens.values()) / len(tokens))
                routed, waited, computing = self.now, 0.0, 0.0
                self.demand(layer, tokens, each)
                self.publish_scores(step, following, layer)
                demanded = {(layer, expert) for expert in tokens}
                here = sorted(demanded & self.resident - self.on_host)  # of the first wave
                missing = sorted(demanded - self.resident - self.on_host)
                while True:
                    began, coming = self.now, self.wave(missing)
                    missing = missing[len(coming) :]
                    self.transfer(coming)
                    in_wave = [*here, *coming]
                    # An expert and all that arrive after it compute after its arrival. A product has no sum's
                    # rounding, where FLOPs decide and an expert takes no whole ticks.
                    arrivals = sorted(max(began, self.arrives.get(expert, 0.0)) for expert in in_wave)
                    left = len(in_wave)
                    ends = max([began + each * left, *(came + each * (left - i) for i, came in enumerate(arrivals))])
                    waited += ends - (began + each * left)
                    computing += each * left
                    if not missing:
                        if self.on_host:  # the event lasts longer than without waiting for transfers
                            ends = max(ends, self.hosting)
                            waited = ends - max(routed + computing, self.hosting)
                        for later in range(layer + 1, rules.layers):
                            gap = later - layer
                            self.need[later] = ends + gap * other + (gap - 1) * rules.top_k * rules.expert
                        if rules.after_routing:
                            self.issue_prefetches(layer)
                    self.advance(ends)
                    self.pinned -= demanded
                    here = []
                    if not missing:
                        break
                stall += waited
                if rules.instant:
                    self.advance(self.now)
                if rules.after_computing:
                    self.publish_scores(step, following, layer, computed=True)
                    self.issue_prefetches(layer, computed=True)
            if rules.outside:
                self.advance(self.now + rules.outside)
            spent.append((stall, self.now - begins - stall))
        return spent
