"""Nothing a predictor may not know reaches its scores, from the files on disk to the files that `predict` writes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import TINY, tiny_trace
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER, TINY_TOKEN_CAUSAL, fit

from moe_beyond.cli.main import main
from moe_beyond.evaluation.score_store import ScoresFolder
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer

LENGTH = 14
TOKEN, LAYER = 8, 2  # from here on, everything is edited

FITS = {
    "cross_layer": ("default", *TINY_CROSS_LAYER),
    "token_causal": ("default", *TINY_TOKEN_CAUSAL),
    "row_encoder": (
        "default",
        *("--model.width=16", "--model.token_width=16", "--model.layer_width=8", "--model.heads=2", "--model.depth=1"),
        *("--model.feedforward=16", "--model.ngram_buckets=32"),
    ),
    "naive_bayes": ("counting",),
    "popularity": ("counting",),
    "token_table": ("counting",),
    "eamc": ("counting",),
    "history": ("counting",),
}


def write(folder: Path, traces: list[Trace]) -> Path:
    manifest = Manifest(TINY, Tokenizer("tests", 32), "tiny", 16.0, "dataset", "tests", "0")
    with open_writer(folder, manifest) as writer:
        for index, trace in enumerate(traces):
            writer.write(trace, "validation" if index % 4 == 3 else "train")
    return folder


def edited(trace: Trace) -> Trace:
    """Change the experts from (TOKEN, LAYER) on, and the ids of all later tokens."""
    experts, token_ids = trace.experts.copy(), trace.token_ids.copy()
    experts[TOKEN, LAYER:] = (experts[TOKEN, LAYER:] + 1) % TINY.num_experts
    experts[TOKEN + 1 :] = (experts[TOKEN + 1 :] + 3) % TINY.num_experts
    token_ids[TOKEN + 1 :] = (token_ids[TOKEN + 1 :] + 5) % 32
    return replace(trace, experts=experts, token_ids=token_ids)


def predict(run: Path, traces: Path, folder: Path) -> ScoresFolder:
    checkpoint = next((run / "checkpoints").glob("*.ckpt"))
    words = ["predict", "-c", str(run / "config.yaml"), f"--ckpt_path={checkpoint}", f"--data.test_traces={traces}"]
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(words) == 0
    return ScoresFolder(next(folder.glob("runs/*/version_0/scores")))


@pytest.mark.parametrize("architecture", FITS)
def test_editing_what_comes_later_changes_no_earlier_score(architecture: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    traces = [tiny_trace(f"s{i}", LENGTH, rng) for i in range(24)]
    original = write(tmp_path / "original", traces)
    changed = write(tmp_path / "changed", [edited(trace) for trace in traces])
    trainer, *sizes = FITS[architecture]
    configs = ("-c", str(CONFIGS / f"trainer/{trainer}.yaml"), "-c", str(CONFIGS / f"model/{architecture}.yaml"))
    run = fit(tmp_path, original, *configs, *sizes, "--trainer.max_epochs=1")
    before = predict(run, original, tmp_path / "before")
    after = predict(run, changed, tmp_path / "after")
    moved = dict.fromkeys([*before.lookaheads, "later tokens"], False)  # in some trace: some scores move by jumps
    for trace in traces:
        old = before.scores(trace.sequence_id, LENGTH)
        new = after.scores(trace.sequence_id, LENGTH)
        assert np.array_equal(old[:TOKEN], new[:TOKEN])
        for index, lookahead in enumerate(before.lookaheads):
            # Layer l is scored from layers up to l - h of its token, or up to l of the previous token: none of these
            # may be edited.
            token, known = TOKEN, TINY.num_layers
            if lookahead == "next":
                assert np.array_equal(old[TOKEN, index], new[TOKEN, index])
                token, known = TOKEN + 1, LAYER
            elif lookahead != "token":
                known = LAYER + int(lookahead)
            assert np.array_equal(old[token, index, :known], new[token, index, :known])
            moved[lookahead] |= not np.array_equal(old[token, index, known:], new[token, index, known:])
        moved["later tokens"] |= not np.array_equal(old[TOKEN + 1 :], new[TOKEN + 1 :])
    within_reach = {h: h == "next" or (h != "token" and LAYER + int(h) < TINY.num_layers) for h in before.lookaheads}
    assert moved == {**within_reach, "later tokens": architecture != "popularity"}
