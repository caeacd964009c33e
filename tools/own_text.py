"""Compare text that a model generates with text that it reads: routing, caching and prediction.

    python tools/own_text.py [--prompt-tokens 16] [--tokens 112] [--temperature T] [--out DIR] [--json FILE]
    python tools/own_text.py --demo DIR [--temperature T]
    python tools/own_text.py --read TRACES --written TRACES [--predictor NAME] [--json FILE]

Without trace sets, the tool records the small model on texts that people wrote and that it never saw. First the model
reads them; then it reads only their first tokens and generates the same number of tokens, greedily or by sampling.
Both stay within its training length. Your own trace sets are `moe-beyond collect` without and with `--generate`.

Generated text counts from `decode_start` on, and read text from `--prompt-tokens` on. Sequences of one name are cut to
the shorter length. A cache starts empty and also sees the tokens before. Figures are pooled over tokens. Intervals of
95 % are a bootstrap over sequences; a difference uses the same sequences of both sets if all names agree. Greedy text
repeats itself, so the first row is the share of runs of four tokens that occurred in their sequence before.
"""

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from moe_beyond.collect.collection import collect
from moe_beyond.collect.config import CollectConfig, ProcessRank
from moe_beyond.collect.load import load_model
from moe_beyond.collect.prompts import read_prompts
from moe_beyond.evaluation.sources import ScoreSource, from_predictor_folder, pretrained_source
from moe_beyond.files import write_json
from moe_beyond.geometry import Geometry, budget_slots
from moe_beyond.metrics.routing import RoutingMetrics
from moe_beyond.predictors.batch import collate
from moe_beyond.pretrained import find_predictor, shipped_folder
from moe_beyond.quickstart import bundled_prompts
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.replay import Replay
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import padding_id
from moe_beyond.traces.trace import Trace

SMALL = shipped_folder("small-moe")
POLICIES = ("lru", "belady")
RUN = 4
RESAMPLES = 2000

BUDGETS = ("10%", "25%")

Counts = npt.NDArray[np.float64]
"""Array of shape ``(sequences, 2)``: count, and total."""


@dataclass(frozen=True)
class Side:
    """Names of a trace set's sequences, the number of counted tokens, and the counts of each figure."""

    names: list[str]
    tokens: int
    counts: dict[str, Counts]


def main() -> None:
    """Parse the options, record missing trace sets, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", help="trace set of text that the model read")
    parser.add_argument("--written", help="trace set of text that the model generated")
    parser.add_argument("--predictor", help="predictor folder or name (default: with --read, the pretrained one)")
    parser.add_argument(
        "--prompts",
        default=str(SMALL / "prompts.jsonl"),
        help="prompts, as for moe-beyond collect (default: those of small-moe)",
    )
    parser.add_argument(
        "--demo", type=Path, help="folder of `make demo`; uses its predictor on the texts held out from it"
    )
    parser.add_argument("--prompt-tokens", type=int, default=16, help="tokens per prompt (default: 16)")
    parser.add_argument("--tokens", type=int, default=112, help="tokens after each prompt (default: 112)")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature (default: 0, greedy)")
    parser.add_argument("--budget", action="append", help="cache budget; repeat for more (default: 10%% and 25%%)")
    parser.add_argument("--out", type=Path, help="folder in which the recorded trace sets are kept")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    if args.demo is not None:
        args.predictor = str(args.demo / "predictor")
    if (args.read is None) != (args.written is None):
        raise SystemExit("--read and --written: give both or none")
    with ExitStack() as stack:
        if args.read is None:
            out = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            read, written = make(out, args)
        else:
            read, written = TraceSet(args.read), TraceSet(args.written)
        show(compare(read, written, args), args)


def make(out: Path, args: argparse.Namespace) -> tuple[TraceSet, TraceSet]:
    """Record the small model while it reads texts and while it continues their beginnings."""
    model, tokenizer, _ = load_model(str(SMALL), dtype="float32")
    given, prompt_tokens, tokens = list(read_prompts(args.prompts)), args.prompt_tokens, args.tokens
    if args.demo is not None:
        given = [prompt for prompt in bundled_prompts() if prompt.split == "validation"]
    made = []
    for name, config in (
        ("read", CollectConfig(max_tokens=prompt_tokens + tokens)),
        # The last generated token is not read.
        ("written", CollectConfig(tokens + 1, args.temperature, max_tokens=prompt_tokens)),
    ):
        source = "excerpts that the model never saw" if name == "read" else f"their first {prompt_tokens} tokens"
        traces = collect(
            model, tokenizer, given, out / name, config, name="small-moe", source=source, rank=ProcessRank(0, 1)
        )
        assert traces is not None
        made.append(traces)
    return made[0], made[1]


def compare(read: TraceSet, written: TraceSet, args: argparse.Namespace) -> dict[str, Any]:
    """Count per sequence and pool the counts."""
    if (read.geometry.shape(), read.manifest.model_id) != (written.geometry.shape(), written.manifest.model_id):
        raise SystemExit(f"{read.folder} and {written.folder} record different models; give two sets of one model")
    lengths = [{trace.sequence_id: len(trace) for trace in traces.traces()} for traces in (read, written)]
    shorter = {name: min(lengths[0][name], lengths[1][name]) for name in lengths[0].keys() & lengths[1].keys()}
    if args.predictor:
        source = from_predictor_folder(find_predictor(args.predictor))
    elif args.read is not None:  # the bundled prompts are training text of the pretrained predictor of small-moe
        source = pretrained_source("cross_layer", read)
    else:
        source = None
    sides = [count(traces, shorter, args, source) for traces in (read, written)]
    paired = sides[0].names == sides[1].names
    return {
        "sequences": [len(side.names) for side in sides],
        "tokens": [side.tokens for side in sides],
        "paired": paired,
        "predictor": source.name if source else None,
        "figures": {
            title: bootstrap(sides[0].counts[title], sides[1].counts[title], paired) for title in sides[0].counts
        },
    }


def count(traces: TraceSet, shorter: dict[str, int], args: argparse.Namespace, source: ScoreSource | None) -> Side:
    """Return the counts of every sequence of a trace set."""
    scored = source.sequences(traces, None, True) if source else ((trace, None) for trace in traces.traces())
    names, tokens, rows = [], 0, []
    for trace, scores in scored:
        first = trace.decode_start if trace.decode_start < len(trace) else args.prompt_tokens
        end = shorter.get(trace.sequence_id, len(trace))
        if first < end:
            names.append(trace.sequence_id)
            tokens += end - first
            row = {"repeated 4-grams": repeated(trace.token_ids[:end], first)}
            row |= {"token-to-token reuse": reused(trace.experts[first - 1 : end])}
            row |= cached(trace.experts[:end], first, traces.geometry, args.budget or BUDGETS)
            if source is not None:
                row |= recalled(trace, scores, first, end, source, traces.geometry)
            rows.append(row)
    if not rows:
        raise SystemExit(f"{traces.folder}: no sequence has tokens to count; lower --prompt-tokens")
    return Side(names, tokens, {title: np.array([row[title] for row in rows], np.float64) for title in rows[0]})


def repeated(token_ids: npt.NDArray[np.int32], first: int) -> tuple[int, int]:
    """Count the runs of four tokens that occurred before, and all runs, that end at or after a token."""
    seen: set[tuple[int, ...]] = set()
    found = 0
    for end in range(RUN, len(token_ids) + 1):
        run = tuple(token_ids[end - RUN : end].tolist())
        found += end > first and run in seen
        seen.add(run)
    return found, max(0, len(token_ids) - max(first, RUN - 1))


def reused(experts: npt.NDArray[np.integer[Any]]) -> tuple[int, int]:
    """Count the experts that the previous token used in the same layer, and all experts, after the first token."""
    now, before = experts[1:], experts[:-1]
    there = now != padding_id(now.dtype)
    again = (now[..., :, None] == before[..., None, :]).any(-1) & there
    return int(again.sum()), int(there.sum())


def cached(
    experts: npt.NDArray[np.integer[Any]], first: int, geometry: Geometry, budgets: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Count hits and accesses from a token on, of a cache that starts empty."""
    found = {}
    for budget, policy in itertools.product(budgets, POLICIES):
        replay = Replay(geometry, ReplaySettings(budget_slots(budget, geometry), policy, warmup_tokens=first))
        replay.add(experts)
        result = replay.result()
        found[f"{policy} hits at {budget}"] = (result.hits, result.accesses)
    return found


def recalled(
    trace: Trace, scores: npt.NDArray[np.float32], first: int, end: int, source: ScoreSource, geometry: Geometry
) -> dict[str, tuple[int, int]]:
    """Count the selected experts among the K best scores, and all, from a token on, by lookahead."""
    metrics = RoutingMetrics(len(source.lookaheads), *geometry.shape())
    chosen = collate([trace]).targets(geometry.num_experts)[:, first:end]
    metrics.update(torch.from_numpy(scores[first:end])[None], chosen, torch.ones(1, end - first, dtype=torch.bool))
    found, named = metrics.true_positives.sum(1).tolist(), metrics.selected.sum((1, 2)).tolist()
    return {
        f"recall@{geometry.top_k}, lookahead {lookahead}": (found[place], named[place])
        for place, lookahead in enumerate(source.lookaheads)
        if lookahead != "next"
    }


def bootstrap(read: Counts, written: Counts, paired: bool) -> dict[str, list[float]]:
    """Return both shares and their difference, each with its interval."""
    chance = np.random.default_rng(0)
    picks = [chance.integers(len(counts), size=(RESAMPLES, len(counts))) for counts in (read, written)]
    if paired:
        picks[1] = picks[0]
    drawn = [share(counts[pick].sum(1)) for counts, pick in zip((read, written), picks, strict=True)]
    pooled = [share(counts.sum(0)) for counts in (read, written)]
    found = {"read": (pooled[0], drawn[0]), "written": (pooled[1], drawn[1])}
    found["difference"] = (pooled[1] - pooled[0], drawn[1] - drawn[0])
    return {
        name: [float(value), *np.nanquantile(draws, (0.025, 0.975)).tolist()] for name, (value, draws) in found.items()
    }


def share(counts: Counts) -> npt.NDArray[np.float64]:
    """Return count over total: ``(..., 2)`` -> ``(...)``."""
    return counts[..., 0] / np.maximum(counts[..., 1], 1)


def show(found: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the table and write the JSON."""
    sizes = [f"{n:,} tokens, {m} sequences" for n, m in zip(found["tokens"], found["sequences"], strict=True)]
    without = "" if found["predictor"] else "; no predictor was given"
    table = Table(
        title="text that a model reads, and text that it generates",
        caption="in %, with intervals of 95 % (bootstrap over sequences); without prefetching a cache transfers "
        f"1 - hits of the demanded bytes{without}",
    )
    table.add_column("")
    for name, more in (("read", sizes[0]), ("written", sizes[1]), ("difference", "")):
        table.add_column(f"{name}\n{more}", justify="right")
    for title, row in found["figures"].items():
        cells = []
        for name, (value, low, high) in row.items():
            sign = "+" if name == "difference" else ""
            cells.append(f"{100 * value:{sign}.1f} ({100 * low:{sign}.1f} .. {100 * high:{sign}.1f})")
        table.add_row(title, *cells)
    Console(width=120).print(table)
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
