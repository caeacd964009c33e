"""What a layer uses when it runs next: by the next token, whose id is not known yet.

Eviction needs it: of a layer that has just run every expert waits for the next token.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_beyond.predictors.modules.copy_attention import CopyAttention
from moe_beyond.predictors.stepping.copy_attention import CopyAttentionState, Ids, copied

Floats = npt.NDArray[np.float32]


class NextTokenHead(nn.Module):
    """Logits of each layer for the token after, once the layer was routed.

    They are the sum of maps of the token's state, of running averages of the sequence's own experts up to this token,
    of the layer's own experts, and of the recurrent state after it; and of what followed the earlier tokens that heads
    pick.

    Args:
        layers: L.
        experts: E.
        width: Features of a token's state.
        layer_width: Features of the recurrent state.
        averages: How many running averages there are.
        copy_heads: Heads that pick earlier tokens.
        window: Tokens back that those see, and one.
    """

    def __init__(
        self, layers: int, experts: int, width: int, layer_width: int, averages: int, copy_heads: int, window: int
    ) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(layers, experts))  # before a sequence
        self.from_token = nn.Linear(width, layers * experts)
        self.from_history = nn.Parameter(torch.zeros(averages, layers * experts))
        self.from_expert = nn.Parameter(torch.zeros(layers, experts, experts))
        self.from_state = nn.Parameter(torch.randn(layers, layer_width, experts) * layer_width**-0.5)
        self.copying = CopyAttention(width, copy_heads, window, layers * experts) if copy_heads else None

    def forward(self, x: Tensor, used: Tensor, token_ids: Tensor, real: Tensor, states: Tensor, past: Tensor) -> Tensor:
        """Return logits ``(N, L, E)``, of each real token those that were known before it.

        Args:
            x: ``(B, T, width)`` states of tokens.
            used: ``(B, T, L*E)``, 1 where a token is routed to an expert.
            token_ids: ``(B, T)``.
            real: ``(B, T)`` bool.
            states: ``(L, N, layer_width)``; states[l] knows the layers up to l.
            past: ``(N, L*E)``, what the running averages say, the token's own experts included.
        """
        layers, experts = self.first.shape
        by_layer = used[real].view(-1, layers, experts).transpose(0, 1)
        logits = self.from_token(x[real]) + past
        if self.copying is not None:  # what came after an earlier token is known by now, layer by layer
            logits = logits + self.copying(x, functional.pad(used[:, 1:], (0, 0, 0, 1)), token_ids)[real]
        of_layers = torch.bmm(by_layer, self.from_expert) + torch.bmm(states, self.from_state)
        logits = logits.view(-1, layers, experts) + of_layers.transpose(0, 1)
        rows = logits.new_zeros(*real.shape, layers, experts)
        rows[real] = logits
        first = self.first.to(rows.dtype).expand(len(real), 1, -1, -1)
        known_before: Tensor = torch.cat([first, rows[:, :-1]], 1)[real]
        return known_before


class NextTokenHeadState:
    """What a stepper keeps for `NextTokenHead`.

    Args:
        model: The module.
        decays: ``(averages, 1)``, of the running averages.
    """

    def __init__(self, model: NextTokenHead, decays: Floats) -> None:
        self._copying = CopyAttentionState(model.copying) if model.copying is not None else None
        self._from_state, self._from_expert = model.from_state.detach().numpy(), model.from_expert.detach().numpy()
        self._from_token, self._bias = (x.detach().numpy() for x in (model.from_token.weight, model.from_token.bias))
        history = model.from_history.detach().numpy()
        self._from_history, self._averaged = decays * history, ((1 - decays) * history).sum(0)
        self._shape = tuple(model.first.shape)
        self._known = self._own = np.zeros(self._shape, np.float32)

    def start(self, token: Floats, token_id: int, averages: Floats, past: Ids) -> None:
        """Begin a token.

        Args:
            token: ``(width,)``, its state.
            token_id: Its id.
            averages: ``(averages, L*E)``, of the tokens before.
            past: ``(t, L*K)``, what they were routed to, as ``layer * E + expert``, -1 for none.
        """
        known = self._from_token @ token + self._bias + (averages * self._from_history).sum(0)
        own = self._averaged
        if self._copying is not None:
            shares = self._copying.start(token, token_id)
            if len(past):
                known += copied(shares[:, :-1], past[1:], self._copying.weight)
                own = own + shares[:, -1] @ self._copying.weight  # the token before was followed by this one
        self._known, self._own = known.reshape(self._shape), own.reshape(self._shape)

    def step(self, layer: int, experts: npt.NDArray[np.int64], state: Floats) -> Floats:
        """Return the logits ``(1, E)`` of a layer's next run.

        Args:
            layer: The one that was routed.
            experts: ``(K,)`` or fewer.
            state: ``(layer_width,)``, the recurrent one after it.
        """
        logits = self._known[layer] + self._from_expert[layer, experts].sum(0) + state @ self._from_state[layer]
        logits[experts] += self._own[layer, experts]
        found: Floats = logits[None]
        return found
