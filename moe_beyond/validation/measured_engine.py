"""The measurements of another engine, which wrote its hits and its times per token next to its routing."""

from dataclasses import dataclass

import numpy as np

from moe_beyond.cache.policies import load_policy
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry, parse_budget
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.sequence import Group, ReplaySequence
from moe_beyond.traces.engine_log import EngineLog
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import expert_ids
from moe_beyond.validation.measured import COMPUTING, TRANSFERS, Ints, Measured, expert_bytes

TIMES = ("wall_ms", "compute_ms", "read_bytes")
"""Metrics that a comparison of times needs."""
BUDGET = "cache_budget_MiB"
"""Figure of a log's summary with the budget of the engine."""


@dataclass(frozen=True)
class EngineOptions:
    """Strategy of an engine, as far as its recording does not name it.

    Attributes:
        policy: Name of the eviction policy.
        budget: Memory for experts; None for the budget that the recording names.
    """

    policy: str
    budget: str | None


def measured_engine(traces: TraceSet, options: EngineOptions) -> Measured:
    """Return the measurements of an engine.

    Args:
        traces: Trace set of ``moe-beyond import route-trace`` with metrics.
        options: Policy and budget of the engine.

    Raises:
        UserError: The set has no log or no metrics, they belong to another run, or the budget is unknown.
    """
    logs, geometry, bits = traces.engine_logs(), traces.geometry, traces.manifest.bits
    if not logs:
        raise UserError(
            f"{traces.folder}: has neither telemetry of a run nor the log of an engine; give a folder of run --trace, "
            "or of import route-trace"
        )
    if missing := [name for name in TIMES if any(name not in log.metrics for log in logs)]:
        raise UserError(
            f"{traces.folder}: its log has no {', '.join(missing)} per token; import the recording with --metrics"
        )
    budget = parse_budget(_budget(logs, options, str(traces.folder)), geometry, bits)
    load_policy(options.policy)
    sequences = tuple(
        ReplaySequence(geometry, trace.experts, None, trace.decode_start, trace.sequence_id) for trace in traces
    )
    _check_logs(logs, sequences, str(traces.folder))
    settings = ReplaySettings(
        budget.slots, options.policy, prefill_chunk=max(1, *(sequence.decode_start for sequence in sequences)),
        carry_over=True, bits=bits, budget_bytes=budget.bytes,
    )  # fmt: skip
    steps = [sequence.as_group(settings) for sequence in sequences]
    counts = np.concatenate([_counts(geometry, *each) for each in zip(sequences, steps, logs, strict=True)])
    wall, computing, read_bytes = (
        np.concatenate([log.metrics[name][group.first] for log, group in zip(logs, steps, strict=True)])
        for name in TIMES
    )
    moved = counts[:, :, 2] @ expert_bytes(geometry, bits)
    generated = np.concatenate([group.size == 1 for group in steps]) & np.isfinite(wall)
    return Measured(
        name=str(traces.folder),
        geometry=geometry,
        settings=settings,
        profile=None,
        sequences=sequences,
        counts=counts,
        transfers=counts[:, :, 2].sum(1),
        read_bytes=np.where(np.isfinite(read_bytes), read_bytes, moved),
        generated=generated,
        seconds=1e-3 * wall,
        parts={TRANSFERS: 1e-3 * (wall - computing), COMPUTING: 1e-3 * computing},
        link=None,
    )


def _check_logs(logs: list[EngineLog], sequences: tuple[ReplaySequence, ...], folder: str) -> None:
    """Check that the logs are those of the sequences.

    Raises:
        UserError: They have other sequences, or other numbers of tokens.
    """
    if [(log.sequence_id, log.residency.shape) for log in logs] != [
        (sequence.name, sequence.experts.shape) for sequence in sequences
    ]:
        raise UserError(f"{folder}: its log has other sequences than its traces; import the recording again")


def _budget(logs: list[EngineLog], options: EngineOptions, folder: str) -> str:
    """Return the budget of an engine as text.

    Raises:
        UserError: Neither the options nor the recording name it.
    """
    if options.budget is not None:
        return options.budget
    budgets = {log.summary.get(BUDGET) for log in logs}
    if len(budgets) != 1 or (budget := budgets.pop()) is None:
        raise UserError(f"{folder}: its log does not name the budget of the engine; give --budget")
    return f"{budget!r}MiB"


def _counts(geometry: Geometry, sequence: ReplaySequence, group: Group, log: EngineLog) -> Ints:
    """Return hits, late hits and misses of every event, ``(S, L, 3)``: of the distinct experts of each step."""
    layers, experts, _ = geometry.shape()
    steps = np.repeat(np.arange(len(group.size)), group.size)
    ids = expert_ids(sequence.experts, experts)
    events = steps[:, None, None] * layers + np.arange(layers)[:, None]
    present = ids < experts
    keys, first = np.unique((events * experts + ids)[present], return_index=True)
    resident = log.residency[present][first] > 0
    counts = np.zeros((len(group.size) * layers, 3), np.int64)
    np.add.at(counts, (keys // experts, np.where(resident, 0, 2)), 1)
    return counts.reshape(-1, layers, 3)
