"""Calibration undoes a distortion and keeps the order; a folder's calibration is checked."""

import copy
import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from _helpers.common import TINY, VOCAB
from _helpers.predictor_variants import VARIANTS, fitted_once, probabilities, random_trace
from torch import Tensor

from moe_beyond.errors import UserError
from moe_beyond.files import sealed
from moe_beyond.predictors import fit_calibration
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.batch import Batch, collate
from moe_beyond.predictors.fit_calibration import calibrate
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.io.folder import read_predictor, save_predictor
from moe_beyond.predictors.stepper import Stepper
from moe_beyond.traces.trace import Trace

LAYERS, EXPERTS, TOP_K = TINY.shape()


class Distorted(Predictor):
    """Returns the true logits of weighted draws, with another scale and shift in each layer."""

    architecture: ClassVar[str] = "distorted"

    def __init__(self, activation: str, scale: Tensor, shift: Tensor) -> None:
        super().__init__(TINY, VOCAB)
        self.activation, self.scale, self.shift = activation, scale, shift
        self.truth = torch.randn(VOCAB, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(1)) * 1.5

    @property
    def information(self) -> InformationSet:
        return InformationSet(("token",))

    def stepper(self) -> Stepper:
        raise NotImplementedError

    def forward(self, batch: Batch) -> Tensor:
        logits = self.truth[batch.token_ids]
        return (logits * self.scale[:, None] + self.shift[:, None])[:, :, None]


def drawn(predictor: Distorted, tokens: int) -> Batch:
    """Draw tokens' experts one by one, by weights; this is close to the subset activation."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCAB, (tokens,), generator=generator)
    p = predictor.truth[ids].softmax(-1).flatten(0, 1)
    experts = torch.multinomial(p, TOP_K, generator=generator).view(tokens, LAYERS, TOP_K)
    return collate([Trace("a", "tests", ids.numpy().astype(np.int32), experts.numpy().astype(np.uint8), tokens)])


def error(predictor: Predictor, batch: Batch) -> float:
    """Return the negative log-likelihood, in nats per layer and token."""
    p = torch.from_numpy(probabilities(predictor, batch)[0, :, 0])
    chosen = batch.targets(EXPERTS)[0]
    return -float(torch.where(chosen, p, 1 - p).clamp(min=1e-6).log().sum(-1).mean())


@pytest.mark.parametrize("activation", ["sigmoid", "subset"])
def test_a_known_distortion_is_undone(activation):
    scale, shift = torch.linspace(0.4, 2.5, LAYERS), torch.linspace(-1, 1, LAYERS)
    straight = Distorted(activation, torch.ones(LAYERS), torch.zeros(LAYERS))
    bent = Distorted(activation, scale, shift)
    batch = drawn(straight, 4000)
    straight.calibration, bent.calibration = calibrate(straight, [batch], 4000), calibrate(bent, [batch], 4000)
    torch.testing.assert_close(bent.calibration.scale[0] * scale, straight.calibration.scale[0], rtol=0.03, atol=0)
    assert error(bent, batch) == pytest.approx(error(straight, batch), abs=1e-3)
    uncalibrated = Distorted(activation, scale, shift)
    assert error(bent, batch) < error(uncalibrated, batch) - 0.01


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_predictor_can_be_calibrated_and_keeps_its_order(variant, tmp_path):
    predictor, batch = copy.copy(fitted_once(variant)), collate([random_trace(f"s{i}", 30, i) for i in range(4)])
    before = error_of(predictor, batch)
    plain = predictor(batch)
    predictor.calibration = calibrate(predictor, [batch], int(batch.lengths.sum()))
    assert error_of(predictor, batch) <= before + 1e-4
    assert (predictor.calibration(plain).gather(-1, plain.argsort(-1)).diff(dim=-1) >= 0).all()
    save_predictor(predictor, tmp_path / "p", {})
    loaded = read_predictor(tmp_path / "p")
    np.testing.assert_allclose(probabilities(loaded, batch), probabilities(predictor, batch), atol=1e-6)


@torch.inference_mode()
def error_of(predictor: Predictor, batch: Batch) -> float:
    p = predictor.probabilities(predictor(batch))[batch.mask].clamp(1e-6, 1 - 1e-6)
    chosen = batch.targets(EXPERTS)[batch.mask][:, None]
    return -float(torch.where(chosen, p, 1 - p).log().sum(-1).mean())


def test_long_and_short_text_have_their_part(monkeypatch):
    monkeypatch.setattr(fit_calibration, "MAX_TOKENS", 40)
    seen = []
    monkeypatch.setattr(fit_calibration, "_fit", lambda predictor, x, y: seen.append(x) or (torch.ones(LAYERS),) * 2)
    predictor = fitted_once(VARIANTS[1])
    long, short = (collate([random_trace(name, length, length)]) for name, length in (("long", 300), ("short", 20)))
    calibrate(predictor, [short, long], 320)
    assert 20 < len(seen[0]) < 60  # about 40, of 320
    logits = predictor(long)[0, :, 0]
    from_long = sum(bool((logits == row).flatten(1).all(-1).any()) for row in seen[0])
    assert from_long > 20


def test_nothing_to_calibrate_on():
    with pytest.raises(UserError, match="held-out"):
        calibrate(fitted_once(VARIANTS[0]), [], 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scale": [[1.0]]}, "shapes"),
        ({"scale": [[0.0] * LAYERS]}, "above 0"),
        ({"shift": [[float("nan")] * LAYERS]}, "finite"),
        ({"shift": None}, "no scale and shift"),
        ({"scale": "much"}, "no scale and shift"),
    ],
)
def test_a_damaged_calibration_is_named(change: dict, words: str, tmp_path: Path):
    save_predictor(fitted_once(VARIANTS[0]), tmp_path / "p", {})
    path = tmp_path / "p/config.json"
    config = json.loads(path.read_text())
    config["calibration"] = {"scale": [[1.0] * LAYERS], "shift": [[0.0] * LAYERS], **change}
    path.write_text(json.dumps(sealed(config)))
    with pytest.raises(UserError, match=words) as caught:
        read_predictor(tmp_path / "p")
    assert "config.json" in str(caught.value)
