"""Prediction of a layer's next run, by the next token, before that token's id is known.

Eviction needs it: once a layer has run, all its experts wait for the next token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_beyond.predictors.modules.copy_attention import CopyAttention


class NextTokenHead(nn.Module):
    """Logits of each layer for the next token, available once the layer is routed.

    They are the sum of maps of the token's features, of running averages of the sequence's experts up to this token, of
    the layer's experts, and of the recurrent state after the layer. Copy heads add the experts that followed the
    attended earlier tokens.

    Args:
        layers: Number of MoE layers, L.
        experts: Experts per layer, E.
        width: Features per token.
        layer_width: Features of the recurrent state over layers.
        averages: Number of running averages.
        copy_heads: Number of copy-attention heads; 0 disables them.
        window: Tokens that a copy head spans, including the current token.
    """

    def __init__(
        self, layers: int, experts: int, width: int, layer_width: int, averages: int, copy_heads: int, window: int
    ) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(layers, experts))  # logits of a sequence's first token
        self.from_token = nn.Linear(width, layers * experts)
        self.from_history = nn.Parameter(torch.zeros(averages, layers * experts))
        self.from_expert = nn.Parameter(torch.zeros(layers, experts, experts))
        self.from_state = nn.Parameter(torch.randn(layers, layer_width, experts) * layer_width**-0.5)
        self.copying = CopyAttention(width, copy_heads, window, layers * experts) if copy_heads else None

    def forward(self, x: Tensor, used: Tensor, token_ids: Tensor, real: Tensor, states: Tensor, past: Tensor) -> Tensor:
        """Return the logits that predict each real token, from the tokens before it.

        Args:
            x: Features ``(B, T, width)`` of the tokens.
            used: 1 if a token is routed to an expert, ``(B, T, L*E)``.
            token_ids: Token ids ``(B, T)``.
            real: Mask ``(B, T)`` bool of the N real tokens.
            states: Recurrent states ``(L, N, layer_width)``; states[l] depends on the layers up to l.
            past: Logits ``(N, L*E)`` of the running averages, which include the token's own experts.

        Returns:
            Logits ``(N, L, E)``.
        """
        layers, experts = self.first.shape
        by_layer = used[real].view(-1, layers, experts).transpose(0, 1)
        logits = self.from_token(x[real]) + past
        if self.copying is not None:  # the successor of an earlier token is known by now, layer by layer
            logits = logits + self.copying(x, functional.pad(used[:, 1:], (0, 0, 0, 1)), token_ids)[real]
        of_layers = torch.bmm(by_layer, self.from_expert) + torch.bmm(states, self.from_state)
        logits = logits.view(-1, layers, experts) + of_layers.transpose(0, 1)
        rows = logits.new_zeros(*real.shape, layers, experts)
        rows[real] = logits
        first = self.first.to(rows.dtype).expand(len(real), 1, -1, -1)
        from_token_before: Tensor = torch.cat([first, rows[:, :-1]], 1)[real]
        return from_token_before
