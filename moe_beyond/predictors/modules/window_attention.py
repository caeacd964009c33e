"""Causal attention over the last W tokens: exact in blocks for a batch, and step by step with a state of W tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional

NEVER = float("-inf")


class WindowBlock(nn.Module):
    """A pre-norm transformer block whose tokens see themselves and the ``window - 1`` tokens before them.

    Positions enter as a learned bias per head and distance, so that a step needs no absolute position.

    Args:
        width: Features of a token.
        heads: Attention heads.
        window: Tokens that a token sees, W.
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
        """Map ``(B, T, width)`` to the same shape; linear in T."""
        queries, keys, values = self._project(x)
        if x.shape[1] <= self.window:
            mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=self._mask(x.shape[1], 0))
        else:
            mixed = self._in_blocks(queries, keys, values)
        return self._finish(x, mixed.transpose(1, 2).flatten(2))

    def step(self, x: Tensor, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Take in one token.

        Args:
            x: ``(1, 1, width)``.
            cache: Keys and values ``(1, heads, t, width / heads)`` of the last t < W tokens, or None at the start.

        Returns:
            The token's output ``(1, 1, width)`` and the cache for the next one.
        """
        queries, keys, values = self._project(x)
        if cache is not None:
            keys, values = torch.cat([cache[0], keys], 2), torch.cat([cache[1], values], 2)
        bias = self.bias[:, : keys.shape[2]].flip(-1)[None, :, None]
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        keep = self.window - 1
        start = max(0, keys.shape[2] - keep)
        return self._finish(x, mixed.transpose(1, 2).flatten(2)), (keys[:, :, start:], values[:, :, start:])

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.query_key_value(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        return queries, keys, values

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.dropout(self.out(mixed))
        out: Tensor = x + self.dropout(self.mlp(self.before_mlp(x)))
        return out

    def _mask(self, length: int, earlier: int) -> Tensor:
        """Bias ``(heads, length, earlier + length)`` by distance; `NEVER` for later tokens and beyond the window."""
        here = torch.arange(length, device=self.bias.device)
        distance = here[:, None] + earlier - torch.arange(earlier + length, device=self.bias.device)
        seen = (distance >= 0) & (distance < self.window)
        return self.bias[:, distance.clamp(0, self.window - 1)].masked_fill(~seen, NEVER)

    def _in_blocks(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend block by block of W queries to the block's own keys and those of the block before."""
        batch, heads, length, size = queries.shape
        width = self.window
        blocks = -(-length // width)
        padded = [functional.pad(x, (0, 0, 0, blocks * width - length)) for x in (queries, keys, values)]
        queries, keys, values = (x.view(batch, heads, blocks, width, size).transpose(1, 2) for x in padded)
        keys, values = (torch.cat([functional.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x], 3) for x in (keys, values))
        mask = self._mask(width, width).expand(blocks, -1, -1, -1).clone()
        mask[0, :, :, :width] = NEVER
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return mixed.transpose(1, 2).reshape(batch, heads, blocks * width, size)[:, :, :length]
