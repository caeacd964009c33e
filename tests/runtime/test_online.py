"""Online updates in runs: scores and table equal those of the recorded sequences; recordings repeat them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _helpers.common import VOCAB, error_line
from _helpers.moe_architectures import LAYERS, tiny_model
from _helpers.predictor_variants import Variant, fitted, probabilities

from moe_beyond.cli.main import main
from moe_beyond.collect.load import open_checkpoint
from moe_beyond.collect.prompts import as_prompts
from moe_beyond.errors import UserError
from moe_beyond.predictors.batch import collate
from moe_beyond.predictors.io.folder import read_predictor, save_predictor
from moe_beyond.predictors.online import OnlineUpdates
from moe_beyond.runtime import load_offloaded, offload
from moe_beyond.runtime.generation import Sampling, TextGenerator
from moe_beyond.runtime.records.as_run import replay_as_run
from moe_beyond.runtime.records.recording import read_recording, write_recording
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace

# The last sequence has no decoded token that is read, so its prompt is observed at the end of the run.
PROMPTS = [([5, 9, 30, 7, 11, 4, 3, 17], 6), ([6, 8], 6), ([5, 9, 30], 1), ([6, 8, 5, 9], 1)]
SMALL = {"width": 8, "depth": 1, "heads": 2, "window": 4, "known_tokens": 24, "min_count": 1, "ngram_buckets": 64}
CROSS_LAYER = Variant("cross_layer", "next", {**SMALL, "layer_width": 8, "lookaheads": 2, "next_token_head": True})


@pytest.mark.parametrize("acts", [False, True])
def test_a_run_equals_the_offline_corrections(acts: bool) -> None:
    model: Any = tiny_model("OlmoeForCausalLM", vocab_size=VOCAB)
    predictor = fitted(CROSS_LAYER, offload(model).geometry)
    with offload(model, 6, predictor=predictor, predict_only=not acts, online=True) as run:
        for prompt, new in PROMPTS:
            with torch.inference_mode():
                model.generate(torch.tensor([prompt]), max_new_tokens=new, min_new_tokens=new, do_sample=False)
    offline, lookaheads = OnlineUpdates(predictor), predictor.information.lookaheads
    found = {name: np.zeros((LAYERS, 2), int) for name in lookaheads}
    assert len(run.log.sequences) == len(PROMPTS)
    for sequence in run.log.sequences:
        ids = np.concatenate(sequence.token_ids).astype(np.int32)
        trace = Trace("0", "tests", ids, sequence.routing(LAYERS), sequence.steps[0])
        scores = offline.correct(ids, trace.experts, probabilities(predictor, collate([trace]))[0])
        for token, layer in np.ndindex(len(trace), LAYERS):
            for place, name in enumerate(lookaheads):
                if token < trace.decode_start + (name == "next"):
                    continue  # no scores follow a prompt's layers
                if name != "next" and name > layer:  # available at the start: the smallest one
                    place = next(i for i, other in enumerate(lookaheads) if other > layer)
                best = np.argsort(-scores[token, place, layer], kind="stable")[: run.geometry.top_k]
                hits = len(set(best.tolist()) & set(trace.experts[token, layer].tolist()))
                found[name][layer] += hits, run.geometry.top_k
    assert run.online is not None
    assert (run.online.keys == offline.keys).all()
    assert (run.online.visits == offline.visits).all()
    assert np.allclose(run.online.values, offline.values, rtol=0, atol=1e-4)
    if not acts:
        assert run.predictions is not None
        for name, rows in run.predictions.agreement().items():
            assert [[row.found, row.chosen] for row in rows] == found[name].tolist(), name


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A history predictor with the shape of small-moe."""
    folder = tmp_path_factory.mktemp("predictor") / "fitted"
    manifest = load_offloaded("small-moe", budget=60).manifest
    save_predictor(
        fitted(Variant("history", "default"), manifest.geometry),
        folder,
        {"tokenizer": {"sha256": manifest.tokenizer.sha256}},
    )
    return folder


def test_recordings_repeat_the_updates(tmp_path: Path, predictor: Path) -> None:
    """From an empty table, and from the table of the run before."""
    state = tmp_path / "state.safetensors"
    generator = TextGenerator(open_checkpoint("small-moe"), Sampling(8))
    tables = []
    for name in ("first", "second"):
        with load_offloaded(
            "small-moe", budget=60, predictor=predictor, prefetch="p>0.2", online=True, online_state=state,
            keep_rows=True,
        ) as run:  # fmt: skip
            generations = [generator.generate(run.model, prompt) for prompt in as_prompts(("def read(path):", "A"))]
        write_recording(run, tmp_path / name, generations, Sampling(8), "tests", {})
        assert run.online is not None
        run.online.save(state)
        tables.append(run.online)
        assert (tmp_path / name / "online.safetensors").read_bytes() == state.read_bytes()
        recording = read_recording(tmp_path / name)
        named = replace(recording, options=replace(recording.options, predictor=str(predictor)))
        replayed = replay_as_run(named)
        assert replayed.difference is None, replayed
        assert replayed.equal == replayed.events > 0
    with load_offloaded(
        "small-moe", budget=60, predictor=predictor, prefetch="p>0.2", online=True, online_state=state,
        predict_only=True,
    ) as run:  # fmt: skip
        generations = [generator.generate(run.model, prompt) for prompt in as_prompts(("A",))]
    write_recording(run, tmp_path / "scored", generations, Sampling(8), "tests", {})
    assert (tmp_path / "scored" / "online_start.safetensors").read_bytes() == state.read_bytes()
    assert not read_recording(tmp_path / "scored").options.online  # the predictor did not act
    # Offline, in the order of the recordings, the table is that of the second run.
    fitted_one = read_predictor(predictor)
    offline = OnlineUpdates(fitted_one)
    for name in ("first", "second"):
        for trace in TraceSet(str(tmp_path / name)):
            offline.correct(trace.token_ids, trace.experts, probabilities(fitted_one, collate([trace]))[0])
    assert (offline.keys == tables[1].keys).all()
    assert np.allclose(offline.values, tables[1].values, rtol=0, atol=1e-4)


def test_wrong_options_are_refused(tmp_path: Path, predictor: Path) -> None:
    for options, message in (
        ({"online": True}, r"online: corrects the scores of a predictor \(got none\)"),
        ({"online": "yes"}, "online must be True or False"),
        ({"online_state": "file"}, "online_state: is the file of online updates; set online"),
        ({"online": True, "online_state": 3}, "online_state must be the name of a file"),
        ({"online": True, "online_state": predictor / "config.json", "predictor": predictor}, "damaged safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            load_offloaded("small-moe", budget=60, **options)


def test_the_command_keeps_a_state(capsys: Any, tmp_path: Path, predictor: Path) -> None:
    words = ["run", "--model", "small-moe", "--prompt", "import os", "--budget", "25%", "--max-new-tokens", "4"]
    scored, state = [*words, "--predictor", str(predictor)], tmp_path / "state.safetensors"
    assert error_line(capsys, [*words, "--online"]).startswith(
        "--online: corrects the scores of a predictor (got none)"
    )
    assert error_line(capsys, [*scored, "--online-state", state]).startswith("--online-state: is the file of --online")
    line = error_line(capsys, [*scored, "--online", "--auto", "--device-model", "rtx3060"])
    assert line == "--online: --auto chooses by scores without updates; leave one of them out"
    sizes = []
    for trace in ("one", "two"):
        recorded = tmp_path / trace
        assert main([*scored, "--online", "--online-state", str(state), "--trace", str(recorded)]) == 0
        assert "scores: history online" in capsys.readouterr().out
        sizes.append(state.read_bytes())
        assert main(["replay", "--traces", str(recorded), "--as-run", "--predictor", str(predictor)]) == 0
    assert sizes[0] != sizes[1]
