"""Running a model over prompts and recording its routing, so that a killed collection loses nothing.

Each batch is written to a part file in a hidden folder next to the trace set, by a rename: a part is complete or
absent. The same command reuses the parts that exist and collects the others. When all parts exist, they are merged, in
the order of the prompts. The merged set is also made in the folder of parts and moved out last, so that a kill leaves
files only in that folder. Under torchrun or accelerate, the ranks share the batches in turn; the first rank waits for
all parts and merges them.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe_beyond.collect.config import CollectConfig, ProcessRank, StateLayers, TokenizedPrompt
from moe_beyond.collect.devices import embedding_rows, input_device
from moe_beyond.collect.forward import check_trace, record_batch
from moe_beyond.collect.geometry import measured_geometry
from moe_beyond.collect.out_folder import check_out, parts_folder
from moe_beyond.collect.prompts import Prompt
from moe_beyond.collect.recorder import recording
from moe_beyond.collect.resume import (
    MERGED,
    WAIT_SECONDS,
    check_finished,
    check_space,
    collection_key,
    exclusive,
    merge_parts,
    open_or_resume,
    remove_parts,
    removing_empty_folder,
    write_part,
)
from moe_beyond.collect.router_probe import Router, find_routers, stored_routers
from moe_beyond.collect.state_projection import make_projection
from moe_beyond.collect.steering import steered
from moe_beyond.collect.tokenize import tokenize_prompts
from moe_beyond.collect.tokenizer_files import RecordedTokenizer, recorded_tokenizer
from moe_beyond.errors import UserError
from moe_beyond.files import is_taken, move
from moe_beyond.geometry import Geometry
from moe_beyond.safe_text import printable
from moe_beyond.traces.hidden_states import HiddenStates, StateFormat
from moe_beyond.traces.manifest import NO_TOKEN_IDS, Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.router_weights import Routers
from moe_beyond.traces.state_projection import StateProjection
from moe_beyond.urls import without_secrets
from moe_beyond.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def collect(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    out: str | Path,
    config: CollectConfig | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    source: str = "prompts",
    quantization_bits: float | None = None,
    rank: ProcessRank | None = None,
    progress: Callable[[int, int, int], None] = lambda done, total, tokens: None,
    notice: Callable[[str], None] = lambda line: None,
) -> TraceSet | None:
    """Run a model over prompts, optionally generate, and write its routing as a trace set.

    Args:
        model: MoE model of transformers, on any device.
        tokenizer: Tokenizer of the model.
        prompts: Prompts, in the order of the trace set.
        out: Folder of the trace set to make.
        config: Settings (default: those of `CollectConfig`).
        name: Name of the model (default: the name or path that it was loaded from).
        revision: Revision of the model (default: None, unknown).
        source: File or data set of the prompts, for the manifest (default: ``"prompts"``).
        quantization_bits: Bits per expert parameter (default: those of the model's dtype).
        rank: Number of this process (default: as torchrun sets it).
        progress: Callback with the number of finished batches, of all batches, and of newly recorded tokens.
        notice: Callback with one line about anything that is not recorded.

    Returns:
        The finished trace set; None on ranks other than the first.

    Raises:
        UserError: The model is no MoE, cannot be steered as requested, has hidden states of several widths, or none of
            the requested width or layers. A prompt is empty or too long. ``out`` exists, or an unfinished collection
            there has other settings or is damaged. Or the disk is too small.
    """
    out, rank, config = Path(out), rank or ProcessRank(), config or CollectConfig()
    parts = parts_folder(out)
    if is_taken(out) and rank.number:
        return None  # the first rank reports it
    check_out(out)
    check_can_generate(model, config)
    rows = tokenize_prompts(prompts, tokenizer, model.config, config, source)
    check_ids(rows, tokenizer, embedding_rows(model))
    if not config.tokens:
        rows = [(Prompt("", str(number), "", prompt.split), ids) for number, (prompt, ids) in enumerate(rows)]
    recorded = recorded_tokenizer(model, tokenizer)
    routers = find_routers(model) if config.hidden_states else None
    inputs = None if routers is None else {layer: router.module for layer, router in routers.items()}
    manifest = _manifest(model, recorded, config, inputs, name, revision, source, quantization_bits)
    router_weights = None if routers is None else stored_routers(routers, manifest.geometry)
    if routers is not None and router_weights is None:
        notice(_missing_routers(routers, manifest.geometry))
        if config.state_width is not None:
            notice("the projection of the hidden states is random, because it is made of the routers' weights")
    manifest, projection = _with_states(manifest, config, router_weights)
    batches = [rows[start : start + config.batch_size] for start in range(0, len(rows), config.batch_size)]
    key = collection_key(manifest, rows, config, model)
    if is_taken(out):
        check_finished(out, parts, key)
    else:
        paths = [parts / f"{number:06d}.parquet" for number in range(len(batches))]
        steering = nullcontext() if config.steering is None else steered(model, config.steering, manifest.geometry)
        with steering:  # refuses before anything is written
            if not open_or_resume(parts, key, rank, out):
                return None
            with exclusive(parts, rank), removing_empty_folder(parts, paths, rank):
                if not (parts / MERGED).exists():
                    check_space(parts, manifest, batches, paths, config)
                    _collect_parts(
                        model, tokenizer, batches, paths, manifest, config, inputs, projection, rank, progress
                    )
                if rank.number:
                    return None
                while not (parts / MERGED).exists() and not all(path.exists() for path in paths):
                    time.sleep(WAIT_SECONDS)  # for other ranks; if one fails, the launcher stops this one
                if not (parts / MERGED).exists():
                    merge_parts(parts / MERGED, manifest, batches, paths, recorded, router_weights, projection, config)
                remove_parts(paths)
                move(parts / MERGED, out)
    shutil.rmtree(parts)
    return TraceSet(str(out))


def check_can_generate(model: Any, config: CollectConfig) -> None:
    """Check that a model can generate, if tokens are to be generated.

    Args:
        model: MoE model of transformers.
        config: Settings of the collection.

    Raises:
        UserError: The model has no language-model head.
    """
    if config.generate and not (hasattr(model, "can_generate") and model.can_generate()):
        raise UserError(
            f"--generate {config.generate}: {type(model).__name__} has no language-model head; load it with "
            "AutoModelForCausalLM, or record only prefill (--generate 0)"
        )


def check_ids(rows: Sequence[TokenizedPrompt], tokenizer: "PreTrainedTokenizerBase", num_embeddings: int) -> None:
    """Check that every token id has an embedding.

    Raises:
        UserError: A prompt has a token id outside the embedding.
    """
    for prompt, ids in rows:
        if num_embeddings and max(ids) >= num_embeddings:
            token = tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"{prompt.sequence_id}: token {token!r} has id {max(ids):,}, and the model embeds ids below "
                f"{num_embeddings:,}; give the model's own tokenizer, or resize its embeddings"
            )


def _missing_routers(routers: Mapping[int, Router], geometry: Geometry) -> str:
    """Explain why a trace set with hidden states lacks router weights."""
    missing = [str(layer) for layer in geometry.moe_layers if layer not in routers]
    reason = (
        f"no scores explain the choice of experts in layer{'s' if len(missing) > 1 else ''} {', '.join(missing)} "
        "(hash routing has none, an adapter on the router hides them)"
        if missing
        else "their kind or width differs between layers"
    )
    return f"the routers of {geometry.model} are not stored next to the hidden states: {reason}"


def _manifest(
    model: "PreTrainedModel",
    tokenizer: RecordedTokenizer,
    config: CollectConfig,
    inputs: Mapping[int, nn.Module] | None,
    name: str | None,
    revision: str | None,
    source: str,
    quantization_bits: float | None,
) -> Manifest:
    """Describe the trace set; one token is run to see its number of experts."""
    with recording(model, inputs) as recorder, torch.inference_mode():
        model(torch.zeros((1, 1), dtype=torch.int64, device=input_device(model)))
        (record,) = recorder.pop()
        top_k = record.experts.shape[-1]
    model_id = name or model.config.name_or_path or type(model).__name__
    if Path(model_id).is_dir():  # the same name from every working directory, and no path of this machine
        model_id = Path(model_id).resolve().name
    source = printable(Path(source).name) if Path(source).is_file() else without_secrets(source)
    states = record.hidden_states
    return Manifest(
        geometry=measured_geometry(model, Path(model_id).name, top_k),
        tokenizer=Tokenizer(Path(model_id).name, tokenizer.vocab_size, tokenizer.sha256)
        if config.tokens
        else NO_TOKEN_IDS,
        model_id=model_id,
        quantization_bits=quantization_bits or 8.0 * model.dtype.itemsize,
        author="mixed" if config.generate else "dataset",
        source=source,
        tool_version=__version__,
        revision=revision,
        hidden_size=None if states is None else _hidden_size(states, type(model).__name__),
        generation=_generation(config),
        steering=config.steering,
    )


def _generation(config: CollectConfig) -> dict[str, float] | None:
    """Return the settings of generation for the manifest; None without generation."""
    if not config.generate:
        return None
    sampling = {"temperature": config.temperature, "seed": config.seed} if config.temperature else {"temperature": 0.0}
    return {"tokens": config.generate, **sampling}


def _hidden_size(states: HiddenStates, model: str) -> int:
    """Return the width of the hidden states of one token.

    Raises:
        UserError: Routers and layers read different numbers of values.
    """
    router, layer = states.router_inputs, states.layer_inputs
    if router.shape != layer.shape:
        widths = [" x ".join(map(str, (len(states), states.shape[-1]))) for states in (router, layer)]
        raise UserError(
            f"{model}: routers read {widths[0]} values per token and layers {widths[1]}; the hidden states of such a "
            "model cannot be recorded; leave them out (--record experts)"
        )
    return int(router.shape[-1])


def _with_states(
    manifest: Manifest, config: CollectConfig, routers: Routers | None
) -> tuple[Manifest, StateProjection | None]:
    """Add the requested form of hidden states to a manifest, and make their projection.

    Args:
        manifest: Manifest with the width of the model's hidden states, or without.
        config: Settings of the collection.
        routers: Router weights, or None.

    Raises:
        UserError: A layer is no MoE layer, or the width exceeds the model's.
    """
    full_width, width = manifest.hidden_size, config.state_width
    if full_width is None:
        return manifest, None
    layers = _state_layers(config.state_layers, manifest.geometry)
    if width is not None and width > full_width:
        raise UserError(
            f"--state-width: must be at most {full_width}, the width of the hidden states of {manifest.geometry.model} "
            f"(got {width})"
        )
    if width is None or width == full_width:
        return replace(manifest, states=StateFormat(config.state_dtype, layers)), None
    positions = [manifest.geometry.moe_layers.index(layer) for layer in layers]
    projection = make_projection(None if routers is None else routers.weight, positions, full_width, width)
    states = StateFormat(config.state_dtype, layers, full_width, projection.sha256)
    return replace(manifest, hidden_size=width, states=states), projection


def _state_layers(requested: StateLayers, geometry: Geometry) -> tuple[int, ...]:
    """Return the MoE layers whose hidden states are recorded.

    Raises:
        UserError: There are fewer MoE layers, or a layer is none.
    """
    layers = geometry.moe_layers
    if requested == "all":
        return layers
    if isinstance(requested, tuple):
        if unknown := [layer for layer in requested if layer not in layers]:
            raise UserError(
                f"--state-layers: layer {unknown[0]} is no MoE layer of {geometry.model}; its MoE layers are "
                f"{', '.join(map(str, layers))}"
            )
        return tuple(sorted(set(requested)))
    if requested > len(layers):
        raise UserError(f"--state-layers: {geometry.model} has {len(layers)} MoE layers (got {requested}); give fewer")
    return tuple(layers[index * len(layers) // requested] for index in range(requested))


def _collect_parts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    batches: Sequence[Sequence[TokenizedPrompt]],
    paths: Sequence[Path],
    manifest: Manifest,
    config: CollectConfig,
    inputs: Mapping[int, nn.Module] | None,
    projection: StateProjection | None,
    rank: ProcessRank,
    progress: Callable[[int, int, int], None],
) -> None:
    """Write the parts of this rank that do not exist yet."""
    was_training = model.training
    model.train(False)
    try:
        with recording(model, inputs, manifest.states, projection) as recorder, torch.inference_mode():
            for number in range(rank.number, len(batches), rank.count):
                path, tokens = paths[number], 0
                if not path.exists():
                    traces = record_batch(model, tokenizer, recorder, batches[number], manifest.geometry, config)
                    for trace in traces:  # a trace that the merge would refuse must not become a part
                        check_trace(trace, manifest)
                    write_part(path, traces, manifest.geometry)
                    tokens = sum(map(len, traces))
                progress(number + 1, len(batches), tokens)
    finally:
        model.train(was_training)
