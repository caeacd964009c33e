"""Figures of a run for a user: LRU and Belady on the same routing, times per token, bytes and memory."""

import resource
import sys
from typing import TYPE_CHECKING, Any

import torch

from moe_beyond.cache.misses import MOVE
from moe_beyond.evaluation.engine import whole_stream
from moe_beyond.evaluation.strategies import BASELINES, strategy
from moe_beyond.runtime.memory import HOST, Memory
from moe_beyond.runtime.result import carried_settings, logged_sequences
from moe_beyond.runtime.stepping.prediction_log import PredictionLog
from moe_beyond.runtime.stepping.telemetry import Sums
from moe_beyond.runtime.storage.disk_store import NO_WAIT
from moe_beyond.simulator import Replay, ReplaySettings, Result

if TYPE_CHECKING:
    from moe_beyond.runtime.run import OffloadedRun


def replayed_baselines(run: "OffloadedRun") -> list[Result]:
    """Replay LRU and Belady with the budget and the routing of a run.

    Args:
        run: Run whose sequences were read in one forward, and then token by token.

    Raises:
        UserError: A forward is no step of a replay.
    """
    settings = carried_settings(run.strategy.settings, run.log)
    sequences = logged_sequences(run.log, run.geometry)
    common = ReplaySettings(
        settings.slots, scope=settings.scope, carry_over=True, prefill_chunk=settings.prefill_chunk, bits=settings.bits
    )
    results = []
    for policy in BASELINES:
        row = strategy(common, settings.slots, policy)
        replay = Replay(run.geometry, row, stream=whole_stream(sequences, row) if "future" in row.needs else None)
        for sequence in sequences:
            replay.add_sequence(sequence)
        results.append(replay.result())
    return results


def whole_model_bytes(run: "OffloadedRun") -> int:
    """Return the bytes of the weights of the unmodified model in the type that it computes in."""
    experts = run.geometry.num_experts * sum(layout.nbytes for layout in run.store.layouts.values())
    return run.memory().resident_bytes + experts


def peak_memory(place: str) -> int:
    """Return the largest memory so far, in bytes: the resident set of this process, or PyTorch's tensors on a GPU.

    Args:
        place: ``"host"``, or the name of a GPU.
    """
    if place != HOST:
        return torch.cuda.max_memory_allocated(place)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def summary_json(run: "OffloadedRun", memory: Memory) -> dict[str, Any]:
    """Return the figures of a run that its `moe_beyond.simulator.Result` lacks, as plain values.

    Args:
        run: Run with at least one forward.
        memory: Memory of the run.
    """
    telemetry = run.telemetry
    return {
        "model": run.manifest.model_id,
        "revision": run.manifest.revision,
        "prefill": _sums_json(telemetry.prefill),
        "decode": _sums_json(telemetry.decode),
        "transfers": telemetry.transferred,
        "bytes": telemetry.sources._asdict(),
        "unscored_forwards": telemetry.unscored,
        "memory": {**memory.to_json(), "peak_bytes": {place: peak_memory(place) for place in memory.totals}},
    }


def summary_lines(run: "OffloadedRun", memory: Memory) -> list[str]:
    """Return lines about speed, times per token, bytes by source, memory, and a predictor that does not act.

    Args:
        run: Run with at least one forward.
        memory: Memory of the run.
    """
    prefill, decode = run.telemetry.prefill, run.telemetry.decode
    lines = [f"decode: {_speed(decode)}; prefill: {_speed(prefill)}"]
    if decode.tokens:
        spent = {"stall": decode.wait_s, "cache core": decode.cache_s, "predictor": decode.predictor_s}
        if memory.place == HOST:  # a GPU computes after the call of its kernel
            spent["experts"] = decode.compute_s
        if run.strategy.settings.misses != MOVE:
            spent["experts on the host"] = decode.host_s
        each = ", ".join(f"{name} {1e3 * seconds / decode.tokens:.2f} ms" for name, seconds in spent.items())
        lines.append(f"per decoded token: {each}")
    lines += [_bytes_line(run), _memory_line(memory)]
    if run.strategy.settings.misses != MOVE:
        lines.append("the host computes missing experts, so the output equals the model's up to rounding")
    return lines if run.predictions is None else [*lines, *_prediction_lines(run.predictions)]


def _prediction_lines(log: PredictionLog) -> list[str]:
    content = log.to_json()
    if not content["tokens"]:
        return [f"{log.predictor}: no decoded token had scores"]
    lines = [f"{log.predictor} does not act; shares of another token's routing are in brackets"]
    for row in content["lookaheads"]:
        recall, mass = (
            f"{_percent(row[name])} ({_percent(row[f'shuffled_{name}'])})" for name in ("recall_at_k", "gate_mass_at_k")
        )
        shares = f"recall@{content['k']} {recall}, gate mass {mass}"
        lines.append(f"lookahead {row['lookahead']}: {shares} over {row['entries']:,} entries")
    names = ("moved_bytes", "used_bytes", "shuffled_used_bytes", "missed_bytes")
    moved, used, control, missed = (format_bytes(content["prefetch"][name] / content["tokens"]) for name in names)
    return [
        *lines,
        f"prefetch {log.prefetch} would move {moved} per decoded token, and {used} ({control}) of them would be used; "
        f"misses move {missed}",
    ]


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"


def _bytes_line(run: "OffloadedRun") -> str:
    telemetry = run.telemetry
    tokens = max(telemetry.prefill.tokens + telemetry.decode.tokens, 1)
    host, page_cache, disk = (format_bytes(each / tokens) for each in telemetry.sources)
    line = f"bytes per token: {host} from host memory, {page_cache} from the page cache, {disk} from the disk"
    if not NO_WAIT:
        line = f"bytes per token: {host} from host memory, {disk} from the disk or its page cache (indistinct here)"
    sizes = {layout.nbytes for layout in run.store.layouts.values()}
    if len(sizes) == 1 and sum(telemetry.sources) != telemetry.transferred * min(sizes):
        line += "; these are bytes as stored, and the table's bytes count experts in slots"
    return line


def _memory_line(memory: Memory) -> str:
    parts = {
        "resident weights": memory.resident_bytes, "slots": memory.slots_bytes, "staging": memory.staging_bytes,
        "experts in host memory": memory.host_bytes,
    }  # fmt: skip
    held = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
    totals = ", ".join(
        f"{format_bytes(size)} in {place} (peak {format_bytes(peak_memory(place))})"
        for place, size in memory.totals.items()
    )
    return f"memory: {held}; {totals}; the peak of the host includes libraries"


def format_bytes(size: float) -> str:
    """Format a number of bytes, such as ``4.35 MB``; 1 MB is 1e6 bytes."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"


def _speed(sums: Sums) -> str:
    if not sums.tokens:
        return "no tokens"
    return f"{sums.tokens / sums.seconds:,.1f} tokens/s over {sums.tokens:,} tokens"


def _sums_json(sums: Sums) -> dict[str, Any]:
    names = ("steps", "tokens", "seconds", "cache_s", "predictor_s", "wait_s", "compute_s", "host_s")
    speed = sums.tokens / sums.seconds if sums.tokens else None
    return {**{name: getattr(sums, name) for name in names}, "tokens_per_second": speed}
