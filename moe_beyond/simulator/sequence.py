"""A sequence, or several that are stepped together, as steps and events."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.policy_inputs import Stream
from moe_beyond.cache.steps import StepArrays
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.simulator.settings import ReplaySettings
from moe_beyond.traces.schema import check_experts, expert_ids

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ReplaySequence:
    """Routing of one sequence, and its scores.

    Attributes:
        geometry: Geometry of the model.
        experts: Expert ids as in a `moe_beyond.traces.trace.Trace`, ``(T, L, K)`` integer.
        scores: Probabilities, ``(T, H, L, E)`` float32 (default: None).
        decode_start: Position of the first generated token (default: 0).
        name: Id of the sequence in the trace set (default: empty).
        scores_after: Scores of lookahead ``"next"`` that follow the last token, ``(L, E)`` float32 (default: None).
    """

    geometry: Geometry
    experts: npt.NDArray[np.integer]
    scores: npt.NDArray[np.float32] | None = None
    decode_start: int = 0
    name: str = ""
    scores_after: npt.NDArray[np.float32] | None = None
    _groups: dict[tuple[int, ...], "Group"] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check shapes and values.

        Raises:
            UserError: The experts do not fit the model, the scores do not fit the sequence, or a score is not a
                probability.
        """
        layers, experts, top_k = self.geometry.shape()
        if self.experts.ndim != 3 or self.experts.shape[1:] != (layers, top_k):
            raise UserError(f"experts must have shape (T, {layers}, {top_k}) (got {self.experts.shape})")
        if message := check_experts(self.experts, experts):
            raise UserError(message)
        if self.scores is not None:
            expected = (len(self.experts), self.scores.shape[1] if self.scores.ndim == 4 else -1, layers, experts)
            if self.scores.shape != expected:
                raise UserError(f"scores must have shape (T, H, L, E) = {expected} (got {self.scores.shape})")
            if self.scores.size and not (
                np.isfinite(self.scores).all() and self.scores.min() >= 0 and self.scores.max() <= 1
            ):
                raise UserError("scores must be finite and within 0..1")

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.experts)

    @cached_property
    def ids(self) -> Ints:
        """Experts as ``layer * E + expert`` in the router's order, ``(T, L, K)`` int64; -1 for padding."""
        ids = expert_ids(self.experts, self.geometry.num_experts)
        base = np.arange(self.geometry.num_layers)[:, None] * self.geometry.num_experts
        return np.where(ids < self.geometry.num_experts, ids + base, -1)

    def steps_of_tokens(self, settings: ReplaySettings) -> Ints:
        """Return the number of each token's step, from 0, ``(T,)`` int64.

        Prompt tokens form chunks if the settings have a chunk size; other tokens form windows. A step ends at the end
        of the prompt and at the end of the warm-up, so the same tokens count for every size of steps.
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

    def as_group(self, settings: ReplaySettings) -> "Group":
        """Return a group of this sequence only; replays with the same steps share it."""
        chunked = settings.prefill_chunk > 0 or settings.window > 1
        warmup = settings.warmup_tokens if chunked else 0  # it changes no step if every token is a step
        key = (settings.prefill_chunk, settings.window, warmup, settings.sequential)
        if key not in self._groups:
            self._groups[key] = Group([self], settings)
        return self._groups[key]


class Group:
    """Sequences that are stepped together; step n of the group contains step n of every sequence.

    Args:
        members: Sequences, each at least one token long.
        settings: Settings of the replay.

    Attributes:
        names: Ids of the sequences.
        stream: Demand of all events.
        ends: Number of events up to the end of each step, ``(S,)`` int64.
        tokens: Number of tokens that demand each expert of the stream, ``(n,)`` int64.
        first: Position of each step's first token in its sequence, ``(S,)`` int64.
        size: Number of tokens of each step, ``(S,)`` int64.
        context: Number of tokens up to the end of each step, over the sequences that take part in it, ``(S,)`` int64.
        in_turn: Number of consecutive tokens of each step in the longest sequence, ``(S,)`` int64.
        decoding: Whether each step is decoded, ``(S,)`` bool; prompt tokens without chunks count as decoded.
    """

    def __init__(self, members: Sequence[ReplaySequence], settings: ReplaySettings) -> None:
        # The members themselves would refer to each other and to this group, and stay in memory until a collection.
        self.names = tuple(member.name for member in members)
        self._all_scores = [member.scores for member in members]
        self._scores_after = members[0].scores_after if len(members) == 1 else None
        self._geometry = geometry = members[0].geometry
        layers, experts, _ = geometry.shape()
        self._step_of = [member.steps_of_tokens(settings) for member in members]
        length = max(int(steps[-1]) + 1 for steps in self._step_of)
        self.size: Ints = np.sum([np.bincount(steps, minlength=length) for steps in self._step_of], axis=0)
        self.context: Ints = np.zeros(length, np.int64)
        for steps in self._step_of:
            sizes = np.bincount(steps)
            self.context[: len(sizes)] += np.cumsum(sizes)
        longest = max(zip(members, self._step_of, strict=True), key=lambda pair: pair[1][-1])
        self.first = np.searchsorted(longest[1], np.arange(length))
        self.in_turn: Ints = np.bincount(longest[1], minlength=length)
        read = longest[0].decode_start if settings.prefill_chunk else 0
        self.decoding = self.first >= read
        self.ends = np.arange(1, length + 1) * layers
        if settings.sequential:
            present = members[0].ids >= 0
            ids = members[0].ids[present]
            self.stream = Stream(ids, np.arange(len(ids) + 1))
            self.tokens = np.ones(len(ids), np.int64)
            self.ends = present.sum((1, 2)).cumsum()[np.cumsum(self.size) - 1]
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

    def step_of_events(self) -> Ints:
        """Return the number of each event's step, ``(events,)`` int64."""
        return np.searchsorted(self.ends, np.arange(len(self.stream.offsets) - 1), side="right")

    @cached_property
    def demanded(self) -> Ints:
        """Number of experts that each step demands, token by token, ``(S,)`` int64."""
        return self._sums_of_steps(self.tokens)

    def demanded_units(self, units: Ints) -> Ints:
        """Return the sum of the sizes of the experts that each step demands, token by token, ``(S,)`` int64.

        Args:
            units: Size of each expert, ``(L*E,)`` int64.
        """
        return self._sums_of_steps(self.tokens * units[self.stream.ids])

    def _sums_of_steps(self, values: Ints) -> Ints:
        """Return the sum of the values of each step's experts, ``(n,)``, as ``(S,)`` int64."""
        until = np.concatenate([[0], np.cumsum(values)])[self.stream.offsets[self.ends]]
        return np.diff(until, prepend=0)

    def steps(self, settings: ReplaySettings) -> StepArrays:
        """Return the steps with their scores as arrays for the engine."""
        layers = settings.slices(self._geometry.num_layers)
        return StepArrays(
            ids=self.stream.ids,
            offsets=self.stream.offsets,
            tokens=self.tokens,
            scores=self._with_scores_after(self._scores(len(layers))),
            lookaheads=layers,
            counted=self.first >= settings.warmup_tokens,
        )

    def _with_scores_after(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return scores with a row for the step after the last one, if a single sequence has such scores."""
        if self._scores_after is None or scores.shape[1] == 0:
            return scores
        row = np.full((1, *scores.shape[1:]), np.nan, np.float32)
        row[0, -1] = self._scores_after  # lookahead next is the last one
        return np.concatenate([scores, row])

    def _scores(self, slices: int) -> npt.NDArray[np.float32]:
        """Return the probability that any token of a step uses an expert, ``(S, H, L, E)`` float32.

        A step with several tokens of one sequence has no scores: the score of a later token reads the routing of the
        tokens before it.
        """
        layers, experts, _ = self._geometry.shape()
        length = len(self.size)
        if slices == 0:
            return np.zeros((length, 0, layers, experts), np.float32)
        for scores in self._all_scores:
            if scores is None or scores.shape[1] != slices:
                got = 0 if scores is None else scores.shape[1]
                raise UserError(f"the sequence must have scores of {slices} lookaheads (got {got})")
        first = self._all_scores[0]
        if len(self._all_scores) == 1 and first is not None and len(first) == length:
            return first
        unused = np.ones((length, slices, layers, experts), np.float32)
        for scores, steps in zip(self._all_scores, self._step_of, strict=True):
            assert scores is not None
            single = np.bincount(steps, minlength=length)[steps] == 1
            unused[steps[single]] *= 1 - scores[single]
            unused[steps[~single]] = np.nan
        return 1 - unused


class Grouping:
    """Collects sequences into groups that are stepped together.

    Args:
        settings: Settings of the replay.

    Attributes:
        taken: Number of sequences in full groups and in the current one.
        too_short: Number of sequences that are no longer than the warm-up.
    """

    def __init__(self, settings: ReplaySettings) -> None:
        self._settings = settings
        self._waiting: list[ReplaySequence] = []
        self.taken = self.too_short = 0

    def add(self, sequence: ReplaySequence) -> Iterator[Group]:
        """Add a sequence, and yield its group if the group is full.

        A sequence no longer than the warm-up is left out: it belongs to no batch and does not change a cache that is
        carried over.
        """
        if len(sequence) <= self._settings.warmup_tokens:
            self.too_short += 1
            return
        self.taken += 1
        if self._settings.batch_size == 1:
            yield sequence.as_group(self._settings)
            return
        self._waiting.append(sequence)
        if len(self._waiting) == self._settings.batch_size:
            yield from self.flush()

    def flush(self) -> Iterator[Group]:
        """Yield the group that is not full yet, if there is one."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            yield Group(waiting, self._settings)
