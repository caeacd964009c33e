"""A token's representation that still means something for tokens that training never saw."""

import zlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_beyond.errors import UserError
from moe_beyond.predictors.training_stats import TrainingStats

NGRAM_SIZES = (1, 2, 3, 4)
NGRAMS_PER_TOKEN = 16


def look_up(table: Tensor, token_ids: Tensor) -> Tensor:
    """Return the rows of a table of token ids, ``(V, ...)``; zeros, which mean unknown, for ids from V on.

    A model may read more ids than a predictor was fitted with: padded rows of its embedding, and added tokens.
    """
    known = (token_ids < len(table)).reshape(*token_ids.shape, *(1,) * (table.ndim - 1))
    return table[token_ids.clamp(max=len(table) - 1)].where(known, 0)


class TokenEmbedding(nn.Module):
    """An own vector for each token known from training, plus the mean vector of the token's character n-grams.

    Until `prepare` has run every token is unknown, and without token strings none has n-grams.

    Args:
        vocab_size: Ids of the tokenizer, V.
        width: Features.
        known_tokens: Tokens that get an own vector: the most frequent ones of the training split; 0 does without.
        min_count: Occurrences in the training split that a token needs for an own vector.
        ngram_buckets: Vectors that all n-grams share by hashing; 0 does without n-grams.
    """

    rows: Tensor
    ngrams: Tensor

    def __init__(self, vocab_size: int, width: int, known_tokens: int, min_count: int, ngram_buckets: int) -> None:
        super().__init__()
        if min_count < 1 or min(known_tokens, ngram_buckets) < 0:
            raise UserError("min_count must be at least 1, known_tokens and ngram_buckets 0")
        self.known_tokens, self.min_count = min(known_tokens, vocab_size), min_count
        self.ngram_buckets = ngram_buckets
        self.known = nn.Embedding(self.known_tokens + 1, width)  # row 0: unknown
        self.pieces = None
        if ngram_buckets:
            self.pieces = nn.EmbeddingBag(ngram_buckets + 1, width, mode="mean", padding_idx=0)
        nn.init.normal_(self.known.weight, std=0.02)
        if self.pieces is not None:
            nn.init.normal_(self.pieces.weight, std=0.02)
        self.register_buffer("rows", torch.zeros(vocab_size, dtype=torch.int32))
        per_token = NGRAMS_PER_TOKEN if ngram_buckets else 0
        self.register_buffer("ngrams", torch.zeros(vocab_size, per_token, dtype=torch.int32))

    def prepare(self, text: TrainingStats) -> None:
        """Give the most frequent training tokens their rows, and every token its n-grams."""
        frequent = text.most_frequent(self.known_tokens, self.min_count)
        self.rows.zero_()
        self.rows[torch.from_numpy(frequent)] = torch.arange(1, len(frequent) + 1, dtype=self.rows.dtype)
        if self.pieces is None:
            return
        ngrams = np.zeros(self.ngrams.shape, np.int32)
        for token, string in enumerate(text.token_strings or ()):
            buckets = list(_ngram_buckets(string, self.ngram_buckets))[:NGRAMS_PER_TOKEN]
            ngrams[token, : len(buckets)] = buckets
        self.ngrams.copy_(torch.from_numpy(ngrams))

    def forward(self, token_ids: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Represent tokens.

        Args:
            token_ids: ``(B, T)`` int64.
            hidden: ``(B, T)`` bool, tokens to treat as unknown (so that training meets unknown tokens).

        Returns:
            ``(B, T, width)``.
        """
        rows = look_up(self.rows, token_ids).long()
        if hidden is not None:
            rows = rows.masked_fill(hidden, 0)
        known = functional.embedding(rows, self.known.weight)
        if self.pieces is None:
            return known
        pieces: Tensor = self.pieces(look_up(self.ngrams, token_ids).long().flatten(0, 1)).unflatten(0, token_ids.shape)
        return known + pieces


def _ngram_buckets(string: str, buckets: int) -> Iterator[int]:
    """Hash a token string, and its n-grams longest first, into ``1 .. buckets`` (stable over processes)."""
    marked = f"<{string}>"
    if len(marked) > NGRAM_SIZES[-1]:
        yield 1 + zlib.crc32(marked.encode()) % buckets
    for size in reversed(NGRAM_SIZES):
        for start in range(len(marked) - size + 1):
            yield 1 + zlib.crc32(marked[start : start + size].encode()) % buckets
