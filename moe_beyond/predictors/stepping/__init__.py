"""Decoding state of modules, and compiled functions for steppers."""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports

if TYPE_CHECKING:
    from moe_beyond.predictors.stepping.copy_attention import CopyAttentionState as CopyAttentionState
    from moe_beyond.predictors.stepping.copy_attention import LayerCopyAttentionState as LayerCopyAttentionState
    from moe_beyond.predictors.stepping.copy_attention import copy_experts as copy_experts
    from moe_beyond.predictors.stepping.gru import gru_step as gru_step
    from moe_beyond.predictors.stepping.next_token_head import NextTokenHeadState as NextTokenHeadState
    from moe_beyond.predictors.stepping.prefix_memory import PrefixMemoryState as PrefixMemoryState
    from moe_beyond.predictors.stepping.ring_buffer import RingBuffer as RingBuffer

_MODULES = {
    "CopyAttentionState": "copy_attention",
    "LayerCopyAttentionState": "copy_attention",
    "NextTokenHeadState": "next_token_head",
    "PrefixMemoryState": "prefix_memory",
    "RingBuffer": "ring_buffer",
    "copy_experts": "copy_attention",
    "gru_step": "gru",
}
"""Public name -> module of this package."""

__all__ = sorted(_MODULES)
__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
