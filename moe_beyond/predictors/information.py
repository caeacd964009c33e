"""What a predictor knows, and when."""

from dataclasses import dataclass
from typing import Literal

from moe_beyond.lookahead import Lookahead


@dataclass(frozen=True)
class InformationSet:
    """The information set of one predictor instance; derived from its arguments, checked by tests.

    Attributes:
        lookaheads: What its H outputs are, in order.
        available_after: Whether a score exists once a layer is *routed*, or only once it is *computed* (predictors that
            read layer inputs).
        causal: Whether every score ignores later tokens.
        token_ids: Whether it reads token ids.
        hidden_states: Which hidden states of the present token it reads, if any: router inputs, which exist once a
            layer is routed, or layer inputs, once the layer before is computed.
        gate_weights: Whether it reads router weights.
    """

    lookaheads: tuple[Lookahead, ...]
    available_after: Literal["routed", "computed"] = "routed"
    causal: bool = True
    token_ids: bool = True
    hidden_states: Literal["router_inputs", "layer_inputs"] | None = None
    gate_weights: bool = False

    def describe(self) -> str:
        """Say it in a line, for tables and cards."""
        words = ["lookahead " + ", ".join(map(str, self.lookaheads)), f"known when {self.available_after}"]
        words += [] if self.causal else ["sees later tokens"]
        words += [f"reads {self.hidden_states.replace('_', ' ')}"] if self.hidden_states else []
        words += ["reads gate weights"] if self.gate_weights else []
        return "; ".join(words)
