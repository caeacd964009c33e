"""Named strategies: their settings, reasons why they are unavailable, and the pretrained predictors that fit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import TINY, tiny_trace, word_tokenizer
from _helpers.scoring import history_folder, seer

from moe_beyond import pretrained as published
from moe_beyond.cli.main import main
from moe_beyond.errors import UserError
from moe_beyond.evaluation.named_strategies import STRATEGIES, NamedStrategy, strategy_names
from moe_beyond.evaluation.sources import pretrained_source
from moe_beyond.evaluation.strategies import named_strategies
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.devices import DEVICES
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.writer import open_writer

COMMON = ReplaySettings(TINY.total_experts, warmup_tokens=1)
PUBLISHED = {"cross_layer": seer("cross_layer.x", (1, 2)), "eamc": seer("eamc.x", ("token",))}
RELEASED = seer("released", (0,))

# Policy, prefetcher, predictor, lookahead that it selects by, window.
LINES = {
    "belief-cross-layer": ("belief", "p>0.24", "cross_layer.x", 1, 1),
    "moe-beyond": ("lru", "top6", "released", 0, 1),
    "moe-infinity": ("moe_infinity", "moe_infinity", "eamc.x", None, 1),
    "specmd": ("least_stale", "p>0.5", "cross_layer.x", 1, 1),
    "moe-spac": ("moe_spac", "p>0", None, None, 8),
    "llama.cpp": ("class_lru", "none", None, None, 1),
}
ON_DEVICE = {
    **LINES,
    "llama.cpp-cpu": ("class_lru", "none", None, None, 1),
    "fiddler": ("static", "none", None, None, 1),
    "hybrimoe": ("class_lru", "adaptive", "cross_layer.x", None, 1),
    "belief-cross-layer": ("belief", "p>0.6", "cross_layer.x", 1, 1),
    "od-moe": ("od_moe", "none", None, None, 1),
}


@pytest.mark.parametrize(("device", "expected"), [(None, LINES), ("rtx3060", ON_DEVICE)])
def test_every_system_at_every_budget(device: str | None, expected: dict[str, tuple[object, ...]]) -> None:
    common = replace(COMMON, device=device and DEVICES[device])
    found, sources, missing = named_strategies(
        STRATEGIES, common, [8, 16, 8], 6, RELEASED, PUBLISHED.get, has_profile=True
    )
    lines = {(s.strategy, s.slots): (s.policy, s.prefetch, s.predictor, s.lookahead, s.window) for s in found}
    assert lines == {(name, slots): line for name, line in expected.items() for slots in (8, 16)}
    assert len(found) == len(lines)
    assert {(s.warmup_tokens, s.device) for s in found} == {(1, common.device)}
    assert sorted(source.name for source in sources) == ["cross_layer.x", "eamc.x", "released"]
    assert [one.strategy for one in missing] == [name for name in STRATEGIES if name not in expected]
    assert all(s.lookaheads == ((0,) if s.predictor == "released" else PUBLISHED[s.predictor.split(".")[0]].lookaheads)
               for s in found if s.predictor)  # fmt: skip


def test_a_wider_window_of_all_is_not_narrowed() -> None:
    [spac], _, _ = named_strategies(["moe-spac"], replace(COMMON, window=16), [8], 2, None, PUBLISHED.get)
    assert spac.window == 16


@pytest.mark.parametrize("given", [None, seer("p", (1,))])
def test_what_is_not_available_says_why(given: object) -> None:
    found, sources, missing = named_strategies(STRATEGIES, COMMON, [8], 2, given, lambda architecture: None)
    assert [s.strategy for s in found] == ["moe-spac", "llama.cpp"]
    assert sources == []
    assert {one.strategy: one.reason for one in missing} == {
        "belief-cross-layer": "no pretrained cross_layer predictor fits this model and tokenizer",
        "moe-beyond": "needs the released predictions; give --scores of lookahead 0",
        "moe-infinity": "no pretrained eamc predictor fits this model and tokenizer",
        "specmd": "no pretrained cross_layer predictor fits this model and tokenizer",
        **dict.fromkeys(("od-moe", "llama.cpp-cpu", "fiddler"), "is defined only by time; give --device"),
        "hybrimoe": "no pretrained cross_layer predictor fits this model and tokenizer",
    }


def test_the_host_computes_misses_where_it_can() -> None:
    names = ["moe-spac", "llama.cpp", "llama.cpp-cpu", "fiddler"]

    def handled(device: str | None, *, has_profile: bool = True) -> tuple[dict[str, str], dict[str, str]]:
        common = replace(COMMON, device=device and DEVICES[device])
        found, _, missing = named_strategies(
            names, common, [8], 2, None, lambda architecture: None, has_profile=has_profile
        )
        assert {s.strategy for s in found if s.warm_start} <= {"fiddler"}
        return {s.strategy: s.misses for s in found}, {one.strategy: one.reason for one in missing}

    found, missing = handled("rtx4060-laptop")
    assert found == {"moe-spac": "cpu", "llama.cpp": "move", "llama.cpp-cpu": "cpu", "fiddler": "best"}
    assert missing == {}
    found, missing = handled("jetson-agx-orin")
    assert found == {"moe-spac": "move", "llama.cpp": "move"}
    assert "device jetson-agx-orin has no host_gb_per_s" in missing["fiddler"]
    assert "device rtx4060-laptop-16gb has no host_gb_per_s" in handled("rtx4060-laptop-16gb")[1]["llama.cpp-cpu"]
    assert handled(None)[0] == {"moe-spac": "move", "llama.cpp": "move"}
    assert "give --profile" in handled("rtx4060-laptop", has_profile=False)[1]["fiddler"]


def test_names_are_resolved_once_each() -> None:
    assert strategy_names(["specmd", "belief-cross-layer", "specmd"]) == ["specmd", "belief-cross-layer"]
    assert strategy_names(["belief-cross-layer", "all"]) == list(STRATEGIES)
    with pytest.raises(UserError, match=r"unknown strategy 'moe-infinty'; did you mean 'moe-infinity'\?"):
        strategy_names(["all", "moe-infinty"])


def write(folder: Path, model: str = "m", word: str | None = "a", geometry: Geometry = TINY) -> TraceSet:
    rng = np.random.default_rng(0)
    manifest = Manifest(geometry, Tokenizer("t", 32), model, 16.0, "dataset", "tests", "0")
    vocabulary = None if word is None else word_tokenizer(folder.parent / f"{folder.name}.json", [word])
    with open_writer(folder, manifest, vocabulary=vocabulary) as writer:
        writer.write(tiny_trace("s", 5, rng, geometry), "train")
    return TraceSet(str(folder))


def test_only_a_predictor_of_the_same_checkpoint_and_tokenizer_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = write(tmp_path / "traces")
    package = tmp_path / "package"
    training = {"model_id": "m", "tokenizer": {"name": "t", "sha256": traces.manifest.tokenizer.sha256}}
    history_folder(package / "checkpoints" / "history.m-b", traces, **training)
    monkeypatch.setattr(published, "__file__", str(package / "pretrained.py"))
    found = pretrained_source("history", traces)
    assert found is not None
    assert (found.name, found.lookaheads) == ("history.m-b", ("token",))
    assert pretrained_source("hist", traces) is None
    assert pretrained_source("history", write(tmp_path / "fine-tuned", model="m-tuned")) is None
    assert pretrained_source("history", write(tmp_path / "words", word="b")) is None
    assert pretrained_source("history", write(tmp_path / "no-words", word=None)) is None
    assert pretrained_source("history", write(tmp_path / "larger", geometry=replace(TINY, num_experts=16))) is None
    assert pretrained_source("history", write(tmp_path / "hungry", geometry=replace(TINY, top_k=3))) is None
    # The first by name is taken, and a predictor of another model is passed over.
    history_folder(package / "checkpoints" / "history.m-a", traces, **{**training, "model_id": "other"})
    assert pretrained_source("history", traces).name == "history.m-b"
    history_folder(package / "checkpoints" / "history.m-a", traces, **training)
    assert pretrained_source("history", traces).name == "history.m-a"


def test_a_predictor_whose_weights_a_wheel_leaves_out_is_replaced_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    traces = write(tmp_path / "traces")
    package = tmp_path / "package"
    training = {"model_id": "m", "tokenizer": {"name": "t", "sha256": traces.manifest.tokenizer.sha256}}
    large, small = (package / "checkpoints" / name for name in ("history.m-a", "history.m-a-small"))
    for folder in (large, small):
        history_folder(folder, traces, **training)
    monkeypatch.setattr(published, "__file__", str(package / "pretrained.py"))
    monkeypatch.setattr(STRATEGIES, "_registered", dict(STRATEGIES._registered))
    for name in ("one", "two"):
        STRATEGIES.register(name, NamedStrategy("lru", "top{k}", architecture="history"))
    words = ["replay", "--traces", traces.folder, "--strategy", "one", "--strategy", "two", "--json", "-"]

    def predictors() -> list[str]:
        assert main(words) == 0
        printed = capsys.readouterr()
        notices = printed.err.count("history.m-a: its weights are not installed; history.m-a-small is used\n")
        # One for the usage profile, one for both strategies.
        assert notices == (0 if (large / published.WEIGHTS_FILE).exists() else 2)
        return [result["predictor"] for result in json.loads(printed.out)["results"][:2]]

    assert predictors() == ["history.m-a"] * 2
    (large / published.WEIGHTS_FILE).unlink()
    assert predictors() == ["history.m-a-small"] * 2
    (small / published.WEIGHTS_FILE).unlink()
    with pytest.raises(published.NotInstalledError, match=r"^history\.m-a: its weights are only in"):
        pretrained_source("history", traces)


def test_another_package_adds_a_strategy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(STRATEGIES, "_registered", dict(STRATEGIES._registered))
    STRATEGIES.register("recent-first", NamedStrategy("lru", "oracle", note="for a test"))
    write(tmp_path / "traces")
    assert main(["replay", "--help"]) == 0
    assert "recent-first" in capsys.readouterr().out
    assert main(["replay", "--traces", str(tmp_path / "traces"), "--strategy", "recent-first", "--json", "-"]) == 0
    [result, *_] = json.loads(capsys.readouterr().out)["results"]
    assert (result["strategy"], result["policy"], result["prefetch"]) == ("recent-first", "lru", "oracle")
    assert "recent-first" in strategy_names(["all"])
