"""Another package's predictor, policy and format, from an installed wheel, without a change to this one."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from _helpers.common import tiny_traces

ROOT = Path(__file__).parents[1]
EXAMPLE = Path(__file__).parent / "example_package"
Run = Callable[..., str]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the wheel of the example package is installed."""
    folder = tmp_path_factory.mktemp("example")
    source = shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    build = ["build", "--wheel", "--no-isolation", "--outdir", folder / "dist", source]
    subprocess.run([sys.executable, "-m", *map(str, build)], check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    pip = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder / "site", wheel]
    subprocess.run([sys.executable, "-m", *map(str, pip)], check=True)
    return folder / "site"


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """Run ``moe-beyond`` in a process that sees the example package, and return its standard output."""

    def command(*words: object, package: bool = True, code: int = 0) -> str:
        paths = [str(installed)] * package + [str(ROOT)]
        done = subprocess.run(
            [sys.executable, "-m", "moe_beyond", *map(str, words)], cwd=tmp_path, capture_output=True, text=True,
            check=False, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "WANDB_MODE": "disabled"},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    return command


@pytest.mark.slow
def test_its_predictor_is_fitted_saved_evaluated_and_packaged(run: Run, tmp_path: Path) -> None:
    traces = tiny_traces(tmp_path / "traces").folder
    fit = ["fit", "-c", ROOT / "configs/trainer/counting.yaml", "-c", ROOT / "configs/data/traces.yaml"]
    assert "--model.smoothing SMOOTHING" in re.sub(r"\s+", " ", run("fit", "--model.help", "RepeatsTask"))
    fitted = run(*fit, "--model", "RepeatsTask", "--model.smoothing=0.5", "--data.traces", traces, "--json", "-")
    folder = tmp_path / json.loads(fitted)["predictor"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["package"]) == ("repeats", "moe_beyond_example")
    assert config["arguments"] == {"smoothing": 0.5}
    measure = ["evaluate", folder, "--traces", traces, "--split", "validation", "--budget", "50%", "--json", "-"]
    measured = json.loads(run(*measure))
    assert 0 < measured["metrics"][0]["recall_at_k"] < 1
    assert "repeats" in {result["predictor"] for result in measured["results"]}

    run("package", folder.parent, "--out", tmp_path / "packaged")
    (checkpoint,) = folder.parent.glob("checkpoints/*.ckpt")
    run("package", checkpoint, "--out", tmp_path / "from-checkpoint")
    assert json.loads((tmp_path / "from-checkpoint/config.json").read_text())["package"] == "moe_beyond_example"

    for name in (folder, checkpoint):  # without the package: one line that names it
        out = tmp_path / "without"
        said = run("package", name, "--out", out, package=False, code=2)
        assert said.count("\n") == 1
        assert "repeats is a predictor of package moe_beyond_example, which is not installed; install it" in said
        assert not out.exists()


def test_its_predictor_keeps_the_contract(installed: Path) -> None:
    check = "from moe_beyond.testing import check_predictor; from moe_beyond_example.predictor import Repeats"
    words = [sys.executable, "-c", f"{check}; check_predictor(Repeats)"]
    paths = os.pathsep.join([str(installed), str(ROOT)])
    subprocess.run(words, env=os.environ | {"PYTHONPATH": paths}, check=True)


@pytest.mark.slow
def test_its_policy_replays_and_keeps_the_contract(run: Run, installed: Path, tmp_path: Path) -> None:
    traces = tiny_traces(tmp_path / "traces").folder
    replayed = json.loads(
        run("replay", "--traces", traces, "--policy", "mru", "--prefetch", "none", "--budget", "25%", "--json", "-")
    )
    assert "mru" in {result["policy"] for result in replayed["results"]}
    assert "mru" in run("replay", "--help")
    check = "from moe_beyond.testing import check_policy; check_policy('mru', examples=4)"
    paths = os.pathsep.join([str(installed), str(ROOT)])
    subprocess.run([sys.executable, "-c", check], env=os.environ | {"PYTHONPATH": paths}, check=True)


@pytest.mark.slow
def test_its_format_is_imported(run: Run, tmp_path: Path) -> None:
    (tmp_path / "lines").mkdir()
    lines = [f"{n % 60} {n % 60 + 1} {n % 60 + 2} {n % 60 + 3}" for n in range(2 * 24)]
    (tmp_path / "lines/a.txt").write_text("\n".join(lines))
    words = ["--model", "qwen1.5-moe-a2.7b", "--out", tmp_path / "traces"]
    run("import", "example-lines", tmp_path / "lines", *words)
    assert json.loads((tmp_path / "traces/manifest.json").read_text())["splits"]
    assert "example-lines" in run("import", "--help")
