"""A predictor that a folder could not rebuild is refused before it is fitted."""

from typing import Any

import pytest
import torch
from _helpers.common import TINY, VOCAB
from _helpers.predictor_variants import VARIANTS, Variant, fitted_once

from moe_beyond.errors import UserError
from moe_beyond.predictors import InformationSet, Popularity, check_saveable, saveable


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
        (Scaled, (object(),), "scaled: scale is not a plain JSON value"),
        (Scaled, ((1, 2),), "scaled: scale is not a plain JSON value"),
        (Scaled, (float("nan"),), "scaled: scale is not a plain JSON value"),
        (Scaled, ({1: 2},), "scaled: scale is not a plain JSON value"),
        (Unannotated, (), "scaled: constructor argument scale has no type; annotate it"),
        (Variadic, (), "has no fixed name"),
        (Renamed, (), "no attribute 'factor'; keep every argument of the constructor as an attribute"),
        (OtherOrder, (), "its first constructor arguments must be geometry and vocab_size"),
        (Doubled, (), "scaled: scale is rebuilt as 4.0 (got 2.0)"),
        (Grown, (), "scaled: the rebuilt predictor has other weights"),
        (Changing, (), "information set is rebuilt differently"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_a_folder_could_not_rebuild_is_refused(made: Any, arguments: Any, line: str, monkeypatch) -> None:
    monkeypatch.setattr(saveable, "ARCHITECTURES", {"scaled": made})
    predictor = made(VOCAB, TINY) if made is OtherOrder else made(TINY, VOCAB, *arguments)
    with pytest.raises(UserError) as error:
        check_saveable(predictor)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_class_that_is_not_registered_is_refused(monkeypatch) -> None:
    with pytest.raises(UserError, match=r"^scaled: .*Scaled is not registered under this name; call"):
        check_saveable(Scaled(TINY, VOCAB))
    monkeypatch.setattr(saveable, "ARCHITECTURES", {"scaled": Scaled})
    check_saveable(Scaled(TINY, VOCAB, 2.0))
    with pytest.raises(UserError, match="Doubled is not registered under this name"):
        check_saveable(Doubled(TINY, VOCAB))
