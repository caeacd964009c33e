"""``routed_experts`` as vLLM returns it: an int16 array ``[tokens, MoE layers, top-k]`` a sequence, by its name.

Beside ``NAME`` lie its ``NAME.tokens``, where the set has token ids, and its ``NAME.decode_start``, so that an import
gives the same set.
"""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError
from moe_beyond.files import creating, replacing_folder
from moe_beyond.traces.formats._checks import check_no_padding
from moe_beyond.traces.formats._sidecars import DECODE_START, TOKENS
from moe_beyond.traces.reader import TraceSet

Arrays = Iterator[tuple[str, npt.NDArray[Any]]]


def export_vllm(traces: TraceSet, out: str | Path, split: str | None = None) -> None:
    """Write a trace set as arrays: an ``.npz`` of all of them, or a folder with a ``.npy`` each.

    Args:
        traces: The trace set.
        out: The ``.npz`` to make; without that ending, the folder.
        split: One split, or all.

    Raises:
        UserError: There is no such split, ``out`` is there already, or a sequence's name cannot be a file's.
    """
    traces.shards(split)
    if Path(out).suffix == ".npz":
        with creating(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for name, array in _arrays(traces, split, _cannot_be_a_key):
                member = zipfile.ZipInfo(f"{name}.npy")  # with a fixed date: the same set gives the same bytes
                member.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(member, "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
        return
    with replacing_folder(out) as folder:
        for name, array in _arrays(traces, split, _cannot_be_a_file):
            np.save(folder / f"{name}.npy", array, allow_pickle=False)


def _arrays(traces: TraceSet, split: str | None, cannot_be: Callable[[str], bool]) -> Arrays:
    for trace in traces.traces(split):
        name = trace.sequence_id
        if cannot_be(name):
            raise UserError(f"{traces.folder}: sequence {name!r} cannot name an array; export to an .npz, or rename it")
        check_no_padding(trace, traces)
        yield name, trace.experts.astype(np.int16)
        if traces.manifest.has_token_ids:
            yield name + TOKENS, trace.token_ids
        yield name + DECODE_START, np.array(trace.decode_start)


def _cannot_be_a_key(name: str) -> bool:
    return not name or name.endswith((TOKENS, DECODE_START))


def _cannot_be_a_file(name: str) -> bool:
    return _cannot_be_a_key(name) or name.startswith(".") or bool({"/", "\\", "\0"} & set(name))
