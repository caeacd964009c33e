"""Causal attention over the last W tokens: in exact blocks for a batch, or step by step with a state of W tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional

MASKED = float("-inf")
"""Bias of a pair of tokens that may not attend."""


class WindowBlock(nn.Module):
    """A pre-norm transformer block in which each token attends to itself and to the ``window - 1`` tokens before it.

    Positions enter as a learned bias per head and distance, so a step needs no absolute position.

    Args:
        width: Features per token.
        heads: Number of attention heads.
        window: Tokens that a token attends to, W.
        dropout: Probability of dropping a feature of either branch's output.
    """

    def __init__(self, width: int, heads: int, window: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(heads, window))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, in time linear in T.

        Args:
            x: Features ``(B, T, width)``.

        Returns:
            Features ``(B, T, width)``.
        """
        queries, keys, values = self._project(x)
        if x.shape[1] <= self.window:
            bias = self._bias_by_distance(x.shape[1], 0)
            mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        else:
            mixed = self._in_blocks(queries, keys, values)
        return self._finish(x, mixed.transpose(1, 2).flatten(2))

    def step(self, x: Tensor, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Process one token.

        Args:
            x: Features ``(1, 1, width)`` of the token.
            cache: Keys and values ``(1, heads, t, width / heads)`` of the last t < W tokens; None at the start.

        Returns:
            The token's output ``(1, 1, width)``, and the cache for the next token.
        """
        queries, keys, values = self._project(x)
        if cache is not None:
            keys, values = torch.cat([cache[0], keys], 2), torch.cat([cache[1], values], 2)
        bias = self.bias[:, : keys.shape[2]].flip(-1)[None, :, None]
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        start = max(0, keys.shape[2] - (self.window - 1))
        return self._finish(x, mixed.transpose(1, 2).flatten(2)), (keys[:, :, start:], values[:, :, start:])

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.query_key_value(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        return queries, keys, values

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.dropout(self.out(mixed))
        out: Tensor = x + self.dropout(self.mlp(self.before_mlp(x)))
        return out

    def _bias_by_distance(self, length: int, earlier: int) -> Tensor:
        """Return the bias ``(heads, length, earlier + length)``; `MASKED` for later tokens and outside the window."""
        query = torch.arange(length, device=self.bias.device)
        distance = query[:, None] + earlier - torch.arange(earlier + length, device=self.bias.device)
        visible = (distance >= 0) & (distance < self.window)
        return self.bias[:, distance.clamp(0, self.window - 1)].masked_fill(~visible, MASKED)

    def _in_blocks(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend from each block of W queries to the keys of the block and of the block before it."""
        batch, heads, length, size = queries.shape
        width = self.window
        blocks = -(-length // width)
        padded = [functional.pad(x, (0, 0, 0, blocks * width - length)) for x in (queries, keys, values)]
        queries, keys, values = (x.view(batch, heads, blocks, width, size).transpose(1, 2) for x in padded)
        keys, values = (torch.cat([functional.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x], 3) for x in (keys, values))
        bias = self._bias_by_distance(width, width).expand(blocks, -1, -1, -1).clone()
        bias[0, :, :, :width] = MASKED
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        return mixed.transpose(1, 2).reshape(batch, heads, blocks * width, size)[:, :, :length]
