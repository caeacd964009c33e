"""Evaluation of all checkpoints of a run."""

import pytest
from _helpers.fitting import Run

from moe_beyond.cli.main import main
from moe_beyond.evaluation.checkpoints import evaluate_run
from moe_beyond.evaluation.options import ReplayOptions


def test_every_checkpoint_has_the_same_baselines_and_progress_covers_all(run: Run) -> None:
    reports: list[tuple[int, int]] = []
    options = ReplayOptions(budget=["25%"])
    evaluation = evaluate_run(options, run.folder, progress=lambda done, total: reports.append((done, total)))
    assert [checkpoint.step for checkpoint in evaluation.checkpoints] == sorted(c.step for c in evaluation.checkpoints)
    baselines = [checkpoint.evaluation.results[1:] for checkpoint in evaluation.checkpoints]
    assert all(results == baselines[0] for results in baselines)
    assert evaluation.measured_on.split == "validation"
    done, totals = zip(*reports, strict=True)
    assert list(done) == sorted(done)
    assert {done[-1]} == set(totals)


def test_the_conditions_are_printed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run.folder), "--budget", "25%", "--warmup-tokens", "2"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("conditions: ")]
    assert "after a warm-up of 2" in line
