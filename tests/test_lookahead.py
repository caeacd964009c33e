"""Lookaheads as options and JSON write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_beyond.errors import UserError
from moe_beyond.lookahead import NAMED_LOOKAHEADS, moments, parse_lookahead, reaches


@given(st.integers(0, 10**6))
def test_whole_numbers_are_read_from_text_and_from_json(layers):
    assert parse_lookahead(layers) == parse_lookahead(str(layers)) == layers


def test_some_lookaheads_are_words():
    assert [parse_lookahead(word) for word in NAMED_LOOKAHEADS] == ["computed", "token", "next"]


def test_scores_reach_a_layer_by_hand():
    """Lookaheads that reach layer 2 at each moment of a token with four layers."""
    reached = {
        moment: [h for h in ("computed", 1, 2, 3, "token") if reaches(h, 2, moment[0], computed=moment[1])]
        for moment in moments(4)[:5]
    }
    assert reached == {
        (-1, False): [3, "token"],
        (0, False): [2, 3, "token"],
        (0, True): [2, 3, "token"],
        (1, False): [1, 2, 3, "token"],
        (1, True): ["computed", 1, 2, 3, "token"],
    }
    assert reaches("computed", 0, -1, computed=False)


@pytest.mark.parametrize("text", ["", "-1", -1, "1.5", 1.5, "+1", " 1", "1_0", "Token", "tokens", "²", "٣", None, True])
def test_everything_else_is_quoted_in_the_error(text):
    with pytest.raises(UserError, match="neither 'computed', 'token', 'next' nor a number of layers") as error:
        parse_lookahead(text)
    assert repr(text) in str(error.value)
