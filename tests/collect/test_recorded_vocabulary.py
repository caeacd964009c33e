"""Token ids outside ``tokenizer.json``: padded rows of an embedding, and tokens that are added elsewhere."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _helpers.common import error_line
from _helpers.moe_architectures import tiny_model
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import moe_beyond as mb
from moe_beyond.cli.main import main
from moe_beyond.collect import collection as collecting
from moe_beyond.collect import tokenizer_files as vocabulary
from moe_beyond.collect.tokenizer_files import recorded_tokenizer
from moe_beyond.errors import UserError
from moe_beyond.predictors.batch import collate
from moe_beyond.predictors.io.folder import check_fits
from moe_beyond.predictors.registry import create
from moe_beyond.pretrained import shipped_folder
from moe_beyond.traces.manifest import Tokenizer as ManifestTokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.tokenizers import load_vocabulary, same_tokenizer

SMALL = shipped_folder("small-moe")
KNOWN, ROWS = 2048, 2048 + 512
PADDED = 2487
"""An id in a padded row, which the model writes."""
ADDED = 2048
"""An id of a token that is added outside ``tokenizer.json``."""


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of more rows than its tokenizer has tokens, which writes an id of such a row."""
    folder = tmp_path_factory.mktemp("padded") / "model"
    model = tiny_model("Qwen3MoeForCausalLM", vocab_size=ROWS, tie_word_embeddings=False, max_position_embeddings=256)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[PADDED] = model.model.norm.weight  # the model generates it: a state after a norm is long
        model.lm_head.weight[PADDED - 1] = -model.model.norm.weight  # or this, where its sum is negative
    model.save_pretrained(folder)
    shutil.copyfile(SMALL / "tokenizer.json", folder / "tokenizer.json")
    config = json.loads((SMALL / "tokenizer_config.json").read_text())
    decoder = {str(ADDED): {"content": "<more>", "special": True, "normalized": False, "lstrip": False,
                            "rstrip": False, "single_word": False}}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": decoder}))
    return folder


def collected(model: Path, folder: Path, *more: object) -> TraceSet:
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("def main():\nimport os<more>\n")
    words = ["collect", "--model", model, "--prompts", folder / "prompts.txt", "--out", folder / "traces", "--quiet"]
    assert main([str(word) for word in (*words, *more)]) == 0
    return TraceSet(str(folder / "traces"))


def test_ids_beyond_the_tokenizer_are_recorded(padded: Path, tmp_path: Path) -> None:
    traces = collected(padded, tmp_path, "--generate", 4)
    assert traces.manifest.tokenizer.vocab_size == ROWS
    ids = np.concatenate([trace.token_ids for trace in traces.traces()])
    assert ADDED in ids
    assert set(ids[ids > ADDED]) <= {PADDED, PADDED - 1}
    assert ids.max() > ADDED
    content = (SMALL / "tokenizer.json").read_bytes()  # the file that it was loaded from, as it is
    assert traces.manifest.tokenizer.sha256 == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "traces" / "tokenizer.json").read_bytes() == content
    strings = traces.token_strings
    assert strings is not None
    assert len(strings) == ROWS
    assert strings[:KNOWN] == [Tokenizer.from_file(str(SMALL / "tokenizer.json")).id_to_token(i) for i in range(KNOWN)]
    assert set(strings[KNOWN:]) == {""}


def test_a_predictor_reads_ids_that_it_was_not_fitted_on_as_unknown(padded: Path, tmp_path: Path) -> None:
    traces = collected(padded, tmp_path, "--generate", 4)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "known_tokens": 8, "ngram_buckets": 4}
    fitted = create("token_causal", traces.geometry, KNOWN, memory_tokens=4, **sizes).eval()
    sha256 = traces.manifest.tokenizer.sha256
    check_fits(fitted, traces.manifest, traces.folder, sha256)
    unknown = next(traces.traces())
    never_seen = replace(
        unknown, token_ids=np.where(unknown.token_ids > ADDED, unknown.token_ids - PADDED + 8, unknown.token_ids)
    )
    fitted.tokens.rows.zero_()  # it knows no token, 7 and 8 neither
    fitted.tokens.ngrams.zero_()
    with torch.inference_mode():
        assert torch.equal(fitted(collate([unknown])), fitted(collate([never_seen])))
    with pytest.raises(UserError, match=f"has {ROWS} ids, but the predictor was fitted with {KNOWN}"):
        check_fits(fitted, traces.manifest, traces.folder, "0" * 64)


def test_a_folder_of_parts_from_before_is_finished(padded: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Its key counts only the tokens of tokenizer.json, as earlier versions did; no part is computed again."""

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    words = ["collect", "--model", padded, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "traces"]
    (tmp_path / "p.txt").write_text("def main():\nimport os\n")
    words = [str(word) for word in (*words, "--generate", 4)]
    monkeypatch.setattr(collecting, "merge_parts", stop)
    assert main(words) == 130
    pieces = tmp_path / ".traces.collecting"
    assert (
        f"moe-beyond: 1 of 1 batches are stored in {pieces}; run the same command to resume" in capsys.readouterr().err
    )
    request = json.loads((pieces / "key.json").read_text())
    before = ManifestTokenizer("model", KNOWN, request["tokenizer"])
    request |= {"tokenizer": vars(before), "tool_version": "0.0.1"}
    (pieces / "key.json").write_text(json.dumps({k: v for k, v in request.items() if k != "parameters"}))
    time = (pieces / "000000.parquet").stat().st_mtime_ns
    seen = []
    monkeypatch.undo()
    monkeypatch.setattr(
        collecting,
        "merge_parts",
        lambda *args, real=collecting.merge_parts: (
            seen.append((pieces / "000000.parquet").stat().st_mtime_ns), real(*args)
        ),
    )  # fmt: skip
    assert main(words) == 0
    assert seen == [time]
    assert TraceSet(str(tmp_path / "traces")).manifest.tokenizer.vocab_size == ROWS


def test_a_part_that_the_set_does_not_take_is_named_and_computed_again(padded: Path, tmp_path, monkeypatch, capsys):
    words = ["collect", "--model", padded, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "traces"]
    (tmp_path / "p.txt").write_text("def main():\nimport os\n")
    words = [str(word) for word in (*words, "--generate", 4, "--batch-size", 1, "--quiet")]
    real = collecting.merge_parts

    def smaller(whole: Path, manifest: Any, *args: Any) -> None:
        real(whole, replace(manifest, tokenizer=replace(manifest.tokenizer, vocab_size=KNOWN)), *args)

    monkeypatch.setattr(collecting, "merge_parts", smaller)
    part = tmp_path / ".traces.collecting" / "000000.parquet"
    line = error_line(capsys, words)
    assert line.startswith(f"{part}: sequence 'p-1': token id ")
    assert line.endswith(
        "; remove 000000.parquet, then run the same command again: it collects this part and keeps the others"
    )
    monkeypatch.undo()
    part.unlink()
    assert main(words) == 0


def test_ids_that_nobody_knows_are_refused_at_the_first_batch(padded: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(vocabulary, "embedding_rows", lambda model: 0)
    (tmp_path / "p.txt").write_text("def main():\nimport os\n")
    words = ["collect", "--model", padded, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "traces"]
    line = error_line(capsys, [*words, "--generate", 4, "--batch-size", 1])
    assert line.startswith("p-1: a token id is outside the 2,049 ids of tokenizer and embedding (got 2,48")
    assert line.endswith("); give the model's own tokenizer")
    assert not list((tmp_path / ".traces.collecting").glob("*.parquet"))


def test_ids_that_the_model_does_not_embed_are_refused_before_any_work(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SMALL)
    tokenizer.add_tokens(["<new>"])
    model = tiny_model("Qwen3MoeForCausalLM", vocab_size=KNOWN)
    with pytest.raises(UserError) as error:
        mb.record(model, tokenizer, ["def", "a <new>"], tmp_path / "traces")
    assert str(error.value) == (
        "prompt-2: token '<new>' has id 2,048, and the model embeds ids below 2,048; give the model's own tokenizer, "
        "or resize its embeddings"
    )
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_a_file_of_its_own_is_written(tmp_path: Path) -> None:
    """A tokenizer of another revision, or made in a script: the set stores the tokenizer that was used."""
    model = tiny_model("Qwen3MoeForCausalLM", vocab_size=ROWS)
    tokenizer = AutoTokenizer.from_pretrained(SMALL)
    plain = recorded_tokenizer(model, tokenizer)
    assert (plain.file, plain.vocab_size) == (SMALL / "tokenizer.json", ROWS)
    for name in ("", str(tmp_path), "org/never-cached"):
        tokenizer.name_or_path = name
        made = recorded_tokenizer(model, tokenizer)
        assert made.file is None
        assert Tokenizer.from_str(made.content.decode()).get_vocab() == tokenizer.get_vocab()
    other = tmp_path / "tokenizer.json"
    other.write_text((SMALL / "tokenizer.json").read_text().replace('"def"', '"DEF"'))
    tokenizer.name_or_path = str(tmp_path)
    assert recorded_tokenizer(model, tokenizer).file is None
    traces = mb.record(model, tokenizer, ["def"], tmp_path / "traces")
    assert traces.token_strings is not None
    assert traces.token_strings[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))


def test_an_imported_vocabulary_counts_what_lies_beside_its_file(padded: Path, tmp_path: Path) -> None:
    assert load_vocabulary(str(SMALL / "tokenizer.json")).describe().vocab_size == KNOWN
    assert load_vocabulary(str(padded)).describe().vocab_size == ROWS
    assert load_vocabulary(str(padded / "tokenizer.json")).describe().vocab_size == ROWS
    for name, content, size in (
        ("tokenizer_config.json", {"added_tokens_decoder": {"2050": {}, "x": {}}}, 2051),
        ("added_tokens.json", {"<a>": 2060, "<b>": "x"}, 2061),
        ("config.json", {"text_config": {"vocab_size": 2100}}, 2100),
        ("config.json", {"vocab_size": 7}, KNOWN),
    ):
        folder = tmp_path / f"{size}-{name}"
        folder.mkdir()
        shutil.copyfile(SMALL / "tokenizer.json", folder / "tokenizer.json")
        (folder / name).write_text(json.dumps(content))
        assert load_vocabulary(str(folder)).describe().vocab_size == size


def test_the_packaged_tokenizer_counts_as_the_shipped_predictors_do() -> None:
    assert load_vocabulary("deepseek-v2").describe().vocab_size == 100002


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(("a", 8), ("a", 8), True), (("a", 8), ("a", 9), True), (("a", 8), ("b", 8), False),
     ((None, 8), (None, 8), True), ((None, 8), (None, 9), False), ((None, 8), ("a", 8), False)],
)  # fmt: skip
def test_one_file_is_one_tokenizer(one: tuple[Any, int], other: tuple[Any, int], same: bool) -> None:
    made = [ManifestTokenizer("x", size, sha256 and sha256 * 64) for sha256, size in (one, other)]
    assert same_tokenizer(*made) is same
