"""Information sets: everything that a predictor reads, and when its scores are available."""

from dataclasses import dataclass
from typing import Literal

from moe_beyond.lookahead import Lookahead


@dataclass(frozen=True)
class InformationSet:
    """Information set of one predictor instance, derived from its arguments and checked by tests.

    Attributes:
        lookaheads: Lookahead of each of the H outputs, in order.
        available_after: Point at which layer l's inputs suffice for the scores of later layers: once layer l is
            ``"routed"``, or only once it is ``"computed"`` (predictors that read layer inputs).
        causal: Whether every score ignores later tokens.
        token_ids: Whether the predictor reads token ids.
        hidden_states: Hidden states of the current token that the predictor reads: ``"router_inputs"``, which exist
            once a layer is routed, ``"layer_inputs"``, which exist once the layer before is computed, or None.
        gate_weights: Whether the predictor reads gate weights.
    """

    lookaheads: tuple[Lookahead, ...]
    available_after: Literal["routed", "computed"] = "routed"
    causal: bool = True
    token_ids: bool = True
    hidden_states: Literal["router_inputs", "layer_inputs"] | None = None
    gate_weights: bool = False
