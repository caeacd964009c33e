"""Trace sets for other tools to read, one file a format."""

from collections.abc import Callable

from moe_beyond.traces.exporters.llama_cpp import export_llama_cpp
from moe_beyond.traces.exporters.vllm import export_vllm
from moe_beyond.traces.formats.libcachesim import export_libcachesim

EXPORTERS: dict[str, Callable[..., None]] = {
    "libcachesim": export_libcachesim,
    "vllm": export_vllm,
    "llama-cpp": export_llama_cpp,
}
"""By format: what writes a trace set, given the set, where to, and a split or None for all."""
