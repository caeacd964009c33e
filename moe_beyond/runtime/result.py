"""Counts and measured times of a run, and its sequences as a replay reads them."""

from dataclasses import replace
from typing import Any

import numpy as np

from moe_beyond.cache.cache import Cache
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.runtime.stepping.sequences import SequenceLog
from moe_beyond.runtime.stepping.telemetry import Telemetry
from moe_beyond.simulator import ReplaySequence, ReplaySettings, Result
from moe_beyond.simulator.replay import counts_so_far
from moe_beyond.simulator.result import make_result
from moe_beyond.simulator.sums import SequenceSums
from moe_beyond.simulator.totals import StepTimes, Totals


def run_result(
    geometry: Geometry,
    settings: ReplaySettings,
    *,
    cache: Cache,
    telemetry: Telemetry,
    log: SequenceLog,
    demanded: int,
    device: str,
) -> Result:
    """Return the counts and measured times of a run.

    Args:
        geometry: Geometry of the model.
        settings: Settings of an equal replay, except its steps.
        cache: Cache core with the counts.
        telemetry: Times and bytes.
        log: Sequences that the model has read.
        demanded: Number of experts that were demanded, token by token.
        device: Description of the device.
    """
    prefill, decode = telemetry.prefill, telemetry.decode
    tokens, sequences = prefill.tokens + decode.tokens, len(log.sequences)
    carried = carried_settings(settings, log)
    times = StepTimes(timed=False, counted_tokens=tokens, demanded=demanded)
    totals = Totals(counts_so_far(cache.state), times, SequenceSums(), sequences)
    counted = make_result(geometry, carried, totals)
    measured: dict[str, Any] = {
        "device": f"this machine ({device})",
        "measured": True,
        "bytes_per_token": sum(telemetry.sources) / max(tokens, 1),
        # Forwards without a sequence read several tokens, too, and belong to no prompt.
        "prefill_ms": 1e3 * prefill.seconds / sequences if sequences and not log.unlogged else None,
    }
    if decode.tokens:
        p50, p95, p99 = (float(1e3 * np.quantile(decode.durations, q)) for q in (0.5, 0.95, 0.99))
        measured |= {
            "stall_ms_per_token": 1e3 * decode.wait_s / decode.tokens,
            "compute_ms_per_token": 1e3 * (decode.seconds - decode.wait_s) / decode.tokens,
            "tokens_per_second": decode.tokens / decode.seconds,
            "token_ms_p50": p50,
            "token_ms_p95": p95,
            "token_ms_p99": p99,
        }
    return replace(counted, **measured)


def carried_settings(settings: ReplaySettings, log: SequenceLog) -> ReplaySettings:
    """Return the settings of a replay whose steps are the forwards of a run.

    Args:
        settings: Settings of the run's strategy.
        log: Sequences that were read in one forward, and then token by token.
    """
    longest = max((sequence.steps[0] for sequence in log.sequences), default=1)
    return replace(settings, prefill_chunk=longest)


def logged_sequences(log: SequenceLog, geometry: Geometry) -> list[ReplaySequence]:
    """Return the sequences of a run for a replay.

    Args:
        log: Sequences that the model has read.
        geometry: Geometry of the model.

    Raises:
        UserError: A forward read several tokens after the first forward of its sequence, or belongs to no sequence.
    """
    sequences = []
    for number, logged in enumerate(log.sequences):
        if any(tokens > 1 for tokens in logged.steps[1:]):
            raise UserError(
                f"sequence {number}: a later forward read several tokens, which a replay cannot repeat; read every "
                "prompt in one forward"
            )
        experts = logged.routing(geometry.num_layers)
        sequences.append(ReplaySequence(geometry, experts, None, logged.steps[0], f"sequence-{number}"))
    if log.unlogged:
        raise UserError(
            f"run: {log.unlogged:,} forwards were interrupted, read several sequences, or tokens after rejected "
            "drafts, which a replay cannot repeat; generate one sequence at a time"
        )
    return sequences
