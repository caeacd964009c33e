"""Neural-network modules that architectures share."""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports

if TYPE_CHECKING:
    from moe_beyond.predictors.modules.copy_attention import CopyAttention as CopyAttention
    from moe_beyond.predictors.modules.copy_attention import LayerCopyAttention as LayerCopyAttention
    from moe_beyond.predictors.modules.next_token_head import NextTokenHead as NextTokenHead
    from moe_beyond.predictors.modules.prefix_memory import PrefixMemory as PrefixMemory
    from moe_beyond.predictors.modules.routing_memory import RoutingMemory as RoutingMemory
    from moe_beyond.predictors.modules.token_embedding import TokenEmbedding as TokenEmbedding
    from moe_beyond.predictors.modules.window_attention import WindowBlock as WindowBlock

_MODULES = {
    "CopyAttention": "copy_attention",
    "LayerCopyAttention": "copy_attention",
    "NextTokenHead": "next_token_head",
    "PrefixMemory": "prefix_memory",
    "RoutingMemory": "routing_memory",
    "TokenEmbedding": "token_embedding",
    "WindowBlock": "window_attention",
}
"""Public name -> module of this package."""

__all__ = sorted(_MODULES)
__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
