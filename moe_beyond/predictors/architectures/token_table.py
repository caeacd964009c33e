"""token_table: how often each token id used each expert, with backoff to the popularity."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.activation import Activation
from moe_beyond.predictors.argument_limits import check_arguments
from moe_beyond.predictors.base import CountingPredictor, in_range
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.stepper import Stepper, TokenStepper
from moe_beyond.predictors.training_stats import TrainingStats


class TokenTable(CountingPredictor):
    """Counts experts per token id and layer.

    P(e | token, l) = (count of the token with e + backoff * popularity of e) / (count of the token + backoff). The
    popularity is the share of all tokens that used e in layer l, plus one imaginary token that used all experts evenly.
    Tokens that are rare or absent in the training split share one row.

    Args:
        geometry: Shape of the model.
        vocab_size: Number of token ids of the tokenizer.
        backoff: Weight of the popularity, in occurrences of the token (default: 2).
        min_count: Minimum training occurrences of a token with its own row (default: 1).
    """

    architecture: ClassVar[str] = "token_table"
    activation: Activation = "sigmoid"

    token_ids: Tensor
    occurrences: Tensor
    table: Tensor

    def __init__(self, geometry: Geometry, vocab_size: int, backoff: float = 2.0, min_count: int = 1) -> None:
        super().__init__(geometry, vocab_size)
        check_arguments(self.architecture, locals())
        self.backoff, self.min_count = backoff, min_count
        self._resize(0)

    def _resize(self, tokens: int) -> None:
        """Allocate a row for all other tokens, then one row for each of a number of tokens."""
        layers, experts, _ = self.geometry.shape()
        self.register_buffer("token_ids", torch.full((1 + tokens,), -1))
        self.register_buffer("occurrences", torch.zeros(1 + tokens, dtype=torch.int64))
        self.register_buffer("table", torch.zeros(1 + tokens, layers, experts, dtype=torch.int32))
        self._popularity: Tensor | None = None

    @property
    def information(self) -> InformationSet:
        """The id of the current token."""
        return InformationSet(("token",))

    def prepare(self, stats: TrainingStats) -> None:
        """Allocate a row for every token id that is frequent enough in the training split, in ascending order."""
        frequent = (torch.from_numpy(stats.token_counts) >= max(self.min_count, 1)).nonzero()[:, 0]
        self._resize(len(frequent))
        self.token_ids[1:] = frequent

    def partial_fit(self, batch: Batch) -> None:
        """Add a batch to the counts."""
        real = batch.mask
        rows = self._rows(batch.token_ids[real])
        self._popularity = None
        self.occurrences.index_add_(0, rows, torch.ones_like(rows))
        used = batch.targets(self.geometry.num_experts)[real]
        self.table.index_add_(0, rows, used.to(self.table.dtype))

    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B, T, 1, L, E)``."""
        return self.token_logits(batch.token_ids)[:, :, None]

    def token_logits(self, token_ids: Tensor) -> Tensor:
        """Return logits ``(..., L, E)`` of token ids of any shape."""
        _, experts, top_k = self.geometry.shape()
        # Cached, because it is a sum over all tokens.
        if self._popularity is None or self._popularity.device != self.table.device:
            self._popularity = (self.table.sum(0) + top_k / experts) / (self.occurrences.sum() + 1)
        popularity, rows = self._popularity, self._rows(token_ids)
        weight = self.occurrences[rows][..., None, None] + self.backoff
        shares = torch.where(weight > 0, (self.table[rows] + self.backoff * popularity) / weight, popularity)
        return torch.logit(shares, eps=1e-6)

    def _rows(self, token_ids: Tensor) -> Tensor:
        """Return each token's row; 0 if it has no row of its own."""
        rows = torch.searchsorted(self.token_ids, token_ids).clamp(max=len(self.token_ids) - 1)
        return torch.where(self.token_ids[rows] == token_ids, rows, 0)

    def weights_fault(self) -> str | None:
        """Describe rows without ascending token ids, and counts that are negative or exceed the occurrences."""
        if self.token_ids[0] != -1 or not (self.token_ids[1:] > self.token_ids[:-1]).all():
            return "token_ids are not -1, for all other tokens, and then ascending"
        inside = in_range(self.table, 0, self.occurrences[:, None, None]) and in_range(self.occurrences, 0)
        return None if inside else "table is not in 0..occurrences"

    def stepper(self) -> Stepper:
        """Return a stepper; it has no state."""
        return _TokenTableStepper(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The number of rows depends on the training split, so it is read from the weights.
        if (key := f"{prefix}token_ids") in state_dict:
            self._resize(max(len(state_dict[key]), 1) - 1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _TokenTableStepper(TokenStepper):
    _predictor: TokenTable

    def _logits(self, token_id: int) -> Tensor:
        return self._predictor.token_logits(torch.tensor(token_id))
