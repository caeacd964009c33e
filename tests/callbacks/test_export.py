"""The predictor that a fit leaves behind is calibrated, by its own validation or another's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER, Run, fit

from moe_beyond.cli.main import main
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.predictors.fit_calibration import calibrate
from moe_beyond.predictors.io.folder import read_predictor

SMALL = ("--data.token_budget=64", "--data.max_tokens=16", "--trainer.max_epochs=1", *TINY_CROSS_LAYER)


def export(folder: Path, run: Run, calibration: str, *words: str) -> list[str]:
    """Return what a tiny fit without validation is started with."""
    more = folder / "export.yaml"
    more.write_text(
        "model: {class_path: CrossLayerTask}\ndata: {class_path: TraceDataModule}\n"
        "trainer:\n  logger: [{class_path: CSVLogger, init_args: {save_dir: runs, name: x}}]\n"
        f"  callbacks: [{{class_path: ExportBest, init_args: {{calibration: {calibration}}}}}]\n"
    )
    return ["-c", str(more), *SMALL, *words]


def test_a_fit_calibrates_on_its_validation_split(run: Run) -> None:
    predictor = read_predictor(run.folder / "predictor")
    found, predictor.calibration = predictor.calibration, None
    data = TraceDataModule(str(run.traces))
    tokens = data.manifest.counts()["validation"]["tokens"]
    expected = calibrate(predictor, data.val_dataloader(), tokens)
    assert found is not None
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-3, atol=1e-3)


def test_a_fit_on_all_takes_over_the_calibration_of_one_that_held_out(run: Run, tmp_path: Path) -> None:
    words = export(tmp_path, run, str(run.folder / "predictor"), "--data.val_split=null")
    folder = fit(tmp_path, run.traces, *words) / "predictor"
    found, lent = (read_predictor(path).calibration for path in (folder, run.folder / "predictor"))
    assert found is not None
    assert lent is not None
    np.testing.assert_array_equal(found.scale, lent.scale)


@pytest.mark.parametrize(("calibration", "words"), [("null", ()), ("validation", ("--data.val_split=null",))])
def test_without_held_out_text_there_is_none(
    run: Run, tmp_path: Path, calibration: str, words: tuple[str, ...]
) -> None:
    folder = fit(tmp_path, run.traces, *export(tmp_path, run, calibration, *words)) / "predictor"
    assert read_predictor(folder).calibration is None


def test_a_calibration_that_does_not_fit_is_refused_at_once(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = export(tmp_path, run, str(run.folder / "predictor"), "--model.lookaheads=2", "--data.val_split=null")
    data = ["-c", str(CONFIGS / "data/traces.yaml"), f"--data.traces={run.traces}"]
    assert main(["fit", *data, *words]) == 2
    assert "has no calibration that fits a cross_layer" in capsys.readouterr().err
