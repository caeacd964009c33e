"""The conditions of replays in one line: start of a sequence, steps, counted tokens and the limits of times."""

from collections.abc import Sequence

from moe_beyond.report.labels import BASELINES
from moe_beyond.simulator import Result

FORECAST = "tok/s is a forecast"
PARTS = {"outside_params": "dense layers and head", "kv_values_per_token": "the KV cache"}
"""Field of a geometry -> parts of computing whose times need it."""


def format_conditions(results: Sequence[Result]) -> str:
    """Describe the conditions of replays, separated by semicolons.

    Args:
        results: Results of one command, at least one. They differ only in policy, prefetcher, budget and window.
    """
    clauses = [_start(results), _steps(results), format_counts(results[0])]
    if timed := [result for result in results if result.device is not None and not result.measured]:
        clauses.append(FORECAST + format_left_out(timed[0].left_out or []))
    if oversized := format_oversized(results):
        clauses.append(oversized)
    return "; ".join(clauses)


def format_left_out(fields: Sequence[str]) -> str:
    """Name the parts of computing that a timing model leaves out; an empty text if there are none.

    Args:
        fields: Fields that the geometry lacks.
    """
    if not fields:
        return ""
    parts = " and ".join(PARTS[name] for name in fields)
    return f" without {parts}: the geometry has no {', '.join(fields)}"


def format_counts(result: Result) -> str:
    """State the numbers of counted sequences and tokens, and of sequences shorter than the warm-up."""
    counted = f"{result.sequences:,} sequence{'' if result.sequences == 1 else 's'}, {result.tokens:,} tokens counted"
    if not result.warmup_tokens:
        return counted
    excluded = f"{result.too_short:,} of {result.sequences + result.too_short:,} sequences are too short to count"
    return f"{counted} after a warm-up of {result.warmup_tokens:,} tokens; {excluded}"


def format_oversized(results: Sequence[Result]) -> str:
    """List the budgets that exceed the device's memory; an empty text if every budget fits."""
    budgets = sorted({result.budget_slots for result in results if not result.fits_device})
    if not budgets:
        return ""
    first = next(result for result in results if not result.fits_device)
    return (
        f"{first.device} has room for {first.device_slots:,} experts, next to other weights and an eighth kept free: "
        f"{', '.join(f'{slots:,}' for slots in budgets)} slots do not fit"
    )


def _start(results: Sequence[Result]) -> str:
    """Describe the cache at the start of a sequence."""
    if any(result.carry_over for result in results):
        return "each sequence starts with the cache of the previous one"
    warm = dict.fromkeys(result.strategy for result in results if result.warm_start)
    cold = {result.strategy for result in results if not result.warm_start}
    if warm and cold <= BASELINES.keys() | {"all_resident"}:
        return (
            f"each sequence starts with the most popular experts{' (baselines: with an empty cache)' if cold else ''}"
        )
    popular = f" ({', '.join(warm)}: with the most popular experts)" if warm else ""
    return f"each sequence starts with an empty cache{popular}"


def _steps(results: Sequence[Result]) -> str:
    """Describe the tokens of a step."""
    first = results[0]
    chunk = first.prefill_chunk
    text = f"prompts in steps of {chunk:,} tokens" if chunk else "one token per step, prompts included"
    if first.batch_size > 1:
        text += f", batches of {first.batch_size} sequences"
    if windows := sorted({result.window for result in results if result.window > 1}):
        strategies = dict.fromkeys(result.strategy for result in results if result.window > 1)
        text += f"; {', '.join(strategies)}: windows of {', '.join(map(str, windows))} drafted tokens"
    if chunk or first.batch_size > 1 or windows:
        text += "; hit rate over the distinct experts of a step, bytes over the experts of its tokens one by one"
    return text
