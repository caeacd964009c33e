"""eamc: MoE-Infinity's predictor (arXiv 2401.14361), a collection of expert-activation matrices.

The matrix of a sequence counts, for each layer, how many of its tokens were routed to each expert. A new request is
predicted to continue like the stored sequence with the most similar matrix. The paper's priorities, which fall with the
distance to the layer, belong to a prefetcher and are not part of these probabilities.
"""

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.predictors.activation import Activation
from moe_beyond.predictors.argument_limits import check_arguments
from moe_beyond.predictors.base import CountingPredictor, in_range
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.stepper import Stepper

# Largest count that a matrix stores.
MAX_COUNT = torch.iinfo(torch.int16).max


class Eamc(CountingPredictor):
    """Stores matrices of training sequences, and predicts from the matrix nearest to the request.

    In a full collection, a new matrix replaces the most similar one. Similarity is the cosine over all layers routed so
    far in the request; ties go to the lowest index. With the nearest matrix M of n tokens,

        P(e | l) = (M[l, e] + backoff * popularity of e) / (n + backoff)

    The popularity is the share of the collection's tokens that used e in layer l,
    plus one imaginary token that used all experts evenly. P is the popularity if nothing is routed yet, or if no stored
    sequence shares an expert with the request.

    Each segment of a long text counts as a sequence: fit with ``data.max_tokens`` above the longest sequence.

    Args:
        geometry: Shape of the model.
        vocab_size: Number of token ids of the tokenizer.
        capacity: Maximum number of matrices (default: 120).
        backoff: Weight of the popularity, in tokens (default: 1).
        ahead: Largest lookahead in layers; ``"token"`` is always predicted (default: 3).
    """

    architecture: ClassVar[str] = "eamc"
    activation: Activation = "sigmoid"

    matrices: Tensor
    tokens: Tensor

    def __init__(
        self, geometry: Geometry, vocab_size: int, capacity: int = 120, backoff: float = 1.0, ahead: int = 3
    ) -> None:
        super().__init__(geometry, vocab_size)
        check_arguments(self.architecture, locals())
        self.capacity, self.backoff, self.ahead = capacity, backoff, ahead
        layers, experts, _ = geometry.shape()
        self.register_buffer("matrices", torch.zeros(capacity, layers, experts, dtype=torch.int16))
        self.register_buffer("tokens", torch.zeros(capacity, dtype=torch.int64))  # 0: the entry is free

    @property
    def information(self) -> InformationSet:
        """Experts of earlier tokens, and of earlier layers of the current token."""
        lookaheads: list[Lookahead] = [*range(1, self.ahead + 1), "token"]
        return InformationSet(tuple(lookaheads), token_ids=False)

    def partial_fit(self, batch: Batch) -> None:
        """Store the matrix of each sequence.

        Args:
            batch: Training sequences, each passed once.

        Raises:
            UserError: A sequence is longer than the largest count of a matrix.
        """
        if int(batch.lengths.max()) > MAX_COUNT:
            name = batch.sequence_ids[int(batch.lengths.argmax())]
            raise UserError(
                f"eamc: sequence {name!r} has more than {MAX_COUNT:,} tokens, the largest count; set data.max_tokens"
            )
        counts = batch.targets(self.geometry.num_experts).sum(1)
        stored = self.matrices.flatten(1).double()
        squared_norms = stored.square().sum(1)
        for matrix, length in zip(counts.flatten(1).double(), batch.lengths, strict=True):
            if (free := (self.tokens == 0).nonzero()).numel():
                entry = int(free[0])
            else:
                entry = int(_similarities(stored @ matrix, squared_norms).argmax())
            stored[entry], squared_norms[entry], self.tokens[entry] = matrix, matrix.square().sum(), length
        self.matrices.copy_(stored.view_as(self.matrices))

    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B, T, H, L, E)``."""
        lookaheads, (layers, experts, _) = self.information.lookaheads, self.geometry.shape()
        table, rows = self._table(), self._rows(batch)
        layer = torch.arange(layers, device=table.device)
        logits = table.new_empty(*batch.token_ids.shape, len(lookaheads), layers, experts)
        for index, lookahead in enumerate(lookaheads):
            routed = (layer - lookahead + 1).clamp(min=0) if isinstance(lookahead, int) else layer * 0
            logits[:, :, index] = table[rows[..., routed], layer]
        return logits

    def _rows(self, batch: Batch) -> Tensor:
        """Return ``(B, T, L)``: the row of `_table` that applies once n layers of a token are routed, n = 0 .. L-1."""
        layers, experts, _ = self.geometry.shape()
        by_expert, so_far, overall = self._by_expert()
        ids = batch.ids(experts)
        flat_ids = ids + torch.arange(layers, device=ids.device)[:, None] * experts
        flat_ids = flat_ids.masked_fill(ids == experts, layers * experts)
        # Sums of counts are exact in single precision too, and only that has a fast path here. Padding counts 0.
        by_expert = functional.pad(by_expert, (0, 0, 0, 1))
        products = functional.embedding_bag(flat_ids.flatten(0, 2), by_expert, mode="sum")
        dots = products.view(len(flat_ids), -1, self.capacity).cumsum(1, dtype=torch.float64)
        first, others = dots[:, :layers], dots[:, layers:]
        after = torch.cat([self._nearest(first, so_far), self._nearest(others, overall)], 1)
        return functional.pad(after[:, :-1], (1, 0), value=self.capacity).view(batch.experts.shape[:3])

    def _by_expert(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the terms of the cosine similarity.

        Returns:
            Counts of each expert in the P matrices, ``(L*E, P)`` float32; squared norms of the matrices over the layers
            up to each layer, ``(L, P)`` float64; squared norms over all layers, ``(P,)`` float64.
        """
        so_far = self.matrices.double().square().sum(2).cumsum(1).T.contiguous()
        return self.matrices.flatten(1).T.float().contiguous(), so_far, so_far[-1]

    def _nearest(self, dots: Tensor, squared_norms: Tensor) -> Tensor:
        """Return the row of `_table`: that of the most similar matrix, or the last row if all similarities are 0."""
        best, row = _similarities(dots, squared_norms).max(-1)
        return torch.where(best > 0, row, self.capacity)

    def _table(self) -> Tensor:
        """Return logits ``(P + 1, L, E)``: those of each matrix, then those of the popularity."""
        _, experts, top_k = self.geometry.shape()
        popularity = (self.matrices.sum(0).double() + top_k / experts) / (self.tokens.sum() + 1)
        weight = self.tokens[:, None, None].double() + self.backoff
        shares = (self.matrices.double() + self.backoff * popularity) / weight
        return torch.logit(torch.cat([shares, popularity[None]]), eps=1e-6).float()

    def weights_fault(self) -> str | None:
        """Describe counts that are negative or exceed the tokens of their matrix."""
        return None if in_range(self.matrices, 0, self.tokens[:, None, None]) else "matrices are not in 0..tokens"

    def stepper(self) -> Stepper:
        """Return a stepper; its state is P inner products."""
        return _EamcStepper(self)


def _similarities(dots: Tensor, squared_norms: Tensor) -> Tensor:
    """Return squared cosines times the request's squared norm, which does not change the order; 0 for empty matrices.

    The values are quotients of integers, so equal similarities are equal to the bit.
    """
    return dots.square() / squared_norms.where(squared_norms > 0, torch.inf)


class _EamcStepper(Stepper):
    _predictor: Eamc

    @torch.inference_mode()
    def __init__(self, predictor: Eamc) -> None:
        self._by_expert, self._so_far, self._overall = predictor._by_expert()  # noqa: SLF001
        table = predictor._table()[:, None].expand(-1, len(predictor.information.lookaheads), -1, -1)  # noqa: SLF001
        self._table = predictor.probabilities(table).numpy()  # (P + 1, H, L, E): each lookahead has its own calibration
        super().__init__(predictor)

    def _reset(self) -> None:
        self._dots = torch.zeros(self._predictor.capacity, dtype=torch.float64)
        self._row, self._token = self._predictor.capacity, -1
        self._scores = np.full(self._table.shape[2:], np.nan, np.float32)

    def _start_token(self, token_id: int) -> None:
        self._token += 1
        layers = np.arange(len(self._scores))
        self._scores = self._table[self._row, np.minimum(layers, self._predictor.ahead), layers]

    @torch.inference_mode()
    def _route(self, layer: int, experts: npt.NDArray[np.int64], state: npt.NDArray[np.float32] | None) -> None:
        flat_ids = torch.from_numpy(experts) + layer * self._table.shape[3]
        self._dots = self._dots + self._by_expert[flat_ids].sum(0)
        norms = self._so_far[layer] if self._token == 0 else self._overall
        self._row = int(self._predictor._nearest(self._dots, norms))  # noqa: SLF001
        self._scores = self._scores.copy()  # arrays returned by `scores` before stay unchanged
        self._scores[layer] = np.nan
        targets = np.arange(layer + 1, min(layer + 1 + self._predictor.ahead, len(self._scores)))
        self._scores[targets] = self._table[self._row, targets - layer - 1, targets]

    def scores(self) -> npt.NDArray[np.float32]:
        return self._scores
