"""The format ``example-lines``: a text file per sequence, with one line of expert ids per entry, token by token."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.traces import Trace
from moe_beyond.traces.formats import Format, Option, Progress, Recording, checked_ids, recording_reader, source_files

if TYPE_CHECKING:
    from moe_beyond.traces import TraceSet


def read_example_lines(
    source: Path, geometry: Geometry, *, prompt_tokens: int | None = None, progress: Progress
) -> Recording:
    """Read a ``.txt`` file, or a folder of them.

    Args:
        source: Path of the recording.
        geometry: Shape of the model.
        prompt_tokens: Tokens of every prompt (default: all tokens).
        progress: Called with the number of files read and their total.

    Raises:
        UserError: A line does not have K expert ids of the model, or a token lacks a layer.
    """
    traces = []
    files = source_files(source, ".txt")
    for done, path in enumerate(files, 1):
        try:
            ids = np.loadtxt(path, np.int64, ndmin=2)
        except ValueError as error:
            raise UserError(f"{path}: cannot be read as lines of whole numbers ({error})") from error
        entries, top_k = ids.shape
        if top_k != geometry.top_k or entries % geometry.num_layers:
            raise UserError(f"{path}: expected {geometry.num_layers} lines per token, {geometry.top_k} ids each")

        def location(token: int, layer: int, path: Path = path) -> str:
            return f"{path}: line {token * geometry.num_layers + layer + 1}"

        experts = checked_ids(ids.reshape(-1, geometry.num_layers, top_k), geometry, location)
        tokens = len(experts)
        decode_start = tokens if prompt_tokens is None else min(prompt_tokens, tokens)
        traces.append(Trace(path.stem, path.name, np.zeros(tokens, np.int32), experts, decode_start))
        progress(done, len(files))
    return Recording(f"example lines, {source.resolve().name}", [len(t) for t in traces], traces, "unknown", None)


def write_example_lines(traces: "TraceSet", out: str | Path, split: str | None = None) -> None:
    """Write a trace set as a folder of text files.

    Args:
        traces: The trace set.
        out: Path of the new folder.
        split: Name of a split (default: all splits).
    """
    folder = Path(out)
    folder.mkdir()
    for trace in traces.traces(split):
        np.savetxt(folder / f"{trace.sequence_id}.txt", trace.experts.reshape(-1, traces.geometry.top_k), "%d")


FORMAT = Format(
    summary="one line of expert ids per token and MoE layer: a .txt file per sequence, or a folder of them",
    reader=recording_reader(read_example_lines),
    writer=write_example_lines,
    fields=("K expert ids per line, separated by spaces; token by token, and layer by layer within a token",),
    example=("44 13 5 60 2 31", "7 9 12 63 1 30", "13 9 6 2 40 44"),
    options=(Option("prompt_tokens", int, "N", "tokens of every prompt (default: all tokens)"),),
)
