"""Checkpoints that are damaged, compressed or hostile: one line that names the file, and no memory taken."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _helpers.predictor_variants import VARIANTS, fitted_once

from moe_beyond.errors import UserError
from moe_beyond.predictors.io.checkpoint import CHECKPOINT_KEY, load_checkpoint

PREDICTOR = fitted_once(next(variant for variant in VARIANTS if variant.architecture == "cross_layer"))
WEIGHT = "predictor.start.weight"


def content() -> dict[str, Any]:
    """A checkpoint's content, as a task saves it."""
    about = {
        "architecture": "cross_layer", "package": "moe_beyond", "arguments": PREDICTOR.arguments(),
        "geometry": PREDICTOR.geometry.to_json(), "vocab_size": PREDICTOR.vocab_size, "training": {"source": "tests"},
    }  # fmt: skip
    state = {f"predictor.{name}": weight.clone() for name, weight in PREDICTOR.state_dict().items()}
    return {CHECKPOINT_KEY: about, "state_dict": state, "epoch": 1, "global_step": 7, "callbacks": {}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save(content(), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def refused(path: Path, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_undamaged_checkpoint_is_loaded(path: Path):
    checkpoint = load_checkpoint(path)
    assert (checkpoint.epoch, checkpoint.step, checkpoint.training) == (1, 7, {"source": "tests"})
    for name, weight in PREDICTOR.state_dict().items():
        assert torch.equal(checkpoint.predictor.state_dict()[name], weight), name


def test_a_flipped_bit_of_any_weight_is_noticed(path: Path):
    """Torch does not compare the check sums of an archive's parts."""
    whole = path.read_bytes()
    begin = whole.index(content()["state_dict"][WEIGHT].numpy().tobytes())
    for offset in (0, 5, 100):
        flipped = bytearray(whole)
        flipped[begin + offset] ^= 4
        path.write_bytes(flipped)
        refused(path, "is damaged (the check sum of a part differs)")


def test_a_cut_or_empty_checkpoint_or_a_pipe_is_named(path: Path):
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"", b"PK\x03\x04"):
        path.write_bytes(damaged)
        refused(path, "is not a checkpoint that can be read safely")
    path.unlink()
    os.mkfifo(path)
    refused(path, "is not a regular file")


def test_a_compressed_checkpoint_is_not_unpacked(path: Path):
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    refused(path, "is compressed, as no checkpoint is")


def set_nan(content: dict[str, Any]) -> None:
    content["state_dict"][WEIGHT].view(-1)[0] = torch.nan


def repeat_one_number(content: dict[str, Any]) -> None:
    content["state_dict"][WEIGHT] = torch.zeros(1).expand(10**6, 10**6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_nan, "start.weight must hold only finite numbers"),
        (repeat_one_number, "state_dict has more numbers than the file holds"),
        (lambda content: content["state_dict"].update({WEIGHT: 5}), "state_dict holds other values than tensors"),
        (lambda content: content["state_dict"].pop(WEIGHT), "the weights do not match a cross_layer"),
        (lambda content: content.pop("epoch"), "field 'epoch' is missing"),
        (lambda content: content.update(global_step="7"), "global_step must be a whole number"),
        (lambda content: content.update(state_dict=[]), "state_dict must be an object"),
        (lambda content: content.update({CHECKPOINT_KEY: 5}), "moe_beyond must be an object"),
        (lambda content: content[CHECKPOINT_KEY].pop("geometry"), "field 'geometry' is missing"),
        (lambda content: content[CHECKPOINT_KEY].update(vocab_size=10**12), "vocab_size must be a whole number"),
        (lambda content: content[CHECKPOINT_KEY].update(training={"source": 5}), "training: source must be text"),
        (lambda content: content[CHECKPOINT_KEY]["arguments"].update(width=8192), "the weights do not match"),
        (lambda content: content[CHECKPOINT_KEY]["arguments"].update(source="x"), "'source' is no argument"),
        (lambda content: content[CHECKPOINT_KEY].update(architecture="os.system"), "unknown predictor architecture"),
        (lambda content: content.pop(CHECKPOINT_KEY), "is not a checkpoint of this package"),
    ],
)
def test_a_wrong_part_is_named(change: Callable[[dict[str, Any]], Any], reason: str, path: Path):
    changed = content()
    change(changed)
    torch.save(changed, path)
    refused(path, reason)
