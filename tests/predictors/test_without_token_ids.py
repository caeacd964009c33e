"""Traces without token ids: only predictors that read none are fitted on them and score them."""

from dataclasses import replace
from pathlib import Path

import pytest
from _helpers.common import TINY, VOCAB, tiny_traces
from _helpers.fitting import CONFIGS, fit
from _helpers.predictor_variants import HIDDEN, VARIANTS, Variant

from moe_beyond.cli.main import main
from moe_beyond.errors import UserError
from moe_beyond.predictors.io.folder import check_fits
from moe_beyond.predictors.registry import create
from moe_beyond.traces.manifest import NO_TOKEN_IDS
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.writer import open_writer


def without_token_ids(folder: Path, traces: TraceSet) -> TraceSet:
    manifest = replace(traces.manifest, tokenizer=NO_TOKEN_IDS, shards=())
    with open_writer(folder, manifest) as writer:
        for split in traces.manifest.splits:
            for trace in traces.traces(split):
                writer.write(replace(trace, token_ids=trace.token_ids * 0), split)
    return TraceSet(str(folder))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_predictor_that_reads_token_ids_is_not_used(variant: Variant, trace_set: TraceSet, tmp_path: Path) -> None:
    predictor = create(variant.architecture, TINY, VOCAB, **variant.arguments)
    manifest = replace(trace_set.manifest, hidden_size=HIDDEN, shards=())
    check_fits(predictor, manifest, "traces")
    manifest = replace(manifest, tokenizer=NO_TOKEN_IDS)
    if predictor.information.token_ids:
        with pytest.raises(UserError, match=f"^traces: has no token ids, which {variant.architecture} requires"):
            check_fits(predictor, manifest, "traces")
    else:
        check_fits(predictor, manifest, "traces", "another sha256")


def test_what_reads_none_is_fitted_and_evaluated_and_the_rest_is_refused(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    traces = without_token_ids(tmp_path / "without", tiny_traces(tmp_path / "with"))
    configs = ["-c", str(CONFIGS / "trainer/counting.yaml"), "-c"]
    run = fit(tmp_path, Path(traces.folder), *configs, str(CONFIGS / "model/history.yaml"))
    assert main(["evaluate", str(run / "predictor"), "--traces", str(tmp_path / "with")]) == 0
    capsys.readouterr()
    words = ["fit", "-c", str(CONFIGS / "data/traces.yaml"), *configs, str(CONFIGS / "model/token_table.yaml")]
    assert main([*words, f"--data.traces={traces.folder}"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"moe-beyond: error: {traces.folder}: has no token ids, which token_table requires")
    assert len(list(tmp_path.glob("runs/*/*/predictor"))) == 1
