"""token_table: how often each expert went with each token id, backed off to how often it was chosen at all."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.base import CountingPredictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.limits import check_arguments
from moe_beyond.predictors.stepper import Stepper, TokenStepper
from moe_beyond.predictors.training_stats import TrainingStats


class TokenTable(CountingPredictor):
    """Counts per token id and layer.

    P(e | token, l) = (count of the token with e + backoff * popularity of e) / (count of the token + backoff), where
    the popularity is the share of all tokens that chose e in layer l, with one imaginary token that chose evenly.
    Tokens that are rare in the training split, or not in it, share one row.

    Args:
        geometry: The model's shape.
        vocab_size: Ids of the tokenizer.
        backoff: Occurrences that the popularity counts for.
        min_count: Training occurrences that a row of a token's own needs.
    """

    architecture: ClassVar[str] = "token_table"
    activation = "sigmoid"

    token_ids: Tensor
    occurrences: Tensor
    table: Tensor

    def __init__(self, geometry: Geometry, vocab_size: int, backoff: float = 2.0, min_count: int = 1) -> None:
        super().__init__(geometry, vocab_size)
        check_arguments(self.architecture, locals())
        self.backoff, self.min_count = backoff, min_count
        self._resize(0)

    def _resize(self, tokens: int) -> None:
        """Make a row for all others, then one for each of so many tokens."""
        layers, experts, _ = self.geometry.shape()
        self.register_buffer("token_ids", torch.full((1 + tokens,), -1))
        self.register_buffer("occurrences", torch.zeros(1 + tokens, dtype=torch.int64))
        self.register_buffer("table", torch.zeros(1 + tokens, layers, experts, dtype=torch.int32))
        self._popularity: Tensor | None = None

    @property
    def information(self) -> InformationSet:
        """The token's id alone."""
        return InformationSet(("token",))

    def prepare(self, text: TrainingStats) -> None:
        """Make a row for every token id that is frequent enough in the training split, ascending."""
        frequent = (torch.from_numpy(text.token_counts) >= max(self.min_count, 1)).nonzero()[:, 0]
        self._resize(len(frequent))
        self.token_ids[1:] = frequent

    def partial_fit(self, batch: Batch) -> None:
        """Count a batch."""
        real = batch.mask
        rows = self._rows(batch.token_ids[real])
        self._popularity = None
        self.occurrences.index_add_(0, rows, torch.ones_like(rows))
        chosen = batch.targets(self.geometry.num_experts)[real]
        self.table.index_add_(0, rows, chosen.to(self.table.dtype))

    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B, T, 1, L, E)``."""
        return self.of_tokens(batch.token_ids)[:, :, None]

    def of_tokens(self, token_ids: Tensor) -> Tensor:
        """Return logits ``(..., L, E)`` of token ids of any shape."""
        _, experts, top_k = self.geometry.shape()
        if (
            self._popularity is None or self._popularity.device != self.table.device
        ):  # of every token: too much to add up for each
            self._popularity = (self.table.sum(0) + top_k / experts) / (self.occurrences.sum() + 1)
        popularity, rows = self._popularity, self._rows(token_ids)
        weight = self.occurrences[rows][..., None, None] + self.backoff
        shares = torch.where(weight > 0, (self.table[rows] + self.backoff * popularity) / weight, popularity)
        return torch.logit(shares, eps=1e-6)

    def _rows(self, token_ids: Tensor) -> Tensor:
        """Return each token's row, 0 where it has none of its own."""
        rows = torch.searchsorted(self.token_ids, token_ids).clamp(max=len(self.token_ids) - 1)
        return torch.where(self.token_ids[rows] == token_ids, rows, 0)

    def stepper(self) -> Stepper:
        """Return a stepper; it keeps nothing."""
        return _TokenTableStepper(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The number of rows is that of the tokens seen, which only the weights know.
        if (key := f"{prefix}token_ids") in state_dict:
            self._resize(max(len(state_dict[key]), 1) - 1)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.token_ids[0] != -1:
            raise UserError("token_table: weights of an earlier layout, without a row for all other tokens; fit anew")


class _TokenTableStepper(TokenStepper):
    def _logits(self, token_id: int) -> Tensor:
        assert isinstance(self._predictor, TokenTable)
        return self._predictor.of_tokens(torch.tensor(token_id))
