"""A predictor that a folder could not rebuild is refused before it is fitted."""

from typing import Any

import pytest
import torch
from _helpers.common import TINY, VOCAB
from _helpers.predictor_variants import VARIANTS, Variant, fitted_once

from moe_beyond.errors import UserError
from moe_beyond.predictors import InformationSet, Popularity, Predictor, check_saveable, create
from moe_beyond.predictors.io import provider, saveable


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_registered_predictor_can_be_saved(variant: Variant) -> None:
    before = torch.random.get_rng_state()
    check_saveable(fitted_once(variant))
    assert torch.equal(torch.random.get_rng_state(), before)


class Scaled(Popularity):
    """The popularity, with an argument."""

    architecture = "scaled"

    def __init__(self, geometry: Any, vocab_size: int, scale: Any = 1.0) -> None:
        super().__init__(geometry, vocab_size)
        self.scale = scale


class Unannotated(Scaled):
    def __init__(self, geometry, vocab_size, scale=1.0) -> None:
        super().__init__(geometry, vocab_size, scale)


class Variadic(Scaled):
    def __init__(self, geometry: Any, vocab_size: int, **options: Any) -> None:
        super().__init__(geometry, vocab_size)


class Renamed(Scaled):
    def __init__(self, geometry: Any, vocab_size: int, factor: float = 1.0) -> None:
        super().__init__(geometry, vocab_size, factor)


class OtherOrder(Scaled):
    def __init__(self, vocab_size: int, geometry: Any, scale: float = 1.0) -> None:
        super().__init__(geometry, vocab_size, scale)


class Doubled(Scaled):
    def __init__(self, geometry: Any, vocab_size: int, scale: float = 1.0) -> None:
        super().__init__(geometry, vocab_size, 2 * scale)


class Grown(Scaled):
    made = 0

    def __init__(self, geometry: Any, vocab_size: int, scale: float = 1.0) -> None:
        super().__init__(geometry, vocab_size, scale)
        Grown.made += 1
        self.register_buffer("more", torch.zeros(Grown.made))


class Changing(Scaled):
    made = 0

    def __init__(self, geometry: Any, vocab_size: int, scale: float = 1.0) -> None:
        super().__init__(geometry, vocab_size, scale)
        Changing.made += 1
        self.lookaheads = Changing.made

    @property
    def information(self) -> InformationSet:
        return InformationSet((self.lookaheads,))


@pytest.mark.parametrize(
    ("made", "arguments", "line"),
    [
        (Scaled, (object(),), "argument 'scale' does not survive JSON"),
        (Scaled, ((1, 2),), "argument 'scale' does not survive JSON"),
        (Scaled, (float("nan"),), "argument 'scale' does not survive JSON"),
        (Scaled, ({1: 2},), "argument 'scale' does not survive JSON"),
        (Unannotated, (), "'scale' has no type"),
        (Variadic, (), "has no fixed name"),
        (Renamed, (), "'factor' has no attribute of the same name; set self.factor in __init__"),
        (OtherOrder, (), "the first constructor arguments must be geometry and vocab_size"),
        (Doubled, (), "argument 'scale' is rebuilt as 4.0 (got 2.0)"),
        (Grown, (), "the weights do not match a scaled"),
        (Changing, (), "information set is rebuilt differently"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_a_folder_could_not_rebuild_is_refused(made: Any, arguments: Any, line: str, monkeypatch) -> None:
    register(monkeypatch, made)
    predictor = made(VOCAB, TINY) if made is OtherOrder else made(TINY, VOCAB, *arguments)
    with pytest.raises(UserError) as error:
        check_saveable(predictor)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_class_that_is_not_registered_is_refused(monkeypatch) -> None:
    with pytest.raises(UserError, match=r"Scaled cannot be saved: its architecture is not registered \(got 'scaled'\)"):
        check_saveable(Scaled(TINY, VOCAB))
    register(monkeypatch, Scaled)
    check_saveable(Scaled(TINY, VOCAB, 2.0))
    with pytest.raises(UserError, match="architecture 'scaled' is registered for another class"):
        check_saveable(Doubled(TINY, VOCAB))


def register(monkeypatch: pytest.MonkeyPatch, made: type[Predictor]) -> None:
    """Register a class for one test."""
    monkeypatch.setattr(saveable, "ARCHITECTURES", {"scaled": made})
    monkeypatch.setattr(saveable, "predictor_class", lambda architecture: made)
    monkeypatch.setattr(
        saveable, "create", lambda name, geometry, vocab, *, source, **given: made(geometry, vocab, **given)
    )


def test_the_provider_is_the_package_of_the_class() -> None:
    assert provider.provider(type(create("eamc", TINY, VOCAB))) == "moe_beyond"
    assert provider.provider(Scaled) == Scaled.__module__.partition(".")[0]
