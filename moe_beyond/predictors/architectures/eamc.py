"""eamc: MoE-Infinity's predictor (arXiv 2401.14361), a collection of expert-activation matrices.

A sequence's matrix counts, layer by layer, how many of its tokens were routed to each expert. A new request is taken to
go on like the stored sequence whose matrix is most like its own so far. The paper's priorities, which fall with the
distance to the layer, are a prefetcher's and no part of the probabilities here.
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
from moe_beyond.predictors.base import CountingPredictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.limits import check_arguments
from moe_beyond.predictors.stepper import Stepper

# What a stored count can be.
MOST = torch.iinfo(torch.int16).max


class Eamc(CountingPredictor):
    """Keeps matrices of training sequences, and predicts from the one nearest to the request.

    A full collection takes a new matrix in the place of the one most similar to it. Similarity is the cosine over all
    layers that were routed so far in this request; ties go to the lowest place. With the nearest matrix M of n
    tokens, P(e | l) = (M[l, e] + backoff * popularity of e) / (n + backoff), where the popularity is the share of the
    collection's tokens that chose e in layer l, with one imaginary token that chose evenly. While nothing is routed, or
    no stored sequence shares an expert with the request, P is the popularity.

    A long text cut into pieces counts as so many sequences: fit with ``data.max_tokens`` above the longest.

    Args:
        geometry: The model's shape.
        vocab_size: Ids of the tokenizer.
        capacity: Matrices at most.
        backoff: Tokens that the popularity counts for.
        ahead: Lookaheads 1 .. this are scored, besides the whole token's.
    """

    architecture: ClassVar[str] = "eamc"
    activation = "sigmoid"

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
        self.register_buffer("tokens", torch.zeros(capacity, dtype=torch.int64))  # 0: a place that is free

    @property
    def information(self) -> InformationSet:
        """Experts of earlier tokens, and of this one's earlier layers."""
        lookaheads: list[Lookahead] = [*range(1, self.ahead + 1), "token"]
        return InformationSet(tuple(lookaheads), token_ids=False)

    def partial_fit(self, batch: Batch) -> None:
        """Store the matrix of each sequence.

        Raises:
            UserError: A sequence is longer than its matrix can count.
        """
        if int(batch.lengths.max()) > MOST:
            name = batch.sequence_ids[int(batch.lengths.argmax())]
            raise UserError(f"eamc counts to {MOST:,}, and sequence {name!r} is longer; set data.max_tokens to cut it")
        found = batch.targets(self.geometry.num_experts).sum(1)
        stored = self.matrices.flatten(1).double()
        squared_norms = stored.square().sum(1)
        for matrix, length in zip(found.flatten(1).double(), batch.lengths, strict=True):
            if (free := (self.tokens == 0).nonzero()).numel():
                place = int(free[0])
            else:
                place = int(_similarities(stored @ matrix, squared_norms).argmax())
            stored[place], squared_norms[place], self.tokens[place] = matrix, matrix.square().sum(), length
        self.matrices.copy_(stored.view_as(self.matrices))

    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B, T, H, L, E)``."""
        lookaheads, (layers, experts, _) = self.information.lookaheads, self.geometry.shape()
        table, rows = self._table(), self._rows(batch)
        layer = torch.arange(layers, device=table.device)
        logits = table.new_empty(*batch.token_ids.shape, len(lookaheads), layers, experts)
        for index, lookahead in enumerate(lookaheads):
            known = (
                (layer - lookahead + 1).clamp(min=0) if isinstance(lookahead, int) else layer * 0
            )  # layers routed by then
            logits[:, :, index] = table[rows[..., known], layer]
        return logits

    def _rows(self, batch: Batch) -> Tensor:
        """Return ``(B, T, L)``: the row of `_table` that holds once n layers of a token are routed, n = 0 .. L-1."""
        layers, experts, _ = self.geometry.shape()
        by_expert, so_far, overall = self._by_expert()
        ids = batch.ids(experts)
        chosen = ids + torch.arange(layers, device=ids.device)[:, None] * experts
        chosen = chosen.masked_fill(ids == experts, layers * experts)
        # Sums of counts: exact also in single precision, which alone has a fast path here. None counts nothing.
        by_expert = functional.pad(by_expert, (0, 0, 0, 1))
        shared = functional.embedding_bag(chosen.flatten(0, 2), by_expert, mode="sum")
        dots = shared.view(len(chosen), -1, self.capacity).cumsum(1, dtype=torch.float64)
        first, others = dots[:, :layers], dots[:, layers:]
        after = torch.cat([self._nearest(first, so_far), self._nearest(others, overall)], 1)
        return functional.pad(after[:, :-1], (1, 0), value=self.capacity).view(batch.experts.shape[:3])

    def _by_expert(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a request is compared with.

        Returns:
            ``(L*E, P)`` float32, each expert's counts in the P matrices; ``(L, P)`` float64, the matrices' squared
            norms over the layers up to each; ``(P,)`` float64, over all.
        """
        so_far = self.matrices.double().square().sum(2).cumsum(1).T.contiguous()
        return self.matrices.flatten(1).T.float().contiguous(), so_far, so_far[-1]

    def _nearest(self, dots: Tensor, squared_norms: Tensor) -> Tensor:
        """Return the row of `_table`: the most similar matrix, or the last where none is similar at all."""
        best, row = _similarities(dots, squared_norms).max(-1)
        return torch.where(best > 0, row, self.capacity)

    def _table(self) -> Tensor:
        """Return ``(P + 1, L, E)`` logits: of each matrix, and last of the popularity."""
        _, experts, top_k = self.geometry.shape()
        popularity = (self.matrices.sum(0).double() + top_k / experts) / (self.tokens.sum() + 1)
        weight = self.tokens[:, None, None].double() + self.backoff
        shares = (self.matrices.double() + self.backoff * popularity) / weight
        return torch.logit(torch.cat([shares, popularity[None]]), eps=1e-6).float()

    def stepper(self) -> Stepper:
        """Return a stepper; its state is P products."""
        return _EamcStepper(self)


def _similarities(dots: Tensor, squared_norms: Tensor) -> Tensor:
    """Return squared cosines but for the request's own norm, which changes no order; 0 for an empty matrix.

    They are quotients of integers, so that what is equally similar is equal to the bit.
    """
    return dots.square() / squared_norms.where(squared_norms > 0, torch.inf)


class _EamcStepper(Stepper):
    _predictor: Eamc

    @torch.inference_mode()
    def __init__(self, predictor: Eamc) -> None:
        self._by_expert, self._so_far, self._overall = predictor._by_expert()  # noqa: SLF001
        table = predictor._table()[:, None].expand(-1, len(predictor.information.lookaheads), -1, -1)  # noqa: SLF001
        self._table = predictor.probabilities(table).numpy()  # (P + 1, H, L, E): lookaheads are calibrated apart
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
        chosen = torch.from_numpy(experts) + layer * self._table.shape[3]
        self._dots = self._dots + self._by_expert[chosen].sum(0)
        norms = self._so_far[layer] if self._token == 0 else self._overall
        self._row = int(self._predictor._nearest(self._dots, norms))  # noqa: SLF001
        self._scores = self._scores.copy()  # what `scores` returned before stays as it was
        self._scores[layer] = np.nan
        near = np.arange(layer + 1, min(layer + 1 + self._predictor.ahead, len(self._scores)))
        self._scores[near] = self._table[self._row, near - layer - 1, near]

    def scores(self) -> npt.NDArray[np.float32]:
        return self._scores
