"""Checks of trace sets for formats that cannot express padding."""

from moe_beyond.errors import UserError
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import has_padding
from moe_beyond.traces.trace import Trace


def check_no_padding(trace: Trace, traces: TraceSet) -> None:
    """Check that every entry of a sequence has K experts.

    Args:
        trace: Sequence to check.
        traces: Trace set of the sequence, for error messages.

    Raises:
        UserError: A top-k entry has no expert.
    """
    if has_padding(trace.experts):
        raise UserError(
            f"{traces.folder}: sequence {trace.sequence_id!r} has entries with fewer than "
            f"{traces.geometry.top_k} experts, which this format cannot express; choose libcachesim"
        )
