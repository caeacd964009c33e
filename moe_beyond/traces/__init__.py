"""Trace sets: the recorded routing of an MoE model on disk, and its reading and writing.

The names below are imported on first use, because pyarrow is.

.. include:: README.md
"""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports

if TYPE_CHECKING:
    from moe_beyond.traces.hidden_states import HiddenStates
    from moe_beyond.traces.manifest import Manifest, ShardInfo, Tokenizer
    from moe_beyond.traces.reader import Split, TraceSet
    from moe_beyond.traces.router_weights import Routers
    from moe_beyond.traces.schema import expert_ids, padding_id
    from moe_beyond.traces.shard import Shard
    from moe_beyond.traces.steering import Steering
    from moe_beyond.traces.tokenizers import load_vocabulary
    from moe_beyond.traces.trace import Trace
    from moe_beyond.traces.writer import TraceWriter, open_writer

__all__ = [
    "HiddenStates",
    "Manifest",
    "Routers",
    "Shard",
    "ShardInfo",
    "Split",
    "Steering",
    "Tokenizer",
    "Trace",
    "TraceSet",
    "TraceWriter",
    "expert_ids",
    "load_vocabulary",
    "open_writer",
    "padding_id",
]

_MODULES = {
    "HiddenStates": "hidden_states",
    "Manifest": "manifest",
    "Routers": "router_weights",
    "Shard": "shard",
    "ShardInfo": "manifest",
    "Split": "reader",
    "Steering": "steering",
    "Tokenizer": "manifest",
    "Trace": "trace",
    "TraceSet": "reader",
    "TraceWriter": "writer",
    "expert_ids": "schema",
    "load_vocabulary": "tokenizers",
    "open_writer": "writer",
    "padding_id": "schema",
}
"""Module of each name."""

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
