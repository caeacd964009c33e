"""`check_predictor` accepts what keeps the contract, and gives one reason for what breaks it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from _helpers.two_moments import TwoMoments

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.architectures.history import History
from moe_beyond.predictors.architectures.popularity import Popularity
from moe_beyond.predictors.information import InformationSet
from moe_beyond.testing import check_predictor
from moe_beyond.testing.predictors import check_information_set, fit_tiny, random_trace


class Blind(History):
    """Declares less than it reads: whole-token scores that know the token's own experts."""

    def forward(self, batch: Any) -> torch.Tensor:
        return super().forward(batch) + batch.targets(self.geometry.num_experts)[:, :, None]


class Reader(Popularity):
    """Reads token ids and does not declare it."""

    def forward(self, batch: Any) -> torch.Tensor:
        return super().forward(batch) + batch.token_ids[..., None, None, None] / self.vocab_size

    @property
    def information(self) -> InformationSet:
        return InformationSet(("token",), token_ids=False)


class Forgetful(Popularity):
    """Does not keep its argument."""

    def __init__(self, geometry: Geometry, vocab_size: int, weight: float = 1.0) -> None:
        super().__init__(geometry, vocab_size)


class Opaque(Popularity):
    """Has an argument that JSON cannot store."""

    def __init__(self, geometry: Geometry, vocab_size: int, dtype: Any = np.float32) -> None:
        super().__init__(geometry, vocab_size)
        self.dtype = dtype


class Early(TwoMoments):
    """Declares that it reads no layer inputs."""

    @property
    def information(self) -> InformationSet:
        return replace(super().information, hidden_states=("router_inputs",))


class Hasty(TwoMoments):
    """Declares that the scores that wait for computing are those that do not."""

    @property
    def information(self) -> InformationSet:
        return replace(super().information, lookaheads=(1, "computed"))


class Half(Popularity):
    """Returns half-precision logits."""

    def forward(self, batch: Any) -> torch.Tensor:
        return super().forward(batch).half()


def test_a_predictor_of_two_moments_keeps_the_contract() -> None:
    check_predictor(TwoMoments)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(Early, "depends on layer inputs, not in the information set"), (Hasty, "score of lookahead 1 depends on what")],
)
def test_scores_that_read_a_state_too_early_are_found(broken: type[TwoMoments], reason: str) -> None:
    predictor = fit_tiny(broken)
    with pytest.raises(AssertionError, match=f"^{broken.__name__}: .*{reason}"):
        check_information_set(predictor, random_trace(predictor, "a", 6, 0), 2, 1)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (Blind, "stepping gives other scores than the batch"),
        (Reader, "stepping gives other scores than the batch"),
        (Forgetful, "keep every argument of the constructor as an attribute"),
        (Opaque, "arguments\\(\\) returns values that JSON cannot store"),
        (Half, "forward returns logits of another type"),
        (Early, "stepping gives other scores than the batch"),
        (Hasty, "stepping gives other scores than the batch"),
    ],
)
def test_a_broken_contract_has_a_reason(broken: type[Popularity], reason: str) -> None:
    with pytest.raises(AssertionError, match=f"^{broken.__name__}: .*{reason}"):
        check_predictor(broken)


def test_an_instance_is_checked_as_it_is() -> None:
    check_predictor(fit_tiny(Popularity))
    with pytest.raises(TypeError, match="only with a class"):
        check_predictor(fit_tiny(Popularity), weight=1.0)
