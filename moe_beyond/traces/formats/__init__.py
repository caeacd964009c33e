"""Trace sets out of other tools' recordings, one file per format: its description and its reader."""

from collections.abc import Callable
from functools import partial

from moe_beyond.traces.formats import flame_moe, jsonl, llama_cpp, moe_beyond_csv, vllm
from moe_beyond.traces.formats._describe import Format
from moe_beyond.traces.formats._recording import import_recording
from moe_beyond.traces.reader import TraceSet

IMPORTERS: dict[str, Callable[..., TraceSet]] = {
    "moe-beyond-csv": moe_beyond_csv.import_moe_beyond_csv,
    "vllm": partial(import_recording, vllm.read_vllm),
    "llama-cpp": partial(import_recording, llama_cpp.read_llama_cpp),
    "flame-moe": partial(import_recording, flame_moe.read_flame_moe),
    "jsonl": partial(import_recording, jsonl.read_jsonl),
}
"""By format: what makes a trace set of a recording, given the recording, where to make it, and the model's preset."""
FORMATS: dict[str, Format] = {
    "moe-beyond-csv": moe_beyond_csv.FORMAT,
    "vllm": vllm.FORMAT,
    "llama-cpp": llama_cpp.FORMAT,
    "flame-moe": flame_moe.FORMAT,
    "jsonl": jsonl.FORMAT,
}
"""By format: its description in help."""
