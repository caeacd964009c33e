"""Prompts in, a trace set out: batches, padding, generation, and going on after being killed."""

import contextlib
import copy
import json
import os
import traceback
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from _helpers.common import error_line
from _helpers.moe_architectures import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_beyond as mb
from moe_beyond.cli.main import main
from moe_beyond.collect.collection import collect
from moe_beyond.collect.config import CollectConfig, ProcessRank
from moe_beyond.collect.geometry import measured_geometry
from moe_beyond.collect.prompts import Prompt, as_prompts
from moe_beyond.collect.recorder import recording
from moe_beyond.errors import UserError
from moe_beyond.geometry import geometry_from_config
from moe_beyond.pretrained import shipped_folder
from moe_beyond.traces.analysis.statistics import summarize
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace

SMALL = shipped_folder("small-moe")
TEXTS = ["def main():", "The list of arguments", "import numpy as np\n\n", "x", "Returns the number of items in a set."]


@pytest.fixture(scope="module")
def small() -> tuple:
    return AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.float32), AutoTokenizer.from_pretrained(SMALL)


def prompts() -> list[Prompt]:
    return [Prompt(text, f"p{n}", split="validation" if n == 3 else "train") for n, text in enumerate(TEXTS)]


def collected(small: tuple, out: Path, **asked) -> list[Trace]:
    traces = collect(*small, prompts(), out, CollectConfig(**asked), rank=ProcessRank(0, 1))
    assert traces is not None
    assert [path.name for path in out.parent.iterdir()] == [out.name]  # nothing next to it
    return sorted(traces.traces(), key=lambda trace: trace.sequence_id)


def same(one: Trace, other: Trace) -> None:
    assert (one.sequence_id, one.source, one.decode_start) == (other.sequence_id, other.source, other.decode_start)
    assert np.array_equal(one.token_ids, other.token_ids)
    assert np.array_equal(one.experts, other.experts)
    assert one.gate_weights is not None
    assert other.gate_weights is not None
    np.testing.assert_allclose(one.gate_weights, other.gate_weights, atol=2e-3)


def test_a_trace_holds_what_the_model_did(small: tuple, tmp_path: Path) -> None:
    model, tokenizer = small
    model.train()
    found = collected(small, tmp_path / "traces", batch_size=2)
    assert model.training
    model.eval()
    for trace, text in zip(found, TEXTS, strict=True):
        token_ids = tokenizer(text, return_tensors="pt").input_ids
        assert trace.token_ids.tolist() == token_ids[0].tolist()
        assert trace.decode_start == len(trace)
        with recording(model) as recorder, torch.inference_mode():
            model(token_ids)
            experts, weights = recorder.pop_concatenated()
        assert np.array_equal(trace.experts, experts)
        np.testing.assert_allclose(trace.gate_weights, weights, atol=2e-3)
    assert TraceSet(str(tmp_path / "traces")).manifest.splits == ("train", "validation")


def test_what_is_read_is_the_same_in_batches_of_one_and_of_eight(small: tuple, tmp_path: Path) -> None:
    alone = collected(small, tmp_path / "one" / "traces", batch_size=1)
    together = collected(small, tmp_path / "all" / "traces", batch_size=8)  # padded at the right
    for one, other in zip(alone, together, strict=True):
        same(one, other)


def test_what_is_written_is_routed_as_what_is_read(small: tuple, tmp_path: Path) -> None:
    alone = collected(small, tmp_path / "one" / "traces", batch_size=1, generate=9)
    together = collected(small, tmp_path / "all" / "traces", batch_size=8, generate=9)
    model, tokenizer = small
    for one, other, text in zip(alone, together, TEXTS, strict=True):
        same(one, other)  # though padded at the left
        assert one.decode_start == len(tokenizer(text).input_ids)
        assert len(one) == one.decode_start + 8  # the last generated token is not read
        with recording(model) as recorder, torch.inference_mode():
            model(torch.from_numpy(one.token_ids.astype(np.int64))[None])
            experts, _ = recorder.pop_concatenated()
        assert np.array_equal(np.sort(one.experts), np.sort(experts))


def test_an_answer_ends_where_the_model_ends_it(small: tuple, tmp_path: Path, monkeypatch) -> None:
    model, _ = small
    whole = collected(small, tmp_path / "whole" / "traces", batch_size=8, generate=9)
    end = int(whole[0].token_ids[whole[0].decode_start + 3])  # the fourth token of the first answer
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    alone = collected(small, tmp_path / "one" / "traces", batch_size=1, generate=9)
    together = collected(small, tmp_path / "all" / "traces", batch_size=8, generate=9)
    for one, other, before in zip(alone, together, whole, strict=True):
        same(one, other)
        answer = before.token_ids[before.decode_start :].tolist()
        expected = answer.index(end) if end in answer else 8
        assert len(one) - one.decode_start == expected
    assert len(alone[0]) - alone[0].decode_start <= 3


@pytest.mark.parametrize("temperature", [0, 1])
def test_what_a_model_asks_of_generating_does_not_change_what_it_writes(small, tmp_path, monkeypatch, temperature):
    plain = collected(small, tmp_path / "plain" / "traces", generate=6, temperature=temperature)
    for name, value in {"num_beams": 3, "repetition_penalty": 1.9, "typical_p": 0.3, "top_k": 2}.items():
        monkeypatch.setattr(small[0].generation_config, name, value)
    asked = collected(small, tmp_path / "asked" / "traces", generate=6, temperature=temperature)
    for one, other in zip(plain, asked, strict=True):
        same(one, other)
    assert small[0].generation_config.num_beams == 3  # it has its own again


def test_what_is_drawn_is_drawn_again_by_the_same_seed_alone(small: tuple, tmp_path: Path) -> None:
    def written(name: str, **asked) -> list[list[int]]:
        return [t.token_ids.tolist() for t in collected(small, tmp_path / name / "traces", generate=9, **asked)]

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    drawn = written("one", temperature=1.0, batch_size=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert written("again", temperature=1.0, batch_size=2) == drawn
    assert written("other", temperature=1.0, batch_size=2, seed=1) != drawn
    cold = written("cold", temperature=1e-3, batch_size=2)
    assert cold == written("greedy", batch_size=2) != drawn


def test_identity_experts_are_left_out_on_the_way_to_a_replay(small: tuple, tmp_path: Path) -> None:
    """Their slots hold none, on disk and after, whether the model reads or writes."""
    tokenizer = small[1]
    model = tiny_model("LongcatFlashForCausalLM", vocab_size=len(tokenizer))
    traces = collect(
        model, tokenizer, prompts(), tmp_path / "traces", CollectConfig(4, batch_size=2), rank=ProcessRank(0, 1)
    )
    assert traces is not None
    assert (traces.geometry.num_experts, traces.geometry.top_k) == (8, 2)
    real = 0
    for trace in traces.traces():
        with recording(model) as recorder, torch.inference_mode():
            model(torch.from_numpy(trace.token_ids.astype(np.int64))[None])
            experts, _ = recorder.pop_concatenated()
        assert np.array_equal(np.sort(trace.experts.astype(np.int8)), np.sort(experts))  # -1 is 255 in a byte
        assert trace.gate_weights is not None
        assert np.array_equal(trace.gate_weights > 0, trace.experts < 8)
        real += int((trace.experts < 8).sum())
    assert 0 < real < traces.manifest.tokens * traces.geometry.demand_per_token
    found = mb.replay(traces, budget=["50%"], policy=["lru"])
    assert {result["accesses"] for result in found.to_json()["results"]} == {real}
    assert sum(layer.unused_experts for layer in summarize(traces).by_layer) < 16


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_datasets_reads_the_folder_as_it_is(small: tuple, tmp_path: Path, streaming: bool) -> None:
    collected(small, tmp_path / "out" / "traces", batch_size=4, generate=3)
    traces = TraceSet(str(tmp_path / "out" / "traces"))
    loaded = datasets.load_dataset(traces.folder, cache_dir=str(tmp_path / "cache"), streaming=streaming)
    assert list(loaded) == ["train", "validation"]
    for split, rows in loaded.items():
        for row, trace in zip(rows, traces.traces(split), strict=True):
            assert (row["sequence_id"], row["decode_start"]) == (trace.sequence_id, trace.decode_start)
            assert row["token_ids"] == trace.token_ids.tolist()
            assert row["experts"] == trace.experts.ravel().tolist()
            assert row["gate_weights"] == trace.gate_weights.ravel().tolist()


def test_the_geometry_is_read_off_the_modules(small: tuple) -> None:
    model, _ = small
    found, fields = measured_geometry(model, "small", 3), geometry_from_config(model.config.to_dict())
    assert (found.moe_layers, found.shape()) == (fields.moe_layers, fields.shape())
    assert found.params_per_expert == fields.params_per_expert


def test_ranks_take_parts_and_the_first_puts_them_together(small: tuple, tmp_path: Path) -> None:
    whole = collected(small, tmp_path / "whole" / "traces", batch_size=2)
    out = tmp_path / "parts" / "traces"
    asked = CollectConfig(batch_size=2)
    out.parent.mkdir()
    (out.parent / ".traces.collecting").mkdir()
    first = ProcessRank(0, 2)
    # The second rank waits for the first to begin; here the first begins, and is stopped before its batches.
    with pytest.raises(KeyboardInterrupt):
        collect(*small, prompts(), out, asked, rank=first, progress=interrupt)
    assert collect(*small, prompts(), out, asked, rank=ProcessRank(1, 2)) is None
    traces = collect(*small, prompts(), out, asked, rank=first)
    assert traces is not None
    for one, other in zip(sorted(traces.traces(), key=lambda t: t.sequence_id), whole, strict=True):
        same(one, other)


def interrupt(done: int, total: int, tokens: int) -> None:
    raise KeyboardInterrupt


def test_other_settings_do_not_go_on_with_what_was_begun(small: tuple, tmp_path: Path) -> None:
    out = tmp_path / "traces"
    with pytest.raises(KeyboardInterrupt):
        collect(*small, prompts(), out, CollectConfig(batch_size=2), rank=ProcessRank(0, 1), progress=interrupt)
    for fields, asked, texts in (
        ("batch_size", CollectConfig(batch_size=3), prompts()),
        ("prompts", CollectConfig(batch_size=2), prompts()[:4]),
    ):
        with pytest.raises(
            UserError,
            match=f"contains an unfinished collection with different {fields}; rerun with the original settings",
        ):
            collect(*small, texts, out, asked, rank=ProcessRank(0, 1))


def test_another_model_of_the_same_name_does_not_go_on(small: tuple, tmp_path: Path) -> None:
    model, tokenizer = small
    with pytest.raises(KeyboardInterrupt):
        collect(model, tokenizer, prompts(), tmp_path / "traces", rank=ProcessRank(0, 1), progress=interrupt)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[4].mlp.gate.weight[0, 0] += 1
    with pytest.raises(
        UserError, match="contains an unfinished collection with different weights; rerun with the original settings"
    ):
        collect(other, tokenizer, prompts(), tmp_path / "traces", rank=ProcessRank(0, 1))


def test_two_processes_do_not_do_one_part_at_once(small: tuple, tmp_path: Path) -> None:
    def begin_again(done: int, total: int, tokens: int) -> None:
        with pytest.raises(UserError, match="another process is collecting there"):
            collect(*small, prompts(), tmp_path / "traces", rank=ProcessRank(0, 1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(*small, prompts(), tmp_path / "traces", rank=ProcessRank(0, 1), progress=begin_again)
    assert collect(*small, prompts(), tmp_path / "traces", rank=ProcessRank(0, 1)) is not None


def test_blocks_of_prompts_are_held_out(small: tuple, tmp_path: Path) -> None:
    texts = [Prompt(text, f"p{n}") for n, text in enumerate([*TEXTS, *(f"{text} again" for text in TEXTS)])]
    asked = CollectConfig(val_blocks="2:3", batch_size=4)
    traces = collect(*small, texts, tmp_path / "traces", asked, rank=ProcessRank(0, 1))
    assert traces is not None
    held_out = [int(trace.sequence_id[1:]) for trace in traces.traces("validation")]
    assert len(held_out) == 2
    assert held_out[0] % 2 == 0
    assert held_out[1] == held_out[0] + 1
    assert len(list(traces.traces("train"))) == 8


def test_a_test_split_is_chosen_first_and_shares_no_text(small: tuple, tmp_path: Path) -> None:
    texts = [f"def f{number}" * (1 + number % 3) for number in range(12)]
    texts[5] = texts[4] = texts[0]  # copies of the longest kind, of which block 1:3 would choose one
    asked = CollectConfig(test_blocks="1:3", val_blocks="1:3", batch_size=4)
    traces = collect(*small, [Prompt(text, f"p{n}") for n, text in enumerate(texts)], tmp_path / "a", asked)
    assert traces is not None
    found = {split: {t.sequence_id for t in traces.traces(split)} for split in traces.manifest.splits}
    assert set().union(*found.values()) == {f"p{number}" for number in range(12)}
    by_text = [{texts[int(name[1:])] for name in names} for names in found.values()]
    assert sum(map(len, by_text)) == len(set().union(*by_text)) == 10
    # Without the test split, validation chooses among all prompts: the same blocks.
    only = collect(*small, [Prompt(text, f"p{n}") for n, text in enumerate(texts)], tmp_path / "b",
                   CollectConfig(val_blocks="1:3", batch_size=4))  # fmt: skip
    assert only is not None
    assert {t.sequence_id for t in only.traces("validation")} == found["test"]


def test_splits_of_prompts_are_kept_and_exclude_blocks(small: tuple, tmp_path: Path) -> None:
    records = [{"text": "a = 1", "split": "test"}, {"text": "b = 2", "split": None}, "c = 3"]
    traces = collect(*small, as_prompts(records), tmp_path / "traces")
    assert traces is not None
    assert [len(list(traces.traces(split))) for split in ("train", "test")] == [2, 1]
    with pytest.raises(UserError, match=r"--val-blocks: the prompts of prompts have splits \(got 'test'\); leave"):
        collect(*small, as_prompts(records), tmp_path / "more", CollectConfig(val_blocks="1:2"))
    with pytest.raises(UserError, match=r"its split must be a plain name \(got 5\)"):
        as_prompts([{"text": "a", "split": 5}])


def test_the_manifest_and_the_card_say_how_text_was_written(small: tuple, tmp_path: Path) -> None:
    for name, asked, generation, said in (
        ("read", CollectConfig(), None, "read by the model, written by people or another program.\n"),
        (
            "greedy",
            CollectConfig(generate=2),
            {"tokens": 2, "temperature": 0.0},
            "at most 2 tokens after each prompt, always the most probable one",
        ),
        (
            "drawn",
            CollectConfig(generate=2, temperature=0.7, seed=5),
            {"tokens": 2, "temperature": 0.7, "seed": 5},
            "at most 2 tokens after each prompt, sampled at temperature 0.7",
        ),
    ):
        traces = collect(*small, prompts(), tmp_path / name, asked, rank=ProcessRank(0, 1))
        assert traces is not None
        assert (traces.manifest.generation, traces.manifest.model_id) == (generation, "small-moe")
        assert said in (tmp_path / name / "README.md").read_text()


def test_what_is_cut_to_more_than_the_positions_is_refused(small: tuple, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"p0: exceeds the 1,024 positions of the model \(got 1,000 tokens and 25 to generate\)"
    ):
        collect(
            *small, [Prompt("long " * 5000, "p0")], tmp_path / "traces", CollectConfig(generate=25, max_tokens=1000)
        )


def test_another_dtype_of_as_many_bits_does_not_go_on(small: tuple, tmp_path: Path) -> None:
    half, other = (AutoModelForCausalLM.from_pretrained(SMALL, dtype=kind) for kind in (torch.float16, torch.bfloat16))
    with pytest.raises(KeyboardInterrupt):
        collect(half, small[1], prompts(), tmp_path / "traces", rank=ProcessRank(0, 1), progress=interrupt)
    with pytest.raises(
        UserError,
        match="contains an unfinished collection with different dtype and weights; rerun with the original settings",
    ):
        collect(other, small[1], prompts(), tmp_path / "traces", rank=ProcessRank(0, 1))


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["def", " \n"], "p1: is empty"),
        ([], "has no prompts"),
        (["long " * 5000], r"p0: exceeds the [\d,]+ positions of the model \(got [\d,]+ tokens\); truncate it"),
    ],
)
def test_prompts_that_cannot_be_read_are_named_and_nothing_is_left(small, tmp_path, texts, says) -> None:
    given = [Prompt(text, f"p{n}") for n, text in enumerate(texts)]
    with pytest.raises(UserError, match=says):
        collect(*small, given, tmp_path / "traces", rank=ProcessRank(0, 1))
    assert not list(tmp_path.iterdir())


def test_a_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("def main():\nimport os\n")
    words = ["collect", "--model", SMALL, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "traces"]
    assert main([str(word) for word in (*words, "--record", "experts", "--generate", 2, "--json", "-")]) == 0
    found = json.loads(capsys.readouterr().out)
    traces = TraceSet(str(tmp_path / "traces"))
    assert found["fingerprint"] == traces.manifest.fingerprint
    assert (traces.manifest.author, traces.manifest.source) == ("mixed", "prompts.txt")  # no folder of this machine
    assert [trace.sequence_id for trace in traces.traces()] == ["prompts-1", "prompts-2"]
    assert all(trace.gate_weights is None for trace in traces.traces())
    assert "already exists" in error_line(capsys, words)
    for bad, says in (
        (["--record", "experts,weight"], "unknown --record 'weight'"),
        (["--dtype", "int4"], "unknown --dtype 'int4'"),
        (["--batch-size", "0"], "--batch-size: must be a whole number from 1 (got 0)"),
        (["--temperature", "1"], "--temperature: needs --generate N (got 1.0)"),
        (["--temperature", "1e-9", "--generate", "1"], "must be 0 (greedy) or at least 0.001"),
    ):
        assert says in error_line(capsys, [*words, *bad])
    line = error_line(capsys, [*words[:2], tmp_path / "none", *words[3:6], tmp_path / "other"])
    assert line == f"model {tmp_path}/none: there is no such folder; a model on the Hub is ORG/REPO"


def test_without_tokens_a_set_holds_only_expert_ids(small: tuple, tmp_path: Path) -> None:
    private = [Prompt(text, f"secret {n}", "secret.txt") for n, text in enumerate(TEXTS)]
    settings = {"generate": 4, "batch_size": 2}
    for name, tokens in (("whole", True), ("public", False)):
        collect(*small, private, tmp_path / name, CollectConfig(tokens=tokens, **settings), rank=ProcessRank(0, 1))
    whole, public = (TraceSet(str(tmp_path / name)) for name in ("whole", "public"))
    assert not public.manifest.has_token_ids
    for trace, kept in zip(whole, public, strict=True):
        assert np.array_equal(kept.experts, trace.experts)
        assert kept.decode_start == trace.decode_start
        assert not kept.token_ids.any()
        assert kept.gate_weights is None
    files = {path.name: path.read_bytes() for path in (tmp_path / "public").iterdir()}
    assert set(files) == {"manifest.json", "README.md", "train-00000.parquet"}
    assert not any(b"secret" in content for content in files.values())
    assert b"token ids were not recorded" in files["README.md"]


def test_without_tokens_nothing_else_can_be_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("secret\n")
    words = ["collect", "--model", "small-moe", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "set"]
    line = error_line(capsys, [*words, "--no-tokens", "--record", "experts,gate_weights"])
    assert line == "--no-tokens: keeps only expert ids; leave gate weights and hidden states out of --record"
    with pytest.raises(UserError, match="--no-tokens: keeps only expert ids"):
        CollectConfig(tokens=False, hidden_states=True)


def test_readers_of_a_collection_see_only_whole_parts_and_the_whole_set(small: tuple, tmp_path: Path) -> None:
    out = tmp_path / "traces"

    def read_until_whole() -> None:
        while True:
            with contextlib.suppress(FileNotFoundError):  # a part or its folder is merged meanwhile
                for part in (tmp_path / ".traces.collecting").glob("*.parquet"):
                    assert pq.read_table(part, use_threads=False).num_rows == 1
            if out.exists():
                assert len(list(TraceSet(str(out)))) == len(TEXTS)
                return

    readers = []
    for _ in range(8):
        reader = os.fork()
        if reader == 0:
            code = 1
            try:
                read_until_whole()
                code = 0
            except BaseException:
                traceback.print_exc()  # os._exit prints nothing
            finally:
                os._exit(code)
        readers.append(reader)
    collected(small, out, batch_size=1)
    assert [os.waitpid(reader, 0)[1] for reader in readers] == [0] * 8
