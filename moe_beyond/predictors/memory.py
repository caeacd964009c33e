"""A vector for each token of what training routed it to, learned without looking at the text that it is used on.

A vector that is learned for a token by itself fits what this very occurrence was routed to, and the rarer the token,
the less that tells of its next one. Here one map is learned for all tokens: from the routing of a token's occurrences
in other sequences to a vector. So a token in training looks as one will that is met later.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_beyond.predictors.base import TrainingText

BACKOFF = 2.0  # occurrences that the popularity counts for
FLOOR = 0.01  # added to shares before their logarithm is taken
ROWS_AT_ONCE = 1024


class RoutingMemory(nn.Module):
    """Maps each known token's routing in training to a vector; that of unknown tokens is zero.

    Of n occurrences, c of which used an expert, and a popularity P the share is (c + 2 P) / (n + 2); the logarithms of
    shares over popularities are mapped linearly. In training the counts are without the sequence at hand (as far as it
    is in the same batch row); otherwise the vectors are looked up, as a predictor folder holds them.

    Args:
        vocab_size: Ids of the tokenizer, V.
        known_tokens: Tokens that are remembered at most: the most frequent ones of the training split.
        total: L * E.
        width: Features.
    """

    rows: Tensor
    vectors: Tensor
    counts: Tensor | None
    occurrences: Tensor | None
    popularity: Tensor | None

    def __init__(self, vocab_size: int, known_tokens: int, total: int, width: int) -> None:
        super().__init__()
        self.known_tokens = min(known_tokens, vocab_size)
        self.map = nn.Linear(total, width, bias=False)
        nn.init.normal_(self.map.weight, std=0.02)
        narrow = torch.int16 if self.known_tokens < 2**15 else torch.int32
        self.register_buffer("rows", torch.zeros(vocab_size, dtype=narrow))  # 0: unknown
        self.register_buffer("vectors", torch.zeros(1 + self.known_tokens, width))
        for name in ("counts", "occurrences", "popularity"):  # of training alone
            self.register_buffer(name, None, persistent=False)
        self.register_state_dict_pre_hook(_fold_first)  # type: ignore[no-untyped-call]

    def prepare(self, text: TrainingText) -> None:
        """Take in what the most frequent training tokens were routed to."""
        found = text.most_frequent(self.known_tokens)
        counts = torch.from_numpy(text.expert_counts(found))
        occurrences = torch.from_numpy(text.token_counts[found]).float()
        self.rows.zero_()
        self.rows[torch.from_numpy(found)] = torch.arange(1, len(found) + 1, dtype=self.rows.dtype)
        self.counts = torch.cat([counts.new_zeros(1, counts.shape[1]), counts])
        self.occurrences = torch.cat([occurrences.new_zeros(1), occurrences])
        self.popularity = counts.sum(0).float() / max(float(occurrences.sum()), 1.0)
        self.fold()

    def forward(self, token_ids: Tensor, hidden: Tensor | None, used: Tensor) -> Tensor:
        """Return vectors ``(B, T, width)``.

        Args:
            token_ids: ``(B, T)``.
            hidden: ``(B, T)`` bool, tokens to treat as unknown; None for none.
            used: ``(B, T, L*E)``, 1 where a token was routed to an expert, 0 where padded; in training it is left out
                of what is remembered.
        """
        rows = self.rows[token_ids].long()
        if hidden is not None:
            rows = rows.masked_fill(hidden, 0)
        if not self.training or self.counts is None or self.occurrences is None:
            return self.vectors[rows]
        real = used.amax(-1) > 0
        same = (token_ids[:, :, None] == token_ids[:, None]) & real[:, None] & (rows > 0)[..., None]
        same = same.to(used.dtype)
        elsewhere = (self.counts[rows] - same @ used).clamp(min=0)  # another piece may have been cut off
        mapped: Tensor = self.map(self._features(elsewhere, (self.occurrences[rows] - same.sum(-1)).clamp(min=0)))
        return mapped

    def _features(self, counts: Tensor, occurrences: Tensor) -> Tensor:
        """Return ``(..., L*E)``, zero where nothing is known."""
        assert self.popularity is not None
        shares = (counts + BACKOFF * self.popularity) / (occurrences[..., None] + BACKOFF)
        return ((shares + FLOOR) / (self.popularity + FLOOR)).log()

    @torch.no_grad()
    def fold(self) -> None:
        """Bring the vectors up to date with the map, all of training in them."""
        if self.counts is None or self.occurrences is None:
            return
        for start in range(1, len(self.counts), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            features = self._features(self.counts[part].float(), self.occurrences[part])
            self.vectors[start : start + len(features)] = features @ self.map.weight.T

    def train(self, mode: bool = True) -> "RoutingMemory":
        """Switch between training, where vectors are made anew, and looking them up."""
        super().train(mode)
        if not mode:
            self.fold()
        return self


def _fold_first(module: nn.Module, prefix: str, keep_vars: bool) -> Any:
    assert isinstance(module, RoutingMemory)
    module.fold()
