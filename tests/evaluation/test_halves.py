"""Two halves of a trace set: conversations stay together, copies do not cross, and large sets are sampled."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import TINY, VOCAB, tiny_trace
from _helpers.scoring import foresight, seer

from moe_beyond.errors import UserError
from moe_beyond.evaluation import halves as module
from moe_beyond.evaluation.halves import halve
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer


def written(folder: Path, traces: Sequence[Trace]) -> TraceSet:
    manifest = Manifest(TINY, Tokenizer("tests", VOCAB), "tiny", 16.0, "dataset", "tests", "0")
    with open_writer(folder, manifest) as writer:
        for trace in traces:
            writer.write(trace)
    return TraceSet(str(folder))


def random_traces(number: int, length: int = 12, seed: int = 0) -> list[Trace]:
    rng = np.random.default_rng(seed)
    return [tiny_trace(f"s{each}", length, rng) for each in range(number)]


def names(traces: TraceSet, warmup_tokens: int = 0) -> tuple[list[str], list[str]]:
    found = halve(traces, None, None, warmup_tokens)
    return [each.name for each in found.tuning], [each.name for each in found.held_out]


def continued(trace: Trace, more: Trace, name: str) -> Trace:
    """A trace that begins with the whole text of another one."""
    return Trace(
        name, "tests", np.append(trace.token_ids, more.token_ids), np.append(trace.experts, more.experts, 0),
        len(trace) + len(more),
    )  # fmt: skip


def test_conversations_take_turns(tmp_path: Path) -> None:
    tuning, held_out = names(written(tmp_path / "t", random_traces(5)))
    assert tuning == ["s0", "s2", "s4"]
    assert held_out == ["s1", "s3"]


def test_blocks_of_large_sets_take_turns(tmp_path: Path) -> None:
    tuning, held_out = names(written(tmp_path / "t", random_traces(40)))
    assert tuning[:5] == ["s0", "s1", "s2", "s3", "s8"]
    assert held_out[:5] == ["s4", "s5", "s6", "s7", "s12"]
    assert len(tuning) == len(held_out) == 20


def test_turns_of_a_conversation_stay_together(tmp_path: Path) -> None:
    first, more, *others = random_traces(6)
    second = continued(first, more, "turn-2")
    third = continued(second, others[0], "turn-3")
    tuning, held_out = names(written(tmp_path / "t", [first, second, third, *others[1:]]))
    assert tuning == ["s0", "turn-2", "turn-3", "s4"]
    assert held_out == ["s3", "s5"]


def test_no_copy_is_held_out(tmp_path: Path) -> None:
    first, second, third, fourth, fifth, sixth = random_traces(6)
    copy = Trace("copy", "tests", first.token_ids, first.experts, first.decode_start)
    tuning, held_out = names(written(tmp_path / "t", [first, second, third, copy, fifth, sixth, fourth]))
    assert tuning == ["s0", "s2", "s4", "s3"]
    assert held_out == ["s1", "s5"]


def test_sequences_within_the_warm_up_do_not_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    traces = [*random_traces(4), tiny_trace("short", 5, rng)]
    assert sum(map(len, names(written(tmp_path / "t", traces), warmup_tokens=5))) == 4
    with pytest.raises(UserError, match=r"at least 4 conversations .*, two to choose by .* \(got 3\); record more"):
        names(written(tmp_path / "u", random_traces(3)))


def test_large_sets_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HALF_TOKENS", 60)
    monkeypatch.setattr(module, "SEQUENCE_TOKENS", 10)
    traces = written(tmp_path / "t", random_traces(40))
    source = seer()
    found = halve(traces, None, source)
    assert [sum(map(len, half)) for half in (found.tuning, found.held_out)] == [50, 50]  # one of each block of four
    assert str(found).endswith("a sample, with at most 10 tokens of each sequence")
    for sequence in (*found.tuning, *found.held_out):
        trace = traces[sequence.name]
        assert np.array_equal(sequence.experts, trace.experts[:10])
        assert np.array_equal(sequence.scores, foresight(trace, 1, TINY.num_experts)[:10])
