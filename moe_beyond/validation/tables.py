"""The tables of ``moe-beyond validate``: a recording next to its replay."""

from rich.table import Table

from moe_beyond.report.labels import NO_VALUE
from moe_beyond.report.tables.wrapping import WrappedTable
from moe_beyond.validation.comparison import STEADY, Pair, Validation

FITTED = (
    ("link_gb_per_s", "GB/s"),
    ("link_latency_us", "us per transfer"),
    ("prefetch_us", "us per prefetch in addition"),
    ("other_ms", "ms per layer"),
    ("layer_us", "us per layer in addition"),
    ("expert_ms", "ms per expert"),
    ("token_ms", "ms per token"),
    ("overlap", "overlap"),
)
"""Fields of a device that a fit sets, and their units."""


def validation_tables(validation: Validation) -> list[Table]:
    """Return the table of counts and the table of times.

    Args:
        validation: Comparison of a recording with its replay.
    """
    settings, times = validation.measured.settings, validation.times
    strategy = settings.strategy
    counts = WrappedTable(title=f"{strategy}, {settings.slots:,} slots: counts of all steps")
    _headings(counts, "count", "replayed", "difference")
    for name, pair in validation.counts.items():
        counts.add_row(name, f"{pair.recorded:,.0f}", f"{pair.replayed:,.0f}", f"{pair.difference:+,.0f}")
    spent = WrappedTable(title=f"{strategy}: milliseconds per token, mean of {times.tokens:,} generated tokens")
    _headings(spent, "part", "forecast", "difference", "error")
    for name, pair in {**times.parts, "token": times.token_ms}.items():
        spent.add_row(name, f"{pair.recorded:.3f}", f"{pair.replayed:.3f}", f"{pair.difference:+.3f}", _percent(pair))
    return [counts, spent]


def validation_lines(validation: Validation) -> list[str]:
    """Return the lines about speed, equal events, and the device.

    Args:
        validation: Comparison of a recording with its replay.
    """
    times, device = validation.times, validation.device
    lines = [f"tokens/s: {_speed(times.tokens_per_second)}; r2 of the tokens' times {_r2(times.r2)}"]
    steady, correlation = times.steady
    if steady < times.tokens:
        lines.append(
            f"without {times.tokens - steady:,} tokens of over {STEADY:g} times the median besides transfers: squared "
            f"correlation {_r2(correlation)}"
        )
    if times.given_computing is not None:
        speed, r2 = times.given_computing
        lines.append(f"given the recorded computing of each token: tokens/s {_speed(speed)}; r2 {_r2(r2)}")
    if validation.as_run is not None:
        lines.append(str(validation.as_run))
    values = ", ".join(f"{value:.4g} {unit}" for name, unit in FITTED if (value := getattr(device, name)) is not None)
    origin = "given"
    if validation.fitted_on:
        origin = f"fitted on the first {validation.fitted_on:,} generated tokens, judged on the other ones"
    return [*lines, f"device {device.name} ({origin}): {values}"]


def _headings(table: Table, *names: str) -> None:
    first, *others = names
    table.add_column(first)
    for name in ("recorded", *others):
        table.add_column(name, justify="right")


def _percent(pair: Pair) -> str:
    return NO_VALUE if pair.error is None else f"{pair.error:+.1%}"


def _speed(pair: Pair) -> str:
    return f"{pair.recorded:.3f} recorded, {pair.replayed:.3f} forecast ({_percent(pair)})"


def _r2(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.3f}"
