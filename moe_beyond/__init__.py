"""Record, predict and replay mixture-of-experts routing under a memory budget.

Example:
    >>> import moe_beyond as mb
    >>> traces = mb.load_traces("traces/webglm")  # doctest: +SKIP
    >>> predictor = mb.load_predictor("cross_layer.deepseek-v2-lite-puffin")  # doctest: +SKIP
    >>> mb.replay(traces, predictor, budget="10%", device="rtx4060-laptop").table()  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

from moe_beyond.version import __version__ as __version__

if TYPE_CHECKING:
    from moe_beyond.api import Replayed as Replayed
    from moe_beyond.api import evaluate as evaluate
    from moe_beyond.api import load_predictor as load_predictor
    from moe_beyond.api import load_traces as load_traces
    from moe_beyond.api import record as record
    from moe_beyond.api import replay as replay

OFFERED = ("Replayed", "evaluate", "load_predictor", "load_traces", "record", "replay")
"""Of `moe_beyond.api`, what is there by its name alone."""


def __getattr__(name: str) -> Any:
    """Import what a script uses when it first does: the package itself is there at once."""
    if name not in OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moe_beyond import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted((*globals(), *OFFERED))
