"""A token embedding that is meaningful for tokens that do not occur in training."""

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
    """Return the rows of a table for token ids; zeros, which mean unknown, for ids from V on.

    A model may read more ids than a predictor was fitted with: padded rows of its embedding, and added tokens.

    Args:
        table: Table ``(V, ...)`` with one row per token id.
        token_ids: Token ids of any shape.
    """
    in_table = (token_ids < len(table)).reshape(*token_ids.shape, *(1,) * (table.ndim - 1))
    return table[token_ids.clamp(max=len(table) - 1)].where(in_table, 0)


class TokenEmbedding(nn.Module):
    """A learned vector per known token, plus the mean vector of the token's character n-grams.

    Before `prepare` every token is unknown. Without token strings no token has n-grams.

    Args:
        vocab_size: Number of token ids of the tokenizer, V.
        width: Features per token.
        known_tokens: Maximum number of tokens with a vector: the most frequent tokens of the training split; 0
            disables these vectors.
        min_count: Minimum number of occurrences in the training split of a token with a vector.
        ngram_buckets: Number of hash buckets, each with a vector, that all n-grams share; 0 disables n-grams.
    """

    rows: Tensor
    ngrams: Tensor

    def __init__(self, vocab_size: int, width: int, known_tokens: int, min_count: int, ngram_buckets: int) -> None:
        super().__init__()
        if min_count < 1 or min(known_tokens, ngram_buckets) < 0:
            raise UserError("token embedding: min_count must be at least 1, known_tokens and ngram_buckets at least 0")
        self.known_tokens, self.min_count = min(known_tokens, vocab_size), min_count
        self.ngram_buckets = ngram_buckets
        self.known = nn.Embedding(self.known_tokens + 1, width)  # row 0: unknown
        self.ngram_embedding = None
        if ngram_buckets:
            self.ngram_embedding = nn.EmbeddingBag(ngram_buckets + 1, width, mode="mean", padding_idx=0)
        nn.init.normal_(self.known.weight, std=0.02)
        if self.ngram_embedding is not None:
            nn.init.normal_(self.ngram_embedding.weight, std=0.02)
        self.register_buffer("rows", torch.zeros(vocab_size, dtype=torch.int32))
        per_token = NGRAMS_PER_TOKEN if ngram_buckets else 0
        self.register_buffer("ngrams", torch.zeros(vocab_size, per_token, dtype=torch.int32))

    def prepare(self, stats: TrainingStats) -> None:
        """Assign rows to the most frequent training tokens, and n-grams to every token.

        Args:
            stats: Statistics of the training split.
        """
        frequent = stats.most_frequent(self.known_tokens, self.min_count)
        self.rows.zero_()
        self.rows[torch.from_numpy(frequent)] = torch.arange(1, len(frequent) + 1, dtype=self.rows.dtype)
        if self.ngram_embedding is None:
            return
        ngrams = np.zeros(self.ngrams.shape, np.int32)
        for token, string in enumerate(stats.token_strings or ()):
            buckets = list(_ngram_buckets(string, self.ngram_buckets))[:NGRAMS_PER_TOKEN]
            ngrams[token, : len(buckets)] = buckets
        self.ngrams.copy_(torch.from_numpy(ngrams))

    def weights_fault(self) -> str | None:
        """Describe rows and n-grams without a vector; None if all have one."""
        if not ((self.rows >= 0) & (self.rows <= self.known_tokens)).all():
            return f"rows are not in 0..{self.known_tokens}"
        inside = ((self.ngrams >= 0) & (self.ngrams <= self.ngram_buckets)).all()
        return None if inside else f"ngrams are not in 0..{self.ngram_buckets}"

    def forward(self, token_ids: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return embeddings ``(B, T, width)``.

        Args:
            token_ids: Token ids ``(B, T)`` int64.
            hidden: Mask ``(B, T)`` bool of tokens to treat as unknown, so that training includes unknown tokens; None:
                no token.
        """
        rows = look_up(self.rows, token_ids).long()
        if hidden is not None:
            rows = rows.masked_fill(hidden, 0)
        embedded = functional.embedding(rows, self.known.weight)
        if self.ngram_embedding is None:
            return embedded
        ngrams = look_up(self.ngrams, token_ids).long().flatten(0, 1)
        from_ngrams: Tensor = self.ngram_embedding(ngrams).unflatten(0, token_ids.shape)
        return embedded + from_ngrams


def _ngram_buckets(string: str, buckets: int) -> Iterator[int]:
    """Hash a token string, and its n-grams longest first, into ``1 .. buckets``; the same in every process."""
    delimited = f"<{string}>"
    if len(delimited) > NGRAM_SIZES[-1]:
        yield 1 + zlib.crc32(delimited.encode()) % buckets
    for size in reversed(NGRAM_SIZES):
        for start in range(len(delimited) - size + 1):
            yield 1 + zlib.crc32(delimited[start : start + size].encode()) % buckets
