"""A vector for each token of what training routed it to, learned without looking at the text that it is used on.

A vector that is learned for a token by itself fits what this very occurrence was routed to, and the rarer the token,
the less that tells of its next one. Here one map is learned for all tokens: from the routing of a token's occurrences
in other sequences to a vector. So a token in training looks as one will that is met later.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_beyond.predictors.modules.token_embedding import look_up
from moe_beyond.predictors.training_stats import TrainingStats

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

    def __init__(self, vocab_size: int, known_tokens: int, total: int, width: int) -> None:
        super().__init__()
        self.known_tokens = min(known_tokens, vocab_size)
        self.map = nn.Linear(total, width, bias=False)
        nn.init.normal_(self.map.weight, std=0.02)
        self.register_buffer("rows", torch.zeros(vocab_size, dtype=torch.int32))  # 0: unknown
        self.register_buffer("vectors", torch.zeros(1 + self.known_tokens, width))
        # Of training alone, and the same in all processes: no buffers, which would be sent around at every step.
        self._counts: tuple[Tensor, Tensor, Tensor] | None = None
        self.register_state_dict_pre_hook(_fold_first)  # type: ignore[no-untyped-call]

    def prepare(self, text: TrainingStats) -> None:
        """Take in what the most frequent training tokens were routed to."""
        found = text.most_frequent(self.known_tokens)
        counts = torch.from_numpy(text.expert_counts(found))
        occurrences = torch.from_numpy(text.token_counts[found]).float()
        self.rows.zero_()
        self.rows[torch.from_numpy(found)] = torch.arange(1, len(found) + 1, dtype=self.rows.dtype)
        popularity = counts.sum(0).float() / max(float(occurrences.sum()), 1.0)
        counts = torch.cat([counts.new_zeros(1, counts.shape[1]), counts])
        self._counts = counts, torch.cat([occurrences.new_zeros(1), occurrences]), popularity
        self.fold()

    def forward(self, token_ids: Tensor, hidden: Tensor | None = None, used: Tensor | None = None) -> Tensor:
        """Return vectors ``(B, T, width)``.

        Args:
            token_ids: ``(B, T)``.
            hidden: ``(B, T)`` bool, tokens to treat as unknown; None for none.
            used: ``(B, T, L*E)``, 1 where a token was routed to an expert, 0 where padded: what training leaves out of
                what is remembered.
        """
        rows = look_up(self.rows, token_ids).long()
        if hidden is not None:
            rows = rows.masked_fill(hidden, 0)
        if not self.training or self._counts is None or used is None:
            return self.vectors[rows]
        counts, occurrences, popularity = self._here(self._counts)
        real = used.amax(-1) > 0
        same = (token_ids[:, :, None] == token_ids[:, None]) & real[:, None] & (rows > 0)[..., None]
        same = same.to(used.dtype)
        # Never below zero, also where what is passed in was not counted.
        elsewhere, times = (counts[rows] - same @ used).clamp(min=0), (occurrences[rows] - same.sum(-1)).clamp(min=0)
        mapped: Tensor = self.map(_features(elsewhere, times, popularity))
        return mapped

    def _here(self, counts: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the counts on the device of the weights, moved there once."""
        if counts[0].device != self.vectors.device:
            counted, occurrences, popularity = (part.to(self.vectors.device) for part in counts)
            counts = self._counts = counted, occurrences, popularity
        return counts

    @torch.no_grad()
    def fold(self) -> None:
        """Bring the vectors up to date with the map, all of training in them."""
        if self._counts is None:
            return
        counts, occurrences, popularity = self._here(self._counts)
        for start in range(1, len(counts), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            features = _features(counts[part].float(), occurrences[part], popularity)
            self.vectors[start : start + len(features)] = features @ self.map.weight.T

    def train(self, mode: bool = True) -> "RoutingMemory":
        """Switch between training, where vectors are made anew, and looking them up."""
        super().train(mode)
        if not mode:
            self.fold()
        return self


def _features(counts: Tensor, occurrences: Tensor, popularity: Tensor) -> Tensor:
    """Return ``(..., L*E)``, zero where nothing is known."""
    shares = (counts + BACKOFF * popularity) / (occurrences[..., None] + BACKOFF)
    return ((shares + FLOOR) / (popularity + FLOOR)).log()


def _fold_first(module: nn.Module, prefix: str, keep_vars: bool) -> Any:
    assert isinstance(module, RoutingMemory)
    module.fold()
