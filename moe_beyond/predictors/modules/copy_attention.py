"""Attention over earlier tokens whose values are the experts that those used: what was routed so once may be again.

Nothing is mixed on the way: an expert's logit gains only where tokens that a head picks used that very expert.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_beyond.predictors.modules.window_attention import NEVER

FEATURES = 32  # of a query, and of a key
TOKENS_AT_ONCE = 256


class CopyAttention(nn.Module):
    """Heads that each pick earlier tokens when a token starts.

    A head's part is gate(t) * weight(l, e) * sum over s < t of a(t, s) * used(s, l, e), with a softmax over the last
    ``window - 1`` tokens of queries times keys, plus a bias by distance, and two more where s is the same token, and
    where the token before it is the same as well.

    Args:
        width: Features of a token's state.
        heads: Heads; each has a weight for every expert of every layer.
        window: Tokens back that are seen, and one; at least 2.
        total: L * E.
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
        """Return what the heads add to the logits.

        Args:
            x: ``(B, T, width)`` states.
            used: ``(B, T, L*E)``, 1 where a token is routed to an expert.
            token_ids: ``(B, T)``.

        Returns:
            ``(B, T, L*E)``; a token's own experts are not in it.
        """
        queries, keys = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key))
        gate = self.gate(x).sigmoid().transpose(1, 2)[..., None]
        before = functional.pad(token_ids[:, :-1], (1, 0), value=-1)
        added = []
        for start, stop, first, bias, earlier in _parts(x.shape[1], self.bias, self.window):
            alike = token_ids[:, start:stop, None] == token_ids[:, None, first:stop]
            twice = alike & (before[:, start:stop, None] == before[:, None, first:stop])
            alike, twice = alike[:, None].float(), twice[:, None].float()
            match = queries[:, :, start:stop] @ keys[:, :, first:stop].transpose(-1, -2) * FEATURES**-0.5 + bias
            match = match + self.same[:, 0, None, None] * alike + self.same[:, 1, None, None] * twice
            shares = match.softmax(-1) * earlier * gate[:, :, start:stop]
            copied = [(shares[:, head] @ used[:, first:stop]) * weight for head, weight in enumerate(self.weight)]
            added.append(torch.stack(copied).sum(0))
        return torch.cat(added, 1)


class LayerCopyAttention(nn.Module):
    """Heads that pick earlier tokens anew after every layer, by where those had been routed up to it.

    Once j layers of a token are routed, a head compares the recurrent state with those of earlier tokens at the same
    point, and adds what the picked ones used in the layers j .. j + H - 1 that come next.

    Args:
        layers: L.
        experts: E.
        width: Features of the recurrent state.
        lookaheads: H.
        heads: Heads.
        window: Tokens back that are seen, and one; at least 2.
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
        """Return the weights ``(L, heads, H, E)`` of the layers that come after j are routed; 0 past the last."""
        layers = self.weight.shape[2]
        moved = [functional.pad(w, (0, 0, 0, i))[:, i : i + layers] for i, w in enumerate(self.weight)]
        return torch.stack(moved, 1).permute(2, 0, 1, 3)

    def forward(self, states: Tensor, used: Tensor, real: Tensor) -> Tensor:
        """Return what the heads add to the logits: ``(N, H, L, E)`` of the N real tokens.

        Args:
            states: ``(L, N, width)``; states[j] knows the layers before j.
            used: ``(B, T, L, E)``, 1 where a token is routed to an expert.
            real: ``(B, T)`` bool.
        """
        layers, length = len(states), real.shape[1]
        queries, keys = (self._in_rows(torch.bmm(states, part), real) for part in (self.query, self.key))
        gate = (torch.bmm(states, self.gate) + self.gate_bias[:, None]).sigmoid()
        by_layer = used.permute(2, 0, 1, 3)
        ahead = functional.pad(by_layer, (0, 0, 0, 0, 0, 0, 0, self.lookaheads - 1))
        values = torch.cat([ahead[i : i + layers] for i in range(self.lookaheads)], -1)  # (L, B, T, H*E)
        copied = []
        for start, stop, first, bias, earlier in _parts(length, self.bias, self.window):
            match = queries[..., start:stop, :] @ keys[..., first:stop, :].transpose(-1, -2) * FEATURES**-0.5 + bias
            shares = match.softmax(-1) * earlier
            copied.append(shares @ values[:, :, None, first:stop].to(shares.dtype))  # (L, B, heads, t, H*E)
        each = torch.cat(copied, 3).transpose(2, 3)[:, real]
        each = each.view(*each.shape[:3], self.lookaheads, -1)
        added = torch.einsum("lnhse,lnh,lhse->lnse", each, gate, self.weights_ahead())
        # Layer l at lookahead h is what comes h-th after l - h + 1 layers; or, so early, (l + 1)-th after none.
        layer, lookahead = torch.arange(layers), torch.arange(self.lookaheads)[:, None]
        found: Tensor = added[(layer - lookahead).clamp(min=0), :, torch.minimum(lookahead, layer)]
        return found.permute(2, 0, 1, 3)

    def _in_rows(self, x: Tensor, real: Tensor) -> Tensor:
        """Lay ``(L, N, heads * FEATURES)`` of real tokens out as ``(L, B, heads, T, FEATURES)``."""
        rows = x.new_zeros(len(x), *real.shape, x.shape[-1])
        rows[:, real] = x
        return rows.view(*rows.shape[:3], self.heads, -1).transpose(2, 3)


def _parts(length: int, bias: Tensor, window: int) -> list[tuple[int, int, int, Tensor, Tensor]]:
    """Cut T tokens into parts that look back together, so that nothing grows with T squared.

    Returns:
        Of each: its tokens ``start .. stop``; the first that they see; the bias ``(heads, t, n)`` by distance, `NEVER`
        for what is not seen; and ``(t, n)`` bool, whether it is an earlier token that is seen.
    """
    parts = []
    for start in range(0, length, TOKENS_AT_ONCE):
        stop, first = min(start + TOKENS_AT_ONCE, length), max(0, start - window + 1)
        distance = torch.arange(start, stop, device=bias.device)[:, None] - torch.arange(
            first, stop, device=bias.device
        )
        earlier = (distance > 0) & (distance < window)
        # The first token sees none; it sees itself instead, to no effect, for a softmax over nothing would be NaN.
        seen = earlier | ((distance == 0) & ~earlier.any(-1, keepdim=True))
        parts.append((start, stop, first, bias[:, distance.clamp(0, window - 1)].masked_fill(~seen, NEVER), earlier))
    return parts
