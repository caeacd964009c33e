"""Decoding state of the next-token head."""

import numpy as np
import numpy.typing as npt

from moe_beyond.predictors.modules.next_token_head import NextTokenHead
from moe_beyond.predictors.stepping.copy_attention import CopyAttentionState, Ids, copy_experts

Floats = npt.NDArray[np.float32]


class NextTokenHeadState:
    """Parts of the next token's logits that are available before a layer is routed.

    Args:
        module: Next-token head that is stepped.
        decays: Decay of each running average per token, ``(averages, 1)``.
    """

    def __init__(self, module: NextTokenHead, decays: Floats) -> None:
        self._copying = CopyAttentionState(module.copying) if module.copying is not None else None
        self._from_state, self._from_expert = module.from_state.detach().numpy(), module.from_expert.detach().numpy()
        self._from_token, self._bias = (x.detach().numpy() for x in (module.from_token.weight, module.from_token.bias))
        history = module.from_history.detach().numpy()
        self._from_history, self._from_current = decays * history, ((1 - decays) * history).sum(0)
        self._shape = tuple(module.first.shape)
        # Logits of all experts, and logits that are added for experts that the current token uses.
        self._logits = self._bonus = np.zeros(self._shape, np.float32)

    def start(self, x: Floats, token_id: int, averages: Floats, past: Ids) -> None:
        """Start a token.

        Args:
            x: Features ``(width,)`` of the token.
            token_id: Id of the token.
            averages: Running averages ``(averages, L*E)`` over the tokens before.
            past: Experts of the t tokens before, ``(t, L*K)``, as ``layer * E + expert``; -1 for padding.
        """
        logits = self._from_token @ x + self._bias + (averages * self._from_history).sum(0)
        bonus = self._from_current
        if self._copying is not None:
            attention = self._copying.start(x, token_id)
            if len(past):
                logits += copy_experts(attention[:, :-1], past[1:], self._copying.weight)
                bonus = bonus + attention[:, -1] @ self._copying.weight  # this token follows the token before
        self._logits, self._bonus = logits.reshape(self._shape), bonus.reshape(self._shape)

    def step(self, layer: int, experts: npt.NDArray[np.int64], state: Floats) -> Floats:
        """Return the logits ``(1, E)`` of a layer's next run.

        Args:
            layer: Layer that was routed.
            experts: Ids ``(n,)`` of its experts, n <= K.
            state: Recurrent state ``(layer_width,)`` after the layer.
        """
        logits = self._logits[layer] + self._from_expert[layer, experts].sum(0) + state @ self._from_state[layer]
        logits[experts] += self._bonus[layer, experts]
        next_run: Floats = logits[None]
        return next_run
