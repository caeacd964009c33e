"""A vector per token, mapped from the token's routing in the training split, leaving out the sequence at hand.

A learned per-token embedding overfits its training occurrences; the rarer the token, the worse it generalises. Here all
tokens share one learned map from the routing of a token's occurrences in other sequences to a vector. A token in
training therefore looks like a token in later text.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_beyond.predictors.modules.token_embedding import look_up
from moe_beyond.predictors.training_stats import TrainingStats

BACKOFF = 2.0  # occurrences by which the popularity is weighted
FLOOR = 0.01  # added to shares before the logarithm
ROWS_PER_CHUNK = 1024


class RoutingMemory(nn.Module):
    """Maps each known token's routing in training to a vector; the vector of unknown tokens is zero.

    For a token with n occurrences, c of which used an expert of popularity P, the share is (c + 2 P) / (n + 2). The
    logarithm of share over popularity is mapped linearly. In training, the counts exclude the current sequence (its
    part in the same batch row). Otherwise the vectors are looked up in a cache, which a predictor folder stores.

    Args:
        vocab_size: Number of token ids of the tokenizer, V.
        memory_tokens: Maximum number of tokens in the memory: the most frequent tokens of the training split.
        total: Number of experts of the model, L * E.
        width: Features per token.
    """

    rows: Tensor
    vectors: Tensor

    def __init__(self, vocab_size: int, memory_tokens: int, total: int, width: int) -> None:
        super().__init__()
        self.memory_tokens = min(memory_tokens, vocab_size)
        self.map = nn.Linear(total, width, bias=False)
        nn.init.normal_(self.map.weight, std=0.02)
        self.register_buffer("rows", torch.zeros(vocab_size, dtype=torch.int32))  # 0: unknown
        self.register_buffer("vectors", torch.zeros(1 + self.memory_tokens, width))
        # Used in training only and equal in all processes: buffers would be broadcast at every step.
        self._counts: tuple[Tensor, Tensor, Tensor] | None = None
        self.register_state_dict_pre_hook(_refresh_before_saving)  # type: ignore[no-untyped-call]

    def prepare(self, stats: TrainingStats) -> None:
        """Read the routing of the most frequent training tokens.

        Args:
            stats: Statistics of the training split.
        """
        token_ids = stats.most_frequent(self.memory_tokens)
        counts = torch.from_numpy(stats.expert_counts(token_ids))
        occurrences = torch.from_numpy(stats.token_counts[token_ids]).float()
        self.rows.zero_()
        self.rows[torch.from_numpy(token_ids)] = torch.arange(1, len(token_ids) + 1, dtype=self.rows.dtype)
        popularity = counts.sum(0).float() / max(float(occurrences.sum()), 1.0)
        counts = torch.cat([counts.new_zeros(1, counts.shape[1]), counts])
        self._counts = counts, torch.cat([occurrences.new_zeros(1), occurrences]), popularity
        self.refresh_cache()

    def weights_fault(self) -> str | None:
        """Describe rows without a vector; None if all have one."""
        inside = ((self.rows >= 0) & (self.rows <= self.memory_tokens)).all()
        return None if inside else f"rows are not in 0..{self.memory_tokens}"

    def forward(self, token_ids: Tensor, hidden: Tensor | None = None, used: Tensor | None = None) -> Tensor:
        """Return vectors ``(B, T, width)``.

        Args:
            token_ids: Token ids ``(B, T)``.
            hidden: Mask ``(B, T)`` bool of tokens to treat as unknown; None: no token.
            used: 1 if a token is routed to an expert, 0 where padded, ``(B, T, L*E)``. Training subtracts it from the
                counts.
        """
        rows = look_up(self.rows, token_ids).long()
        if hidden is not None:
            rows = rows.masked_fill(hidden, 0)
        if not self.training or self._counts is None or used is None:
            return self.vectors[rows]
        counts, occurrences, popularity = self._on_device(self._counts)
        real = used.amax(-1) > 0
        same = (token_ids[:, :, None] == token_ids[:, None]) & real[:, None] & (rows > 0)[..., None]
        same = same.to(used.dtype)
        # At least zero, also if the batch was not part of the counted training split.
        elsewhere, times = (counts[rows] - same @ used).clamp(min=0), (occurrences[rows] - same.sum(-1)).clamp(min=0)
        mapped: Tensor = self.map(_features(elsewhere, times, popularity))
        return mapped

    def _on_device(self, counts: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the counts on the device of the weights; they are moved once."""
        if counts[0].device != self.vectors.device:
            by_expert, occurrences, popularity = (part.to(self.vectors.device) for part in counts)
            counts = self._counts = by_expert, occurrences, popularity
        return counts

    @torch.no_grad()
    def refresh_cache(self) -> None:
        """Recompute the cached vectors with the current map, from the counts of the whole training split."""
        if self._counts is None:
            return
        counts, occurrences, popularity = self._on_device(self._counts)
        for start in range(1, len(counts), ROWS_PER_CHUNK):
            part = slice(start, start + ROWS_PER_CHUNK)
            features = _features(counts[part].float(), occurrences[part], popularity)
            self.vectors[start : start + len(features)] = features @ self.map.weight.T

    def train(self, mode: bool = True) -> "RoutingMemory":
        """Switch between training, which maps counts, and evaluation, which looks vectors up."""
        super().train(mode)
        if not mode:
            self.refresh_cache()
        return self


def _features(counts: Tensor, occurrences: Tensor, popularity: Tensor) -> Tensor:
    """Return features ``(..., L*E)``, zero for tokens without occurrences."""
    shares = (counts + BACKOFF * popularity) / (occurrences[..., None] + BACKOFF)
    return ((shares + FLOOR) / (popularity + FLOOR)).log()


def _refresh_before_saving(module: nn.Module, prefix: str, keep_vars: bool) -> Any:
    assert isinstance(module, RoutingMemory)
    module.refresh_cache()
