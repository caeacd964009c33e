"""Formats that have K experts in every entry."""

from moe_beyond.errors import UserError
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import has_padding
from moe_beyond.traces.trace import Trace


def check_no_padding(trace: Trace, traces: TraceSet) -> None:
    """Check that every slot of a sequence holds an expert.

    Raises:
        UserError: One was taken by an identity or a skip expert, which the format has no word for.
    """
    if has_padding(trace.experts):
        raise UserError(
            f"{traces.folder}: sequence {trace.sequence_id!r} has entries of fewer than "
            f"{traces.geometry.top_k} experts, which the format cannot say"
        )
