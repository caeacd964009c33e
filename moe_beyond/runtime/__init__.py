"""Running a model under a memory budget: its experts are moved into slots when they are needed.

.. include:: README.md
"""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports

if TYPE_CHECKING:
    from moe_beyond.runtime.offloading import load_offloaded, offload
    from moe_beyond.runtime.run import OffloadedRun

__all__ = ["OffloadedRun", "load_offloaded", "offload"]

_IMPORTS_TORCH = {"OffloadedRun": "run", "load_offloaded": "offloading", "offload": "offloading"}
"""Public name -> module that is imported when the name is first read, because it imports torch."""

__getattr__, __dir__ = lazy_exports(__name__, _IMPORTS_TORCH)
