"""A sequence, or several that go together, as steps and events."""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.engine import Steps
from moe_beyond.cache.policy_inputs import Stream
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.simulator.settings import ReplaySettings
from moe_beyond.traces.schema import check_experts, expert_ids

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ReplaySequence:
    """What one sequence was routed to, and what was predicted of it.

    Attributes:
        geometry: The model.
        experts: ``(T, L, K)`` expert ids, as in a `moe_beyond.traces.trace.Trace`.
        scores: ``(T, H, L, E)`` float32 probabilities, or None.
        decode_start: The first token that the model wrote itself.
        name: Id of the sequence in the trace set.
    """

    geometry: Geometry
    experts: npt.NDArray[np.integer]
    scores: npt.NDArray[np.float32] | None = None
    decode_start: int = 0
    name: str = ""
    _made: dict[tuple[int, ...], "Group"] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check shapes and values.

        Raises:
            UserError: The experts do not fit the model, or the scores the sequence, or are no probabilities.
        """
        layers, experts, top_k = self.geometry.shape()
        if self.experts.ndim != 3 or self.experts.shape[1:] != (layers, top_k):
            raise UserError(f"experts have shape {self.experts.shape}, expected (T, {layers}, {top_k})")
        if wrong := check_experts(self.experts, experts):
            raise UserError(wrong)
        if self.scores is not None:
            expected = (len(self.experts), self.scores.shape[1] if self.scores.ndim == 4 else -1, layers, experts)
            if self.scores.shape != expected:
                raise UserError(f"scores have shape {self.scores.shape}, expected (T, H, L, E) = {expected}")
            if self.scores.size and not (
                np.isfinite(self.scores).all() and self.scores.min() >= 0 and self.scores.max() <= 1
            ):
                raise UserError("scores are not all finite and within 0..1")

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.experts)

    @cached_property
    def ids(self) -> Ints:
        """``(T, L, K)`` experts as ``layer * E + expert``, in the router's order; -1 where a slot holds none."""
        ids = expert_ids(self.experts, self.geometry.num_experts)
        base = np.arange(self.geometry.num_layers)[:, None] * self.geometry.num_experts
        return np.where(ids < self.geometry.num_experts, ids + base, -1)

    def steps_of_tokens(self, settings: ReplaySettings) -> Ints:
        """Return the number of the step that each token belongs to: ``(T,)``, from 0.

        Prompt tokens are stepped in chunks where there are any, other tokens in windows. A step ends where the prompt
        does and where the warm-up does, so that the same tokens count whatever makes a step.
        """
        length, chunk = len(self), settings.prefill_chunk
        read = min(self.decode_start, length) if chunk else 0
        ends = sorted({read, min(settings.warmup_tokens, length), length} - {0})
        parts, begins, steps = [np.zeros(0, np.int64)], 0, 0
        for end in ends:
            size = chunk if begins < read else settings.window
            parts.append(steps + np.arange(end - begins) // size)
            begins, steps = end, steps - (begins - end) // size
        return np.concatenate(parts)

    def alone(self, settings: ReplaySettings) -> "Group":
        """Return the sequence by itself; replays that step it alike share the work."""
        chunked = settings.prefill_chunk > 0 or settings.window > 1
        warmup = settings.warmup_tokens if chunked else 0  # where every token is a step it changes none
        key = (settings.prefill_chunk, settings.window, warmup, settings.sequential)
        if key not in self._made:
            self._made[key] = Group([self], settings)
        return self._made[key]


class Group:
    """Sequences whose steps go together, one by one.

    Args:
        members: The sequences, each at least one token long.
        settings: How they are stepped.

    Attributes:
        names: Ids of the sequences.
        stream: Their demands.
        ends: ``(S,)`` int64, how many events there are up to the end of each step.
        tokens: ``(n,)`` int64, for how many tokens each expert is demanded.
        first: ``(S,)`` int64, the place in its sequence of the first token of each step.
        size: ``(S,)`` int64, how many tokens each step has.
        in_turn: ``(S,)`` int64, how many of those follow one another in the longest sequence.
        decoding: ``(S,)`` bool, whether they were written by the model, or are treated as if.
    """

    def __init__(self, members: Sequence[ReplaySequence], settings: ReplaySettings) -> None:
        self._members = members
        self.names = tuple(member.name for member in members)
        geometry = members[0].geometry
        layers, experts, _ = geometry.shape()
        self._step_of = [member.steps_of_tokens(settings) for member in members]
        length = max(int(steps[-1]) + 1 for steps in self._step_of)
        self.size: Ints = np.sum([np.bincount(steps, minlength=length) for steps in self._step_of], axis=0)
        longest = max(zip(members, self._step_of, strict=True), key=lambda pair: pair[1][-1])
        self.first = np.searchsorted(longest[1], np.arange(length))
        self.in_turn: Ints = np.bincount(longest[1], minlength=length)
        read = longest[0].decode_start if settings.prefill_chunk else 0
        self.decoding = self.first >= read
        self.ends = np.arange(1, length + 1) * layers
        if settings.sequential:
            there = members[0].ids >= 0
            ids = members[0].ids[there]
            self.stream = Stream(ids, np.arange(len(ids) + 1))
            self.tokens = np.ones(len(ids), np.int64)
            self.ends = there.sum((1, 2)).cumsum()[np.cumsum(self.size) - 1]
        elif (self.size == 1).all():
            self.stream = Stream.of_tokens(geometry, members[0].experts)
            self.tokens = np.ones(len(self.stream.ids), np.int64)
        else:
            total = geometry.total_experts
            keys = np.concatenate(
                [(s[:, None, None] * total + m.ids)[m.ids >= 0] for m, s in zip(members, self._step_of, strict=True)]
            )
            keys, self.tokens = np.unique(keys, return_counts=True)
            events = np.bincount(keys // experts, minlength=length * layers)
            self.stream = Stream(keys % total, np.concatenate([[0], np.cumsum(events)]))

    def without_scores(self) -> "Group":
        """Return the group with the same arrays and without its sequences, whose scores take memory."""
        group = copy(self)
        group._members, group._step_of = (), []  # noqa: SLF001
        return group

    def step_of_events(self) -> Ints:
        """Return the step of each event: ``(events,)``."""
        return np.searchsorted(self.ends, np.arange(len(self.stream.offsets) - 1), side="right")

    def demanded(self) -> Ints:
        """Return how many experts each step demands, token by token: ``(S,)`` int64."""
        until = np.concatenate([[0], np.cumsum(self.tokens)])[self.stream.offsets[self.ends]]
        return np.diff(until, prepend=0)

    def steps(self, settings: ReplaySettings) -> Steps:
        """Return the steps with what is known of them, and which count."""
        layers = settings.slices(self._members[0].geometry.num_layers)
        return Steps(
            ids=self.stream.ids,
            offsets=self.stream.offsets,
            tokens=self.tokens,
            scores=self._scores(len(layers)),
            lookaheads=layers,
            computed=settings.available == "computed",
            counted=self.first >= settings.warmup_tokens,
        )

    def _scores(self, slices: int) -> npt.NDArray[np.float32]:
        """Return ``(S, H, L, E)``: the probability that any token of a step uses an expert.

        Where a step has several tokens of one sequence nothing is known: a score of any but the first uses what the
        tokens before it were routed to.
        """
        layers, experts, _ = self._members[0].geometry.shape()
        length = len(self.size)
        if slices == 0:
            return np.zeros((length, 0, layers, experts), np.float32)
        found = [member.scores for member in self._members]
        for scores in found:
            if scores is None or scores.shape[1] != slices:
                have = 0 if scores is None else scores.shape[1]
                raise UserError(f"scores of {slices} lookaheads are needed, and the sequence has {have}")
        if len(found) == 1 and found[0] is not None and len(found[0]) == length:
            return found[0]
        unused = np.ones((length, slices, layers, experts), np.float32)
        for scores, steps in zip(found, self._step_of, strict=True):
            assert scores is not None
            alone = np.bincount(steps, minlength=length)[steps] == 1
            unused[steps[alone]] *= 1 - scores[alone]
            unused[steps[~alone]] = np.nan
        return 1 - unused


class Grouping:
    """Gathers sequences into the groups that are stepped together.

    Args:
        settings: How they are stepped.

    Attributes:
        taken: Number of sequences that were stepped, or wait for a batch to be full.
        too_short: Number of sequences that the warm-up left out.
    """

    def __init__(self, settings: ReplaySettings) -> None:
        self._settings = settings
        self._waiting: list[ReplaySequence] = []
        self.taken = self.too_short = 0

    def add(self, sequence: ReplaySequence) -> Iterator[Group]:
        """Take a sequence and yield the group that it makes full, if it does.

        A sequence no longer than the warm-up is left out: it has no place in a batch and leaves no trace in a cache
        that is carried over.
        """
        if len(sequence) <= self._settings.warmup_tokens:
            self.too_short += 1
            return
        self.taken += 1
        if self._settings.batch_size == 1:
            yield sequence.alone(self._settings)
            return
        self._waiting.append(sequence)
        if len(self._waiting) == self._settings.batch_size:
            yield from self.rest()

    def rest(self) -> Iterator[Group]:
        """Yield the group that is not full, if there is one."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            yield Group(waiting, self._settings)
