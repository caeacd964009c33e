"""The conditions of a table of replays in one line: how sequences start, what counts, and that times are bounds."""

from collections.abc import Sequence

from moe_beyond.simulator import Result

UPPER_BOUND = "tok/s: an upper bound, MoE layers only"


def conditions(results: Sequence[Result]) -> str:
    """Say under which conditions replays were made.

    Args:
        results: Results of one command, at least one. They share all but policy, prefetcher, budget and window.
    """
    first = results[0]
    said = [_start(results), _steps(results), counted_words(first)]
    if any(result.device is not None for result in results):
        said.append(UPPER_BOUND)
    if beyond := beyond_memory(results):
        said.append(beyond)
    return "; ".join(said)


def counted_words(result: Result) -> str:
    """Say how many sequences and tokens count, and how many sequences the warm-up left out."""
    counted = f"{result.sequences:,} sequence{'' if result.sequences == 1 else 's'}, {result.tokens:,} tokens count"
    if not result.warmup_tokens:
        return counted
    left_out = f"{result.too_short:,} of {result.sequences + result.too_short:,} sequences are too short to count"
    return f"{counted}, after a warm-up of {result.warmup_tokens:,}; {left_out}"


def beyond_memory(results: Sequence[Result]) -> str:
    """Name the budgets that their device cannot hold; nothing where it holds all."""
    budgets = sorted({result.budget_slots for result in results if not result.fits_device})
    if not budgets:
        return ""
    first = next(result for result in results if not result.fits_device)
    return (
        f"{first.device} has room for {first.device_slots:,} experts, next to other weights and an eighth kept free: "
        f"{', '.join(f'{slots:,}' for slots in budgets)} slots do not fit"
    )


def _start(results: Sequence[Result]) -> str:
    """Say what a sequence finds in the cache."""
    if any(result.carry_over for result in results):
        return "sequences find the cache as the one before left it"
    if any(result.warm_start for result in results):
        cold = "" if all(result.warm_start for result in results) else ", references with an empty one"
        return f"sequences start with the most popular experts{cold}"
    return "sequences start with an empty cache"


def _steps(results: Sequence[Result]) -> str:
    """Say which tokens make a step."""
    first = results[0]
    chunk = first.prefill_chunk
    words = f"prompt tokens are read {chunk:,} a step" if chunk else "prompt tokens are stepped one by one"
    if first.batch_size > 1:
        words += f", {first.batch_size} sequences together"
    if windows := sorted({result.window for result in results if result.window > 1}):
        names = dict.fromkeys(result.strategy for result in results if result.window > 1)
        words += f"; {', '.join(names)}: windows of {', '.join(map(str, windows))} drafted tokens"
    if chunk or first.batch_size > 1 or windows:
        words += "; hits there: of a step's distinct experts; bytes: over what its tokens demand one by one"
    return words
