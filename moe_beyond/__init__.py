"""Record, predict and replay mixture-of-experts routing under a memory budget, and run models under it.

Example:
    >>> import moe_beyond as mb
    >>> traces = mb.load_traces("traces/webglm")  # doctest: +SKIP
    >>> predictor = mb.load_predictor("cross_layer.deepseek-v2-lite-puffin-small")  # doctest: +SKIP
    >>> mb.replay(traces, predictor, budget="10%", device="rtx4060-laptop").table()  # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports
from moe_beyond.version import __version__ as __version__

if TYPE_CHECKING:
    from moe_beyond.api import ReplayReport as ReplayReport
    from moe_beyond.api import evaluate as evaluate
    from moe_beyond.api import import_traces as import_traces
    from moe_beyond.api import list_pretrained as list_pretrained
    from moe_beyond.api import load_predictor as load_predictor
    from moe_beyond.api import load_traces as load_traces
    from moe_beyond.api import plan as plan
    from moe_beyond.api import record as record
    from moe_beyond.api import replay as replay
    from moe_beyond.errors import UserError as UserError
    from moe_beyond.geometry import Geometry as Geometry
    from moe_beyond.runtime.offloading import load_offloaded as load_offloaded
    from moe_beyond.runtime.offloading import offload as offload
    from moe_beyond.runtime.run import OffloadedRun as OffloadedRun
    from moe_beyond.traces.reader import TraceSet as TraceSet

_MODULES = {
    "Geometry": "geometry",
    "OffloadedRun": "runtime.run",
    "ReplayReport": "api",
    "TraceSet": "traces.reader",
    "UserError": "errors",
    "evaluate": "api",
    "import_traces": "api",
    "list_pretrained": "api",
    "load_offloaded": "runtime.offloading",
    "load_predictor": "api",
    "load_traces": "api",
    "offload": "runtime.offloading",
    "plan": "api",
    "record": "api",
    "replay": "api",
}
"""Public name -> module of this package; a module is imported on first use, so that the package imports at once."""

__all__ = ["__version__", *_MODULES]

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
