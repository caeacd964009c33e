"""Running a model over prompts and keeping what it routed, so that nothing is lost when it is killed.

What a batch routed goes into a piece of its own, in a folder beside the trace set to be, by a rename: a piece is there
as a whole or not at all. The same command finds the pieces there are and does the others; when all are there, they
become the trace set, in the order of the prompts. Under torchrun or accelerate each rank does every so many-th batch,
and the first one waits for all and puts them together.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn

from moe_beyond.collect.forcing import forcing
from moe_beyond.collect.prompts import Prompt, token_ids_of
from moe_beyond.collect.recorder import Call, Recorder, find_experts, recording
from moe_beyond.errors import UserError
from moe_beyond.files import read_json, replacing, write_json
from moe_beyond.geometry import Geometry
from moe_beyond.traces.manifest import Manifest
from moe_beyond.traces.reader import TraceSet, decode
from moe_beyond.traces.schema import experts_dtype, to_table
from moe_beyond.traces.steering import Steering
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.vocabulary import load_vocabulary
from moe_beyond.traces.writer import writing
from moe_beyond.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REQUEST_FILE = "request.json"
LAYER_END = re.compile(r"(?:layers|blocks)\.\d+\.")
WAIT_SECONDS = 1.0
SPARE = 1.1
"""Of the space that a collection is thought to take."""

Row = tuple[Prompt, list[int]]
"""A prompt and its token ids."""


@dataclass(frozen=True)
class Collection:
    """What is to be collected.

    Attributes:
        generate: Tokens that the model writes after each prompt, greedily; 0 lets it read alone.
        gate_weights: Whether these are kept.
        batch_size: Prompts at once.
        max_tokens: What is longer is cut to this many; None refuses what the model has no positions for.
        shard_tokens: A shard of the trace set is closed once it holds this many.
        steering: Experts that are forced on or off in all that the model reads and writes; None lets it be.
    """

    generate: int = 0
    gate_weights: bool = True
    batch_size: int = 8
    max_tokens: int | None = None
    shard_tokens: int = 65536
    steering: Steering | None = None


@dataclass
class Rank:
    """Which of several processes this is."""

    number: int = field(default_factory=lambda: int(os.environ.get("RANK", 0)))
    count: int = field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", 1)))


def collect(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    out: str | Path,
    asked: Collection = Collection(),
    *,
    name: str | None = None,
    revision: str | None = None,
    source: str = "prompts",
    quantization_bits: float | None = None,
    rank: Rank | None = None,
    progress: Callable[[int, int, int], None] = lambda done, total, tokens: None,
) -> TraceSet | None:
    """Let a model read prompts, and perhaps answer them, and write its routing as a trace set.

    Args:
        model: A transformers mixture of experts, on any device.
        tokenizer: Its tokenizer, with a ``tokenizer.json`` where it was loaded from.
        prompts: What it is given.
        out: The trace set to make.
        asked: How.
        name: Of the model; where it was loaded from by default.
        revision: Of the model, if known.
        source: Where the prompts are from, for the manifest.
        quantization_bits: Bits per parameter of the experts; those of the model's dtype by default.
        rank: Which of several processes this is; as torchrun says by default.
        progress: Called with the batches done, all batches, and the tokens recorded since the last call.

    Returns:
        The finished trace set; None on ranks other than the first.

    Raises:
        UserError: The model is no mixture of experts, or cannot be steered so; a prompt is empty or too long, ``out``
            exists, or what is beside it was begun with other prompts or settings.
    """
    out, rank = Path(out), rank or Rank()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists; choose another folder or remove it")
    rows = [(prompt, _cut(prompt, token_ids_of(prompt, tokenizer), model, asked)) for prompt in prompts]
    if not rows:
        raise UserError(f"{source}: holds no prompt")
    if twice := _first_twice([prompt.sequence_id for prompt, _ in rows]):
        raise UserError(f"{source}: two prompts are called {twice!r}")
    manifest = _manifest(model, tokenizer, asked, name, revision, source, quantization_bits)
    batches = [rows[begin : begin + asked.batch_size] for begin in range(0, len(rows), asked.batch_size)]
    pieces = out.parent / f".{out.name}.collecting"
    was_training = model.training
    model.train(False)
    forced = nullcontext() if asked.steering is None else forcing(model, asked.steering, manifest.geometry)
    try:
        with forced, recording(model) as recorder, torch.inference_mode():
            _begin(pieces, manifest, rows, asked, rank)
            _check_space(pieces, manifest.geometry, rows, asked)
            for number, batch in enumerate(batches):
                if number % rank.count == rank.number:
                    path, tokens = pieces / f"{number:06d}.parquet", 0
                    if not path.exists():
                        tokens = _collect_batch(model, tokenizer, recorder, batch, manifest.geometry, asked, path)
                    progress(number + 1, len(batches), tokens)
    finally:
        model.train(was_training)
    if rank.number:
        return None
    paths = [pieces / f"{number:06d}.parquet" for number in range(len(batches))]
    while not all(path.exists() for path in paths):
        time.sleep(WAIT_SECONDS)  # other ranks are at it; if one fails, whoever started us stops us
    _put_together(out, manifest, paths, tokenizer, asked, {prompt.sequence_id: prompt.split for prompt, _ in rows})
    shutil.rmtree(pieces)
    return TraceSet(str(out))


def measured_geometry(model: nn.Module, name: str, top_k: int) -> Geometry:
    """Read a model's geometry off its modules.

    Args:
        model: A transformers mixture of experts.
        name: What to call it.
        top_k: Experts that a token is routed to.
    """
    found, modules = find_experts(model), dict(model.named_modules())
    layers = sorted(found)
    names = {id(module): key for key, module in modules.items()}
    hooked = found[layers[0]]
    first, count = names[id(hooked.module)], hooked.num_experts
    block = modules[first[: LAYER_END.search(first).end() - 1]]  # type: ignore[union-attr]
    beside = modules[first.rpartition(".")[0]]  # where a router is hooked, experts are its neighbours
    holder = hooked.module if hooked.names is not None else getattr(beside, "experts", None)
    if holder is not None:
        weights = list(holder.parameters())
    else:  # JetMoE has no module for them: of all maps there, those with a row an expert are theirs
        weights = [w for w in beside.parameters() if w.ndim == 3]
    inside = sum(w.numel() for w in weights)
    return Geometry(
        model=name,
        moe_layers=tuple(layers),
        num_experts=count,
        top_k=top_k,
        # Weights may have rows of identity experts too, which nobody moves.
        params_per_expert=max(1, sum(w.numel() // (max(len(w), count) if w.ndim == 3 else count) for w in weights)),
        other_params_per_layer=sum(w.numel() for w in block.parameters()) - inside,
    )


def _cut(prompt: Prompt, token_ids: list[int], model: "PreTrainedModel", asked: Collection) -> list[int]:
    """Cut a prompt to what is asked for.

    Raises:
        UserError: It is longer than the model has positions, and nothing is said of cutting.
    """
    if asked.max_tokens is not None:
        return token_ids[: asked.max_tokens]
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and len(token_ids) + asked.generate > most:
        more = f" and {asked.generate} to write" if asked.generate else ""
        raise UserError(
            f"{prompt.sequence_id}: has {len(token_ids):,} tokens{more}, and the model {most:,} positions; "
            "--max-tokens N cuts it"
        )
    return token_ids


def _first_twice(names: Sequence[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _manifest(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    asked: Collection,
    name: str | None,
    revision: str | None,
    source: str,
    quantization_bits: float | None,
) -> Manifest:
    """Describe the trace set to be; one token is read to see how many experts it is routed to."""
    with recording(model) as recorder, torch.inference_mode():
        model(torch.zeros((1, 1), dtype=torch.int64, device=model.device))
        top_k = recorder.calls()[0].experts.shape[-1]
    model_id = name or model.config.name_or_path or type(model).__name__
    vocabulary = load_vocabulary(tokenizer.name_or_path)
    return Manifest(
        geometry=measured_geometry(model, Path(model_id).name, top_k),
        tokenizer=replace(vocabulary.describe(), name=Path(model_id).name),
        model_id=model_id,
        quantization_bits=quantization_bits or 8.0 * model.dtype.itemsize,
        author="mixed" if asked.generate else "dataset",
        source=source,
        tool_version=__version__,
        revision=revision,
        steering=asked.steering,
    )


def _begin(pieces: Path, manifest: Manifest, rows: Sequence[Row], asked: Collection, rank: Rank) -> None:
    """Make the folder of pieces, or see that the one there is was begun with the same.

    Raises:
        UserError: It was begun with something else.
    """
    texts = hashlib.sha256(json.dumps([(p.sequence_id, p.split, ids) for p, ids in rows]).encode()).hexdigest()
    described = {name: value for name, value in asdict(manifest).items() if name != "shards"}
    request = json.loads(json.dumps({"manifest": described, "prompts": texts, "asked": asdict(asked)}))
    path = pieces / REQUEST_FILE
    if path.exists():
        found = read_json(path)
        if differ := [name for name in request if found.get(name) != request[name]]:
            other = " and ".join(differ)
            raise UserError(
                f"{pieces}: a collection was begun there with other {other}; go on with the same, or remove it"
            )
    elif rank.number == 0:
        write_json(path, request)
    else:
        while not path.exists():
            time.sleep(WAIT_SECONDS)


def _check_space(pieces: Path, geometry: Geometry, rows: Sequence[Row], asked: Collection) -> None:
    """Refuse to begin what the disk will not hold.

    Raises:
        UserError: It will not.
    """
    tokens = sum(len(token_ids) + asked.generate for _, token_ids in rows)
    an_expert = (1 if geometry.num_experts <= 255 else 2) + 2 * asked.gate_weights
    needed = int(2 * SPARE * tokens * (4 + geometry.demand_per_token * an_expert))  # pieces, and the set made of them
    free = shutil.disk_usage(pieces).free
    if needed > free:
        raise UserError(
            f"{pieces.parent}: {tokens:,} tokens need some {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        )


def _collect_batch(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    recorder: Recorder,
    batch: Sequence[Row],
    geometry: Geometry,
    asked: Collection,
    path: Path,
) -> int:
    """Run the model over a batch and write its piece; return the tokens that were recorded."""
    longest = max(len(token_ids) for _, token_ids in batch)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.full((len(batch), longest), pad)
    mask = torch.zeros_like(ids)
    for row, (_, token_ids) in enumerate(batch):
        # What goes on writing stands at the right; what only reads at the left, where positions are its own.
        place = slice(longest - len(token_ids), None) if asked.generate else slice(len(token_ids))
        ids[row, place], mask[row, place] = torch.tensor(token_ids), 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    written = ids[:, :0]
    if asked.generate:
        found = model.generate(  # type: ignore[operator]
            ids, attention_mask=mask, max_new_tokens=asked.generate, do_sample=False, pad_token_id=pad
        )
        written = found[:, longest:]
    else:
        model(ids, attention_mask=mask, use_cache=False)
    calls = recorder.calls()
    traces = [
        _trace(prompt, token_ids, row, longest, calls, written[row].tolist(), _ends(model), asked, geometry)
        for row, (prompt, token_ids) in enumerate(batch)
    ]
    if asked.steering is not None:
        for trace in traces:
            asked.steering.check_obeyed(trace.experts, geometry)
    with replacing(path) as temporary:
        pq.write_table(to_table(traces, geometry), temporary, compression="zstd")
    return sum(map(len, traces))


def _ends(model: "PreTrainedModel") -> set[int]:
    """Return the tokens after which a model says nothing more."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}


def _trace(
    prompt: Prompt,
    token_ids: list[int],
    row: int,
    longest: int,
    calls: Sequence[Call],
    written: list[int],
    ends: set[int],
    asked: Collection,
    geometry: Geometry,
) -> Trace:
    """Put together what the calls routed of one row: its prompt, and each token it wrote and read again."""
    first = calls[0]
    begin = row * longest + (longest - len(token_ids) if asked.generate else 0)
    read = slice(begin, begin + len(token_ids))
    # What is written last is not read; nor is what comes after an end, of a row that others outlast.
    end = next((place for place, token in enumerate(written) if token in ends), len(written) - 1)
    steps = calls[1:][: max(end, 0)]
    experts = np.concatenate([first.experts[read], *(call.experts[row : row + 1] for call in steps)])
    weights = np.concatenate([first.gate_weights[read], *(call.gate_weights[row : row + 1] for call in steps)])
    return Trace(
        sequence_id=prompt.sequence_id,
        source=prompt.source,
        token_ids=np.array([*token_ids, *written[: len(steps)]], np.int32),
        experts=experts.astype(experts_dtype(geometry)),
        decode_start=len(token_ids),
        gate_weights=weights.astype(np.float16) if asked.gate_weights else None,
    )


def _put_together(
    out: Path,
    manifest: Manifest,
    paths: Sequence[Path],
    tokenizer: "PreTrainedTokenizerBase",
    asked: Collection,
    splits: dict[str, str],
) -> None:
    """Write the trace set out of all pieces."""
    vocabulary = load_vocabulary(tokenizer.name_or_path).path
    with writing(out, manifest, vocabulary=vocabulary, shard_tokens=asked.shard_tokens) as writer:
        for trace in _pieces(paths, manifest.geometry):
            writer.write(trace, splits[trace.sequence_id])


def _pieces(paths: Sequence[Path], geometry: Geometry) -> Iterator[Trace]:
    for path in paths:
        shard = decode(pq.read_table(path), geometry, str(path))
        yield from (shard.trace(row) for row in range(len(shard)))
