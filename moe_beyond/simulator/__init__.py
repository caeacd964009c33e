"""Replay of traces through the cache core: settings, devices and their timing, bounds, and the result.

.. include:: README.md
"""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports
from moe_beyond.simulator.devices import DEVICES, Device, load_device
from moe_beyond.simulator.settings import BOUNDS, ReplaySettings

if TYPE_CHECKING:
    from moe_beyond.simulator.bounds import Bound
    from moe_beyond.simulator.replay import Replay
    from moe_beyond.simulator.result import Result
    from moe_beyond.simulator.sequence import ReplaySequence
    from moe_beyond.simulator.timeline import Timeline

__all__ = [
    "BOUNDS",
    "DEVICES",
    "Bound",
    "Device",
    "Replay",
    "ReplaySequence",
    "ReplaySettings",
    "Result",
    "Timeline",
    "load_device",
]

_COMPILED = {
    "Bound": "bounds",
    "Replay": "replay",
    "ReplaySequence": "sequence",
    "Result": "result",
    "Timeline": "timeline",
}
"""Public name -> module that is imported when the name is first read, because it imports numba."""

__getattr__, __dir__ = lazy_exports(__name__, _COMPILED)
