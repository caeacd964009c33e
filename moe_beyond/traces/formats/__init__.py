"""File formats of other tools, one module each: a description, a reader or a writer.

`FORMATS` lists them. A new format is one module and one line here. Another package adds its own with
``FORMATS.register`` or an entry point in the group ``moe_beyond.formats``.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from moe_beyond.errors import unknown
from moe_beyond.exports import lazy_exports
from moe_beyond.registry import Registry
from moe_beyond.traces.formats._format import Format, Option

if TYPE_CHECKING:
    from moe_beyond.traces.formats._files import source_files
    from moe_beyond.traces.formats._ids import check_layers, checked_ids
    from moe_beyond.traces.formats._missing import recorded_span
    from moe_beyond.traces.formats._recording import Progress, Recording, import_recording, recording_reader
    from moe_beyond.traces.reader import TraceSet

__all__ = [
    "FORMATS",
    "Format",
    "Option",
    "Progress",
    "Recording",
    "check_layers",
    "checked_ids",
    "format_reader",
    "format_writer",
    "import_recording",
    "readable_formats",
    "recorded_span",
    "recording_reader",
    "source_files",
    "writable_formats",
]

_MODULES = {
    "Progress": "_recording",
    "Recording": "_recording",
    "check_layers": "_ids",
    "checked_ids": "_ids",
    "import_recording": "_recording",
    "recorded_span": "_missing",
    "recording_reader": "_recording",
    "source_files": "_files",
}
"""Modules of the names that are imported on first use: they import pyarrow and tokenizers."""

FORMATS: Registry[Format] = Registry(
    "format",
    "moe_beyond.formats",
    {
        "moe-beyond-csv": "moe_beyond.traces.formats.moe_beyond_csv:FORMAT",
        "vllm": "moe_beyond.traces.formats.vllm:FORMAT",
        "llama-cpp": "moe_beyond.traces.formats.llama_cpp:FORMAT",
        "flame-moe": "moe_beyond.traces.formats.flame_moe:FORMAT",
        "jsonl": "moe_beyond.traces.formats.jsonl:FORMAT",
        "route-trace": "moe_beyond.traces.formats.route_trace:FORMAT",
        "libcachesim": "moe_beyond.traces.formats.libcachesim:FORMAT",
        "trace-set": "moe_beyond.traces.formats.trace_set:FORMAT",
    },
)
"""Name -> format."""


def readable_formats() -> dict[str, Format]:
    """Return the formats that `moe-beyond import` reads, by name."""
    return {name: form for name, form in FORMATS.items() if form.reader is not None}


def writable_formats() -> dict[str, Format]:
    """Return the formats that `moe-beyond export` writes, by name."""
    return {name: form for name, form in FORMATS.items() if form.writer is not None}


def format_reader(name: str) -> "Callable[..., TraceSet]":
    """Return the reader of a format.

    Args:
        name: Name of the format.

    Raises:
        UserError: No format of this name can be read.
    """
    reader = FORMATS[name].reader if name in FORMATS else None
    if reader is None:
        raise unknown("format", name, readable_formats())
    return reader


def format_writer(name: str) -> "Callable[..., None]":
    """Return the writer of a format.

    Args:
        name: Name of the format.

    Raises:
        UserError: No format of this name can be written.
    """
    writer = FORMATS[name].writer if name in FORMATS else None
    if writer is None:
        raise unknown("format", name, writable_formats())
    return writer


__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
