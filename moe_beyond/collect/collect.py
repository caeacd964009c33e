"""Running a model over prompts and keeping what it routed, so that nothing is lost when it is killed.

What a batch routed goes into a piece of its own, in a folder beside the trace set to be, by a rename: a piece is there
as a whole or not at all. The same command finds the pieces there are and does the others; when all are there, they
become the trace set, in the order of the prompts. That is made in the folder of pieces too, and moved out last, so that
whatever a kill leaves lies there and goes with it. Under torchrun or accelerate each rank does every so many-th batch,
and the first one waits for all and puts them together.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from moe_beyond.collect.forcing import forcing
from moe_beyond.collect.prompts import Prompt, token_ids_of
from moe_beyond.collect.recorder import Call, Recorder, find_experts, recording
from moe_beyond.collect.routers import find_routers, stored_routers
from moe_beyond.errors import UserError
from moe_beyond.files import check_is_elsewhere, read_json, replacing, write_json
from moe_beyond.geometry import Geometry
from moe_beyond.traces.hidden_states import SUFFIX, HiddenStates, concatenate, load_states
from moe_beyond.traces.manifest import MANIFEST_FILE, Manifest
from moe_beyond.traces.reader import TraceSet, decode
from moe_beyond.traces.routers import Routers
from moe_beyond.traces.schema import experts_dtype, to_table
from moe_beyond.traces.steering import Steering
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.vocabulary import load_vocabulary
from moe_beyond.traces.writer import writing
from moe_beyond.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REQUEST_FILE = "request.json"
WHOLE = "set"
"""In the folder of pieces: the trace set, once all pieces are in it."""
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
        hidden_states: Whether what routers and layers read is kept, some hundred times as much as the entries; and the
            routers, where they are found.
        steering: Experts that are forced on or off in all that the model reads and writes; None lets it be.
    """

    generate: int = 0
    gate_weights: bool = True
    batch_size: int = 8
    max_tokens: int | None = None
    shard_tokens: int = 65536
    hidden_states: bool = False
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
        UserError: The model is no mixture of experts, or cannot be steered so, or has no hidden states of one width; a
            prompt is empty or too long, ``out`` exists, what is beside it was begun with other prompts or settings or
            is damaged, or there is no room.
    """
    out, rank = Path(out), rank or Rank()
    check_is_elsewhere(out)
    pieces = out.parent / f".{out.name}.collecting"
    if _is_taken(out):
        if rank.number:
            return None  # the first rank tells
        if not pieces.is_dir():
            raise UserError(f"{out} already exists; choose another folder or remove it")
    rows = [(prompt, _cut(prompt, token_ids_of(prompt, tokenizer), model, asked)) for prompt in prompts]
    if not rows:
        raise UserError(f"{source}: holds no prompt")
    if twice := _first_twice([prompt.sequence_id for prompt, _ in rows]):
        raise UserError(f"{source}: two prompts are called {twice!r}")
    routers = find_routers(model) if asked.hidden_states else None
    readers = None if routers is None else {layer: router.module for layer, router in routers.items()}
    manifest = _manifest(model, tokenizer, asked, readers, name, revision, source, quantization_bits)
    batches = [rows[begin : begin + asked.batch_size] for begin in range(0, len(rows), asked.batch_size)]
    request = _request(manifest, rows, asked)
    if _is_taken(out):
        _check_finished(out, pieces, request)
    else:
        paths = [pieces / f"{number:06d}.parquet" for number in range(len(batches))]
        forced = nullcontext() if asked.steering is None else forcing(model, asked.steering, manifest.geometry)
        with forced:  # refuses before anything is written
            if not _begin(pieces, request, rank, out):
                return None
            if not (pieces / WHOLE).exists():
                _check_space(pieces, manifest, batches, paths, asked)
                _collect_part(model, tokenizer, batches, paths, manifest.geometry, asked, readers, rank, progress)
        if rank.number:
            return None
        while not (pieces / WHOLE).exists() and not all(path.exists() for path in paths):
            time.sleep(WAIT_SECONDS)  # other ranks are at it; if one fails, whoever started us stops us
        if not (pieces / WHOLE).exists():
            known = None if routers is None else stored_routers(routers, manifest.geometry)
            _put_together(pieces / WHOLE, manifest, batches, paths, tokenizer, known, asked)
        for path in paths:
            path.unlink(missing_ok=True)
            _states_path(path).unlink(missing_ok=True)
        (pieces / WHOLE).replace(out)
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
    readers: Mapping[int, nn.Module] | None,
    name: str | None,
    revision: str | None,
    source: str,
    quantization_bits: float | None,
) -> Manifest:
    """Describe the trace set to be; one token is read to see how many experts it is routed to."""
    with recording(model, readers) as recorder, torch.inference_mode():
        model(torch.zeros((1, 1), dtype=torch.int64, device=model.device))
        (call,) = recorder.calls()
        top_k = call.experts.shape[-1]
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
        hidden_size=None if call.hidden_states is None else _hidden_size(call.hidden_states, type(model).__name__),
        steering=asked.steering,
    )


def _hidden_size(states: HiddenStates, model: str) -> int:
    """Return the width of one token's states.

    Raises:
        UserError: They are not one of a token, or of two widths.
    """
    router, layer = states.router_inputs, states.layer_inputs
    if router.shape != layer.shape:
        read, before = (" x ".join(map(str, (len(states), states.shape[-1]))) for states in (router, layer))
        raise UserError(
            f"{model}: of a token its routers read {read} numbers, its layers {before}; hidden states of such a model "
            "cannot be recorded"
        )
    return int(router.shape[-1])


def _is_taken(out: Path) -> bool:
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def _request(manifest: Manifest, rows: Sequence[Row], asked: Collection) -> dict[str, Any]:
    """Say what a collection is of, so that the same command knows it again; plain values."""
    texts = hashlib.sha256(json.dumps([(p.sequence_id, p.split, ids) for p, ids in rows]).encode()).hexdigest()
    return _plain(_described(manifest) | {"prompts": texts} | asdict(asked))


def _described(manifest: Manifest) -> dict[str, Any]:
    return {name: value for name, value in asdict(manifest).items() if name not in ("shards", "routers_sha256")}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def _begin(pieces: Path, request: dict[str, Any], rank: Rank, out: Path) -> bool:
    """Make the folder of pieces, or see that the one there is was begun with the same.

    Returns:
        Whether there is something to do; nothing where the first rank has put all together meanwhile.

    Raises:
        UserError: It was begun with something else.
    """
    path = pieces / REQUEST_FILE
    while rank.number and not path.exists():
        if _is_taken(out):
            return False
        time.sleep(WAIT_SECONDS)
    if not path.exists():
        write_json(path, request)
    elif differ := _differences(read_json(path), request):
        raise UserError(
            f"{pieces}: a collection was begun there with other {differ}; go on with the same, or remove it"
        )
    return True


def _differences(found: Any, request: dict[str, Any]) -> str:
    if not isinstance(found, dict):
        return "contents"
    return " and ".join(name for name in request if found.get(name) != request[name])


def _check_finished(out: Path, pieces: Path, request: dict[str, Any]) -> None:
    """See that a set that is there is what the same command made, and was killed before it could remove the rest.

    Raises:
        UserError: It is something else.
    """
    left = sorted(path.name for path in pieces.iterdir() if not path.name.startswith("."))
    ours = left in ([], [REQUEST_FILE]) and (out / MANIFEST_FILE).exists()
    made = {**request, **_plain(_described(TraceSet(str(out)).manifest))} if ours else {}
    if made != request or (left and read_json(pieces / REQUEST_FILE) != request):
        raise UserError(f"{out} already exists; choose another folder or remove it")


def _check_space(
    pieces: Path, manifest: Manifest, batches: Sequence[Sequence[Row]], paths: Sequence[Path], asked: Collection
) -> None:
    """Refuse to begin what the disk will not hold: the pieces to come, and the set made of all.

    Raises:
        UserError: It will not.
    """
    by_batch = [sum(len(token_ids) + asked.generate for _, token_ids in batch) for batch in batches]
    to_come = sum(tokens for tokens, path in zip(by_batch, paths, strict=True) if not path.exists())
    geometry = manifest.geometry
    states = 2 * 2 * geometry.num_layers * (manifest.hidden_size or 0)
    an_expert = (1 if geometry.num_experts <= 255 else 2) + 2 * asked.gate_weights
    needed = int(SPARE * (to_come + sum(by_batch)) * (4 + geometry.demand_per_token * an_expert + states))
    free = shutil.disk_usage(pieces).free
    if needed > free:
        raise UserError(
            f"{pieces.parent}: {sum(by_batch):,} tokens need some {needed / 1e6:,.1f} MB more, and "
            f"{free / 1e6:,.1f} MB are free; make room, then run the same command again"
        )


def _collect_part(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    batches: Sequence[Sequence[Row]],
    paths: Sequence[Path],
    geometry: Geometry,
    asked: Collection,
    readers: Mapping[int, nn.Module] | None,
    rank: Rank,
    progress: Callable[[int, int, int], None],
) -> None:
    """Write those of a rank's pieces that are not there."""
    was_training = model.training
    model.train(False)
    try:
        with recording(model, readers) as recorder, torch.inference_mode():
            for number in range(rank.number, len(batches), rank.count):
                path, tokens = paths[number], 0
                if not path.exists():
                    tokens = _collect_batch(model, tokenizer, recorder, batches[number], geometry, asked, path)
                progress(number + 1, len(batches), tokens)
    finally:
        model.train(was_training)


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
    states = [trace.hidden_states for trace in traces if trace.hidden_states is not None]
    if states:  # first: a piece is there once its entries are
        with replacing(_states_path(path)) as temporary:
            concatenate(states).save(temporary)
    with replacing(path) as temporary:
        pq.write_table(to_table(traces, geometry), temporary, compression="zstd")
    return sum(map(len, traces))


def _states_path(path: Path) -> Path:
    """Return where the hidden states of a piece lie."""
    return path.with_name(path.stem + SUFFIX)


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
    own = slice(row, row + 1)
    experts = np.concatenate([first.experts[read], *(call.experts[own] for call in steps)])
    weights = np.concatenate([first.gate_weights[read], *(call.gate_weights[own] for call in steps)])
    states = [call.hidden_states[part] for call, part in ((first, read), *((call, own) for call in steps))
              if call.hidden_states is not None]  # fmt: skip
    return Trace(
        sequence_id=prompt.sequence_id,
        source=prompt.source,
        token_ids=np.array([*token_ids, *written[: len(steps)]], np.int32),
        experts=experts.astype(experts_dtype(geometry)),
        decode_start=len(token_ids),
        gate_weights=weights.astype(np.float16) if asked.gate_weights else None,
        hidden_states=concatenate(states) if states else None,
    )


def _put_together(
    whole: Path,
    manifest: Manifest,
    batches: Sequence[Sequence[Row]],
    paths: Sequence[Path],
    tokenizer: "PreTrainedTokenizerBase",
    routers: Routers | None,
    asked: Collection,
) -> None:
    """Write the trace set out of all pieces; what kills left half-written goes first."""
    for left in whole.parent.glob(".*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    vocabulary = load_vocabulary(tokenizer.name_or_path).path
    with writing(whole, manifest, vocabulary=vocabulary, routers=routers, shard_tokens=asked.shard_tokens) as writer:
        for path, batch in zip(paths, batches, strict=True):
            for trace, (prompt, _) in zip(_read_piece(path, batch, manifest), batch, strict=True):
                writer.write(trace, prompt.split)


def _read_piece(path: Path, batch: Sequence[Row], manifest: Manifest) -> Iterator[Trace]:
    """Read what a batch routed.

    Raises:
        UserError: The piece is damaged, or of other prompts.
    """
    geometry, size = manifest.geometry, manifest.hidden_size
    try:
        shard = decode(pq.read_table(path), geometry, str(path))
        if size is not None:
            shape, beside = (len(shard.token_ids), geometry.num_layers, size), _states_path(path)
            shard = replace(shard, hidden_states=load_states(beside.read_bytes(), shape, str(beside)))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is damaged; remove it, and the same command collects it again") from error
    if shard.sequence_ids != [prompt.sequence_id for prompt, _ in batch]:
        raise UserError(f"{path}: is of other prompts; remove it, and the same command collects it again")
    return (shard.trace(row) for row in range(len(shard)))
