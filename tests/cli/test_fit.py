"""From a config to a predictor folder and back to figures, all through the command line."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _helpers.common import TINY, error_line, tiny_traces
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER, Run, fit
from safetensors.numpy import load_file

from moe_beyond.cli.main import main
from moe_beyond.evaluation.score_store import ScoresFolder
from moe_beyond.predictors.io.folder import read_config, read_predictor
from moe_beyond.traces.reader import TraceSet


def columns(run: Path) -> dict[str, list[float]]:
    """The figures that the CSV logger kept, name by name."""
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def test_a_fit_learns_and_replays_at_every_validation(run: Run) -> None:
    figures = columns(run.folder)
    assert len(figures["val_budget_50pct/hit_rate"]) == 3
    assert figures["val/recall_at_k"][-1] > 2 / 8  # chance
    # What does not depend on the predictor stays the same from validation to validation.
    for name in ("lru_hit_rate", "belady_hit_rate", "lru_bytes_ratio", "belady_bytes_ratio"):
        assert len(set(figures[f"val_budget_50pct/{name}"])) == 1
    assert figures["val_budget_50pct/belady_hit_rate"][0] >= figures["val_budget_50pct/lru_hit_rate"][0]
    for figure in ("f1_micro", "average_precision"):
        for lookahead in (1, 2, 3, "next"):
            assert f"val_lookahead_{lookahead}/{figure}" in figures
    assert [name for name in figures if "recall_at_k" in name] == [
        "val/recall_at_k", *(f"val_lookahead_{lookahead}/recall_at_k" for lookahead in (2, 3, "next"))
    ]  # fmt: skip


def test_the_best_checkpoint_is_exported(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    config = read_config(run.folder / "predictor")
    assert config["architecture"] == "cross_layer"
    assert config["lookaheads"] == [1, 2, 3, "next"]
    assert config["arguments"]["width"] == 16
    assert config["training"]["fingerprint"] == TraceSet(str(run.traces)).manifest.fingerprint
    hits = columns(run.folder)["val_budget_50pct/hit_rate"]
    best = torch.load(next(run.folder.glob(f"checkpoints/epoch={hits.index(max(hits))}-*.ckpt")), weights_only=True)[
        "state_dict"
    ]
    exported = read_predictor(run.folder / "predictor").state_dict()
    assert all(torch.equal(exported[name], best[f"predictor.{name}"]) for name in exported)


def test_package_makes_the_same_folder_from_a_checkpoint(run: Run, tmp_path: Path) -> None:
    best = next(run.folder.glob("checkpoints/epoch=*.ckpt"))
    assert main(["package", str(best), "--out", str(tmp_path / "p"), "--half"]) == 0
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    halves = load_file(tmp_path / "p" / "model.safetensors")
    assert {str(t.dtype) for t in halves.values() if t.dtype.kind == "f"} == {"float16"}
    assert read_predictor(tmp_path / "p").geometry == TraceSet(str(run.traces)).geometry


def words_for(run: Run, verb: str, checkpoint: str = "last.ckpt") -> list[str]:
    """``validate``, ``test`` or ``predict`` of a checkpoint, from the run's own config."""
    return [verb, "-c", str(run.folder / "config.yaml"), f"--ckpt_path={run.folder / 'checkpoints' / checkpoint}"]


def test_validating_a_checkpoint_repeats_what_the_fit_saw(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words_for(run, "validate")) == 0
    again, seen = columns(next(tmp_path.glob("runs/*/version_0"))), columns(run.folder)
    budget = "val_budget_50pct"
    for name in (
        "val/recall_at_k",
        "val/loss",
        f"{budget}/hit_rate",
        f"{budget}/bytes_ratio",
        f"{budget}/belady_hit_rate",
    ):
        assert again[name] == pytest.approx([seen[name][-1]])


def test_test_agrees_with_evaluate(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words_for(run, "test")) == 0
    tested = columns(next(tmp_path.glob("runs/*/version_0")))
    assert main(["package", str(run.folder / "checkpoints/last.ckpt"), "--out", "p"]) == 0
    capsys.readouterr()
    words = ["--traces", str(run.traces), "--split", "validation", "--budget", "50%", "--json", "-"]
    assert main(["evaluate", "p", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["lookahead"] for row in found["metrics"]] == [1, 2, 3, "next"]
    for number, row in enumerate(found["metrics"]):
        section = f"test_lookahead_{row['lookahead']}"
        for name in ("f1_micro", "f1_macro", "accuracy", "average_precision", "exact_match"):
            assert math.isclose(tested[f"{section}/{name}"][0], row[name], rel_tol=1e-6)
        recall = tested[f"{section if number else 'test'}/recall_at_k"][0]
        assert math.isclose(recall, row["recall_at_k"], rel_tol=1e-6)
    replayed = next(r for r in found["results"] if r["prefetch"] == "top2" and r["lookahead"] == 1)
    assert math.isclose(tested["test_budget_50pct/hit_rate"][0], replayed["hit_rate"], rel_tol=1e-6)
    assert math.isclose(tested["test_budget_50pct/bytes_ratio"][0], replayed["bytes_ratio"], rel_tol=1e-6)
    assert {(r["policy"], r["prefetch"]) for r in found["results"]} == {
        ("lru", "top2"), ("lru", "none"), ("belady", "none"), ("static_hindsight", "none"),
    }  # fmt: skip


def test_predicted_scores_replay_like_the_predictor(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words_for(run, "predict")) == 0
    scores = next(tmp_path.glob("runs/*/version_0/scores"))
    assert ScoresFolder(scores).lookaheads == (1, 2, 3, "next")
    assert main(["package", str(run.folder / "checkpoints/last.ckpt"), "--out", "p"]) == 0
    found = []
    for source in (["--predictor", "p"], ["--scores", str(scores)]):
        capsys.readouterr()
        words = ["--traces", str(run.traces), "--split", "validation", "--budget", "12", "--lookahead", "2"]
        assert main(["replay", *source, *words, "--prefetch", "top3", "--json", "-"]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]
    first = json.loads(found[0])["results"][0]
    assert (first["lookahead"], first["prefetch"], first["predictor"]) == (2, "top3", "cross_layer")


def test_evaluate_lists_all_checkpoints_of_a_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run.folder), "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps)
    per_epoch = max(steps) // 3
    assert any(step % per_epoch for step in steps)  # saved between validations
    assert all(row["metrics"][0]["tokens"] == rows[0]["metrics"][0]["tokens"] for row in rows)
    assert main(["evaluate", str(run.folder)]) == 0
    assert "between-step=2.ckpt" in capsys.readouterr().out


def test_a_resumed_fit_ends_where_one_that_never_stopped_does(run: Run, tmp_path: Path) -> None:
    every_epoch = tmp_path / "every_epoch.yaml"
    every_epoch.write_text(
        "trainer:\n  callbacks:\n    - class_path: ModelCheckpoint\n"
        "      init_args: {save_top_k: -1, save_last: true, filename: '{epoch}'}\n"
        "    - class_path: ModelCheckpoint\n"
        "      init_args: {save_top_k: -1, every_n_train_steps: 3, filename: '{step}'}\n"
    )
    words = (
        *("-c", str(CONFIGS / "trainer/default.yaml"), "-c", str(every_epoch)),
        *("-c", str(CONFIGS / "model/cross_layer.yaml"), *TINY_CROSS_LAYER),
        *("--model.dropout=0", "--model.token_dropout=0", "--trainer.max_epochs=3"),
        *("--data.token_budget=64", "--data.max_tokens=16"),
    )

    def last(folder: Path, *more: str) -> tuple[Path, dict[str, torch.Tensor]]:
        folder.mkdir()
        done = fit(folder, run.traces, *words, *more)
        return done, torch.load(done / "checkpoints/last.ckpt", weights_only=True)["state_dict"]

    straight, weights = last(tmp_path / "straight")
    # After an epoch, and in the middle of the first and the second.
    for name in ("epoch=0", "epoch=1", "step=3", "step=6"):
        _, resumed = last(tmp_path / name, f"--ckpt_path={straight / 'checkpoints' / name}.ckpt")
        for key, tensor in weights.items():
            assert torch.equal(resumed[key], tensor), (name, key)


def refit(run: Run, folder: Path, *words: str) -> Path:
    """Fit the run's predictor once more, one epoch, otherwise."""
    base = ("-c", str(CONFIGS / "trainer/default.yaml"), "-c", str(CONFIGS / "model/cross_layer.yaml"))
    few = ("--data.token_budget=64", "--data.max_tokens=16", "--trainer.max_epochs=1", *TINY_CROSS_LAYER)
    return fit(folder, run.traces, *base, *few, *words)


def test_a_pupil_fits_half_of_what_its_teachers_say(run: Run, tmp_path: Path) -> None:
    teachers = f"--model.teachers=[{run.folder / 'predictor'},{run.folder / 'predictor'}]"
    alone, taught = tmp_path / "alone", tmp_path / "taught"
    for folder, words in ((alone, ()), (taught, (teachers,))):
        folder.mkdir()
        refit(run, folder, "--trainer.log_every_n_steps=1", *words)
    config = read_config(next(taught.glob("runs/*/version_0/predictor")))
    assert config["training"]["recipe"]["teachers"] == 2
    losses = [columns(next(folder.glob("runs/*/version_0")))["train/loss"] for folder in (alone, taught)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert "teachers" not in read_config(next(alone.glob("runs/*/version_0/predictor")))["training"]["recipe"]


def test_a_teacher_predicts_what_its_pupil_does(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "-c", CONFIGS / "model/cross_layer.yaml", "-c", CONFIGS / "data/traces.yaml", *TINY_CROSS_LAYER]
    words += [f"--data.traces={run.traces}", f"--model.teachers=[{run.folder / 'predictor'}]"]
    said = error_line(capsys, [*words, "--model.objective=softmax"])
    assert "has lookaheads 1, 2, 3, next, activation subset of 4 MoE layers x 8 experts" in said
    assert "but the fitted predictor has lookaheads 1, 2, 3, next, activation softmax" in said
    assert error_line(capsys, [*words, "--model.lookaheads=5"]).endswith(
        "top-2, and lacks lookahead 4, 5 of the fitted predictor; choose another teacher, or fit fewer lookaheads"
    )
    tiny_traces(tmp_path / "other", geometry=replace(TINY, num_experts=16))
    words[words.index(f"--data.traces={run.traces}")] = f"--data.traces={tmp_path / 'other'}"
    said = error_line(capsys, words)
    assert "8 experts, top-2, but the fitted predictor has lookaheads 1, 2, 3, next, activation subset of 4 MoE" in said


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile uses deprecated parts of torch
def test_a_compiled_objective_is_the_same(run: Run, tmp_path: Path) -> None:
    losses = []
    for compiled in ("false", "true"):
        (tmp_path / compiled).mkdir()
        words = ("--model.objective=subset", f"--model.compiled={compiled}", "--trainer.log_every_n_steps=1")
        losses.append(columns(refit(run, tmp_path / compiled, *words))["train/loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
