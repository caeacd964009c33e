"""What predictors that counted training text tell policies."""

from pathlib import Path

from moe_beyond.errors import UserError
from moe_beyond.predictors.architectures.popularity import Popularity
from moe_beyond.predictors.io.folder import check_fits, load_predictor
from moe_beyond.traces.reader import TraceSet
from moe_beyond.usage_profile import UsageProfile


def load_profile(folder: str | Path, traces: TraceSet) -> UsageProfile:
    """Load the profile out of a fitted ``history`` or ``popularity`` predictor.

    Args:
        folder: The predictor's.
        traces: What it is used on; it must fit.

    Raises:
        UserError: The predictor is another, or does not fit the traces.
    """
    predictor = load_predictor(folder)
    if not isinstance(predictor, Popularity):
        raise UserError(
            f"{folder}: a profile is a fitted history or popularity predictor, not {predictor.architecture}"
        )
    check_fits(predictor, traces.manifest, traces.folder)
    return predictor.profile()
