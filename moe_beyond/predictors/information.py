"""Information sets: everything that a predictor reads, and when its scores are available."""

from dataclasses import dataclass
from typing import Literal

from moe_beyond.lookahead import Lookahead

StateKind = Literal["router_inputs", "layer_inputs"]


@dataclass(frozen=True)
class InformationSet:
    """Information set of one predictor instance, derived from its arguments and checked by tests.

    Attributes:
        lookaheads: Lookahead of each of the H outputs, in the order of `moe_beyond.lookahead.Lookahead`.
        causal: Whether every score ignores later tokens.
        token_ids: Whether the predictor reads token ids.
        hidden_states: Kinds of hidden states of the current token that the predictor reads, in this order:
            ``"router_inputs"``, which exist once a layer is routed, and ``"layer_inputs"``, which exist once the layer
            before is computed (default: none).
        gate_weights: Whether the predictor reads gate weights.
    """

    lookaheads: tuple[Lookahead, ...]
    causal: bool = True
    token_ids: bool = True
    hidden_states: tuple[StateKind, ...] = ()
    gate_weights: bool = False
