"""Recording the routing of a transformers MoE: load a model, run it over prompts, write a trace set.

Names are imported when first used, because the recorder needs torch and the command line's help must not.

.. include:: README.md
"""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports

if TYPE_CHECKING:
    from moe_beyond.collect.collection import collect as collect
    from moe_beyond.collect.config import CollectConfig as CollectConfig
    from moe_beyond.collect.config import ProcessRank as ProcessRank
    from moe_beyond.collect.geometry import measured_geometry as measured_geometry
    from moe_beyond.collect.load import load_model as load_model
    from moe_beyond.collect.prompts import Prompt as Prompt
    from moe_beyond.collect.prompts import as_prompts as as_prompts
    from moe_beyond.collect.prompts import read_prompts as read_prompts
    from moe_beyond.collect.recorder import Recorder as Recorder
    from moe_beyond.collect.recorder import recording as recording
    from moe_beyond.collect.router_probe import find_routers as find_routers
    from moe_beyond.collect.steering import steered as steered

_MODULES = {
    "CollectConfig": "config",
    "ProcessRank": "config",
    "Prompt": "prompts",
    "Recorder": "recorder",
    "as_prompts": "prompts",
    "collect": "collection",
    "find_routers": "router_probe",
    "load_model": "load",
    "measured_geometry": "geometry",
    "read_prompts": "prompts",
    "recording": "recorder",
    "steered": "steering",
}
"""Public name -> module of this package."""

__all__ = sorted(_MODULES)
__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
