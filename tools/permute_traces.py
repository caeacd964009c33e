"""Make a large trace set from a small one, by repeating it with permuted expert ids.

    python tools/permute_traces.py TRACES OUT --entries 66e6

Every repeat has its own permutation per layer. The repeats have the lengths, tokens and popularity skew of the
original but share no routing, so a benchmark on them is representative of a recording of that size.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.progress import track

from moe_beyond.traces.manifest import TOKENIZER_FILE
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import expert_ids, padding_id
from moe_beyond.traces.writer import open_writer


def permute(source: TraceSet, out: str, entries: float, seed: int) -> TraceSet:
    """Write at least ``entries`` entries to ``out``.

    Args:
        source: Trace set to repeat.
        out: Folder of the trace set to write.
        entries: Minimum number of (token, layer) entries.
        seed: Random seed of the permutations.
    """
    layers, experts, _ = source.geometry.shape()
    repeats = math.ceil(entries / (source.manifest.tokens * layers))
    random = np.random.default_rng(seed)
    manifest = replace(source.manifest, source=f"{source.manifest.source}, {repeats} times under permuted expert ids")
    vocabulary = Path(source.folder) / TOKENIZER_FILE if manifest.tokenizer.sha256 else None
    with open_writer(out, manifest, vocabulary=vocabulary) as writer:
        for number in track(range(repeats), description="repeating"):
            permuted = np.stack([np.append(random.permutation(experts), padding_id(np.int64)) for _ in range(layers)])
            for split in source.manifest.splits:
                for trace in source.traces(split):
                    chosen = permuted[np.arange(layers)[:, None], expert_ids(trace.experts, experts)]
                    name = f"{trace.sequence_id}.{number}"
                    writer.write(replace(trace, sequence_id=name, experts=chosen, gate_weights=None), split)
    return TraceSet(out)


def main() -> None:
    """Parse the options and write the trace set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", help="trace set to repeat")
    parser.add_argument("out", help="trace set to write")
    parser.add_argument("--entries", type=float, default=66e6, help="minimum number of entries (default: 66e6)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    args = parser.parse_args()
    made = permute(TraceSet(args.traces), args.out, args.entries, args.seed)
    print(f"{args.out}: {made.manifest.tokens * made.geometry.num_layers:,} entries")


if __name__ == "__main__":
    main()
