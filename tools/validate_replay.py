"""Times of runs next to their replays, for several budgets and strategies.

    python tools/validate_replay.py --model small-moe --tier host
    python tools/validate_replay.py --model DIR --data TRACE_SET --direct-io [--json FILE]

Every run decodes the same texts and records its telemetry. With --data, the routing is that of the trace set, on a
model of tools/make_bench_model.py; otherwise the model routes its own prompts. All events are replayed as they ran,
and the clock forecasts the times. A device is fitted on every other token of a run, and judged on the tokens between
them, because the speed of a shared machine drifts within a run. Repeats take turns, and errors are medians over
repeats. A strategy is POLICY or POLICY+PREFETCH.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts.bench_models import Text
from parts.forced_routing import forced_routing
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache
from transformers.utils import logging

from moe_beyond.cache.prefetchers import parse_prefetch
from moe_beyond.collect.load import open_checkpoint
from moe_beyond.collect.prompts import Prompt
from moe_beyond.files import write_json
from moe_beyond.runtime import OffloadedRun, load_offloaded
from moe_beyond.runtime.generation import Generation, Sampling
from moe_beyond.runtime.options import READERS, TIERS
from moe_beyond.runtime.records.as_run import replay_as_run
from moe_beyond.runtime.records.recording import read_recording, write_recording
from moe_beyond.simulator.settings import reads_scores
from moe_beyond.traces.reader import TraceSet
from moe_beyond.validation.comparison import Pair
from moe_beyond.validation.fit import fit_device, halves
from moe_beyond.validation.forecast import forecast
from moe_beyond.validation.measured import LINK, Ints, Measured
from moe_beyond.validation.measured_run import measured_run

PREDICTOR_NAME, PROFILE_NAME = "cross_layer.deepseek-v2-lite-puffin-small", "history.deepseek-v2-lite-puffin"
BUDGETS = ["10%", "20%", "30%", "50%", "75%"]
STRATEGIES = ["lru", "belief", "belief+p>0.5", "belief+top2"]
CONSOLE = Console(width=140)


@dataclass(frozen=True)
class Row:
    """One run of a strategy at a budget.

    Attributes:
        measured: Measurements of the run.
        events: Number of events.
        equal: Number of events that the replay as the run repeats.
    """

    measured: Measured
    events: int
    equal: int


def decode(run: OffloadedRun, texts: Sequence[Text], *, forced: bool) -> None:
    """Decode texts token by token.

    Args:
        run: Run with telemetry, within its block.
        texts: Tokens and their routing.
        forced: Whether the model uses the routing of the texts, instead of its own.
    """
    with ExitStack() as stack, torch.inference_mode():
        force = stack.enter_context(forced_routing(run.model)) if forced else None
        for text in texts:
            cache = DynamicCache(config=run.model.config)
            for place, token_id in enumerate(text.token_ids):
                if force is not None:
                    force(text.experts[place : place + 1])
                run.model(token_id[None, None], past_key_values=cache, use_cache=True)


def record(args: argparse.Namespace, texts: Sequence[Text], budget: str, strategy: str, folder: Path) -> Row:
    """Run a strategy, write its recording into a folder unless it is there, and read its measurements."""
    if not (folder / "run.json").is_file():
        run_strategy(args, texts, budget, strategy, folder)
    recording = read_recording(folder)
    named = {role: getattr(args, role) for role in recording.fingerprints}  # a recording knows only a folder's name
    recording = replace(recording, options=replace(recording.options, **named))
    as_run = replay_as_run(recording)
    return Row(measured_run(recording), as_run.events, as_run.equal)


def run_strategy(args: argparse.Namespace, texts: Sequence[Text], budget: str, strategy: str, folder: Path) -> None:
    """Run a strategy and write its recording into a folder."""
    policy, _, prefetch = strategy.partition("+")
    scores = reads_scores(policy) or parse_prefetch(prefetch or "none").prefetcher.reads_scores
    run = load_offloaded(
        args.model, budget=budget, policy=policy, prefetch=prefetch or "none", device="cpu", tier=args.tier,
        predictor=args.predictor if scores else None,
        profile=args.profile if policy == "belief" and args.profile != "none" else None,
        direct_io=args.direct_io, readers=args.readers, keep_rows=True,
    )  # fmt: skip
    with run:
        decode(run, texts, forced=args.data is not None)
    generations = [
        Generation(Prompt("", str(number), "tools/validate_replay.py"), [], [], "") for number in range(len(texts))
    ]
    write_recording(run, folder, generations, Sampling(), str(args.data or args.model), {})


def in_turn(measured: Measured) -> tuple[Ints, Ints]:
    """Return every other generated token, to fit on, and those between them, to judge."""
    tokens = np.concatenate(halves(measured))
    return tokens[::2], tokens[1::2]


def errors(measured: Measured) -> dict[str, float]:
    """Fit a device, and return the figures of a run's judged tokens, recorded and forecast."""
    fitted, judged = in_turn(measured)
    fit = fit_device(measured, fitted)
    found = forecast(measured, fit.device, fit.upkeep)
    speed = Pair(1 / float(measured.seconds[judged].mean()), 1 / float(found.seconds[judged].mean()))
    stall = Pair(*(1e3 * float(each.parts[LINK][judged].mean()) for each in (measured, found)))
    return {
        "hits": int(measured.counts[:, :, 0].sum()), "hits_forecast": int(found.counts[:, :, 0].sum()),
        "recorded": speed.recorded, "forecast": speed.replayed, "error": speed.error or 0.0,
        "stall_recorded": stall.recorded, "stall_forecast": stall.replayed, "stall_error": stall.error or 0.0,
    }  # fmt: skip


def summary(rows: Mapping[tuple[str, str], Sequence[Row]]) -> list[dict[str, Any]]:
    """Return the figures of all strategies, medians over repeats."""
    figures = []
    for (strategy, budget), found in rows.items():
        each = [errors(row.measured) for row in found]
        counts = {"events": sum(row.events for row in found), "equal_events": sum(row.equal for row in found)}
        medians = {name: statistics.median(figure[name] for figure in each) for name in each[0]}
        figures.append({"strategy": strategy, "budget": budget, **counts, **medians})
    return figures


def show(figures: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of `summary`."""
    table = Table(title="every second token of each run, medians over repeats")
    for name in ("strategy", "budget", "events equal", "hits", "in the clock", "tokens/s", "forecast", "error",
                 "stall ms", "forecast", "error"):  # fmt: skip
        table.add_column(name, justify="left" if name == "strategy" else "right")
    for row in figures:
        table.add_row(
            row["strategy"], row["budget"], f"{row['equal_events']:,}/{row['events']:,}", f"{row['hits']:,.0f}",
            f"{row['hits_forecast']:,.0f}", f"{row['recorded']:.2f}", f"{row['forecast']:.2f}", f"{row['error']:+.1%}",
            f"{row['stall_recorded']:.2f}", f"{row['stall_forecast']:.2f}", f"{row['stall_error']:+.1%}",
        )  # fmt: skip
    CONSOLE.print(table)
    for name, error, limit in (("tokens/s", "error", 0.05), ("stall", "stall_error", 0.1)):
        within = sum(abs(row[error]) <= limit for row in figures)
        CONSOLE.print(f"{name} within {limit:.0%}: {within} of {len(figures)} rows", highlight=False)


def texts_of(args: argparse.Namespace) -> list[Text]:
    """Return the texts that every run decodes."""
    if args.data is not None:
        return [
            Text(
                torch.from_numpy(trace.token_ids.astype(np.int64)), torch.from_numpy(trace.experts.astype(np.int64))
            ).first(args.tokens)
            for trace in itertools.islice(TraceSet(args.data).traces(), args.sequences)
        ]
    checkpoint = open_checkpoint(args.model)
    lines = (checkpoint.folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[: args.sequences]
    ids = (checkpoint.tokenizer(json.loads(line)["text"])["input_ids"][: args.tokens] for line in lines)
    return [Text(torch.tensor(each), torch.zeros(0)) for each in ids]


def main() -> None:
    """Parse the options, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="small-moe, or a folder that tools/make_bench_model.py wrote")
    parser.add_argument("--data", help="trace set with the routing (default: the model routes its own prompts)")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, help="budgets (default: 10%%, 20%%, 30%%, 50%%, 75%%)")
    parser.add_argument(
        "--strategies", nargs="+", default=STRATEGIES, help=f"strategies (default: {' '.join(STRATEGIES)})"
    )
    parser.add_argument("--predictor", default=PREDICTOR_NAME, help=f"predictor (default: {PREDICTOR_NAME})")
    parser.add_argument(
        "--profile", default=PROFILE_NAME, help=f"usage profile of belief, or none (default: {PROFILE_NAME})"
    )
    parser.add_argument("--tier", default="disk", choices=TIERS, help="place of experts without a slot (default: disk)")
    parser.add_argument("--direct-io", action="store_true", help="bypass the page cache")
    parser.add_argument("--readers", type=int, default=READERS, help=f"threads that read (default: {READERS})")
    parser.add_argument("--sequences", type=int, default=4, help="texts (default: 4)")
    parser.add_argument("--tokens", type=int, default=16, help="most tokens of each text (default: 16)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads that compute (default: 1)")
    parser.add_argument(
        "--recordings", type=Path, help="folder of recordings; those that exist are read (default: temporary)"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    texts = texts_of(args)
    rows: dict[tuple[str, str], list[Row]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        parent = args.recordings or Path(temporary)
        for number, strategy, budget in itertools.product(range(args.repeats), args.strategies, args.budgets):
            folder = parent / f"{strategy}-{budget}-{number}"
            rows.setdefault((strategy, budget), []).append(record(args, texts, budget, strategy, folder))
    figures = summary(rows)
    show(figures)
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    main()
