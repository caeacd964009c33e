import pytest
from _helpers.common import TINY, VOCAB

from moe_beyond.errors import UserError
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.registry import ARCHITECTURES, create


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_class_calls_itself_what_the_registry_does(name):
    found = ARCHITECTURES[name]
    assert issubclass(found, Predictor)
    assert found.architecture == name
    assert found.activation in ("sigmoid", "softmax", "subset")


def test_an_unknown_architecture_names_the_near_miss():
    with pytest.raises(UserError, match="'cros_layer'; did you mean 'cross_layer'"):
        ARCHITECTURES["cros_layer"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_unknown_argument_is_named(name):
    with pytest.raises(UserError, match=f"{name}.*no_such_argument"):
        create(name, TINY, VOCAB, no_such_argument=1)
