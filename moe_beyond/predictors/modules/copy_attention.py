"""Attention over earlier tokens whose values are the expert sets of those tokens.

The values are not mixed by any map: an expert's logit rises only if tokens that a head attends to used that expert.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_beyond.predictors.modules.window_attention import MASKED

FEATURES = 32  # per query and key
TOKENS_PER_CHUNK = 256


class CopyAttention(nn.Module):
    """Heads that attend to earlier tokens when a token starts.

    A head adds gate(t) * weight(l, e) * sum over s < t of a(t, s) * used(s, l, e) to the logits. The attention a is a
    softmax over the last ``window - 1`` tokens of query times key, plus a bias by distance. Two more biases apply if s
    is the same token as t, and if the tokens before them are also the same.

    Args:
        width: Features per token.
        heads: Number of heads; each has a weight for every expert of every layer.
        window: Tokens that a head spans, including the current token; at least 2.
        total: Number of experts of the model, L * E.
    """

    def __init__(self, width: int, heads: int, window: int, total: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.query, self.key = nn.Linear(width, heads * FEATURES), nn.Linear(width, heads * FEATURES)
        self.gate = nn.Linear(width, heads)
        self.bias = nn.Parameter(torch.zeros(heads, window))
        self.same = nn.Parameter(torch.ones(heads, 2))
        self.weight = nn.Parameter(torch.full((heads, total), 2.0 / heads))

    def forward(self, x: Tensor, used: Tensor, token_ids: Tensor) -> Tensor:
        """Return the heads' part of the logits, which does not depend on a token's own experts.

        Args:
            x: Features ``(B, T, width)`` of the tokens.
            used: 1 if a token is routed to an expert, ``(B, T, L*E)``.
            token_ids: Token ids ``(B, T)``.

        Returns:
            Logits ``(B, T, L*E)``.
        """
        queries, keys = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key))
        gate = self.gate(x).sigmoid().transpose(1, 2)[..., None]
        before = functional.pad(token_ids[:, :-1], (1, 0), value=-1)
        chunks = []
        for start, stop, first, bias, earlier in _chunks(x.shape[1], self.bias, self.window):
            same = token_ids[:, start:stop, None] == token_ids[:, None, first:stop]
            same_pair = same & (before[:, start:stop, None] == before[:, None, first:stop])
            same, same_pair = same[:, None].float(), same_pair[:, None].float()
            match = queries[:, :, start:stop] @ keys[:, :, first:stop].transpose(-1, -2) * FEATURES**-0.5 + bias
            match = match + self.same[:, 0, None, None] * same + self.same[:, 1, None, None] * same_pair
            attention = match.softmax(-1) * earlier * gate[:, :, start:stop]
            by_head = [(attention[:, head] @ used[:, first:stop]) * weight for head, weight in enumerate(self.weight)]
            chunks.append(torch.stack(by_head).sum(0))
        return torch.cat(chunks, 1)


class LayerCopyAttention(nn.Module):
    """Heads that attend to earlier tokens again after every layer, by the routing up to that layer.

    Once j layers of a token are routed, a head compares the recurrent state with the states of earlier tokens after j
    layers. It adds the experts that the attended tokens used in the layers j .. j + H - 1.

    Args:
        layers: Number of MoE layers, L.
        experts: Experts per layer, E.
        width: Features of the recurrent state.
        lookaheads: Number of lookaheads, H.
        heads: Number of heads.
        window: Tokens that a head spans, including the current token; at least 2.
    """

    def __init__(self, layers: int, experts: int, width: int, lookaheads: int, heads: int, window: int) -> None:
        super().__init__()
        self.lookaheads, self.heads, self.window = lookaheads, heads, window
        self.query, self.key = (nn.Parameter(torch.randn(layers, width, heads * FEATURES) * width**-0.5) for _ in "qk")
        self.gate, self.gate_bias = (
            nn.Parameter(torch.zeros(layers, width, heads)),
            nn.Parameter(torch.zeros(layers, heads)),
        )
        self.bias = nn.Parameter(torch.zeros(heads, window))
        self.weight = nn.Parameter(torch.full((lookaheads, heads, layers, experts), 2.0 / heads))

    def weights_ahead(self) -> Tensor:
        """Return the weights ``(L, heads, H, E)`` of the H layers after j layers are routed; 0 past the last layer."""
        layers = self.weight.shape[2]
        moved = [functional.pad(w, (0, 0, 0, i))[:, i : i + layers] for i, w in enumerate(self.weight)]
        return torch.stack(moved, 1).permute(2, 0, 1, 3)

    def forward(self, states: Tensor, used: Tensor, real: Tensor) -> Tensor:
        """Return the heads' part of the logits.

        Args:
            states: Recurrent states ``(L, N, width)`` of the N real tokens; states[j] depends on the first j layers.
            used: 1 if a token is routed to an expert, ``(B, T, L, E)``.
            real: Mask ``(B, T)`` bool of real tokens.

        Returns:
            Logits ``(N, H, L, E)``.
        """
        layers, length = len(states), real.shape[1]
        queries, keys = (self._in_rows(torch.bmm(states, part), real) for part in (self.query, self.key))
        gate = (torch.bmm(states, self.gate) + self.gate_bias[:, None]).sigmoid()
        by_layer = used.permute(2, 0, 1, 3)
        ahead = functional.pad(by_layer, (0, 0, 0, 0, 0, 0, 0, self.lookaheads - 1))
        values = torch.cat([ahead[i : i + layers] for i in range(self.lookaheads)], -1)  # (L, B, T, H*E)
        chunks = []
        for start, stop, first, bias, earlier in _chunks(length, self.bias, self.window):
            match = queries[..., start:stop, :] @ keys[..., first:stop, :].transpose(-1, -2) * FEATURES**-0.5 + bias
            attention = match.softmax(-1) * earlier
            chunks.append(attention @ values[:, :, None, first:stop].to(attention.dtype))  # (L, B, heads, t, H*E)
        attended = torch.cat(chunks, 3).transpose(2, 3)[:, real]
        attended = attended.view(*attended.shape[:3], self.lookaheads, -1)
        after_layers = torch.einsum("lnhse,lnh,lhse->lnse", attended, gate, self.weights_ahead())
        # Layer l at lookahead h is the h-th layer after l - h + 1 layers are routed. For l < h it is the (l + 1)-th
        # layer after none is routed.
        layer, lookahead = torch.arange(layers), torch.arange(self.lookaheads)[:, None]
        logits: Tensor = after_layers[(layer - lookahead).clamp(min=0), :, torch.minimum(lookahead, layer)]
        return logits.permute(2, 0, 1, 3)

    def _in_rows(self, x: Tensor, real: Tensor) -> Tensor:
        """Reshape ``(L, N, heads * FEATURES)`` of the real tokens to ``(L, B, heads, T, FEATURES)``."""
        rows = x.new_zeros(len(x), *real.shape, x.shape[-1])
        rows[:, real] = x
        return rows.view(*rows.shape[:3], self.heads, -1).transpose(2, 3)


def _chunks(length: int, bias: Tensor, window: int) -> list[tuple[int, int, int, Tensor, Tensor]]:
    """Split T tokens into chunks that attend together, so that memory does not grow with T squared.

    Args:
        length: Number of tokens, T.
        bias: Bias by distance, ``(heads, window)``.
        window: Tokens that a head spans.

    Returns:
        For each chunk: its tokens ``start .. stop``, the first token that they attend to, the bias ``(heads, t, n)``
        (`MASKED` for tokens that are not visible), and a mask ``(t, n)`` bool of the visible earlier tokens.
    """
    chunks = []
    for start in range(0, length, TOKENS_PER_CHUNK):
        stop, first = min(start + TOKENS_PER_CHUNK, length), max(0, start - window + 1)
        distance = torch.arange(start, stop, device=bias.device)[:, None] - torch.arange(
            first, stop, device=bias.device
        )
        earlier = (distance > 0) & (distance < window)
        # The first token has no earlier token. It attends to itself, without effect: an empty softmax would be NaN.
        visible = earlier | ((distance == 0) & ~earlier.any(-1, keepdim=True))
        masked = bias[:, distance.clamp(0, window - 1)].masked_fill(~visible, MASKED)
        chunks.append((start, stop, first, masked, earlier))
    return chunks
