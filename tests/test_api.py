"""The package as a script or a notebook uses it: the same answers as the command line's."""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from _helpers.fitting import Run
from _helpers.scoring import history_folder
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_beyond as mb
from moe_beyond.cli.main import main
from moe_beyond.cli.replay_options import add_budgets, add_conditions, add_strategies
from moe_beyond.errors import UserError
from moe_beyond.evaluation.options import DEFAULT_BUDGET, ReplayOptions
from moe_beyond.geometry import Geometry, budget_slots
from moe_beyond.pretrained import shipped_folder

pytestmark = pytest.mark.filterwarnings("ignore:measured on split validation", "ignore:.*expect (less|a little less)")


def said_by(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    assert main([*words, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_replay_answers_as_the_command_does(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    traces, folder = mb.load_traces(run.traces), run.folder / "predictor"
    found = mb.replay(
        traces, folder, budget=["25%", 16], policy=["lru", "belief"], prefetch="top2", device="rtx4060-laptop"
    )
    words = ("--budget", "25%", "--budget", "16", "--policy", "lru", "--policy", "belief", "--prefetch", "top2")
    words = ("replay", "--traces", str(run.traces), *words, "--device", "rtx4060-laptop", "--predictor", str(folder))
    assert found.to_json() == said_by(capsys, *words)
    frame = found.to_pandas()
    assert list(frame["strategy"]) == [result.strategy for result in found.results]
    assert "hit_rate" in frame
    assert "per_layer" not in frame
    assert isinstance(found.table(), Table)
    assert found.plot().axes[0].get_ylabel() == "hit rate (%)"
    html = found._repr_html_()
    assert "belief + top2" in html
    assert "<script" not in html
    with pytest.raises(UserError, match=r"call moe_beyond\.evaluate"):
        found.metrics_table()


def test_evaluate_answers_as_the_command_does(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.folder / "predictor"
    found = mb.evaluate(run.traces, folder, split="validation", budget="25%")
    words = ("evaluate", str(folder), "--traces", str(run.traces), "--split", "validation", "--budget", "25%")
    assert found.to_json() == said_by(capsys, *words)
    assert "recall@k" in found._repr_html_()
    # A loaded predictor scores alike, under its architecture's name.
    again = mb.evaluate(run.traces, mb.load_predictor(folder), split="validation", budget="25%")
    assert again.metrics == found.metrics


def test_without_a_predictor_of_one_budget(trace_set, tmp_path: Path) -> None:
    history_folder(tmp_path / "history", trace_set)
    found = mb.replay(trace_set, policy="belief", profile=str(tmp_path / "history"), split="train")
    assert [result.strategy for result in found.results] == ["belief", "lru", "belady", "static_hindsight"]
    assert isinstance(found.plot(), Figure)
    assert found.plot().axes[0].get_xlabel() == "bytes transferred / demanded"


def test_what_is_not_there_is_named(trace_set, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="replay: unknown argument 'polcy'; did you mean 'policy'"):
        mb.replay(trace_set, polcy="lru")
    with pytest.raises(UserError, match="unknown policy"):
        mb.replay(trace_set, policy="lro")
    with pytest.raises(UserError, match="none"):
        mb.load_traces(tmp_path / "none")
    with pytest.raises(AttributeError, match="has no attribute 'reply'"):
        _ = mb.reply
    assert {"replay", "load_traces"} <= set(dir(mb))


@pytest.mark.parametrize(
    ("number", "slots"),
    [
        (0.25, 8), (1.0, 32), (2, 2), (16, 16), (np.int64(16), 16), (np.float64(0.5), 16), (np.float32(0.1), 3),
        (0.07, 2), ([0.25, 16, "50%"], [8, 16]), (np.array([8, 16]), [8, 16]), ((0.5,), 16), (range(8, 10), [8, 9]),
    ],
)  # fmt: skip
def test_a_budget_may_be_a_number(trace_set, number, slots) -> None:
    """A float up to 1.0 is a share of the 32 experts, an int is slots."""
    results = mb.replay(trace_set, budget=number, policy="lru").results
    found = list(dict.fromkeys(result.budget_slots for result in results))
    assert found == (slots if isinstance(slots, list) else [slots])


def test_a_share_is_exact() -> None:
    from moe_beyond.api import _budget

    assert [_budget(share) for share in (0.1, 0.07, 0.29, 1e-3)] == ["10.0%", "7.00%", "29.00%", "0.100%"]
    assert budget_slots(_budget(0.29), mb.Geometry("g", (0,), 100, 2, 1, 1)) == 29


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"budget": 0.0}, "budget: must be a share"),
        ({"budget": -1.0}, "budget: must be a share"),
        ({"budget": 1.5}, "budget: must be a share"),
        ({"budget": float("nan")}, "budget: must be a share"),
        ({"budget": True}, "budget: must be a share"),
        ({"budget": None}, "budget: must be a share"),
        ({"budget": [[8]]}, "budget: must be a share"),
        ({"budget": []}, "budget: names no budget"),
        ({"budget": b"10%"}, "budget: must be a share"),
        ({"budget": bytearray(b"10%")}, "budget: must be a share"),
        ({"budget": memoryview(b"10%")}, "budget: must be a share"),
        ({"budget": {"10%": 1}}, "budget: must be a share"),
        ({"policy": b"lru"}, "policy: must be text"),
        ({"lookahead": b"\x01"}, "lookahead: must be "),
        ({"budget": -3}, "budget '-3'"),
        ({"policy": 3}, "policy: must be text (got 3)"),
        ({"policy": ["lru", None]}, "policy: must be text (got None)"),
        ({"warmup_tokens": "ten"}, "warmup_tokens: must be a whole number (got 'ten')"),
        ({"warmup_tokens": 1.5}, "warmup_tokens: must be a whole number (got 1.5)"),
        ({"batch_size": True}, "batch_size: must be a whole number (got True)"),
        ({"carry_over": "yes"}, "carry_over: must be True or False (got 'yes')"),
        ({"quantization": "4"}, "quantization: must be a number (got '4')"),
        ({"device": 3}, "device: must be text (got 3)"),
        ({"device": "/"}, ""),
        ({"profile": "/"}, ""),
        ({"split": 3}, "split: must be the name of a split (got 3)"),
        ({"split": "tests"}, "unknown split"),
    ],
)
def test_an_options_value_of_another_kind_is_one_line(trace_set, options, line: str) -> None:
    with pytest.raises(UserError) as error:
        mb.replay(trace_set, **options)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", " ", "a\0b"])
def test_a_name_that_names_nothing_is_one_line(trace_set, name: str) -> None:
    says = re.escape(f"must be a name or a path (got {name!r})")
    with pytest.raises(UserError, match=f"^traces {says}"):
        mb.load_traces(name)
    with pytest.raises(UserError, match=f"^predictor {says}"):
        mb.load_predictor(name)
    with pytest.raises(UserError, match=f"^replay: traces {says}"):
        mb.replay(name, budget=2)
    with pytest.raises(UserError, match=f"^replay: predictor {says}"):
        mb.replay(trace_set, name, budget=2)


@pytest.mark.parametrize("split", [5, ("train",), b"train", True])
def test_a_split_of_another_kind_is_one_line(trace_set, split: object) -> None:
    with pytest.raises(UserError, match=r"^split: must be the name of a split \(got "):
        list(mb.load_traces(trace_set.folder).traces(split))


def test_swapped_and_foreign_arguments_are_one_line(run: Run, trace_set) -> None:
    folder = run.folder / "predictor"
    predictor = mb.load_predictor(folder)
    name = "cross_layer.deepseek-v2-lite-puffin"
    for arguments, line in (
        ((predictor, run.traces), "evaluate: traces is a predictor (cross_layer); write evaluate(traces, predictor)"),
        ((folder, run.traces), f"evaluate: traces is a predictor ({folder}); write evaluate(traces, predictor)"),
        ((name, run.traces), f"evaluate: traces is a predictor ({name}); write evaluate(traces, predictor)"),
        ((trace_set, trace_set), "evaluate: predictor is a trace set"),
        ((trace_set, run.traces), f"evaluate: predictor is a trace set ({run.traces})"),
        ((trace_set, None), "evaluate: a predictor is missing"),
        ((trace_set, 3), "evaluate: predictor must be a name or a path (got 3)"),
        ((3, predictor), "evaluate: traces must be a name or a path (got 3)"),
        ((trace_set, "x" * 5000), "xxx...: File name too long"),
        (("x" * 5000, predictor), "xxx...: File name too long"),
    ):
        with pytest.raises(UserError, match=re.escape(line)) as error:
            mb.evaluate(*arguments)
        assert len(str(error.value)) < 200
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"evaluate: takes no strategy; moe_beyond\.replay does"):
        mb.evaluate(trace_set, predictor, strategy="all")


def test_records_slips_are_one_line(tmp_path: Path) -> None:
    folder = shipped_folder("small-moe")
    small = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for prompts, options, line in (
        ("hi", {}, "prompts: must be a list of prompts (got one str); write [...] around it"),
        (3, {}, "prompts: must be a list of prompts (got one int); write [...] around it"),
        ([3], {}, "prompts[0]: must be a record with a text in one of messages, "),
        ([[{"role": "user"}]], {}, "prompts[0]: must be a record with a text in one of messages, "),
        (["hi"], {"generat": 3}, "record: unknown argument 'generat'; did you mean 'generate'?"),
    ):
        with pytest.raises(UserError) as error:
            mb.record(*small, prompts, tmp_path / "out", **options)
        assert line in str(error.value)


def test_a_notebook_shows_one_table_and_one_picture(trace_set, monkeypatch: pytest.MonkeyPatch) -> None:
    import rich.console
    import rich.jupyter

    shown: list[object] = []
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setattr(rich.jupyter, "display", lambda *parts: shown.append(parts))
    found = mb.replay(trace_set, budget=["25%", "50%"])
    assert found._repr_html_().count("static_hindsight") == 3  # two rows and the caption
    assert shown == []
    for figure in (found.plot(), mb.replay(trace_set, budget="25%").plot()):
        assert figure._repr_png_().startswith(b"\x89PNG")


def test_training_text_is_left_out_or_warned_of(run: Run) -> None:
    predictor = mb.load_predictor(run.folder)  # a run means the predictor that it exported
    with pytest.warns(UserWarning, match="measured on split validation: split train is training text of cross_layer"):
        found = mb.evaluate(run.traces, predictor, budget="25%")
    assert found.measured_on.split == "validation"
    with pytest.warns(UserWarning, match="cross_layer was fitted on split train of this set: expect less"):
        found = mb.replay(run.traces, predictor, split="train", budget="25%")
    assert found.to_json()["measured_on"]["relation"] == "training text"
    assert "was fitted on split train of this set" in found._repr_html_()


def test_what_cannot_be_recorded_is_one_line_before_work(tmp_path: Path) -> None:
    import torch
    from torch import nn

    from moe_beyond.collect.load import load_model

    model, tokenizer, _ = load_model("small-moe")
    with torch.device("meta"):
        empty = type(model)(model.config)
    for given, says in (
        (("small-moe", tokenizer), "record: model must be a loaded transformers model (got 'small-moe'); Auto"),
        ((None, tokenizer), "record: model must be a loaded transformers model (got None)"),
        ((nn.Linear(2, 2), tokenizer), "record: model must be a loaded transformers model (got Linear("),
        ((model, None), "record: tokenizer must be a loaded tokenizer (got None); AutoTokenizer"),
        ((model, "x"), "record: tokenizer must be a loaded tokenizer (got 'x')"),
        ((tokenizer, model), "record: model is a tokenizer; write record(model, tokenizer, prompts, out)"),
        ((empty, tokenizer), "record: the model is on the meta device and has no weights"),
    ):
        with pytest.raises(UserError) as error:
            mb.record(*given, ["a"], tmp_path / "out")
        assert str(error.value).startswith(says)
        assert "\n" not in str(error.value)
    for options, says in (
        ({"temperature": "hot"}, "temperature: must be a number (got 'hot')"),
        ({"temperature": True, "generate": 1}, "temperature: must be a number (got True)"),
        ({"seed": 1.5}, "seed: must be a whole number (got 1.5)"),
        ({"val_blocks": 5}, "val_blocks: must be text such as '20:10', or None (got 5)"),
        ({"steering": {"off": [[1, 0]]}}, "steering: must be a Steering, or None; "),
        ({"steering": "steer.json"}, "steering: must be a Steering, or None; "),
        ({"gate_weights": "no"}, "gate_weights: must be True or False (got 'no')"),
        ({"hidden_states": "yes"}, "hidden_states: must be True or False (got 'yes')"),
        ({"hidden_states": 1}, "hidden_states: must be True or False (got 1)"),
    ):
        with pytest.raises(UserError) as error:
            mb.record(model, tokenizer, ["a"], tmp_path / "out", **options)
        assert str(error.value).startswith(says)
    assert not list(tmp_path.iterdir())


def keywords(function: Callable[..., object]) -> dict[str, object]:
    """The keyword-only parameters of a function, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


def test_functions_have_the_options_of_their_commands() -> None:
    parser = ArgumentParser()
    for add in (add_budgets, add_strategies, add_conditions):
        add(parser)
    options = {action.dest for action in parser._actions} - {"help", "predictor", "scores"}
    defaults = {field.name: field.default for field in fields(ReplayOptions)} | {"budget": DEFAULT_BUDGET}
    assert keywords(mb.replay) == {"split": None, **defaults}
    assert options == set(defaults)
    assert keywords(mb.evaluate) == {
        name: value for name, value in keywords(mb.replay).items() if name != "strategy"
    } | {"bootstrap": 0}


def test_plan_returns_the_result_of_its_command(trace_set, capsys: pytest.CaptureFixture[str]) -> None:
    assert {**keywords(mb.plan), "budget": DEFAULT_BUDGET} == keywords(mb.replay)
    report = mb.plan(trace_set, "30%", policy=["lru"], split="all")
    words = ("plan", "--traces", str(trace_set.folder), "--target", "30%", "--policy", "lru", "--split", "all")
    assert report.to_json() == said_by(capsys, *words)
    with pytest.raises(UserError, match="target: must be text such as"):
        mb.plan(trace_set, 0.9)


def test_import_writes_the_trace_set_of_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    geometry = Geometry("tiny", (0, 1), num_experts=4, top_k=2, params_per_expert=8, other_params_per_layer=0)
    Path("geometry.json").write_text(json.dumps(geometry.to_json()))
    Path("engine").mkdir()
    np.save("engine/a.npy", np.array([[[0, 1], [2, 3]], [[1, 2], [0, 3]]], np.int16))
    command = ["import", "vllm", "engine", "--out", "one", "--model", "geometry.json", "--quantization", "4"]
    assert main([*command, "--quiet"]) == 0
    traces = mb.import_traces("vllm", "engine", "two", model=Path("geometry.json"), quantization=4)
    assert traces.manifest == mb.load_traces("one").manifest
    for options, text in (
        ({"quantization": 0}, "quantization: bits per parameter must be more than 0"),
        ({"format_options": {"sequence_tokens": 8}}, "format_options: vllm has no option 'sequence_tokens'"),
        ({"model": "geometry.jso"}, "geometry.jso"),
    ):
        with pytest.raises(UserError, match=text):
            mb.import_traces("vllm", "engine", "three", **{"model": "geometry.json", **options})


def test_record_has_the_options_of_a_collection(trace_set, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = []

    def collect(model: object, tokenizer: object, prompts: object, out: str, config: object, **more: object) -> object:
        configs.append(config)
        return trace_set

    monkeypatch.setattr("moe_beyond.api._check_loaded", lambda model, tokenizer: None)
    monkeypatch.setattr("moe_beyond.collect.collection.collect", collect)
    mb.record(None, None, ["hi"], "out")
    [config] = configs
    assert config == type(config)()
    assert keywords(mb.record) == {field.name: field.default for field in fields(config)}


def test_pretrained_predictors_are_listed() -> None:
    assert "history.deepseek-v2-lite-puffin" in mb.list_pretrained()
    assert mb.list_pretrained("history") == ["history.deepseek-v2-lite-puffin"]
    assert mb.list_pretrained("histor") == []


def test_all_splits_are_measured_on_request(run: Run) -> None:
    with pytest.warns(UserWarning, match="was fitted on split train of this set"):
        report = mb.evaluate(run.traces, run.folder / "predictor", split="all", budget="25%")
    assert report.measured_on.split is None
    assert report.to_json()["measured_on"]["relation"] == "training text"
    assert report.metrics[0].tokens == mb.load_traces(run.traces).manifest.tokens


def test_a_bootstrap_adds_intervals(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.folder / "predictor"
    report = mb.evaluate(run.traces, folder, split="train", budget="25%", bootstrap=100)
    words = ("evaluate", str(folder), "--traces", str(run.traces), "--split", "train", "--budget", "25%")
    assert report.to_json() == said_by(capsys, *words, "--bootstrap", "100")
    assert report.bootstrap_draws == 100
    assert "95 % intervals" in report._repr_html_()
    with pytest.raises(UserError, match="bootstrap: must be a whole number"):
        mb.evaluate(run.traces, folder, bootstrap=1.5)
