"""A batch of prompts through the model: what each token of each was routed to, in reading and in writing."""

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
    asked: CollectConfig,
) -> list[Trace]:
    """Run the model over a batch.

    Args:
        model: A transformers mixture of experts, in evaluation mode.
        tokenizer: Its tokenizer.
        recorder: Of the model.
        batch: Prompts and their token ids.
        geometry: The model's shape.
        asked: What to record, and how.

    Returns:
        A trace a prompt.

    Raises:
        UserError: The model did not do as it was steered, or gave gate weights that are not finite.
    """
    longest = max(len(token_ids) for _, token_ids in batch)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.full((len(batch), longest), pad)
    mask = torch.zeros_like(ids)
    for row, (_, token_ids) in enumerate(batch):
        # What goes on writing stands at the right; what only reads at the left, where positions are its own.
        place = slice(longest - len(token_ids), None) if asked.generate else slice(len(token_ids))
        ids[row, place], mask[row, place] = torch.tensor(token_ids), 1
    device = input_device(model)
    ids, mask = ids.to(device), mask.to(device)
    written = ids[:, :0]
    if asked.generate:
        drawn = {"do_sample": True, "temperature": asked.temperature, "top_k": 0, "top_p": 1.0}
        how = drawn if asked.temperature else {"do_sample": False}
        with torch.random.fork_rng(), _plainly_generating(model):
            torch.manual_seed(_seed(batch, asked.seed))  # of the batch: one that is done again is drawn again
            try:
                found = model.generate(  # type: ignore[operator]
                    ids, attention_mask=mask, max_new_tokens=asked.generate, pad_token_id=pad, **how
                )
            except RuntimeError as error:  # nothing can be drawn from a distribution that is not finite
                if (layer := recorder.layer_without_numbers()) is None:
                    raise
                raise _not_finite(batch[0][0].sequence_id, layer) from error
        written = found[:, longest:]
    else:
        model(ids, attention_mask=mask, use_cache=False)
    calls = recorder.pop()
    ends = _ends(model) if asked.generate else set()
    traces = [
        _trace(prompt, token_ids, row, longest, calls, written[row].tolist(), ends, asked, geometry)
        for row, (prompt, token_ids) in enumerate(batch)
    ]
    if asked.steering is not None:
        for trace in traces:
            asked.steering.check_obeyed(trace.experts, geometry)
    return traces


def check_trace(trace: Trace, manifest: Manifest) -> None:
    """Refuse at once what the trace set would not take when all batches are done.

    Args:
        trace: Trace of one prompt.
        manifest: Manifest of the trace set.

    Raises:
        UserError: Its token ids are outside the vocabulary, or its experts no choice of the model's.
    """
    most = manifest.tokenizer.vocab_size
    if len(outside := trace.token_ids[(trace.token_ids < 0) | (trace.token_ids >= most)]):
        raise UserError(
            f"{trace.sequence_id}: token id {outside[0]:,} was read or written, and tokenizer and embedding have "
            f"{most:,} ids; give the model's own tokenizer"
        )
    if wrong := check_experts(trace.experts, manifest.geometry.num_experts):
        raise UserError(f"{trace.sequence_id}: {wrong}; such a model cannot be recorded")


@contextmanager
def _plainly_generating(model: "PreTrainedModel") -> Iterator[None]:
    """Leave out what ``generation_config.json`` asks for beside ends: beams, whose rows are no prompt's, penalties."""
    from transformers import GenerationConfig

    own = model.generation_config
    ends = getattr(own, "eos_token_id", None)
    model.generation_config = GenerationConfig(eos_token_id=ends)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own


def _seed(batch: Sequence[TokenizedPrompt], seed: int) -> int:
    """Return a seed of its own for each batch."""
    names = "\n".join([str(seed), *(prompt.sequence_id for prompt, _ in batch)])
    return int.from_bytes(hashlib.sha256(names.encode()).digest()[:8], "little")


def _ends(model: "PreTrainedModel") -> set[int]:
    """Return the tokens after which a model says nothing more."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}


def _trace(
    prompt: Prompt,
    token_ids: list[int],
    row: int,
    longest: int,
    calls: Sequence[ForwardRecord],
    written: list[int],
    ends: set[int],
    asked: CollectConfig,
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
    kept = _half(weights, prompt.sequence_id, geometry, stored=asked.gate_weights)
    states = [call.hidden_states[part] for call, part in ((first, read), *((call, own) for call in steps))
              if call.hidden_states is not None]  # fmt: skip
    return Trace(
        sequence_id=prompt.sequence_id,
        source=prompt.source,
        token_ids=np.array([*token_ids, *written[: len(steps)]], np.int32),
        experts=experts.astype(experts_dtype(geometry)),
        decode_start=len(token_ids),
        gate_weights=kept if asked.gate_weights else None,
        hidden_states=concatenate(states) if states else None,
    )


def _half(weights: npt.NDArray[np.float32], name: str, geometry: Geometry, *, stored: bool) -> npt.NDArray[np.float16]:
    """Return gate weights, ``(T, L, K)``, in half precision.

    Raises:
        UserError: One is not finite: what its router chose means nothing. Or one that is stored is too large.
    """
    for place, layer in enumerate(geometry.moe_layers):
        if not np.isfinite(weights[:, place]).all():
            raise _not_finite(name, layer)
    if stored and (largest := np.abs(weights).max(initial=0)) > LARGEST:
        raise UserError(
            f"{name}: a gate weight of {largest:g} is beyond {LARGEST:,.0f}, the largest that is stored; leave gate "
            "weights out (--record experts)"
        )
    with np.errstate(over="ignore"):
        return weights.astype(np.float16)


def _not_finite(name: str, layer: int) -> UserError:
    return UserError(
        f"{name}: the router of layer {layer} gives gate weights that are not finite (NaN or infinite), so its choice "
        "means nothing; compute in another type (--dtype float32 or bfloat16), or give intact weights"
    )
