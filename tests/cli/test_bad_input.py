"""A user's mistake is one line that names it, exit code 2, and nothing half-written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from _helpers.common import TINY, tiny_traces
from _helpers.fitting import CONFIGS, Run

from moe_beyond.cli.main import main
from moe_beyond.files import sealed


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Run a command line that must be refused, and return its one line."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 2
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.strip()]
        assert "Traceback" not in said.err
        assert lines[-1].startswith("moe-beyond: error: "), said.err
        return lines[-1]

    return run


@pytest.fixture
def packaged(run: Run, tmp_path: Path) -> Path:
    assert main(["package", str(run.folder / "checkpoints/last.ckpt"), "--out", str(tmp_path / "p")]) == 0
    return tmp_path / "p"


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_scoring_needs_a_checkpoint(verb: str, run: Run, refused) -> None:
    assert f"{verb} needs trained weights; give --ckpt_path" in refused(verb, "-c", str(run.folder / "config.yaml"))


def test_a_checkpoint_that_is_not_there_or_not_ours(run: Run, tmp_path: Path, refused) -> None:
    config = str(run.folder / "config.yaml")
    assert "nowhere.ckpt" in refused("test", "-c", config, f"--ckpt_path={tmp_path / 'nowhere.ckpt'}")
    other = tmp_path / "other.ckpt"
    other.write_bytes(b"not a checkpoint")
    assert str(other) in refused("package", str(other), "--out", str(tmp_path / "p"))
    assert str(tmp_path / "gone.ckpt") in refused("package", str(tmp_path / "gone.ckpt"), "--out", str(tmp_path / "p"))
    assert not (tmp_path / "p").exists()


def test_traces_of_another_geometry_or_tokenizer(run: Run, packaged: Path, tmp_path: Path, refused) -> None:
    other = tmp_path / "other"
    tiny_traces(other, geometry=replace(TINY, num_experts=16))
    said = refused("evaluate", str(packaged), "--traces", str(other))
    assert str(other) in said
    assert "4 MoE layers x 16 experts, top-2" in said
    assert "4 MoE layers x 8 experts, top-2" in said
    said = refused(
        "test",
        "-c",
        str(run.folder / "config.yaml"),
        f"--data.test_traces={other}",
        f"--ckpt_path={run.folder}/checkpoints/last.ckpt",
    )
    assert "16 experts" in said
    words = tmp_path / "words"
    tiny_traces(words, vocab=64)
    assert "tokenizer" in refused("evaluate", str(packaged), "--traces", str(words))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "1"], "below one event's demand of 2 experts"),
        (["--budget", "7", "--scope", "per-layer"], "give at least 8 slots"),
        (["--budget", "33"], "more than all 32 experts"),
        (["--budget", "lots"], "budget 'lots' cannot be read"),
        (
            ["--budget", "0.001GB", "--quantization", "0"],
            "must be more than 0 (got 0)",
        ),
        (["--policy", "lrx"], "unknown policy 'lrx'; did you mean 'lru'?"),
        (["--scope", "local", "--budget", "50%"], "scope 'local'"),
        (["--prefetch", "best6", "--budget", "50%"], "prefetch 'best6' cannot be parsed"),
        (["--prefetch", "top2", "--budget", "50%"], "needs scores; give --predictor or --scores"),
        (["--lookahead", "1", "--budget", "50%"], "--lookahead 1: there are no scores; add --predictor or --scores"),
        (["--split", "tset", "--budget", "50%"], "unknown split"),
        (["--warmup-tokens", "-1", "--budget", "50%"], "--warmup-tokens -1 is less than 0"),
    ],
)
def test_replay_options(run: Run, words: list[str], said: str, tmp_path: Path, refused) -> None:
    out = tmp_path / "out.json"
    assert said in refused("replay", "--traces", str(run.traces), "--json", str(out), *words)
    assert not out.exists()


def test_lookaheads_and_distances_that_a_predictor_does_not_have(run: Run, packaged: Path, refused) -> None:
    words = ["replay", "--traces", str(run.traces), "--budget", "50%", "--predictor", str(packaged)]
    assert "has no such scores; choose from 1, 2, 3" in refused(*words, "--lookahead", "4")
    assert "has no such scores; choose from 1, 2, 3" in refused(*words, "--lookahead", "token")
    assert "neither 'computed', 'token', 'next' nor a number" in refused(*words, "--lookahead", "soon")
    assert "a distance needs scores of lookahead token" in refused(*words, "--prefetch", "top2@2")
    assert "selects more than a layer's 8 experts" in refused(*words, "--prefetch", "top9")
    assert "exclude each other" in refused(*words, "--scores", "somewhere")


def test_a_predictor_that_is_none(run: Run, packaged: Path, tmp_path: Path, refused) -> None:
    traces = ["--traces", str(run.traces)]
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused("evaluate", str(tmp_path / "empty"), *traces)
    assert "cross_laser" in refused("evaluate", "cross_laser", *traces)
    config = json.loads((packaged / "config.json").read_text())
    (packaged / "config.json").write_text(json.dumps(sealed({**config, "architecture": "os.system"})))
    assert "unknown predictor architecture 'os.system'" in refused("evaluate", str(packaged), *traces)
    (packaged / "config.json").write_text(json.dumps(config))
    weights = (packaged / "model.safetensors").read_bytes()
    (packaged / "model.safetensors").write_bytes(weights[:-1] + b"\x01")
    assert "is damaged" in refused("evaluate", str(packaged), *traces)
    assert "evaluate: a trace set is missing" in refused("evaluate", str(packaged))


def test_scores_of_other_traces(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = run.folder / "checkpoints/last.ckpt"
    assert main(["predict", "-c", str(run.folder / "config.yaml"), f"--ckpt_path={checkpoint}"]) == 0
    scores = next(tmp_path.glob("runs/*/version_0/scores"))
    other = tmp_path / "other"
    tiny_traces(other, seed=5)
    words = ["replay", "--scores", str(scores), "--budget", "50%"]
    assert "another trace set" in refused(*words, "--traces", str(other))
    assert "no scores for sequence" in refused(*words, "--traces", str(run.traces), "--split", "train")


def test_fits_that_cannot_be(run: Run, tmp_path: Path, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["fit", "-c", str(CONFIGS / "data/traces.yaml"), "-c", str(CONFIGS / "trainer/counting.yaml")]
    table = [*base, "-c", str(CONFIGS / "model/token_table.yaml"), f"--data.traces={run.traces}"]
    assert "a counting predictor needs one epoch (got 2)" in refused(*table, "--trainer.max_epochs=2")
    assert "has no validation split 'dev'" in refused(*table, "--data.val_split=dev")
    nowhere = tmp_path / "nowhere"
    assert f"{nowhere}: no trace set here" in refused(*table[:-1], f"--data.traces={nowhere}")
    assert not list(tmp_path.glob("runs/*/*/predictor"))


def test_words_that_cannot_be_parsed(run: Run, refused) -> None:
    assert "unknown command 'replya'; did you mean 'replay'?" in refused("replya")
    assert "--tracs" in refused("replay", "--tracs", "x")
    assert "--warmup-tokens: expects a whole number" in refused(
        "replay", "--traces", str(run.traces), "--warmup-tokens", "x"
    )
    assert "nothere.yaml" in refused("fit", "-c", "nothere.yaml")
    assert "NoSuchTask" in refused("fit", "--model", "NoSuchTask")


def test_a_callback_that_asks_for_what_is_not_there(run: Run, tmp_path: Path, refused) -> None:
    config = tmp_path / "callback.yaml"
    config.write_text(
        "trainer:\n  callbacks:\n    - class_path: CacheReplay\n      init_args: {lookahead: token, budget: '50%'}\n"
    )
    words = [str(run.folder / "config.yaml"), "-c", str(config), f"--ckpt_path={run.folder / 'checkpoints/last.ckpt'}"]
    assert "has no lookahead token; choose one of 1, 2, 3" in refused("validate", "-c", *words)
