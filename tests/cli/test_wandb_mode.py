"""Where wandb's runs go is settled without an account and without a question."""

import os
import sys
from pathlib import Path

import pytest
from _helpers.common import error_line, tiny_traces
from _helpers.fitting import CONFIGS, fit
from _helpers.wandb_files import offline_runs

COUNTING = ("-c", str(CONFIGS / "trainer/counting.yaml"), "-c", str(CONFIGS / "model/popularity.yaml"))


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nobody is logged in, and nothing is set."""
    home = tmp_path / "home"
    home.mkdir()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(home / name.lower()))
    return monkeypatch


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    tiny_traces(tmp_path / "traces")
    return tmp_path / "traces"


def test_a_stranger_gets_an_offline_run(stranger: pytest.MonkeyPatch, traces: Path, tmp_path: Path) -> None:
    before = {name for name in os.environ if name.startswith("WANDB_")}
    fit(tmp_path, traces, *COUNTING)
    assert len(offline_runs(tmp_path)) == 1
    assert {name for name in os.environ if name.startswith("WANDB_")} == before


ONLINE = "wandb: mode online needs a login; run `wandb login`, or set WANDB_API_KEY, or set WANDB_MODE="
LOGGER = "--trainer.logger=WandbLogger"


@pytest.mark.parametrize(
    ("mode", "words", "says"),
    [
        ("online", (), ONLINE),
        (None, (LOGGER, "--trainer.logger.mode=online"), ONLINE),
        ("onlin", (), "unknown WANDB_MODE 'onlin'; did you mean 'online'?"),
        (
            None,
            (LOGGER, '--trainer.logger.settings={"api_key": "sesame"}'),
            "must not contain an api_key; set WANDB_API_KEY",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    mode: str | None,
    words: tuple[str, ...],
    says: str,
    stranger: pytest.MonkeyPatch,
    traces: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if mode is not None:
        stranger.setenv("WANDB_MODE", mode)
    stranger.chdir(tmp_path)
    said = error_line(capsys, ["fit", *COUNTING, "-c", CONFIGS / "data/traces.yaml", f"--data.traces={traces}", *words])
    assert says in said
    assert "sesame" not in said
    assert not (tmp_path / "runs").exists()


def test_what_wandb_refuses_is_one_line(
    stranger: pytest.MonkeyPatch, traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger.setenv("WANDB_API_KEY", "sesame")
    stranger.chdir(tmp_path)
    said = error_line(capsys, ["fit", *COUNTING, "-c", CONFIGS / "data/traces.yaml", f"--data.traces={traces}"])
    assert said.startswith("wandb: WANDB_API_KEY invalid")
    assert "WANDB_MODE=offline" in said
    assert "sesame" not in said


@pytest.mark.parametrize(
    ("mode", "words"), [("online", ("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs")), ("disabled", ())]
)
def test_without_its_logger_wandb_is_not_even_imported(
    mode: str, words: tuple[str, ...], stranger: pytest.MonkeyPatch, traces: Path, tmp_path: Path
) -> None:
    stranger.setitem(sys.modules, "wandb", None)  # whoever imports it fails
    stranger.setenv("WANDB_MODE", mode)
    folder = fit(tmp_path, traces, *COUNTING, *words)
    assert (folder / "metrics.csv").exists()
    assert not list(tmp_path.glob("**/wandb"))
