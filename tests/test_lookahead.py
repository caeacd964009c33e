"""Lookaheads as options and JSON write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_beyond.errors import UserError
from moe_beyond.lookahead import parse_lookahead


@given(st.integers(0, 10**6))
def test_whole_numbers_are_read_from_text_and_from_json(layers):
    assert parse_lookahead(layers) == parse_lookahead(str(layers)) == layers


def test_the_token_lookahead_is_a_word():
    assert parse_lookahead("token") == "token"
    assert parse_lookahead("next") == "next"


@pytest.mark.parametrize("text", ["", "-1", -1, "1.5", 1.5, "+1", " 1", "1_0", "Token", "tokens", "²", "٣", None, True])
def test_everything_else_is_quoted_in_the_error(text):
    with pytest.raises(UserError, match="neither 'token', 'next' nor a number of layers") as error:
        parse_lookahead(text)
    assert repr(text) in str(error.value)
