"""Trace sets out of other tools' recordings, one file a format."""

from collections.abc import Callable
from functools import partial

from moe_beyond.traces.importers.flame_moe import read_flame_moe
from moe_beyond.traces.importers.jsonl import read_jsonl
from moe_beyond.traces.importers.llama_cpp import read_llama_cpp
from moe_beyond.traces.importers.moe_beyond_csv import import_moe_beyond_csv
from moe_beyond.traces.importers.recording import import_recording
from moe_beyond.traces.importers.vllm import read_vllm
from moe_beyond.traces.reader import TraceSet

IMPORTERS: dict[str, Callable[..., TraceSet]] = {
    "moe-beyond-csv": import_moe_beyond_csv,
    "vllm": partial(import_recording, read_vllm),
    "llama-cpp": partial(import_recording, read_llama_cpp),
    "flame-moe": partial(import_recording, read_flame_moe),
    "jsonl": partial(import_recording, read_jsonl),
}
"""By format: what makes a trace set of a recording, given the recording, where to make it, and the model's preset."""
