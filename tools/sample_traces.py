"""Sample a trace set of any size that routes like recorded conversations.

    python tools/sample_traces.py TRACES OUT --entries 66e6 [--seed 0] [--compare]

A block bootstrap: every new conversation is a sequence of spans of recorded ones, so popularity, dependence of layers
and reuse inside a span are real. Spans have geometric lengths (mean --span tokens) and come from random conversations
of the same split. A conversation keeps the length of a random recorded one. At a cut the routing changes its topic.

A share of the tokens (--swap) then takes the routing of another occurrence of its token id, so that no conversation
repeats another. Ids and routing stay those that the model used together.

--compare prints statistics of both sets: skew, reuse, reuse distance, and hit rates of LRU and Belady at 10 %.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moe_beyond.evaluation.options import ReplayOptions
from moe_beyond.evaluation.run import run_replay
from moe_beyond.traces.analysis.statistics import summarize
from moe_beyond.traces.manifest import TOKENIZER_FILE
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer


class Recorded:
    """All tokens of a split in memory, to draw from.

    Args:
        traces: Trace set to draw from.
        split: Name of the split.
    """

    def __init__(self, traces: TraceSet, split: str) -> None:
        found = list(traces.traces(split))
        self.token_ids = np.concatenate([trace.token_ids for trace in found])
        self.experts = np.concatenate([trace.experts for trace in found])
        self.lengths = np.array([len(trace) for trace in found])
        self.prompts = np.array([trace.decode_start for trace in found])
        self.starts = np.cumsum(self.lengths) - self.lengths
        self._by_id = np.argsort(self.token_ids, kind="stable")  # positions, token id by token id
        self._first = np.searchsorted(self.token_ids[self._by_id], self.token_ids)
        self._count = np.searchsorted(self.token_ids[self._by_id], self.token_ids, side="right") - self._first

    def conversation(self, rng: np.random.Generator, span: float, swap: float) -> tuple[np.ndarray, int]:
        """Draw a conversation.

        Args:
            rng: Source of randomness.
            span: Mean number of tokens of a span.
            swap: Share of tokens that take the routing of another occurrence of their id.

        Returns:
            Position of each token's routing in the recording, ``(T,)``, and the length of the prompt.
        """
        chosen = rng.integers(len(self.lengths))
        length, parts, drawn = int(self.lengths[chosen]), [], 0
        while drawn < length:
            row = rng.choice(len(self.lengths), p=self.lengths / self.lengths.sum())
            begin = int(rng.integers(self.lengths[row]))
            size = min(int(rng.geometric(1 / span)), int(self.lengths[row]) - begin, length - drawn)
            parts.append(self.starts[row] + np.arange(begin, begin + size))
            drawn += size
        positions = np.concatenate(parts)
        moved = rng.random(length) < swap
        offsets = (rng.random(length) * self._count[positions]).astype(np.int64)
        others = self._by_id[self._first[positions] + offsets]
        return np.where(moved, others, positions), int(self.prompts[chosen])


def sample(source: TraceSet, out: str, entries: float, seed: int, span: float = 256, swap: float = 0.05) -> TraceSet:
    """Write at least ``entries`` entries, in the splits of the source and in their proportion.

    Args:
        source: Trace set to draw from.
        out: Folder of the trace set to write.
        entries: Minimum number of (token, layer) entries.
        seed: Seed of the sample.
        span: Mean number of tokens of a span (default: 256).
        swap: Share of tokens that take the routing of another occurrence of their id (default: 0.05).
    """
    layers, manifest = source.geometry.num_layers, source.manifest
    manifest = replace(manifest, source=f"{manifest.source}, sampled with seed {seed}", engine_log_sha256=None)
    manifest = replace(manifest, hidden_size=None, states=None, routers_sha256=None, shards=())
    vocabulary = Path(source.folder) / TOKENIZER_FILE if manifest.tokenizer.sha256 else None
    share = {split: counts["tokens"] / source.manifest.tokens for split, counts in source.manifest.counts().items()}
    with open_writer(out, manifest, vocabulary=vocabulary) as writer:
        for number, split in enumerate(source.manifest.splits):
            rng = np.random.default_rng((seed, number))
            for trace in track(
                _conversations(Recorded(source, split), rng, entries / layers * share[split], span, swap, split),
                description=f"sampling {split}",
            ):
                writer.write(trace, split)
    return TraceSet(out)


def _conversations(
    recorded: Recorded, rng: np.random.Generator, tokens: float, span: float, swap: float, split: str
) -> Iterator[Trace]:
    drawn = number = 0
    while drawn < tokens:
        positions, prompt = recorded.conversation(rng, span, swap)
        yield Trace(f"{split}-{number}", "sampled", recorded.token_ids[positions], recorded.experts[positions], prompt)
        drawn, number = drawn + len(positions), number + 1


def statistics(traces: TraceSet, budget: str = "10%") -> dict[str, float]:
    """Return figures of skew, reuse and caching.

    Args:
        traces: Trace set to describe.
        budget: Memory of the replays (default: 10%).
    """
    summary = summarize(traces)
    layers = summary.by_layer
    outcome = run_replay(ReplayOptions(budget=[budget], policy=["lru"]), traces, split="all")
    rates = {result.strategy: result.hit_rate for result in outcome.results}
    median = [layer.reuse_distance.percentiles for layer in layers]
    return {
        "tokens": summary.tokens,
        "share of the busiest expert": float(np.mean([layer.busiest_share for layer in layers])),
        "normalised entropy": float(np.mean([layer.normalized_entropy for layer in layers])),
        "reuse by the next token": float(summary.token_to_token_reuse or 0),
        "median reuse distance": float(np.mean([row[50] or 0 for row in median])),
        "90th percentile of the reuse distance": float(np.mean([row[90] or 0 for row in median])),
        "dependence of neighbouring layers": float(
            np.mean([layer.next_layer.dependence for layer in layers if layer.next_layer is not None])
        ),
        f"LRU hit rate at {budget}": rates["lru"],
        f"Belady hit rate at {budget}": rates["belady"],
    }


def main() -> None:
    """Parse the options, write the trace set, and compare it on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", help="trace set to draw from")
    parser.add_argument("out", help="trace set to write")
    parser.add_argument("--entries", type=float, default=66e6, help="minimum number of entries (default: 66e6)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    parser.add_argument("--span", type=float, default=256, help="mean number of tokens of a span (default: 256)")
    parser.add_argument("--swap", type=float, default=0.05, help="share of tokens with other routing (default: 0.05)")
    parser.add_argument("--compare", action="store_true", help="print statistics of both sets")
    parser.add_argument("--json", help="file for the figures (default: none)")
    args = parser.parse_args()
    source = TraceSet(args.traces)
    made = sample(source, args.out, args.entries, args.seed, args.span, args.swap)
    figures = {"entries": made.manifest.tokens * made.geometry.num_layers}
    print(f"{args.out}: {figures['entries']:,} entries")
    if args.compare:
        figures |= {"recorded": statistics(source), "sampled": statistics(made)}
        table = Table("figure", "recorded", "sampled", title="recorded and sampled routing")
        for name, value in figures["recorded"].items():
            table.add_row(name, f"{value:,.4g}", f"{figures['sampled'][name]:,.4g}")
        Console().print(table)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
