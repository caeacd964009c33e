"""The limits of constructor arguments, of every architecture."""

import inspect
from typing import Any

import pytest
from _helpers.common import TINY, VOCAB

from moe_beyond.errors import UserError
from moe_beyond.predictors.registry import ARCHITECTURES, create
from moe_beyond.tasks import AdamWSettings, CrossLayerTask, LayerMlpTask, RowEncoderTask, TokenCausalTask
from moe_beyond.tasks.gradient import GradientTask

OF_NAMES = ("objective",)
"""Arguments that are names; constructors refuse unknown ones."""
AT_LEAST_0 = (
    "copy_heads",
    "layer_copy_heads",
    "memory_tokens",
    "memory_prefixes",
    "known_tokens",
    "ngram_buckets",
    "ahead",
)
WRONG = {
    int: (-1, 1.5, "4", None, True),
    int | None: (-1, 0, 1.5, "4", True),
    float: (float("nan"), float("inf"), "0.5", None, True),
    bool: (1, "true", None),
}


def arguments(name: str) -> dict[str, inspect.Parameter]:
    parameters = list(inspect.signature(ARCHITECTURES[name].__init__).parameters.values())[3:]
    return {parameter.name: parameter for parameter in parameters if parameter.name not in OF_NAMES}


def required(name: str) -> dict[str, int]:
    return {"hidden_size": 8} if "hidden_size" in arguments(name) else {}


def cases() -> list[tuple[str, str, object]]:
    return [
        (name, argument, value)
        for name in ARCHITECTURES
        for argument, parameter in arguments(name).items()
        for value in (*WRONG[parameter.annotation], *((0,) * (parameter.annotation is int)))
        if argument != "hidden_size" and not (value == 0 and argument in AT_LEAST_0)
    ]


@pytest.mark.parametrize(("name", "argument", "value"), cases())
def test_a_wrong_argument_is_named(name: str, argument: str, value: object) -> None:
    with pytest.raises(UserError) as caught:
        create(name, TINY, VOCAB, **required(name) | {argument: value})
    assert str(caught.value).startswith(f"predictor: {name}: {argument} must be ")
    assert str(caught.value).endswith(f" (got {value!r})")


@pytest.mark.parametrize(
    ("name", "argument", "wrong", "right"),
    [
        ("cross_layer", "dropout", (-0.1, 1.0, 5), (0, 0.0, 0.99)),
        ("cross_layer", "token_dropout", (-0.1, 1.0, 5), (0, 0.99)),
        ("row_encoder", "dropout", (-0.1, 1.0), (0.5,)),
        ("eamc", "backoff", (-0.1,), (0, 0.0)),
        ("naive_bayes", "smoothing", (0, 0.0, -1), (1e-300,)),
        ("naive_bayes", "token", (), (-1.0, 0)),
    ],
)
def test_the_limits_themselves(name: str, argument: str, wrong: tuple[float, ...], right: tuple[float, ...]) -> None:
    for value in wrong:
        with pytest.raises(UserError, match=f"{name}: {argument} must be"):
            create(name, TINY, VOCAB, **{argument: value})
    for value in right:
        assert create(name, TINY, VOCAB, **{argument: value}).arguments()[argument] == value


@pytest.mark.parametrize("architecture", ["cross_layer", "token_causal", "row_encoder"])
def test_heads_divide_the_width(architecture: str) -> None:
    with pytest.raises(UserError, match=r"heads must divide width \(got heads 3, width 16\)"):
        create(architecture, TINY, VOCAB, heads=3, width=16)


@pytest.mark.parametrize("task", [CrossLayerTask, TokenCausalTask, RowEncoderTask, LayerMlpTask])
@pytest.mark.parametrize(
    ("setting", "value"),
    [("lr", 0), ("lr", -1.0), ("lr", float("inf")), ("weight_decay", -1), ("warmup", -0.1), ("warmup", 1.1)],
)
def test_a_wrong_setting_of_gradient_descent_is_named(task: type[GradientTask], setting: str, value: float) -> None:
    small: dict[str, Any] = {"width": 8} | ({"hidden_size": 8} if task is LayerMlpTask else {})
    with pytest.raises(UserError, match=rf": {setting} must be .* \(got {value!r}\)"):
        task(TINY, VOCAB, optimizer=AdamWSettings(**{setting: value}), **small)
