"""Parts of a trace set, replayed by workers, add up to the whole to the bit."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from _helpers.common import tiny_traces
from _helpers.scoring import history_folder

from moe_beyond.cli.main import main
from moe_beyond.errors import UserError
from moe_beyond.evaluation import engine
from moe_beyond.evaluation.engine import evaluate
from moe_beyond.evaluation.sources import from_predictor_folder
from moe_beyond.evaluation.strategies import grid, with_baselines
from moe_beyond.files import write_json
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.devices import load_device
from moe_beyond.traces.manifest import MANIFEST_FILE
from moe_beyond.traces.reader import TraceSet
from moe_beyond.workers import Workers

DEVICE = load_device("rtx3060,link_gb_per_s=0.003,memory_gb_per_s=0.02")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process do the work of all workers, on copies of their arguments."""

    class Here(Workers):
        def __init__(self, number: int) -> None:
            super().__init__(1)
            self.number = number

        def map(self, function, shared, items):
            for item in items:
                copied, arguments = pickle.loads(pickle.dumps((function, (shared, item))))
                yield pickle.loads(pickle.dumps(copied(*arguments)))

        def __enter__(self):
            return self

    monkeypatch.setattr(engine, "Workers", Here)


@pytest.mark.parametrize("device", [None, DEVICE])
@pytest.mark.parametrize("changes", [{}, {"warmup_tokens": 3}, {"window": 2}])
def test_shards_add_up(device: object, changes: dict, tmp_path: Path, here: None, monkeypatch) -> None:
    traces = tiny_traces(tmp_path / "traces", sequences=40)
    assert len(traces.manifest.shards) > 4
    source = from_predictor_folder(history_folder(tmp_path / "history", traces))
    common = replace(ReplaySettings(32, device=device), **changes)
    prefetch = ["none"] if changes.get("window") else ["top2"]
    asked = with_baselines(grid(common, [8, 16], ["lru", "lfu"], prefetch, source), common, traces.geometry)
    reported = []
    divided = evaluate(
        traces, asked, None, [source], measure=source, bootstrap_draws=100, workers=3, progress=reported.append
    )
    assert sum(reported) == len(asked) * traces.manifest.tokens
    monkeypatch.undo()
    whole = evaluate(traces, asked, None, [source], measure=source, bootstrap_draws=100)
    assert json.dumps(divided.to_json()) == json.dumps(whole.to_json())


@pytest.mark.parametrize("changes", [{"carry_over": True}, {"batch_size": 3}])
def test_one_process_replays_what_needs_the_order(changes: dict, tmp_path: Path, here: None, monkeypatch) -> None:
    traces = tiny_traces(tmp_path / "traces", sequences=40)
    common = replace(ReplaySettings(32), **changes)
    asked = with_baselines(grid(common, [8], ["lru"], ["none"], None), common, traces.geometry)
    found = []
    for workers in (3, 1):
        found.append(evaluate(traces, asked, workers=workers).to_json())
        monkeypatch.undo()
    assert found[0] == found[1]


def test_an_id_in_the_shards_of_two_workers_is_found(tmp_path: Path, here: None) -> None:
    traces, other = (tiny_traces(tmp_path / name, sequences=4, seed=seed) for seed, name in enumerate("ab"))
    moved = replace(other.shards("train")[0], file="more.parquet")
    shutil.copyfile(Path(other.folder) / other.shards("train")[0].file, Path(traces.folder) / moved.file)
    manifest = replace(traces.manifest, shards=(*traces.manifest.shards, moved))
    write_json(Path(traces.folder) / MANIFEST_FILE, manifest.to_json())
    with pytest.raises(UserError, match=r"is in .* too; ids must be unique"):
        evaluate(TraceSet(traces.folder), [ReplaySettings(8)], workers=2)


@pytest.mark.slow
def test_commands_write_the_same_json_with_workers(tmp_path: Path) -> None:
    traces = tiny_traces(tmp_path / "traces", sequences=40)
    history = history_folder(tmp_path / "history", traces)
    commands = {
        "evaluate": ("evaluate", history, "--traces", traces.folder, "--budget", "30%", "--bootstrap", "100"),
        "inspect": ("inspect", traces.folder),
    }
    for name, words in commands.items():
        for workers in (1, 2):
            path = tmp_path / f"{name}-{workers}.json"
            assert main([*map(str, words), "--workers", str(workers), "--json", str(path), "--quiet"]) == 0
        assert (tmp_path / f"{name}-1.json").read_bytes() == (tmp_path / f"{name}-2.json").read_bytes()
