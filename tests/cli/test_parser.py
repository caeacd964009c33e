"""Mistakes on the command line, and their one-line errors."""

from pathlib import Path

import pytest
import torch
from _helpers.common import error_line, failure, tiny_traces
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER

from moe_beyond.cli.library_errors import as_user_error
from moe_beyond.cli.options import command_parser
from moe_beyond.errors import UserError
from moe_beyond.predictors.activation import subset_shift

TRAINER, MODEL, DATA = (f"{CONFIGS / name}.yaml" for name in ("trainer/default", "model/cross_layer", "data/traces"))
EXAMPLE = (
    "for example: moe-beyond fit -c trainer/default -c model/cross_layer -c data/traces --data.traces traces/puffin"
)
ALL_CONFIGS = ["-c", TRAINER, "-c", MODEL, "-c", DATA]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a trace set in it."""
    tiny_traces(tmp_path / "traces")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], f"fit needs --data and --model; {EXAMPLE}"),
        (["--data.traces=traces"], f"fit needs --model; {EXAMPLE}"),
        (
            ["--model", "CrossLayerTask", "--data", "TraceDataModule"],
            f"--data: TraceDataModule needs traces; give --data.traces; {EXAMPLE}",
        ),
        (
            ["--model", "CrossLayrTask", "--data.traces=traces"],
            "--model: unknown class 'CrossLayrTask'; did you mean 'CrossLayerTask'?",
        ),
        (
            ["--model", "CrossLayerTask", "--model.widht=3", "--data.traces=traces"],
            "--model: CrossLayerTask has no argument 'widht'; did you mean 'width'?",
        ),
        (
            ["--model", "CrossLayerTask", "--data", "TraceDataModule", "--data.trace=traces"],
            "--data: TraceDataModule has no argument 'trace'; did you mean 'traces'?",
        ),
        ([*ALL_CONFIGS, "--model.width=wide"], "--model.width: expects a whole number (got 'wide')"),
        (["--modle.width=3"], "unrecognized arguments: --modle.width=3; did you mean --model.width?"),
        (
            ["--trainer.max_epoch=3"],
            "unrecognized arguments: --trainer.max_epoch=3; did you mean --trainer.max_epochs?",
        ),
        (
            ["--trainer.max_epochs=many", *ALL_CONFIGS],
            "--trainer.max_epochs: expects a whole number or null (got 'many')",
        ),
        (["--trainer.logger=NoLogger", *ALL_CONFIGS], None),
        (
            ["--trainer.max_epochs=1", "--trainer.max_epochs", "2"],
            "--trainer.max_epochs: is given twice, and takes one value; leave one of them out",
        ),
    ],
)
def test_a_mistake_of_fit_is_one_line(here: Path, capsys, words: list[str], line: str | None) -> None:
    said = failure(capsys, here, ["fit", *words])
    assert line is None or said == line
    assert not any(phrase in said for phrase in ("Union", "Subtypes", "NoneType", "<class"))


def test_a_precision_that_there_is_not_names_those_there_are(here: Path, capsys) -> None:
    said = failure(capsys, here, ["fit", *ALL_CONFIGS, "--data.traces=traces", "--trainer.precision=fp16"])
    assert said.startswith("--trainer.precision: expects ")
    assert said.endswith("(got 'fp16')")
    assert all(f" {name} " in said for name in ("16-mixed", "bf16-mixed", "32-true"))


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_the_other_commands_report_it_too(here: Path, capsys, command: str) -> None:
    words = [command, "-c", MODEL, "-c", DATA, "--data.traces=traces"]
    assert failure(capsys, here, [*words, "--model.widht=3"]).startswith(
        "--model: CrossLayerTask has no argument 'widht'"
    )
    assert failure(capsys, here, [*words, "--trainer.accelerator=abacus"]).startswith("Trainer: ")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model.dropout=5"], "cross_layer: dropout must be a number from 0 to below 1 (got 5.0)"),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/los"],
            "EarlyStopping: unknown figure to monitor 'val/los'; did you mean 'val/loss'?",
        ),
        (
            ["--trainer.callbacks.warmup=1"],
            "--trainer.callbacks: CacheReplay has no argument 'warmup'; did you mean 'warmup_tokens'?; "
            "a flag reaches only the last one, so set the others in a -c FILE",
        ),
        (
            ["--trainer.max_epochs=0"],
            "nothing was fitted: no training step was made; raise trainer.max_epochs, max_steps, max_time or "
            "limit_train_batches",
        ),
        (["--seed_everything=-1"], "--seed_everything: -1 is not in bounds, numpy accepts from 0 to 4294967295"),
        (["--data.val_split=dev"], None),
    ],
)
def test_what_a_constructor_or_a_callback_refuses_leaves_nothing(
    here: Path, capsys, words: list[str], line: str | None
) -> None:
    said = failure(capsys, here, ["fit", *ALL_CONFIGS, "--data.traces=traces", *TINY_CROSS_LAYER, *words])
    assert line is None or said == line


def test_gradients_that_are_not_there_are_not_clipped(here: Path, capsys) -> None:
    model = f"{CONFIGS / 'model/popularity'}.yaml"
    words = ["fit", "-c", TRAINER, "-c", model, "-c", DATA, "--data.traces=traces", "--trainer.max_epochs=1"]
    assert "use trainer/counting" in failure(capsys, here, words)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["replay"], "replay needs --traces DIR; for example: moe-beyond replay --traces "),
        (["replay", "traces"], "unrecognized arguments: traces; did you mean --traces traces?"),
        (
            ["inspect", "--traces", "traces"],
            "unrecognized arguments: --traces; inspect takes DIR without --traces, as in",
        ),
        (["replay", "--traces", "a", "--traces=b"], "--traces: is given twice, and takes one value"),
        (["replay", "--traces=traces", "--policy=LRU"], "unknown policy 'LRU'; did you mean 'lru'?"),
        (["train"], "unknown command 'train'; did you mean 'fit'?"),
    ],
)
def test_mistakes_of_other_commands(here: Path, capsys, words: list[str], line: str) -> None:
    assert error_line(capsys, words).startswith(line)


def test_options_that_repeat_may_be_given_again() -> None:
    parser = command_parser("command", "About.", "moe-beyond command")
    parser.add_argument("--budget", action="append")
    parser.add_argument("--split")
    args = parser.parse_args(["--quiet", "--budget", "1", "--budget=2", "--split", "a", "--quiet"])
    assert (args.budget, args.split) == (["1", "2"], "a")
    with pytest.raises(UserError, match="--split: is given twice"):
        parser.parse_args(["--split=a", "--budget", "1", "--split", "a"])


def test_an_argument_of_a_class_may_be_given_again_for_the_next_class(here: Path, capsys) -> None:
    words = [
        *("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"),
        *("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/los"),
    ]
    said = failure(capsys, here, ["fit", *ALL_CONFIGS, "--data.traces=traces", *TINY_CROSS_LAYER, *words])
    assert "unknown figure to monitor 'val/los'" in said
    twice = failure(capsys, here, ["fit", *ALL_CONFIGS, *words, "--trainer.callbacks.monitor=x"])
    assert twice.startswith("--trainer.callbacks.monitor: is given twice")


def test_a_fault_of_this_package_stays_a_traceback() -> None:
    with pytest.raises(AttributeError), as_user_error(constructing=True):
        subset_shift(None, 2)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError), as_user_error():  # a library's complaint about what this package hands it
        subset_shift(torch.zeros(3, 4), torch.zeros(5))  # type: ignore[arg-type]
    with pytest.raises(AttributeError), as_user_error():
        torch.nn.Linear(2, 2).no_such_method()


def test_what_a_library_raises_by_itself_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^dropout probability has to be between 0 and 1, but got 7$"), as_user_error():
        torch.nn.Dropout(7)


def test_a_second_value_of_an_option_that_repeats_is_explained(capsys) -> None:
    line = error_line(capsys, ["replay", "--traces", "x", "--budget", "10%", "20%"])
    assert line == "unrecognized arguments: 20%; write --budget again for each value: --budget 20%"
