"""Small trace sets for tests."""

import string
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers.models import WordLevel

from moe_beyond.cli.main import main
from moe_beyond.geometry import Geometry
from moe_beyond.traces.hidden_states import HiddenStates, StateFormat
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.router_weights import Routers
from moe_beyond.traces.schema import padding_id
from moe_beyond.traces.state_projection import StateProjection
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer

TINY = Geometry("tiny", (1, 2, 3, 4), num_experts=8, top_k=2, params_per_expert=1000, other_params_per_layer=5000)
VOCAB = 32
FULL = 20
"""Width from which the hidden states of `projected_traces` are projected."""
QUICK_POLICIES = ("lru", "lfu", "belief", "belady", "belady_bypass")
"""Policies of the quick tests. The core is compiled for each policy, for half a minute in a fresh clone, so the others
run with the slow tests."""


def tiny_trace(
    name: str, length: int, rng: np.random.Generator, geometry: Geometry = TINY, vocab: int = VOCAB
) -> Trace:
    """A random trace whose experts lean on the token's id, so that there is something to learn."""
    token_ids = rng.integers(0, vocab, length)
    layers, experts, top_k = geometry.shape()
    lean = np.random.default_rng(7).gumbel(size=(vocab, layers, experts)) * 2
    gates = lean[token_ids] + rng.gumbel(size=(length, layers, experts))
    return Trace(name, "tests", token_ids.astype(np.int32), np.argsort(-gates)[..., :top_k].astype(np.uint8), length)


def with_holes(experts: np.ndarray, rng: np.random.Generator, share: float = 0.3) -> np.ndarray:
    """Let slots hold no expert, as where a model has identity experts."""
    return np.where(rng.random(experts.shape) < share, padding_id(experts.dtype), experts).astype(experts.dtype)


def there(experts: np.ndarray) -> np.ndarray:
    """The experts of one (token, layer) without such slots."""
    return experts[experts != padding_id(experts.dtype)]


def tiny_traces(
    folder: Path,
    *,
    sequences: int = 12,
    longest: int = 20,
    geometry: Geometry = TINY,
    vocab: int = VOCAB,
    seed: int = 0,
    holes: float = 0.0,
    hidden_states: bool = False,
) -> TraceSet:
    """Write a trace set with a train and a validation split (every fourth sequence) and open it."""
    rng = np.random.default_rng(seed)
    manifest = Manifest(geometry, Tokenizer("tests", vocab), "tiny", 16.0, "dataset", "tests", "0")
    if hidden_states:
        manifest = replace(manifest, hidden_size=geometry.num_experts)
    with open_writer(
        folder, manifest, shard_tokens=64, routers=plain_routers(geometry) if hidden_states else None
    ) as writer:
        for i in range(sequences):
            trace = tiny_trace(f"s{i}", int(rng.integers(1, longest + 1)), rng, geometry, vocab)
            if holes:
                trace = replace(trace, experts=with_holes(trace.experts, rng, holes))
            if hidden_states:
                trace = replace(trace, hidden_states=plain_states(trace.experts, geometry.num_experts))
            writer.write(trace, "validation" if i % 4 == 3 else "train")
    return TraceSet(str(folder))


def projected_traces(
    folder: Path, *, seed: int = 4, layers: tuple[int, ...] = TINY.moe_layers
) -> tuple[TraceSet, StateProjection]:
    """Write a set of the model TINY whose states are projected, next to a plain one, and return its projection too."""
    width = TINY.num_experts
    plain = tiny_traces(folder.with_name(f"{folder.name}-plain"), sequences=16, hidden_states=True)
    columns = np.linalg.qr(np.random.default_rng(seed).normal(size=(2, len(layers), FULL, width)))[0]
    projection = StateProjection(*columns.swapaxes(-1, -2).astype(np.float16))
    states = StateFormat("float16", layers, FULL, projection.sha256)
    manifest = replace(plain.manifest, states=states, shards=(), routers_sha256=None)
    with open_writer(folder, manifest, projection=projection) as writer:
        for split in plain.manifest.splits:
            for trace in plain.traces(split, hidden_states=True):
                some = HiddenStates(*(array[:, : len(layers)] for array in trace.hidden_states.arrays().values()))
                writer.write(replace(trace, hidden_states=some), split)
    return TraceSet(str(folder)), projection


def plain_states(experts: np.ndarray, num_experts: int) -> HiddenStates:
    """Hidden states with 1 at each selected expert; the input of a layer also shows its own choice."""
    chosen = (experts[..., None] == np.arange(num_experts)).any(-2).astype(np.float16)
    return HiddenStates(chosen, chosen)


def plain_routers(geometry: Geometry) -> Routers:
    """Routers that read such states."""
    layers, experts, _ = geometry.shape()
    return Routers(np.tile(np.eye(experts, dtype=np.float32), (layers, 1, 1)), "logits")


def word_tokenizer(path: Path, words: Sequence[str]) -> Path:
    """Write a ``tokenizer.json`` whose token strings are ``words``, numbered from 0."""
    ids = {word: i for i, word in enumerate(words)}
    tokenizers.Tokenizer(WordLevel(ids, unk_token=words[0])).save(str(path))
    return path


def prompt_csv(path: Path, rows: Iterable[Sequence[object]], header: Sequence[str] | None = None) -> Path:
    """Write one prompt as the MoE-Beyond release does: (layer id, token, expert ids) rows under its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header or ["Layer ID", "Token", "Activated Expert IDs"], *rows]
    text = "".join(",".join(map(_csv_cell, line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def release(folder: Path, tokens: Sequence[int], missed: int) -> Path:
    """Write prompts in the layout of the MoE-Beyond release; each prediction misses ``missed`` of the 6 experts."""
    rng = np.random.default_rng(0)
    for number, length in enumerate(tokens, start=1):
        true, predicted = [], []
        for layer in range(1, 27):
            for position in range(length):
                experts = rng.permutation(64)[:12].tolist()
                true.append((layer, string.ascii_letters[position], experts[:6]))
                predicted.append((layer, position, experts[:6], experts[missed : missed + 6]))
        columns = ("Layer ID", "Token", "Activated Expert IDs")
        for name in ("puffin/prompt_{}_data.csv", "webglm/prompt_{}_data_formatted.csv"):
            prompt_csv(folder / name.format(number), true, header=columns)
        path = folder / f"webglm_moe_beyond_predictions/prompt_{number}_data_predicted.csv"
        prompt_csv(path, predicted, header=(*columns, "Predicted Expert IDs"))
    return folder


def _csv_cell(value: object) -> str:
    """Quote only where needed; Python's csv module forgets a lone carriage return before 3.13."""
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\r\n') else text


def error_line(capsys, arguments: Sequence[object]) -> str:
    """Run a command line that must fail like a user's mistake, and return its one line of error."""
    code = main([str(word) for word in arguments])
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("moe-beyond: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err.removeprefix("moe-beyond: error: ").rstrip("\n")


def failure(capsys, folder: Path, words: Sequence[object]) -> str:
    """Return the error line of a command that must leave the folder unchanged."""
    before = sorted(folder.rglob("*"))
    line = error_line(capsys, words)
    assert sorted(folder.rglob("*")) == before
    return line
