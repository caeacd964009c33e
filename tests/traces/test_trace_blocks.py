"""Validation takes whole blocks of prompts and its share of the tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_beyond.errors import UserError
from moe_beyond.traces.splits import held_out_numbers, parse_blocks


def test_blocks_are_parsed():
    assert parse_blocks("20:10") == (20, 10)
    assert parse_blocks("1:2") == (1, 2)


@pytest.mark.parametrize(
    "text", ["", "20", "20:", ":10", "0:10", "20:1", "20:0", "-1:2", "2.5:2", "20:10:3", "a:b", "٢:٣"]
)
def test_bad_blocks_are_quoted(text):
    with pytest.raises(UserError, match="write SIZE:EVERY") as error:
        parse_blocks(text)
    assert repr(text) in str(error.value)


def test_blocks_of_one_by_hand():
    # Ranked 3, 2, 1, 0. In (3, 2), 40 and 30 are both 5 from half of 70, and the lower block 2 wins the tie.
    # In (1, 0), 30 + 20 is exactly half of 100.
    assert held_out_numbers({0: 10, 1: 20, 2: 30, 3: 40}, 1, 2) == {1, 2}


def test_blocks_are_of_numbers_and_not_of_prompts():
    # Number 317 of 310..319 is missing, so its block has nine prompts; the other block has one.
    tokens = dict.fromkeys([n for n in range(310, 320) if n != 317], 1) | {320: 9}
    assert held_out_numbers(tokens, 10, 2) == {n for n in range(310, 320) if n != 317}


def test_one_huge_block_does_not_drag_its_equals_along():
    # The block of 1000 goes to training: with it, validation would hold 1000 of 1003 tokens.
    assert held_out_numbers({0: 1000, 1: 1, 2: 1, 3: 1}, 1, 4) == {1}


def test_a_last_smaller_group_gives_nothing():
    assert held_out_numbers({0: 5, 1: 5, 2: 5}, 1, 2) == {0}
    assert held_out_numbers({0: 5, 1: 5, 2: 5, 3: 5}, 1, 2) == {0, 2}


def test_too_few_blocks_are_an_error():
    with pytest.raises(UserError, match="--val-blocks 20:10: only 1 blocks, so the split would be empty"):
        held_out_numbers({1: 5, 2: 5}, 20, 10)


@given(st.dictionaries(st.integers(0, 300), st.integers(1, 5000), min_size=1), st.integers(1, 20), st.integers(2, 6))
def test_blocks_stay_whole_and_keep_the_share(tokens, size, every):
    blocks = {}
    for number, count in tokens.items():
        blocks.setdefault(number // size, {})[number] = count
    if len(blocks) < every:
        with pytest.raises(UserError):
            held_out_numbers(tokens, size, every)
        return
    chosen = held_out_numbers(tokens, size, every)
    held = {number // size for number in chosen}
    assert chosen == {number for block in held for number in blocks[block]}  # no block is split
    assert len(held) == len(blocks) // every
    # Ranked by tokens, each group of `every` gives one block, and choosing the nearest keeps the error of the share
    # within the widest group's spread; choosing the largest (or any fixed place) lets it add up over groups.
    sizes = sorted((sum(block.values()) for block in blocks.values()), reverse=True)
    groups = [sizes[i : i + every] for i in range(0, len(sizes) - every + 1, every)]
    spread = max(group[0] - group[-1] for group in groups)
    error = sum(sum(blocks[block].values()) for block in held) - sum(map(sum, groups)) / every
    assert abs(error) <= spread + 1e-9


@given(
    st.dictionaries(st.integers(0, 50), st.integers(1, 100), min_size=4).flatmap(
        lambda tokens: st.tuples(st.just(tokens), st.permutations(list(tokens.items())))
    )
)
def test_the_order_of_the_prompts_does_not_matter(pair):
    tokens, shuffled = pair
    assert held_out_numbers(tokens, 1, 3) == held_out_numbers(dict(shuffled), 1, 3)
