"""Running a model over prompts and keeping what it routed, so that nothing is lost when it is killed.

What a batch routed goes into a piece of its own, in a folder beside the trace set to be, by a rename: a piece is there
as a whole or not at all. The same command finds the pieces there are and does the others; when all are there, they
become the trace set, in the order of the prompts. That is made in the folder of pieces too, and moved out last, so that
whatever a kill leaves lies there and goes with it. Under torchrun or accelerate each rank does every so many-th batch,
and the first one waits for all and puts them together.
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from moe_beyond.collect.asked import Collection, Rank, Row
from moe_beyond.collect.batch import record_batch
from moe_beyond.collect.forcing import forcing
from moe_beyond.collect.geometry import measured_geometry
from moe_beyond.collect.pieces import (
    WAIT_SECONDS,
    WHOLE,
    alone,
    begin,
    check_finished,
    check_space,
    digest,
    is_taken,
    put_together,
    remove_pieces,
    request_of,
    write_piece,
)
from moe_beyond.collect.prompts import Prompt, token_ids_of
from moe_beyond.collect.recorder import recording
from moe_beyond.collect.routers import find_routers, stored_routers
from moe_beyond.errors import UserError
from moe_beyond.files import check_is_elsewhere
from moe_beyond.geometry import Geometry
from moe_beyond.traces.blocks import parse_blocks, validation_numbers
from moe_beyond.traces.copies import without_copies
from moe_beyond.traces.hidden_states import HiddenStates
from moe_beyond.traces.manifest import Manifest
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.vocabulary import load_vocabulary
from moe_beyond.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def collect(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    out: str | Path,
    asked: Collection | None = None,
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
        asked: How; as `Collection` says by default.
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
    out, rank, asked = Path(out), rank or Rank(), asked or Collection()
    check_is_elsewhere(out)
    pieces = out.parent / f".{out.name}.collecting"
    if is_taken(out):
        if rank.number:
            return None  # the first rank tells
        if not pieces.is_dir():
            raise UserError(f"{out} already exists; choose another folder or remove it")
    rows = [(prompt, _cut(prompt, token_ids_of(prompt, tokenizer), model, asked)) for prompt in prompts]
    if not rows:
        raise UserError(f"{source}: holds no prompt")
    if twice := _first_twice([prompt.sequence_id for prompt, _ in rows]):
        raise UserError(f"{source}: two prompts are called {twice!r}")
    if asked.val_blocks is not None:
        texts = {number: tuple(ids) for number, (_, ids) in enumerate(rows)}
        lengths = {number: len(ids) for number, ids in texts.items()}
        held_out = without_copies(validation_numbers(lengths, *parse_blocks(asked.val_blocks)), texts)
        splits = ("validation" if number in held_out else "train" for number in range(len(rows)))
        rows = [(replace(prompt, split=split), ids) for (prompt, ids), split in zip(rows, splits, strict=True)]
    routers = find_routers(model) if asked.hidden_states else None
    readers = None if routers is None else {layer: router.module for layer, router in routers.items()}
    manifest = _manifest(model, tokenizer, asked, readers, name, revision, source, quantization_bits)
    batches = [rows[begin : begin + asked.batch_size] for begin in range(0, len(rows), asked.batch_size)]
    request = request_of(manifest, rows, asked) | {"dtype": str(model.dtype), "weights": digest(model)}
    if is_taken(out):
        check_finished(out, pieces, request)
    else:
        paths = [pieces / f"{number:06d}.parquet" for number in range(len(batches))]
        forced = nullcontext() if asked.steering is None else forcing(model, asked.steering, manifest.geometry)
        with forced:  # refuses before anything is written
            if not begin(pieces, request, rank, out):
                return None
            with alone(pieces, rank):
                if not (pieces / WHOLE).exists():
                    check_space(pieces, manifest, batches, paths, asked)
                    _collect_part(model, tokenizer, batches, paths, manifest.geometry, asked, readers, rank, progress)
                if rank.number:
                    return None
                while not (pieces / WHOLE).exists() and not all(path.exists() for path in paths):
                    time.sleep(WAIT_SECONDS)  # other ranks are at it; if one fails, whoever started us stops us
                if not (pieces / WHOLE).exists():
                    known = None if routers is None else stored_routers(routers, manifest.geometry)
                    vocabulary = load_vocabulary(tokenizer.name_or_path).path
                    put_together(pieces / WHOLE, manifest, batches, paths, vocabulary, known, asked)
                remove_pieces(paths)
                (pieces / WHOLE).replace(out)
    shutil.rmtree(pieces)
    return TraceSet(str(out))


def _cut(prompt: Prompt, token_ids: list[int], model: "PreTrainedModel", asked: Collection) -> list[int]:
    """Cut a prompt to what is asked for.

    Raises:
        UserError: With what is to be written it is longer than the model has positions all the same.
    """
    token_ids = token_ids[: asked.max_tokens]
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
    if Path(model_id).is_dir():  # is called alike from wherever it is named, and tells nothing of this machine
        model_id = Path(model_id).resolve().name
    if Path(source).is_file():
        source = Path(source).name
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
        generation=_generation(asked),
        steering=asked.steering,
    )


def _generation(asked: Collection) -> dict[str, float] | None:
    """Say how text is written, if any is."""
    if not asked.generate:
        return None
    drawn = {"temperature": asked.temperature, "seed": asked.seed} if asked.temperature else {"temperature": 0.0}
    return {"tokens": asked.generate, **drawn}


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
                    traces = record_batch(model, tokenizer, recorder, batches[number], geometry, asked)
                    write_piece(path, traces, geometry)
                    tokens = sum(map(len, traces))
                progress(number + 1, len(batches), tokens)
    finally:
        model.train(was_training)
