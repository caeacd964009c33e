"""``fit --resume RUN``, and what Ctrl-C does to a fit."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from _helpers.common import error_line
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER, Run

from moe_beyond.cli import quickstart
from moe_beyond.cli.main import main
from moe_beyond.tasks import PredictorTask

FEW = ("--data.token_budget=64", "--data.max_tokens=16", "--data.window=1", "--trainer.max_epochs=2")
CONFIGURED = [
    word
    for name in ("trainer/default", "model/cross_layer", "data/traces")
    for word in ("-c", f"{CONFIGS / name}.yaml")
]


def fit_words(traces: Path, *more: str) -> list[str]:
    """A tiny fit, with the dropout that is shipped."""
    return ["fit", *CONFIGURED, f"--data.traces={traces}", *FEW, *TINY_CROSS_LAYER, *more]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def signal_at(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process receive a signal once, as a batch begins."""
    begin = PredictorTask.on_train_batch_start

    def receiving(self, batch, batch_idx):
        if self.global_step == step and not sent:
            sent.append(step)
            os.kill(os.getpid(), number)
        begin(self, batch, batch_idx)

    sent: list[int] = []
    monkeypatch.setattr(PredictorTask, "on_train_batch_start", receiving)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_fit_says_how_to_go_on_and_that_gives_the_same_weights(
    number: int,
    code: int,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(fit_words(run.traces)) == 0
    with monkeypatch.context() as patch:
        signal_at(7, number, patch)
        capsys.readouterr()
        assert main(fit_words(run.traces)) == code
    said = capsys.readouterr().err
    assert "moe-beyond: interrupted; the run is in runs/predictor/version_1\n" in said
    assert "Traceback" not in said
    (command,) = [line.removeprefix("go on with: moe-beyond ") for line in said.splitlines() if "go on with" in line]
    assert command == "fit --resume runs/predictor/version_1"
    stopped = torch.load("runs/predictor/version_1/checkpoints/interrupted.ckpt", weights_only=True)
    assert stopped["global_step"] == 8  # the batch that was under way is in it
    assert main(shlex.split(command)) == 0
    expected, found = (weights(Path(f"runs/predictor/version_{number}")) for number in (0, 2))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_second_signal_ends_a_fit_at_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    child = os.fork()
    if child == 0:
        signal_at(3, signal.SIGINT, monkeypatch)
        signal_at(3, signal.SIGINT, monkeypatch)
        try:
            main(fit_words(run.traces))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert not list(tmp_path.rglob("interrupted.ckpt"))


def test_ctrl_c_in_the_quickstart_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(words: list[str]) -> None:  # as Lightning answers it
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr(quickstart, "main", interrupted)
    assert main(["quickstart", "--out", str(tmp_path / "demo")]) == 130
    assert capsys.readouterr().err == "moe-beyond: interrupted; run the same command again\n"


def test_a_finished_run_goes_on_for_longer_and_evaluate_sees_all(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--resume", str(run.folder), "--trainer.max_epochs=4"]) == 0
    assert "the learning rate follows the new schedule from here" in capsys.readouterr().err
    resumed = next(tmp_path.glob("runs/*/version_0"))
    config = yaml.safe_load((resumed / "config.yaml").read_text())
    assert Path(config["ckpt_path"]).parent == run.folder / "checkpoints"
    assert config["trainer"]["max_epochs"] == 4
    steps = []
    for folder in (run.folder, resumed):
        capsys.readouterr()
        assert main(["evaluate", str(folder), "--json", "-"]) == 0
        steps.append([row["step"] for row in json.loads(capsys.readouterr().out)["checkpoints"]])
    assert set(steps[0]) < set(steps[1])
    assert max(steps[1]) == max(steps[0]) // 3 * 4


def test_the_newest_readable_checkpoint_is_resumed_and_what_is_being_written_is_not_touched(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    for path in copy.glob("checkpoints/*.ckpt"):
        if path.stem not in ("between-step=2", "between-step=4"):
            path.write_bytes(path.read_bytes()[:1000])
    (copy / "checkpoints/.last.ckpt.abc.ckpt").write_bytes(b"half")
    assert main(["fit", "--resume", str(copy), "--trainer.max_steps=5", "--quiet"]) == 0
    config = yaml.safe_load(next(tmp_path.glob("runs/*/version_0/config.yaml")).read_text())
    assert Path(config["ckpt_path"]).name == "between-step=4.ckpt"
    assert "last.ckpt: cannot be resumed; skipped" in capsys.readouterr().err
    assert (copy / "checkpoints/.last.ckpt.abc.ckpt").read_bytes() == b"half"  # the run may still be alive


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["fit", "--resume"], "--resume needs a run; name its folder"),
        (["fit", "--resume", "nowhere"], "nowhere: run not found; name its folder"),
        (["fit", "--resume=.", "--resume=."], "--resume is given 2 times; name one run"),
        (["fit", "--resume=."], ".: has no config.yaml; give the configs of the fit with -c"),
        (["fit", "--resume=RUN", "--ckpt_path=x"], "--resume and --ckpt_path both name a checkpoint; give one of them"),
        (["test", "--resume=RUN"], "test has no --resume; give --ckpt_path FILE"),
        (
            ["fit", "-c", "RUN/config.yaml", "--ckpt_path=last"],
            "--ckpt_path last: names no file; moe-beyond fit --resume",
        ),
        (
            ["fit", "-c", "RUN/config.yaml", "--ckpt_path=best"],
            "--ckpt_path best: names no file; moe-beyond fit --resume",
        ),
        (["test", "-c", "RUN/config.yaml", "--ckpt_path=hpc"], "--ckpt_path hpc: names no file; give one, as runs/"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_slips_are_a_line(
    words: list[str],
    line: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.replace("RUN", str(run.folder)) for word in words]
    assert error_line(capsys, words).startswith(line)


def test_a_run_without_checkpoints_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(run.folder / "config.yaml", tmp_path)
    assert error_line(capsys, ["fit", "--resume", tmp_path]) == (
        f"{tmp_path}: has no checkpoint that a fit can resume from; fit again"
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("delay", [0.0, 1.5])
def test_ctrl_c_of_a_terminal_reaches_all_processes_and_ends_in_two_lines(
    workers: int, delay: float, run: Run, tmp_path: Path
) -> None:
    few = fit_words(run.traces, f"--data.num_workers={workers}")
    words = [word for word in few if not word.startswith("--trainer.max_epochs")] + ["--trainer.max_epochs=500"]
    command = [sys.executable, "-m", "moe_beyond", *words]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=err, stderr=err, start_new_session=True)
        try:
            while not list(tmp_path.rglob("last.ckpt")) and process.poll() is None:
                time.sleep(0.05)
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(15) == 130  # also where new workers start just then
        finally:
            process.kill()
    said = (tmp_path / "err").read_text()
    assert "Traceback" not in said
    assert "go on with: moe-beyond fit --resume runs/predictor/version_0" in said


def test_a_finished_fit_is_not_resumed_without_more_to_do(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    epochs = yaml.safe_load((run.folder / "config.yaml").read_text())["trainer"]["max_epochs"]
    capsys.readouterr()
    assert main(["fit", "--resume", str(run.folder), "--quiet"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"moe-beyond: error: {run.folder}/checkpoints/")
    ending = f": the fit is finished (epochs {epochs} of {epochs}); give --trainer.max_epochs M to go on\n"
    assert line.endswith(ending)
    assert not list(tmp_path.iterdir())


def test_a_fit_that_was_stopped_before_its_export_is_resumed_for_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run.folder, "stopped")
    shutil.rmtree("stopped/predictor")
    assert main(["fit", "--resume", "stopped", "--quiet"]) == 0
    resumed = next(tmp_path.glob("runs/*/version_0"))
    assert (resumed / "predictor/config.json").exists()
