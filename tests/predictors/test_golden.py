"""Stored logits: an architecture's arithmetic may not drift, or published weights would mean something else.

``python tests/predictors/test_golden.py`` stores them again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pytest
import torch
from _helpers.common import TINY, VOCAB
from _helpers.predictor_variants import HIDDEN, VARIANTS
from safetensors.numpy import load_file, save_file

from moe_beyond.predictors.base import CountingPredictor
from moe_beyond.predictors.batch import Batch, collate
from moe_beyond.predictors.registry import ARCHITECTURES, create
from moe_beyond.predictors.training_stats import TrainingStats
from moe_beyond.traces.hidden_states import HiddenStates
from moe_beyond.traces.trace import Trace

FOLDER = Path(__file__).parents[1] / "data" / "golden"
LEARNED = [name for name in ARCHITECTURES if not issubclass(ARCHITECTURES[name], CountingPredictor)]


def golden_batch() -> Batch:
    """Two sequences, 11 and 5 tokens, from a formula."""
    layers, experts, _ = TINY.shape()
    traces = []
    for name, length, step in (("a", 11, 3), ("b", 5, 7)):
        position = np.arange(length)
        first = (position[:, None] * step + np.arange(layers) * 5) % experts
        chosen = np.stack([first, (first + 1 + position[:, None] % 3) % experts], -1)
        ids = (position * step * 5 + step) % VOCAB
        waves = np.sin(np.arange(2 * length * layers * HIDDEN)).reshape(2, length, layers, HIDDEN).astype(np.float16)
        states = HiddenStates(*waves)
        traces.append(Trace(name, "tests", ids.astype(np.int32), chosen.astype(np.uint8), length, hidden_states=states))
    return collate(traces)


@torch.inference_mode()
def golden_logits(architecture: str) -> dict[str, np.ndarray]:
    """The real tokens' logits of every causal or other variant, with weights from a formula, not a generator."""
    batch = golden_batch()
    counts = np.arange(VOCAB)[::-1] // 8  # a quarter of the ids never occurs

    def expert_counts(token_ids: np.ndarray) -> np.ndarray:
        waves = (token_ids[:, None] * 7 + np.arange(TINY.total_experts) * 3) % 5
        return np.minimum(waves, counts[token_ids][:, None]).astype(np.int32)

    def prefixes(limit: int) -> tuple[np.ndarray, np.ndarray]:
        keys = np.array([3, 7, VOCAB + 18])  # the first tokens of the batch, and the first two of its first row
        waves = (np.arange(3)[:, None] * 7 + np.arange(TINY.total_experts) * 3) % 5
        return keys[:limit], waves[:limit].astype(np.int32)

    found = {}
    for variant in (variant for variant in VARIANTS if variant.architecture == architecture):
        predictor = create(architecture, TINY, VOCAB, **variant.arguments).eval()
        predictor.prepare(TrainingStats(counts, [f"{i * i}" for i in range(VOCAB)], expert_counts, prefixes))
        for number, (_, parameter) in enumerate(sorted(predictor.named_parameters())):
            waves = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) + number)
            parameter.copy_((0.1 * waves).view_as(parameter))
        found[variant.name] = predictor.eval()(batch)[batch.mask].numpy()
    return found


@pytest.mark.parametrize("architecture", LEARNED)
def test_logits_are_the_stored_ones(architecture):
    stored, found = load_file(FOLDER / f"{architecture}.safetensors"), golden_logits(architecture)
    assert found.keys() == stored.keys()
    for name, logits in found.items():
        assert stored[name].std() > 0.01, name
        np.testing.assert_allclose(logits, stored[name], rtol=1e-3, atol=1e-4, err_msg=name)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in LEARNED:
        save_file(golden_logits(name), FOLDER / f"{name}.safetensors")
