"""What a newcomer runs first: in this clone, and from a wheel in an empty folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from _helpers.fitting import Run

from moe_beyond.cli.main import main
from moe_beyond.predictors.io.folder import read_predictor
from moe_beyond.pretrained import shipped_folder
from moe_beyond.quickstart import _replay
from moe_beyond.traces.analysis.counts import count_routing
from moe_beyond.traces.reader import TraceSet

ROOT = Path(__file__).parents[1]


def line_at(results: list[dict], slots: int, strategy: str) -> dict:
    """The line of a strategy at a budget."""
    return next(r for r in results if (r["budget_slots"], r["strategy"]) == (slots, strategy))


@pytest.mark.slow
def test_the_quickstart_from_a_wheel_beats_lru(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    # Beside this environment's packages, but without the clone: an editable install would be found before the wheel.
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import moe_beyond; "
        f"assert moe_beyond.__file__.startswith({str(site)!r}), moe_beyond.__file__; "
        "from moe_beyond.cli.main import main; sys.exit(main(['quickstart', '--json', 'q.json']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=empty, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1/4 record" in done.stdout
    assert "lru + top3" in done.stdout
    assert "belief + top3" in done.stdout
    out = empty / "demo"
    found = json.loads((empty / "q.json").read_text())
    assert found == json.loads((out / "results.json").read_text())
    for slots in (48, 96):
        names = ("belief + top3", "lru + top3", "lru", "belady", "static_hindsight")
        belief, lru_ahead, lru, belady, fixed = (line_at(found["results"], slots, name) for name in names)
        assert belief["hits"] > lru_ahead["hits"] > lru["hits"]
        assert belady["hits"] > lru["hits"]
        assert len({r["accesses"] for r in (belief, lru_ahead, lru, belady, fixed)}) == 1
    assert (out / "hits.png").read_bytes().startswith(b"\x89PNG")
    traces = TraceSet(str(out / "traces"))
    assert traces.geometry.shape() == (8, 24, 3)
    assert (
        count_routing(traces, layer_pairs=False).activations > 0
    ).all()  # every expert is alive on text the model never saw
    train, held_out = ({t.source for t in traces.traces(split)} for split in ("train", "validation"))
    assert not train & held_out
    assert read_predictor(out / "predictor").information.lookaheads == (1, 2, 3, "next")


def test_held_out_prompts_are_replayed_at_every_tenth_with_baselines(run: Run) -> None:
    outcome = _replay(TraceSet(str(run.traces)), run.folder / "predictor")
    assert outcome.measured_on.split == "validation"
    assert {result.budget_slots for result in outcome.results} == {3, 6, 8, 9, 12, 16, 19, 22, 25, 28, 32}
    rows = [(result.strategy, result.lookahead) for result in outcome.results if result.budget_slots == 8]
    assert rows == [
        ("belief + top2", 1), ("lru + top2", 1), ("lru", None), ("belady", None), ("static_hindsight", None),
    ]  # fmt: skip
    assert outcome.to_json().keys() == {"measured_on", "metrics", "results"}


def test_a_folder_of_somebody_elses_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert main(["quickstart", "--out", str(tmp_path / "mine")]) == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_the_small_model_is_small_and_whole() -> None:
    folder = shipped_folder("small-moe")
    assert (folder / "model.safetensors").stat().st_size <= 20e6
    prompts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == len({prompt["id"] for prompt in prompts}) > 50
    card = (folder / "README.md").read_text()
    assert "Python Software Foundation License" in card
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (folder / "TEXT-LICENSE.txt").read_text()
    assert "normalized" in card or "entropy" in card
