"""The record of the training data in a predictor's configuration."""

from itertools import chain
from typing import Any

from moe_beyond.datamodules.ranks import shared_map
from moe_beyond.datamodules.traces import TraceDataModule
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.texts import hashes_of, sketch, text_starts


def fitted_on(data: TraceDataModule) -> dict[str, Any]:
    """Return descriptions of the training split and, under ``validation``, of the validation split (None without).

    Each has a sketch of its texts, which `moe_beyond.predictors.training_text` compares with other trace sets.

    Args:
        data: Data module of the fit.
    """
    validation = None if data.val_split is None else _describe(data.val_traces, data.val_split)
    return {**_describe(data.traces, data.train_split), "validation": validation}


def _describe(traces: TraceSet, split: str) -> dict[str, Any]:
    found = shared_map(lambda info: text_starts(traces, (info,)), traces.shards(split))
    return {**traces.describe(split), "texts": sketch(hashes_of(list(chain.from_iterable(found))))}
