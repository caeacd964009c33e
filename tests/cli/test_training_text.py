"""Text that a predictor was fitted on is never reported as test text: not by a command, a card, a page or the Hub."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import TINY, VOCAB, error_line, tiny_trace
from _helpers.fitting import CONFIGS, Run, fit
from _helpers.scoring import history_folder
from huggingface_hub import ModelCard

from moe_beyond.cli.main import main
from moe_beyond.hub.push import prepare_upload
from moe_beyond.predictors.io.folder import read_config
from moe_beyond.predictors.training_text import Relation, measured_text, relation_of_figures
from moe_beyond.traces.copies import text_digest
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.texts import HASH_BYTES, MAX_HASHES, count_shared, sketch, text_hashes
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer

BUDGET = ("--budget", "8")
FITTED = "was fitted on split train of this set: expect less on other text"
CHOSE = "split validation of this set chose the epoch of"


def traces_of(folder: Path, splits: dict[str, list[Trace]], source: str = "mine") -> TraceSet:
    manifest = Manifest(TINY, Tokenizer("tests", VOCAB), "tiny", 16.0, "dataset", source, "0")
    with open_writer(folder, manifest) as writer:
        for split, found in splits.items():
            for trace in found:
                writer.write(trace, split)
    return TraceSet(str(folder))


def random_traces(seed: int, count: int = 3) -> list[Trace]:
    rng = np.random.default_rng(seed)
    return [tiny_trace(f"{seed}-{n}", 12, rng) for n in range(count)]


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, dict]:
    """What a command prints, and its JSON's account of the text that it measured."""
    capsys.readouterr()
    json_file = Path(str(words[-1])).with_suffix(".said.json") if isinstance(words[-1], Path) else None
    assert json_file is not None
    assert main([*map(str, words[:-1]), "--json", str(json_file)]) == 0
    return capsys.readouterr().out, json.loads(json_file.read_text())["measured_on"]


# What the decision is, by hand.


def record_of(traces: TraceSet, split: str | None = "train", **changes: object) -> dict:
    return {**traces.describe(split), "texts": sketch(text_hashes(traces, split)), "seen": [], **changes}


def test_the_decision_by_hand(tmp_path: Path) -> None:
    a, b, c = random_traces(1), random_traces(2), random_traces(3)
    traces = traces_of(tmp_path / "a", {"train": a, "validation": b, "test": c})
    same_texts = traces_of(tmp_path / "b", {"all": [replace(t, sequence_id=f"x{t.sequence_id}") for t in a + c]})
    other = traces_of(tmp_path / "c", {"train": random_traces(4)})
    validation = {**record_of(traces, "validation"), "use": "chose the epoch of and calibrated"}
    record = record_of(traces, seen=[validation])
    without = {name: value for name, value in record_of(traces).items() if name not in ("texts", "seen")}
    cases = [
        (record, traces, "train", Relation.TRAINING, "p was fitted on split train of this set"),
        (record, traces, "validation", Relation.TUNING, f"{CHOSE} and calibrated p"),
        (record, traces, "test", Relation.HELD_OUT, ""),
        (record, same_texts, "all", Relation.TRAINING, "p was fitted on 3 of these 6 texts"),
        (record, other, "train", Relation.HELD_OUT, ""),
        ({**record, "seen": []}, traces, "validation", Relation.HELD_OUT, ""),
        # What older folders record: no texts, and not what chose the epoch.
        (without, traces, "train", Relation.TRAINING, "p was fitted on split train of this set"),
        (without, traces, "test", Relation.TUNING, "split test belongs to the trace set that p was fitted on"),
        (without, same_texts, "all", Relation.UNKNOWN, "p was fitted on the same source (mine)"),
        ({**without, "source": "another"}, same_texts, "all", Relation.HELD_OUT, ""),
        (None, traces, "test", Relation.UNKNOWN, "the training text of p is not recorded"),
    ]  # fmt: skip
    for training, measured, split, relation, sentence in cases:
        found = measured_text(measured, split, [("p", training)])
        assert (found.relation, found.split) == (relation, split)
        assert " ".join(found.lines).startswith(sentence)
        assert bool(found.lines) == bool(sentence)


def test_the_default_split_is_the_one_that_nothing_was_fitted_on(tmp_path: Path) -> None:
    a, b, c = random_traces(1), random_traces(2), random_traces(3)
    traces = traces_of(tmp_path / "a", {"train": a, "validation": b, "test": c})
    validation = {**record_of(traces, "validation"), "use": "chose the epoch of"}
    fitted, validated = record_of(traces), record_of(traces, seen=[validation])
    assert measured_text(traces, None, [("p", fitted)]).split == "validation"
    assert measured_text(traces, None, [("p", validated)]).split == "test"
    assert measured_text(traces, None, [("p", fitted), ("q", record_of(traces, "validation"))]).split == "test"
    assert measured_text(traces, None, []).split is None
    chosen = measured_text(traces, None, [("p", validated)])
    assert chosen.lines == ["measured on split test: split train is training text of p; use --split to choose another"]
    # Without another split, all text is measured, and the output notes it.
    only = traces_of(tmp_path / "b", {"train": a})
    found = measured_text(only, None, [("p", record_of(only))])
    assert (found.split, found.relation) == (None, Relation.TRAINING)


def test_a_prompt_is_found_whatever_the_model_answered(tmp_path: Path) -> None:
    traces = random_traces(1)
    later = np.arange(12) >= 5
    other = [
        replace(t, token_ids=((t.token_ids + later) % VOCAB).astype(np.int32), decode_start=5, sequence_id=f"b{n}")
        for n, t in enumerate(traces)
    ]
    first = traces_of(tmp_path / "a", {"train": [replace(t, decode_start=5) for t in traces]})
    second = traces_of(tmp_path / "b", {"train": other})
    assert count_shared(sketch(text_hashes(first)), text_hashes(second)) == (3, True)
    full = "".join(f"{n:012x}" for n in range(MAX_HASHES))
    assert count_shared(full, text_hashes(second)) == (0, False)


def long_traces(seed: int, starts: list[list[int]] | None = None) -> list[Trace]:
    """Texts of 50 tokens, 30 of them the prompt, which begin as given."""
    rng = np.random.default_rng(seed)
    traces = [replace(tiny_trace(f"{seed}-{n}", 50, rng), decode_start=30) for n in range(4)]
    for trace, start in zip(traces, starts or [[]] * 4, strict=True):
        trace.token_ids[: len(start)] = start
    return traces


def cut(trace: Trace, length: int) -> Trace:
    return replace(
        trace,
        token_ids=trace.token_ids[:length],
        experts=trace.experts[:length],
        decode_start=min(trace.decode_start, length),
    )


@pytest.mark.parametrize(
    "variant",
    [
        lambda trace: cut(trace, 16),
        lambda trace: cut(trace, 20),
        lambda trace: cut(trace, 33),
        lambda trace: replace(trace, decode_start=0),  # prompt and answer are one text
        lambda trace: replace(trace, decode_start=50),
        lambda trace: replace(trace, decode_start=12),  # a prompt of another length
        lambda trace: replace(cut(trace, 20), decode_start=0),
    ],
)
@pytest.mark.parametrize("variant_is_fitted", [False, True])
def test_a_start_of_a_text_is_found_however_it_was_cut(tmp_path: Path, variant, variant_is_fitted: bool) -> None:
    texts = long_traces(1)
    whole = traces_of(tmp_path / "a", {"train": texts})
    other = traces_of(tmp_path / "b", {"train": [variant(trace) for trace in texts[:2]] + long_traces(2)[2:]})
    fitted, measured = (other, whole) if variant_is_fitted else (whole, other)
    found = measured_text(measured, "train", [("p", record_of(fitted))])
    assert (found.relation, found.lines) == (
        Relation.TRAINING,
        ["p was fitted on 2 of these 4 texts: expect less on other text"],
    )


def test_a_start_that_many_texts_share_is_no_evidence(tmp_path: Path) -> None:
    system_prompt = list(range(20))
    first = traces_of(tmp_path / "a", {"train": long_traces(1, [system_prompt] * 4)})
    second = traces_of(tmp_path / "b", {"train": long_traces(2, [system_prompt] * 4)})
    for fitted, measured in ((first, second), (second, first)):
        assert measured_text(measured, "train", [("p", record_of(fitted))]).relation is Relation.HELD_OUT
    # Nor are 20 shared tokens of 50, where one text of each set has them: neither is the other's beginning.
    third = traces_of(tmp_path / "c", {"train": long_traces(3, [system_prompt, [], [], []])})
    assert count_shared(sketch(text_hashes(third)), text_hashes(second)) == (0, True)
    fourth = traces_of(tmp_path / "d", {"train": long_traces(4, [system_prompt, [], [], []])})
    assert count_shared(sketch(text_hashes(third)), text_hashes(fourth)) == (0, True)


def test_sketches_of_earlier_versions_hold_prompts_only_and_are_read(tmp_path: Path) -> None:
    texts = long_traces(1)
    traces = traces_of(tmp_path / "a", {"train": texts})
    digests = [text_digest(trace.token_ids[:30], HASH_BYTES).hex() for trace in texts]
    assert count_shared("".join(sorted(digests)), text_hashes(traces)) == (4, True)
    assert (
        count_shared("".join(sorted(digests)), text_hashes(traces_of(tmp_path / "b", {"all": long_traces(2)})))[0] == 0
    )


def test_recorded_figures_of_older_folders_are_judged_by_fingerprint_and_split() -> None:
    training = {"fingerprint": "f", "split": "train"}
    for figures, relation in (
        ({"fingerprint": "f", "split": "train"}, Relation.TRAINING),
        ({"fingerprint": "f", "split": None}, Relation.TRAINING),
        ({"fingerprint": "f", "split": "validation"}, Relation.TUNING),
        ({"fingerprint": "g", "split": "train"}, Relation.HELD_OUT),
        ({"fingerprint": "g", "split": "train", "relation": "training text"}, Relation.TRAINING),
    ):
        assert relation_of_figures(training, figures) is relation


# What commands make of it, with a real fit.


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A fit whose texts no other test's set shares by chance."""
    folder = tmp_path_factory.mktemp("own")
    traces = traces_of(folder / "traces", {"train": random_traces(1, 9), "validation": random_traces(2, 4)})
    configs = ("-c", str(CONFIGS / "trainer/counting.yaml"), "-c", str(CONFIGS / "model/token_table.yaml"))
    return Run(fit(folder, Path(traces.folder), *configs), Path(traces.folder))


@pytest.fixture
def folder(own: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(own.folder / "predictor", tmp_path / "mine"))


def test_a_fit_records_what_it_read(own: Run) -> None:
    training = read_config(own.folder / "predictor")["training"]
    traces = TraceSet(str(own.traces))
    assert training["texts"] == sketch(text_hashes(traces, "train"))
    [seen] = training["seen"]
    assert (seen["split"], seen["texts"]) == ("validation", sketch(text_hashes(traces, "validation")))
    assert seen["use"] in ("chose the epoch of and calibrated", "calibrated")


@pytest.mark.parametrize("verb", ["evaluate", "replay --predictor", "plan --target 20% --predictor"])
def test_commands_measure_held_out_text_by_default(own: Run, tmp_path: Path, capsys, verb: str) -> None:
    named = [*verb.split(), own.folder / "predictor"]
    budget = [] if verb.startswith("plan") else BUDGET
    out, measured = said(capsys, *named, "--traces", own.traces, *budget, tmp_path / "a")
    assert measured["split"] == "validation"
    assert "measured on split validation: split train is training text of token_table" in out
    assert "calibrated token_table: expect a little less on other text" in out
    out, measured = said(capsys, *named, "--traces", own.traces, "--split", "train", *budget, tmp_path / "b")
    assert (measured["split"], measured["relation"]) == ("train", "training text")
    assert f"token_table {FITTED}" in out


def test_a_run_its_checkpoint_and_its_scores_say_it_too(own: Run, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # where `predict` writes
    out, measured = said(capsys, "evaluate", own.folder, *BUDGET, tmp_path / "a")
    assert (measured["split"], measured["relation"]) == ("validation", "chose the epoch or calibrated")
    assert "split validation of this set validates the run" in out
    out, measured = said(
        capsys, "evaluate", own.folder, "--traces", own.traces, "--split", "train", *BUDGET, tmp_path / "b"
    )
    assert f"the run {FITTED}" in out
    assert main(["package", str(next(own.folder.glob("checkpoints/*.ckpt"))), "--out", str(tmp_path / "packaged")]) == 0
    out, measured = said(
        capsys,
        "evaluate",
        tmp_path / "packaged",
        "--traces",
        own.traces,
        "--split",
        "train",
        "--budget",
        "8",
        tmp_path / "c",
    )
    assert f"token_table {FITTED}" in out
    config, checkpoint = own.folder / "config.yaml", next(own.folder.glob("checkpoints/*.ckpt"))
    words = ["predict", "-c", str(config), "--ckpt_path", str(checkpoint), f"--data.test_traces={own.traces}"]
    assert main(words) == 0
    [scores] = [path.parent for path in tmp_path.rglob("scores.json")]
    out, measured = said(capsys, "replay", "--traces", own.traces, "--scores", scores, *BUDGET, tmp_path / "d")
    assert measured["split"] == "validation"
    out, measured = said(
        capsys,
        "replay",
        "--traces",
        own.traces,
        "--scores",
        scores,
        "--split",
        "train",
        "--budget",
        "8",
        tmp_path / "e",
    )
    assert f"token_table {FITTED}" in out


def test_a_copy_elsewhere_and_a_profile_are_known(own: Run, tmp_path: Path, capsys) -> None:
    copied = shutil.copytree(own.traces, tmp_path / "copy")
    out, measured = said(capsys, "evaluate", own.folder / "predictor", "--traces", copied, *BUDGET, tmp_path / "a")
    assert measured["split"] == "validation"
    profile = history_folder(tmp_path / "history", TraceSet(str(own.traces)), split="train")
    out, measured = said(
        capsys,
        "replay",
        "--traces",
        own.traces,
        "--policy",
        "belief",
        "--profile",
        profile,
        "--budget",
        "8",
        tmp_path / "b",
    )
    assert measured["split"] == "validation"
    assert "split train is training text of profile history" in out


def test_figures_of_training_text_are_recorded_on_request_only_and_marked(folder: Path, own: Run, capsys) -> None:
    words = ["evaluate", folder, "--traces", own.traces, "--split", "train", "--budget", "8"]
    before = (folder / "config.json").read_text(), (folder / "README.md").read_text()
    line = error_line(capsys, [*words, "--record"])
    assert line == (
        f"--record: token_table {FITTED}; measure other text, or add --record-training-text, which marks the figures"
    )
    assert ((folder / "config.json").read_text(), (folder / "README.md").read_text()) == before
    assert main([*map(str, words), "--record-training-text"]) == 0
    [figures] = read_config(folder)["figures"]
    assert (figures["split"], figures["relation"]) == ("train", "training text")
    assert "training-text" not in figures["command"]
    assert "**Training text**: the predictor was fitted on this text" in (folder / "README.md").read_text()
    upload = prepare_upload(folder, "org/mine")
    shown = ModelCard(upload.files["README.md"].decode())
    assert {result.dataset_name for result in shown.data.eval_results} == {"mine (TRAINING TEXT), 108 tokens"}


def test_held_out_figures_are_recorded_of_the_split_that_was_measured(folder: Path, own: Run, capsys) -> None:
    assert main(["evaluate", str(folder), "--traces", str(own.traces), *BUDGET, "--record"]) == 0
    [figures] = read_config(folder)["figures"]
    assert (figures["split"], figures["relation"]) == ("validation", "chose the epoch or calibrated")
    assert "chose the epoch or calibrated the predictor" in (folder / "README.md").read_text()


def test_the_report_says_the_same(own: Run, tmp_path: Path, capsys) -> None:
    words = ["report", own.folder, "--traces", own.traces, "--split", "train", *BUDGET, "--device", "rtx4090"]
    assert main([*map(str, words), "--out", str(tmp_path / "page.html")]) == 0
    assert f"token_table {FITTED}." in (tmp_path / "page.html").read_text()
    assert f"token_table {FITTED}" in capsys.readouterr().out


# A run can be given in place of its predictor.


def test_a_run_stands_for_its_predictor_else_for_its_best_checkpoint(own: Run, tmp_path: Path, capsys) -> None:
    run = Path(shutil.copytree(own.folder, tmp_path / "run"))
    words = ["replay", "--traces", str(own.traces), "--split", "validation", *BUDGET, "--json", "-"]
    capsys.readouterr()
    assert main([*words, "--predictor", str(run)]) == 0
    of_run = capsys.readouterr()
    assert f"{run} is a run: its predictor is {run / 'predictor'}" in of_run.err
    assert main([*words, "--predictor", str(run / "predictor")]) == 0
    assert capsys.readouterr().out == of_run.out
    assert main(["package", str(run), "--out", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() == (run / "predictor/model.safetensors").read_bytes()
    assert read_config(tmp_path / "a")["calibration"] == read_config(run / "predictor")["calibration"]
    shutil.rmtree(run / "predictor")
    capsys.readouterr()
    assert main(["package", str(run), "--out", str(tmp_path / "b")]) == 0
    line = capsys.readouterr().err
    assert f"{run} is a run: its predictor is {run / 'checkpoints'}" in line
    assert line.rstrip().endswith(".ckpt")
    assert main([*words, "--predictor", str(run)]) == 0
    shutil.rmtree(run / "checkpoints")
    capsys.readouterr()
    assert "has no checkpoint" in error_line(capsys, ["package", run, "--out", tmp_path / "c"])


def test_package_overwrites_nothing(own: Run, tmp_path: Path, capsys) -> None:
    assert main(["package", str(own.folder), "--out", str(tmp_path / "a")]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    capsys.readouterr()
    line = error_line(capsys, ["package", own.folder, "--out", tmp_path / "a"])
    assert line == f"{tmp_path / 'a'} already exists; choose another folder or remove it"
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
