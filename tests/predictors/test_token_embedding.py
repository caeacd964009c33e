import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from _helpers.predictor_variants import uncounted

from moe_beyond.predictors.modules.token_embedding import TokenEmbedding
from moe_beyond.predictors.training_stats import TrainingStats

STRINGS = ["the", "then", "Ġthe", "a", "b", "ab", "ba", "é", "日本", "", "<", "aaaa", "aaaaa", "internationalisation"]
VOCAB = len(STRINGS)


def embedding(
    counts: list[int], strings: list[str] | None = STRINGS, *, known: int = 4, min_count: int = 2, buckets: int = 8192
) -> TokenEmbedding:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = TokenEmbedding(len(counts), 6, known, min_count, buckets)
    made.prepare(TrainingStats(np.array(counts), strings, uncounted, uncounted))
    return made


def vectors(made: TokenEmbedding, hidden: bool = False) -> torch.Tensor:
    ids = torch.arange(len(made.rows))[None]
    with torch.inference_mode():
        return made(ids, torch.full(ids.shape, hidden))[0]


def test_the_most_frequent_tokens_get_rows_of_their_own():
    made = embedding([0, 5, 2, 9, 1, 2, 3, 0, 0, 0, 0, 0, 0, 0])
    # 9, 5, 3, and of the two counted twice the lower id; the others are unknown.
    assert made.rows.tolist() == [0, 2, 4, 1, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]


def test_a_token_below_the_least_count_is_unknown():
    made = embedding([1] * 3 + [2] + [0] * (VOCAB - 4), known=10)
    assert made.rows.tolist() == [0, 0, 0, 1] + [0] * (VOCAB - 4)


def test_preparing_again_forgets_the_first_text():
    made = embedding([9] * 4 + [0] * (VOCAB - 4))
    made.prepare(TrainingStats(np.array([0] * (VOCAB - 1) + [7]), None, uncounted, uncounted))
    assert made.rows.tolist() == [0] * (VOCAB - 1) + [1]
    assert made.ngrams.abs().sum() == 0


def test_unseen_tokens_of_different_strings_have_different_vectors():
    found = vectors(embedding([0] * VOCAB))
    assert len(torch.unique(found, dim=0)) == VOCAB


@pytest.mark.parametrize("strings", [("Ġ" * 20, "Ġ" * 24), ("_" * 20 + "first", "_" * 20 + "second")])
def test_unseen_long_tokens_that_begin_alike_have_different_vectors(strings):
    # Vocabularies are full of these: runs of spaces, of dashes.
    first, second = vectors(embedding([0, 0], list(strings)))
    assert not torch.equal(first, second)


def test_without_strings_all_unseen_tokens_are_the_unknown_token():
    made = embedding([0] * VOCAB, None)
    assert torch.equal(vectors(made), made.known.weight[:1].detach().expand(VOCAB, -1))


def test_a_known_token_is_its_own_vector_plus_the_mean_of_its_pieces():
    made = embedding([0, 0, 0, 7] + [0] * (VOCAB - 4))
    buckets = made.ngrams[3][made.ngrams[3] > 0].long()
    assert len(buckets) == 6  # "<a>": three single characters, two pairs, one triple
    expected = made.known.weight[1] + made.ngram_embedding.weight[buckets].mean(0)
    torch.testing.assert_close(vectors(made)[3], expected.detach())


def test_a_hidden_token_is_represented_as_if_training_had_not_seen_it():
    counts = [9] * 4 + [0] * (VOCAB - 4)
    known, unknown = embedding(counts), embedding([0] * VOCAB)
    assert torch.equal(vectors(known, hidden=True), vectors(unknown))
    assert not torch.equal(vectors(known)[0], vectors(unknown)[0])


def test_before_prepare_every_token_is_unknown():
    made = TokenEmbedding(5, 6, 4, 2, 64)
    assert len(torch.unique(vectors(made), dim=0)) == 1


def test_more_known_tokens_than_ids_are_not_asked_for():
    assert TokenEmbedding(5, 6, 1000, 2, 64).known.weight.shape == (6, 6)


def test_ngrams_are_hashed_the_same_in_every_process():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_token_embedding import *;"
        "print(embedding([0] * VOCAB).ngrams.tolist())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, os.path.dirname(__file__)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(embedding([0] * VOCAB).ngrams.tolist())


def test_without_ngrams_unseen_tokens_are_alike():
    made = embedding([5, 0, 0, 9] + [0] * (VOCAB - 4), buckets=0)
    found = vectors(made)
    assert made.ngrams.numel() == 0
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[0], found[3])


def test_without_own_vectors_and_ngrams_all_tokens_are_alike():
    found = vectors(embedding([5, 0, 0, 9] + [0] * (VOCAB - 4), known=0, buckets=0))
    assert torch.equal(found, found[:1].expand(VOCAB, -1))
