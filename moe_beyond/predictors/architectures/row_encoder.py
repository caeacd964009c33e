"""row_encoder: the architecture of MoE-Beyond (arXiv 2508.17137), with token ids as its only input.

Its rows are (token, layer) pairs: a token embedding and a learned layer embedding, concatenated and projected to the
encoder's width. The paper's predictor reads the router's own input instead of a token embedding, and also later tokens.
Here the input is the token id, and attention is causal by token unless ``bidirectional`` is set.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.activation import Activation
from moe_beyond.predictors.argument_limits import check_arguments
from moe_beyond.predictors.base import GradientPredictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.modules.token_embedding import TokenEmbedding
from moe_beyond.predictors.objectives import binary_cross_entropy
from moe_beyond.predictors.stepper import Stepper, TokenStepper
from moe_beyond.predictors.training_stats import TrainingStats

# Tokens whose rows attend at the same time; bounds the memory of long sequences.
TOKENS_PER_CHUNK = 16


class RowEncoder(GradientPredictor):
    """A transformer encoder over (token, layer) rows.

    Args:
        geometry: Shape of the model.
        vocab_size: Number of token ids of the tokenizer.
        token_width: Features of a token embedding (default: 512; the paper's: 2048, the model's hidden size).
        layer_width: Features of a layer embedding (default: 512).
        width: Features of a row in the encoder (default: 512).
        depth: Number of encoder layers (default: 4).
        heads: Number of attention heads; must divide width (default: 8).
        feedforward: Features inside the MLP of an encoder layer (default: 2048).
        context_tokens: Tokens whose rows a row attends to: its own token and those before it (default: 512).
        bidirectional: Whether a row also attends to as many later tokens, as in the paper (default: false).
        known_tokens: Maximum number of tokens with a learned embedding (default: 16384).
        min_count: Minimum training occurrences of a token with a learned embedding (default: 2).
        ngram_buckets: Number of vectors that all character n-grams share; 0 disables n-grams (default: 8192).
        dropout: Probability of dropping a feature in training (default: 0.1).
    """

    architecture: ClassVar[str] = "row_encoder"
    activation: Activation = "sigmoid"

    def __init__(
        self,
        geometry: Geometry,
        vocab_size: int,
        token_width: int = 512,
        layer_width: int = 512,
        width: int = 512,
        depth: int = 4,
        heads: int = 8,
        feedforward: int = 2048,
        context_tokens: int = 512,
        bidirectional: bool = False,
        known_tokens: int = 16384,
        min_count: int = 2,
        ngram_buckets: int = 8192,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(geometry, vocab_size)
        check_arguments(self.architecture, locals())
        if width % heads:
            raise UserError(f"row_encoder: heads must divide width (got heads {heads}, width {width})")
        self.token_width, self.layer_width, self.width, self.depth = token_width, layer_width, width, depth
        self.heads, self.feedforward, self.context_tokens = heads, feedforward, context_tokens
        self.bidirectional, self.known_tokens, self.min_count = bidirectional, known_tokens, min_count
        self.ngram_buckets, self.dropout = ngram_buckets, dropout
        self.tokens = TokenEmbedding(vocab_size, token_width, known_tokens, min_count, ngram_buckets)
        self.layers = nn.Embedding(geometry.num_layers, layer_width)
        self.project = nn.Linear(token_width + layer_width, width)
        self.blocks = nn.ModuleList(_RowBlock(width, heads, feedforward, context_tokens, dropout) for _ in range(depth))
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, geometry.num_experts))

    @property
    def information(self) -> InformationSet:
        """Token ids of the current and earlier tokens, and of later tokens if bidirectional."""
        return InformationSet(("token",), causal=not self.bidirectional)

    def prepare(self, stats: TrainingStats) -> None:
        """Read the training split's vocabulary."""
        self.tokens.prepare(stats)

    def loss(self, logits: Tensor, batch: Batch, soft_targets: Tensor | None = None) -> Tensor:
        """Return the binary cross-entropy over all labels, as in the paper."""
        return binary_cross_entropy(logits, batch, soft_targets) / logits.shape[-1]

    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B, T, 1, L, E)``."""
        x = self._rows(batch.token_ids)
        for block in self.blocks:
            x = block(x, batch.mask, self.bidirectional)
        logits: Tensor = self.head(x)[:, :, None]
        return logits

    def _rows(self, token_ids: Tensor) -> Tensor:
        """Return rows ``(B, T, L, width)`` of token ids ``(B, T)``."""
        tokens = self.tokens(token_ids)[:, :, None].expand(-1, -1, self.geometry.num_layers, -1)
        layers = self.layers.weight.expand(*tokens.shape[:2], -1, -1)
        rows: Tensor = self.project(torch.cat([tokens, layers], -1))
        return rows

    def stepper(self) -> Stepper:
        """Return a stepper; its state is keys and values of the rows of ``context_tokens`` tokens.

        Raises:
            UserError: The predictor is bidirectional.
        """
        if self.bidirectional:
            raise UserError(
                "row_encoder: a bidirectional predictor reads later tokens, which do not exist while decoding; "
                "set bidirectional to false"
            )
        return _RowEncoderStepper(self)


class _RowBlock(nn.Module):
    """A post-norm encoder layer, as torch's default, in which rows attend by token index."""

    def __init__(self, width: int, heads: int, feedforward: int, context: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.context = heads, context
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.after_attention, self.after_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, feedforward), nn.ReLU(), nn.Dropout(dropout), nn.Linear(feedforward, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, real: Tensor, bidirectional: bool) -> Tensor:
        """Return rows of the same shape.

        Args:
            x: Rows ``(B, T, L, width)``.
            real: Mask ``(B, T)`` bool of real tokens.
            bidirectional: Whether rows attend to later tokens.
        """
        length, layers = x.shape[1:3]
        queries, keys, values = self._project(x)
        mixed = []
        for start in range(0, length, TOKENS_PER_CHUNK):
            stop = min(start + TOKENS_PER_CHUNK, length)
            first = max(0, start - self.context + 1)
            last = min(length, stop + self.context - 1) if bidirectional else stop
            position = torch.arange(first, last, device=x.device)
            distance = torch.arange(start, stop, device=x.device)[:, None] - position
            visible = (distance.abs() < self.context) & (bidirectional | (distance >= 0))
            # A padded token attends to itself, so that no row of the softmax is empty.
            mask = visible & (real[:, None, first:last] | (distance == 0))
            mask = mask.repeat_interleave(layers, 1).repeat_interleave(layers, 2)[:, None]
            part = functional.scaled_dot_product_attention(
                queries[:, :, start * layers : stop * layers],
                keys[:, :, first * layers : last * layers],
                values[:, :, first * layers : last * layers],
                attn_mask=mask,
            )
            mixed.append(part)
        return self._finish(x, torch.cat(mixed, 2))

    def step(self, x: Tensor, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Process the rows of one token.

        Args:
            x: Rows ``(1, 1, L, width)`` of the token.
            cache: Keys and values of earlier rows; None at the start.

        Returns:
            The token's output rows, and the cache for the next token.
        """
        queries, keys, values = self._project(x)
        if cache is not None:
            keys, values = torch.cat([cache[0], keys], 2), torch.cat([cache[1], values], 2)
        mixed = functional.scaled_dot_product_attention(queries, keys, values)
        start = max(0, keys.shape[2] - (self.context - 1) * x.shape[2])
        return self._finish(x, mixed), (keys[:, :, start:], values[:, :, start:])

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.query_key_value(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        return queries, keys, values

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        attended = self.out(mixed.transpose(1, 2).flatten(2)).view_as(x)
        x = self.after_attention(x + self.dropout(attended))
        out: Tensor = self.after_mlp(x + self.dropout(self.mlp(x)))
        return out


class _RowEncoderStepper(TokenStepper):
    _predictor: RowEncoder

    def _reset(self) -> None:
        super()._reset()
        self._caches: list[tuple[Tensor, Tensor] | None] = [None] * self._predictor.depth

    def _logits(self, token_id: int) -> Tensor:
        predictor = self._predictor
        x = predictor._rows(torch.tensor([[token_id]]))  # noqa: SLF001
        for index, block in enumerate(predictor.blocks):
            assert isinstance(block, _RowBlock)
            x, self._caches[index] = block.step(x, self._caches[index])
        logits: Tensor = predictor.head(x)[0, 0]
        return logits
