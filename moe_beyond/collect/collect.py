"""Running a model over prompts and keeping what it routed, so that nothing is lost when it is killed.

What a batch routed goes into a piece of its own, in a folder beside the trace set to be, by a rename: a piece is there
as a whole or not at all. The same command finds the pieces there are and does the others; when all are there, they
become the trace set, in the order of the prompts. That is made in the folder of pieces too, and moved out last, so that
whatever a kill leaves lies there and goes with it. Under torchrun or accelerate each rank does every so many-th batch,
and the first one waits for all and puts them together.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe_beyond.collect.config import Collection, Rank, Row
from moe_beyond.collect.devices import embedding_rows, input_device
from moe_beyond.collect.forward import check_trace, record_batch
from moe_beyond.collect.geometry import measured_geometry
from moe_beyond.collect.out_folder import check_out, pieces_folder
from moe_beyond.collect.prompts import Prompt
from moe_beyond.collect.recorder import recording
from moe_beyond.collect.resume import (
    WAIT_SECONDS,
    WHOLE,
    alone,
    begin,
    check_finished,
    check_space,
    leaving_nothing,
    put_together,
    remove_pieces,
    request_of,
    write_piece,
)
from moe_beyond.collect.router_probe import Router, find_routers, stored_routers
from moe_beyond.collect.steering import forcing
from moe_beyond.collect.tokenize import tokenize_prompts
from moe_beyond.collect.tokenizer_files import RecordedTokenizer, recorded_tokenizer
from moe_beyond.errors import UserError
from moe_beyond.fields import printable
from moe_beyond.files import is_taken
from moe_beyond.geometry import Geometry
from moe_beyond.traces.hidden_states import HiddenStates
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
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
    notice: Callable[[str], None] = lambda line: None,
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
        notice: Called with one line about what is not recorded.

    Returns:
        The finished trace set; None on ranks other than the first.

    Raises:
        UserError: The model is no mixture of experts, or cannot be steered so, or has no hidden states of one width; a
            prompt is empty or too long, ``out`` exists, what is beside it was begun with other prompts or settings or
            is damaged, or there is no room.
    """
    out, rank, asked = Path(out), rank or Rank(), asked or Collection()
    pieces = pieces_folder(out)
    if is_taken(out) and rank.number:
        return None  # the first rank says so
    check_out(out)
    check_can_write(model, asked)
    rows = tokenize_prompts(prompts, tokenizer, model.config, asked, source)
    _check_ids(rows, tokenizer, embedding_rows(model))
    vocabulary = recorded_tokenizer(model, tokenizer)
    routers = find_routers(model) if asked.hidden_states else None
    readers = None if routers is None else {layer: router.module for layer, router in routers.items()}
    manifest = _manifest(model, vocabulary, asked, readers, name, revision, source, quantization_bits)
    known = None if routers is None else stored_routers(routers, manifest.geometry)
    if routers is not None and known is None:
        notice(_without_routers(routers, manifest.geometry))
    batches = [rows[begin : begin + asked.batch_size] for begin in range(0, len(rows), asked.batch_size)]
    request = request_of(manifest, rows, asked, model)
    if is_taken(out):
        check_finished(out, pieces, request)
    else:
        paths = [pieces / f"{number:06d}.parquet" for number in range(len(batches))]
        forced = nullcontext() if asked.steering is None else forcing(model, asked.steering, manifest.geometry)
        with forced:  # refuses before anything is written
            if not begin(pieces, request, rank, out):
                return None
            with alone(pieces, rank), leaving_nothing(pieces, paths, rank):
                if not (pieces / WHOLE).exists():
                    check_space(pieces, manifest, batches, paths, asked)
                    _collect_part(model, tokenizer, batches, paths, manifest, asked, readers, rank, progress)
                if rank.number:
                    return None
                while not (pieces / WHOLE).exists() and not all(path.exists() for path in paths):
                    time.sleep(WAIT_SECONDS)  # other ranks are at it; if one fails, whoever started us stops us
                if not (pieces / WHOLE).exists():
                    put_together(pieces / WHOLE, manifest, batches, paths, vocabulary, known, asked)
                remove_pieces(paths)
                (pieces / WHOLE).replace(out)
    shutil.rmtree(pieces)
    return TraceSet(str(out))


def check_can_write(model: Any, asked: Collection) -> None:
    """Refuse to let a model answer that cannot.

    Raises:
        UserError: It has no head to write tokens with.
    """
    if asked.generate and not (hasattr(model, "can_generate") and model.can_generate()):
        raise UserError(
            f"--generate {asked.generate}: {type(model).__name__} has no head to write with; load it with "
            "AutoModelForCausalLM, or let it read only (--generate 0)"
        )


def _check_ids(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", most: int) -> None:
    """Refuse token ids that a model has no embedding of.

    Raises:
        UserError: A prompt has one.
    """
    for prompt, ids in rows:
        if most and max(ids) >= most:
            token = tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"{prompt.sequence_id}: token {token!r} has id {max(ids):,}, and the model embeds ids below {most:,}; "
                "give the model's own tokenizer, or resize its embeddings"
            )


def _without_routers(routers: Mapping[int, Router], geometry: Geometry) -> str:
    """Say why a set with hidden states comes without the model's routers."""
    missing = [str(layer) for layer in geometry.moe_layers if layer not in routers]
    why = (
        f"of layer{'s' if len(missing) > 1 else ''} {', '.join(missing)} no scores were found that choose the experts "
        "(hash routing has none, an adapter on the router hides them)"
        if missing
        else "they differ in kind or width from layer to layer"
    )
    return f"the routers of {geometry.model} are not stored next to the hidden states: {why}"


def _manifest(
    model: "PreTrainedModel",
    vocabulary: RecordedTokenizer,
    asked: Collection,
    readers: Mapping[int, nn.Module] | None,
    name: str | None,
    revision: str | None,
    source: str,
    quantization_bits: float | None,
) -> Manifest:
    """Describe the trace set to be; one token is read to see how many experts it is routed to."""
    with recording(model, readers) as recorder, torch.inference_mode():
        model(torch.zeros((1, 1), dtype=torch.int64, device=input_device(model)))
        (call,) = recorder.calls()
        top_k = call.experts.shape[-1]
    model_id = name or model.config.name_or_path or type(model).__name__
    if Path(model_id).is_dir():  # is called alike from wherever it is named, and tells nothing of this machine
        model_id = Path(model_id).resolve().name
    if Path(source).is_file():
        source = printable(Path(source).name)
    return Manifest(
        geometry=measured_geometry(model, Path(model_id).name, top_k),
        tokenizer=Tokenizer(Path(model_id).name, vocabulary.vocab_size, vocabulary.sha256),
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
    manifest: Manifest,
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
                    traces = record_batch(model, tokenizer, recorder, batches[number], manifest.geometry, asked)
                    for trace in traces:  # what the set would not take is no piece of it
                        check_trace(trace, manifest)
                    write_piece(path, traces, manifest.geometry)
                    tokens = sum(map(len, traces))
                progress(number + 1, len(batches), tokens)
    finally:
        model.train(was_training)
