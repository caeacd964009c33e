"""Running the model over a batch of prompts, and cutting the recorded routing into traces."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from moe_beyond.collect.config import CollectConfig, TokenizedPrompt
from moe_beyond.collect.devices import input_device
from moe_beyond.collect.prompts import Prompt
from moe_beyond.collect.recorder import LARGEST, ForwardRecord, Recorder
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.traces.hidden_states import concatenate
from moe_beyond.traces.manifest import Manifest
from moe_beyond.traces.schema import check_experts, experts_dtype
from moe_beyond.traces.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def record_batch(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    recorder: Recorder,
    batch: Sequence[TokenizedPrompt],
    geometry: Geometry,
    config: CollectConfig,
) -> list[Trace]:
    """Run the model over a batch.

    Args:
        model: MoE model of transformers, in evaluation mode.
        tokenizer: Tokenizer of the model.
        recorder: Recorder of the model.
        batch: Prompts and their token ids.
        geometry: Geometry of the model.
        config: Settings of the collection.

    Returns:
        One trace per prompt.

    Raises:
        UserError: The model did not obey the steering, or computed gate weights that are not finite.
    """
    longest = max(len(token_ids) for _, token_ids in batch)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.full((len(batch), longest), pad)
    mask = torch.zeros_like(ids)
    for row, (_, token_ids) in enumerate(batch):
        # Generation needs padding on the left; without it, padding on the right keeps each prompt's positions.
        place = slice(longest - len(token_ids), None) if config.generate else slice(len(token_ids))
        ids[row, place], mask[row, place] = torch.tensor(token_ids), 1
    device = input_device(model)
    ids, mask = ids.to(device), mask.to(device)
    generated = ids[:, :0]
    if config.generate:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}
        decoding = sampling if config.temperature else {"do_sample": False}
        with torch.random.fork_rng(), default_generation(model):
            torch.manual_seed(batch_seed(batch, config.seed))  # a batch that is repeated is sampled alike
            try:
                sequences = model.generate(  # type: ignore[operator]
                    ids, attention_mask=mask, max_new_tokens=config.generate, pad_token_id=pad, **decoding
                )
            except RuntimeError as error:  # torch cannot sample from a distribution that is not finite
                if (layer := recorder.first_nonfinite_layer()) is None:
                    raise
                raise _not_finite(batch[0][0].sequence_id, layer) from error
        generated = sequences[:, longest:]
    else:
        model(ids, attention_mask=mask, use_cache=False)
    records = recorder.pop()
    end_ids = _end_token_ids(model) if config.generate else set()
    traces = [
        _trace(prompt, token_ids, row, longest, records, generated[row].tolist(), end_ids, config, geometry)
        for row, (prompt, token_ids) in enumerate(batch)
    ]
    if config.steering is not None:
        for trace in traces:
            config.steering.check_obeyed(trace.experts, geometry)
    return traces


def check_trace(trace: Trace, manifest: Manifest) -> None:
    """Check a trace before it is stored, so that the merge of all batches cannot fail on it.

    Args:
        trace: Trace of one prompt.
        manifest: Manifest of the trace set.

    Raises:
        UserError: A token id is outside the vocabulary, or the experts are not a valid choice.
    """
    vocab_size = manifest.tokenizer.vocab_size
    if len(outside := trace.token_ids[(trace.token_ids < 0) | (trace.token_ids >= vocab_size)]):
        raise UserError(
            f"{trace.sequence_id}: a token id is outside the {vocab_size:,} ids of tokenizer and embedding (got "
            f"{outside[0]:,}); give the model's own tokenizer"
        )
    if problem := check_experts(trace.experts, manifest.geometry.num_experts):
        raise UserError(f"{trace.sequence_id}: {problem}; such a model cannot be recorded")


@contextmanager
def default_generation(model: "PreTrainedModel") -> Iterator[None]:
    """Ignore ``generation_config.json`` except its end tokens: beams would mix rows, penalties would change routing."""
    from transformers import GenerationConfig

    original = model.generation_config
    end_ids = getattr(original, "eos_token_id", None)
    model.generation_config = GenerationConfig(eos_token_id=end_ids)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = original


def batch_seed(batch: Sequence[TokenizedPrompt], seed: int) -> int:
    """Return a seed that depends on the prompts of a batch."""
    names = "\n".join([str(seed), *(prompt.sequence_id for prompt, _ in batch)])
    return int.from_bytes(hashlib.sha256(names.encode()).digest()[:8], "little")


def _end_token_ids(model: "PreTrainedModel") -> set[int]:
    """Return the token ids that end a generated sequence."""
    end_ids = getattr(model.generation_config, "eos_token_id", None)
    return set(end_ids) if isinstance(end_ids, list) else set() if end_ids is None else {end_ids}


def _trace(
    prompt: Prompt,
    token_ids: list[int],
    row: int,
    longest: int,
    records: Sequence[ForwardRecord],
    generated: list[int],
    end_ids: set[int],
    config: CollectConfig,
    geometry: Geometry,
) -> Trace:
    """Build the trace of one row: its prompt, and each generated token that the model read again."""
    prefill = records[0]
    start = row * longest + (longest - len(token_ids) if config.generate else 0)
    prompt_rows = slice(start, start + len(token_ids))
    # The model does not read the last generated token. Tokens after an end token fill rows that finish early.
    end = next((place for place, token in enumerate(generated) if token in end_ids), len(generated) - 1)
    steps = records[1:][: max(end, 0)]
    decode_row = slice(row, row + 1)
    selected = [(prefill, prompt_rows), *((record, decode_row) for record in steps)]
    experts = np.concatenate([record.experts[rows] for record, rows in selected])
    weights = np.concatenate([record.gate_weights[rows] for record, rows in selected])
    half_weights = _half(weights, prompt.sequence_id, geometry, stored=bool(config.gate_weights))
    states = [record.hidden_states[rows] for record, rows in selected if record.hidden_states is not None]
    ids = np.array([*token_ids, *generated[: len(steps)]], np.int32)
    return Trace(
        sequence_id=prompt.sequence_id,
        source=prompt.source,
        token_ids=ids if config.tokens else np.zeros_like(ids),
        experts=experts.astype(experts_dtype(geometry)),
        decode_start=len(token_ids),
        gate_weights=half_weights if config.gate_weights else None,
        hidden_states=concatenate(states) if states else None,
    )


def _half(weights: npt.NDArray[np.float32], name: str, geometry: Geometry, *, stored: bool) -> npt.NDArray[np.float16]:
    """Return gate weights, ``(T, L, K)``, in half precision.

    Raises:
        UserError: A weight is not finite, so that the choice of its router is meaningless; or a stored weight is too
            large.
    """
    for place, layer in enumerate(geometry.moe_layers):
        if not np.isfinite(weights[:, place]).all():
            raise _not_finite(name, layer)
    if stored and (largest := np.abs(weights).max(initial=0)) > LARGEST:
        raise UserError(
            f"{name}: a gate weight exceeds {LARGEST:,.0f}, the largest half-precision number (got {largest:g}); "
            "leave gate weights out (--record experts)"
        )
    with np.errstate(over="ignore"):
        return weights.astype(np.float16)


def _not_finite(name: str, layer: int) -> UserError:
    return UserError(
        f"{name}: the router of layer {layer} computes gate weights that are not finite (NaN or infinite), so its "
        "choice is meaningless; compute in another type (--dtype float32 or bfloat16), or give intact weights"
    )
