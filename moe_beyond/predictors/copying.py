"""Attention over earlier tokens whose values are the experts that those used: what was routed so once may be again."""

import torch
from torch import Tensor, nn

NEVER = float("-inf")


class Copying(nn.Module):
    """Heads that each pick earlier tokens, and add the experts of those to the logits.

    A head's part is gate(t) * weight(l, e) * sum over s < t of a(t, s) * used(s, l, e), with a softmax over the last
    ``window - 1`` tokens of queries times keys plus a bias by distance. Nothing is mixed: an expert's logit gains only
    where tokens that the head picks used that very expert.

    Args:
        width: Features of a token's state.
        heads: Heads; each has a weight for every expert of every layer.
        window: Tokens back that are seen, and one.
        total: L * E.
        features: Of a query, and of a key.
    """

    def __init__(self, width: int, heads: int, window: int, total: int, features: int = 32) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.query, self.key = nn.Linear(width, heads * features), nn.Linear(width, heads * features)
        self.gate = nn.Linear(width, heads)
        self.bias = nn.Parameter(torch.zeros(heads, window))
        self.weight = nn.Parameter(torch.full((heads, total), 2.0 / heads))

    def forward(self, x: Tensor, used: Tensor) -> Tensor:
        """Return what the heads add to the logits.

        Args:
            x: ``(B, T, width)`` states.
            used: ``(B, T, L*E)``, 1 where a token is routed to an expert.

        Returns:
            ``(B, T, L*E)``; a token's own experts are not in it.
        """
        queries, keys = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key))
        position = torch.arange(x.shape[1], device=x.device)
        distance = position[:, None] - position
        seen = (distance > 0) & (distance < self.window)
        seen |= (distance == 0) & ~seen.any(-1, keepdim=True)  # a softmax over nothing would be NaN; dropped below
        bias = self.bias[:, distance.clamp(0, self.window - 1)].masked_fill(~seen, NEVER)
        shares = (queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5 + bias).softmax(-1)
        shares = shares * self.gate(x).sigmoid().transpose(1, 2)[..., None] * (distance > 0)
        added = torch.zeros_like(used)
        for head, weight in enumerate(self.weight):
            added = added + (shares[:, head] @ used) * weight
        return added

    def step(self, x: Tensor, keys: Tensor, used: Tensor) -> Tensor:
        """Return ``(L*E,)``, what the heads add for one token.

        Args:
            x: ``(width,)`` state.
            keys: ``(n, heads * features)`` of the n <= window - 1 tokens before, oldest first.
            used: ``(n, L*E)``, what those were routed to.
        """
        if len(keys) == 0:
            return torch.zeros_like(self.weight[0])
        queries = self.query(x).view(self.heads, -1)
        match = torch.einsum("hf,nhf->hn", queries, keys.view(len(keys), self.heads, -1)) * queries.shape[-1] ** -0.5
        shares = (match + self.bias[:, 1 : len(keys) + 1].flip(-1)).softmax(-1) * self.gate(x).sigmoid()[:, None]
        added: Tensor = ((shares @ used) * self.weight).sum(0)
        return added
