"""The upload at the end of a fit, and its checks before the fit starts."""

from pathlib import Path

import pytest
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER, Run
from _helpers.hub_stand_in import Hub

from moe_beyond.cli.main import main
from moe_beyond.predictors import from_pretrained
from moe_beyond.predictors.io.folder import read_predictor

SMALL = ("--data.token_budget=64", "--data.max_tokens=16", "--trainer.max_epochs=1", *TINY_CROSS_LAYER)
BOTH = "[{class_path: ExportBest}, {class_path: PushBest, init_args: {repository: org/tiny}}]"


@pytest.fixture
def fitted(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a tiny fit with these callbacks; return its exit code and where it leaves a predictor."""
    monkeypatch.chdir(tmp_path)

    def fit(callbacks: str = BOTH, traces: str = str(run.traces)) -> tuple[int, Path]:
        more = tmp_path / "push.yaml"
        more.write_text(
            "model: {class_path: CrossLayerTask}\n"
            "trainer:\n  logger: [{class_path: CSVLogger, init_args: {save_dir: runs, name: x}}]\n"
            f"  callbacks: {callbacks}\n"
        )
        words = ["-c", str(CONFIGS / "data/traces.yaml"), "-c", str(more), f"--data.traces={traces}", *SMALL]
        return main(["fit", *words]), tmp_path / "runs/x/version_0/predictor"

    return fit


def test_a_fit_publishes_its_best(hub: Hub, fitted, capsys) -> None:
    code, folder = fitted()
    assert code == 0
    repository = hub.model("org/tiny")
    assert f"{hub.url}/org/tiny, commit {repository.branches['main']}" in capsys.readouterr().err
    assert repository.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert from_pretrained("org/tiny").architecture == "cross_layer"


def test_a_push_that_fails_loses_no_fit(hub: Hub, fitted, capsys) -> None:
    hub.breaks("POST", "/commit/", 500)
    code, folder = fitted()
    assert code == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moe-beyond: warning")]
    assert "not uploaded: hf:org/tiny@main: the Hub fails (status 500)" in line
    by_hand = line.split(": moe-beyond ")[1].split()
    assert by_hand[:1] == ["push"]
    assert read_predictor(folder).architecture == "cross_layer"
    hub.broken.clear()
    assert main(by_hand) == 0
    assert "model.safetensors" in hub.model("org/tiny").files


@pytest.mark.parametrize(
    ("callbacks", "token", "said"),
    [
        (BOTH, "hf_wrongOne", "hf:org/tiny: the Hub does not accept the token"),
        (BOTH, None, "hf:org/tiny: the Hub requires a token"),
        (BOTH.replace("org/tiny", "tiny"), "", "'tiny' is not the name of a repository; write ORG/REPO"),
        (BOTH.replace("{class_path: ExportBest}, ", ""), "", "put ExportBest before it"),
    ],
)
def test_what_forbids_a_push_is_known_before_the_fit(hub, fitted, capsys, monkeypatch, callbacks, token, said) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    elif token:
        monkeypatch.setenv("HF_TOKEN", token)
    code, folder = fitted(callbacks)
    assert code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("moe-beyond: error: ")
    assert said in line
    assert "hf_wrongOne" not in line
    assert not folder.parent.joinpath("metrics.csv").exists()
    assert hub.repositories == {}
