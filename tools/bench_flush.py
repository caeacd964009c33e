"""Cost of flushing files to the disk before they are renamed: `python tools/bench_flush.py [--folder DIR]`.

Each target is written several times with and without its flush, in turn. Figures are medians in milliseconds, of the
disk that holds the folder.
"""

import argparse
import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from moe_beyond.collect.resume import write_part
from moe_beyond.files import write_json
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.io.folder import save_predictor
from moe_beyond.predictors.registry import create
from moe_beyond.tasks.checkpoint_io import WholeCheckpointIO
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer

GEOMETRY = Geometry("DeepSeek-V2-Lite", tuple(range(1, 27)), 64, 6, params_per_expert=8650752, other_params_per_layer=1)
VOCAB = 102400
CHECKPOINT_VALUES = 12_500_000
"""Values of a checkpoint of 50 MB, as cross_layer's with its optimiser."""
TRAINING = {"fingerprint": "0", "split": "train", "source": "tools", "tokenizer": {"name": "tools", "sha256": None}}


def traces(count: int) -> list[Trace]:
    """Make random traces of 500 tokens each."""
    chance, layers, experts, top_k = np.random.default_rng(0), *GEOMETRY.shape()
    first = chance.integers(0, experts, (count, 500, layers, 1))
    ids = ((first + 7 * np.arange(top_k)) % experts).astype(np.uint8)
    tokens = chance.integers(0, VOCAB, (count, 500)).astype(np.int32)
    return [Trace(str(number), "tools", tokens[number], ids[number], 500) for number in range(count)]


def targets() -> dict[str, Callable[[Path], Any]]:
    """Return a function for each kind of target that writes it at a path."""
    part, many = traces(4), traces(80)
    checkpoint = {"state_dict": {"weight": torch.randn(CHECKPOINT_VALUES)}}
    predictor = create("token_table", GEOMETRY, VOCAB)
    manifest = Manifest(GEOMETRY, Tokenizer("tools", VOCAB), "tools", 16.0, "dataset", "tools", "0")

    def trace_set(path: Path) -> None:
        with open_writer(path, manifest, shard_tokens=8192) as writer:
            for trace in many:
                writer.write(trace)

    return {
        "a JSON file": lambda path: write_json(path, {}),
        "a part file of 52,000 entries": lambda path: write_part(path, part, GEOMETRY),
        "a trace set of 1,040,000 entries, 5 shards": trace_set,
        "a checkpoint of 50 MB": lambda path: WholeCheckpointIO().save_checkpoint(checkpoint, path),
        "a predictor folder": lambda path: save_predictor(predictor, path, TRAINING),
    }


def main() -> None:
    """Parse the options, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure (default: that of temporary files)")
    parser.add_argument("--repeats", type=int, default=9, help="repeats of each (default: 9)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    fsync, figures = os.fsync, dict[str, dict[str, float]]()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        for title, write in targets().items():
            spans: dict[bool, list[float]] = {True: [], False: []}
            for number, flushes in itertools.product(range(args.repeats), (True, False)):
                path = Path(name) / f"{number}-{flushes}"
                os.fsync = fsync if flushes else lambda _: None  # type: ignore[assignment]
                began = time.perf_counter()
                write(path)
                spans[flushes].append(1000 * (time.perf_counter() - began))
                size = sum(each.stat().st_size for each in (path, *path.rglob("*")) if each.is_file())
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            with_flush, without = (statistics.median(spans[flushes]) for flushes in (True, False))
            figures[title] = {"megabytes": size / 1e6, "ms": with_flush, "ms_without_flush": without}
    os.fsync = fsync
    table = Table(title="time to write, in ms")
    for head in ("target", "MB", "flushed", "not flushed", "flush costs"):
        table.add_column(head, justify="left" if head == "target" else "right")
    for title, row in figures.items():
        one, other = row["ms"], row["ms_without_flush"]
        table.add_row(title, f"{row['megabytes']:.2f}", f"{one:.1f}", f"{other:.1f}", f"{one - other:.1f}")
    Console(width=120).print(table)
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    main()
