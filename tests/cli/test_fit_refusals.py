"""Options with which no fit can be made: one line each, before any work, and nothing left behind."""

import errno
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from _helpers.common import error_line, failure, tiny_traces
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER
from lightning.pytorch.loggers import CSVLogger

from moe_beyond.cli.library_errors import as_user_error
from moe_beyond.errors import UserError
from moe_beyond.tasks import PredictorTask

CONFIGURED = [
    word
    for name in ("trainer/default", "model/cross_layer", "data/traces")
    for word in ("-c", str(CONFIGS / f"{name}.yaml"))
]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals") / "traces"
    tiny_traces(folder)
    return folder


@pytest.fixture
def refused(
    traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """What a tiny fit with more options is refused with."""
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)

    def run(*words: str, data: str | None = None) -> str:
        chosen = f"--data.traces={traces if data is None else data}"
        line: str = failure(capsys, tmp_path, ["fit", *CONFIGURED, chosen, *TINY_CROSS_LAYER, "--quiet", *words])
        return line

    return run


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("--model.dropout=5", "cross_layer: dropout must be a number from 0 to below 1 (got 5.0)"),
        ("--model.optimizer.lr=-1", "cross_layer: lr must be a finite number above 0 (got -1.0)"),
        ("--model.optimizer.warmup=2", "cross_layer: warmup must be a number within 0..1 (got 2.0)"),
        ("--data.num_workers=-1", "data.num_workers must be at least 0 (got -1)"),
        ("--data.seed=-1", "data.seed must be at least 0 (got -1)"),
        ("--data.val_traces=", "data.val_traces: the name is empty; give the folder of a trace set"),
        ("--model.vocab_size=5", "--model.vocab_size: is read from the traces (got 5); leave it out"),
        (
            "--trainer.precision=64",
            "--trainer.precision: weights are kept in 32 bits; set 32-true, 16-mixed or bf16-mixed (got 64-true)",
        ),
        (
            "--trainer.plugins=DoublePrecision",
            "--trainer.precision: weights are kept in 32 bits; set 32-true, 16-mixed or bf16-mixed (got 64-true)",
        ),
        (
            "--trainer.num_nodes=3",
            "--trainer.num_nodes: 3 nodes need a launcher (torchrun, srun), or on each node MASTER_ADDR, MASTER_PORT, "
            "NODE_RANK in the environment (missing: MASTER_ADDR, MASTER_PORT, NODE_RANK)",
        ),
        (
            "--trainer.callbacks+=BackboneFinetuning",
            "BackboneFinetuning: 'CrossLayerTask' object has no attribute 'backbone'",
        ),
        (
            "--trainer.callbacks+=WeightAveraging",
            "trainer.callbacks: WeightAveraging averages buffers, which hold ids (got use_buffers true); set "
            "use_buffers to false",
        ),
    ],
)
def test_an_option_out_of_range_is_a_line(word: str, line: str, refused: Refused) -> None:
    assert refused(word) == line


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork", "ddp_notebook", "ddp_notebook_find_unused_parameters_true"])
def test_a_strategy_whose_result_is_lost_is_named(name: str, refused: Refused) -> None:
    line = refused(f"--trainer.strategy={name}")
    assert line.startswith(f"--trainer.strategy: {name} starts ")
    assert line.endswith("; set ddp")


@pytest.mark.parametrize("given", ["model: null", "model: {class_path: CrossLayerTask, init_args: {vocab_size: 5}}"])
def test_a_file_is_refused_as_an_option_is(given: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(given)
    line = refused("-c", "more.yaml")
    assert line in (
        "more.yaml: model: is null; give its settings, or remove it from the file",
        "--model.vocab_size: is read from the traces (got 5); leave it out",
    )
    assert ("null" in given) == line.startswith("more.yaml")


def test_empty_names_are_a_line(refused: Refused) -> None:
    assert refused("-c", "") == "-c: the name of the file is empty; name a configuration file in YAML"
    assert refused(data="") == "data.traces: the name is empty; give the folder of a trace set"


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("folder", "--json folder: is a folder; name a file"),
        ("file/below.json", "--json file/below.json: file is a file, not a folder; name another place"),
        ("", "--json: the name of the file is empty; name a file, or - for standard output"),
    ],
)
def test_a_place_for_json_is_checked_before_work(path: str, line: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    assert refused(f"--json={path}") == line


def test_our_own_fault_in_a_hook_keeps_its_traceback() -> None:
    from lightning.pytorch.callbacks import LambdaCallback

    callback = LambdaCallback(on_fit_start=lambda *_: PredictorTask.recipe(object()))  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="has no attribute 'trainer'"), as_user_error():
        callback.on_fit_start(None, None)  # type: ignore[arg-type]


def test_a_librarys_constructor_that_refuses_a_value_is_a_line() -> None:
    import torch

    with pytest.raises(UserError, match="Invalid learning rate"), as_user_error():
        torch.optim.AdamW([torch.zeros(1)], lr=-1.0)


def test_a_full_disk_is_a_line_with_the_folder_of_the_run(
    traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CSVLogger, "save", full)
    words = ["fit", *CONFIGURED, f"--data.traces={traces}", *TINY_CROSS_LAYER, "--trainer.max_epochs=1", "--quiet"]
    assert error_line(capsys, words) == (
        "runs/predictor/version_0: cannot be written (No space left on device); free some space, then run the same "
        "command again"
    )
