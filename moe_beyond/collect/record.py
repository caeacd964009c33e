"""A trace set of a model's routing, from prompts that it reads."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_beyond.collect.recorder import recording
from moe_beyond.errors import UserError
from moe_beyond.geometry import geometry_from_config
from moe_beyond.traces.manifest import Manifest
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.vocabulary import load_vocabulary
from moe_beyond.traces.writer import writing
from moe_beyond.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARD_TOKENS = 4096


@dataclass(frozen=True)
class Prompt:
    """A text to read.

    Attributes:
        text: Of at least one token.
        sequence_id: Its name; one of a kind in a trace set.
        source: Where it is from.
        split: Where its trace goes.
    """

    text: str
    sequence_id: str
    source: str = "prompts"
    split: str = "train"


def record(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Iterable[str | Prompt],
    out: str | Path,
    *,
    name: str | None = None,
    source: str = "prompts",
    quantization_bits: float | None = None,
) -> TraceSet:
    """Let a model read prompts, one forward each, and write its routing as a trace set.

    Args:
        model: A transformers mixture of experts, on any device.
        tokenizer: Its tokenizer, with a ``tokenizer.json`` where it was loaded from.
        prompts: Texts, or texts with names and splits of their own.
        out: The trace set to make.
        name: Of the model; where it was loaded from by default.
        source: Where the prompts are from, for the manifest.
        quantization_bits: Bits per parameter of the experts; those of the model's dtype by default.

    Returns:
        The finished trace set.

    Raises:
        UserError: The model is no mixture of experts, a prompt is empty, or ``out`` exists.
    """
    vocabulary = load_vocabulary(tokenizer.name_or_path)
    model_id = name or model.config.name_or_path or type(model).__name__
    named = Path(model_id).name
    manifest = Manifest(
        geometry=replace(geometry_from_config(model.config.to_dict()), model=named),
        tokenizer=replace(vocabulary.describe(), name=named),
        model_id=model_id,
        quantization_bits=quantization_bits or 8.0 * model.dtype.itemsize,
        author="dataset",
        source=source,
        tool_version=__version__,
    )
    was_training = model.training
    model.train(False)
    try:
        with (
            writing(out, manifest, vocabulary=vocabulary.path, shard_tokens=SHARD_TOKENS) as writer,
            recording(model) as recorder,
            torch.inference_mode(),
        ):
            for number, given in enumerate(prompts):
                prompt = Prompt(given, f"prompt {number}", source) if isinstance(given, str) else given
                token_ids = tokenizer(prompt.text, return_tensors="pt").input_ids
                if not prompt.text or token_ids.shape[1] == 0:  # some tokenizers begin even nothing with a token
                    raise UserError(f"{prompt.sequence_id}: is empty; the model has nothing to read")
                model(token_ids.to(model.device))
                experts, gate_weights = recorder.take()
                trace = Trace(
                    sequence_id=prompt.sequence_id,
                    source=prompt.source,
                    token_ids=token_ids[0].numpy().astype(np.int32),
                    experts=experts,
                    decode_start=len(experts),
                    gate_weights=gate_weights.astype(np.float16),
                )
                writer.write(trace, prompt.split)
    finally:
        model.train(was_training)
    return TraceSet(str(out))
