"""Decode speed of a model whose experts do not fit into the memory that they get.

    python tools/make_bench_model.py --data TRACE_SET --out DIR
    python tools/bench_run.py --model DIR --data TRACE_SET [--budget 10%] [--json FILE]

The routing is that of the trace set: a token's experts are the recorded ones, weighted by the model's own scores. Each
row runs in its own process and decodes sequences token by token. Rows take turns in every repeat; speeds and ratios
are medians over repeats.

- `accelerate` is transformers with experts on disk through accelerate, at equal memory. The budget holds the layer that
  runs and the experts of as many other layers as fit; everything besides experts is in memory. The files on disk leave
  the page cache before each token. A page cache as large as the budget would keep nothing until the next token either,
  because every token reads all layers in the same order.
- `POLICY` and `POLICY+PREFETCH` read experts into slots when they are needed, with direct I/O. The predictor gives
  scores if the policy or the prefetcher reads them. The cache stays warm across sequences.
- `resident` has slots for all experts, filled before the measurement.
- `unmodified` is the model in memory; together with `resident` it needs twice the memory of the experts.

With --overhead, runs with slots for all experts and the model in memory decode the same tokens in turns, in one
process. A model with narrow experts needs little memory, and shows the runtime's own time:

    python tools/make_bench_model.py --data TRACE_SET --hidden-size 64 --expert-width 32 --out SMALL
    python tools/bench_run.py --model SMALL --data TRACE_SET --overhead
"""

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_disk import describe_machine
from parts.bench_models import Loaded, Options, Text, load
from parts.bench_overhead import POLICIES, measure_overhead, show_overhead
from parts.forced_routing import forced_routing
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from moe_beyond.cache.counters import COUNTERS
from moe_beyond.collect.recorder import recording
from moe_beyond.errors import UserError
from moe_beyond.files import write_json
from moe_beyond.geometry import budget_slots, load_preset
from moe_beyond.runtime.options import READERS
from moe_beyond.traces.reader import TraceSet

PREDICTOR, PROFILE = "cross_layer.deepseek-v2-lite-puffin-small", "history.deepseek-v2-lite-puffin"
"""Predictor and usage profile by default."""
CONSOLE = Console(width=120)


@dataclass(frozen=True)
class Decoded:
    """Measurements of a text.

    Attributes:
        seconds: Time of each token in seconds.
        expert_seconds: Time of each call of an experts module in seconds.
        counts: Counts and sums over the tokens, as `counts` returns them.
    """

    seconds: list[float]
    expert_seconds: list[float]
    counts: dict[str, float]


@contextmanager
def timed_experts(model: PreTrainedModel) -> Iterator[list[float]]:
    """Yield a list that receives the time of each call of an experts module, in seconds."""
    found: list[float] = []
    began = 0.0

    def before(module: Any, args: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def after(module: Any, args: Any, output: Any) -> None:
        found.append(time.perf_counter() - began)

    modules = [module for name, module in model.named_modules() if name.endswith(".experts")]
    handles = [module.register_forward_pre_hook(before) for module in modules]
    handles += [module.register_forward_hook(after, prepend=True) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def start(row: str, options: Options, texts: list[Text]) -> Connection:
    """Start a row's process.

    Args:
        row: Row, as `load` reads it.
        options: Options of the run.
        texts: Texts of the warm-up.

    Returns:
        Connection from which the memory for experts arrives, and `Decoded` for each text that is sent. The process ends
        when the connection is closed.
    """
    context = multiprocessing.get_context("spawn")  # a forked process would share torch's threads
    ours, theirs = context.Pipe()
    context.Process(target=serve, args=(row, options, texts, theirs)).start()
    theirs.close()
    return ours


def serve(row: str, options: Options, texts: list[Text], connection: Connection) -> None:
    """Load a model, and decode the texts that arrive.

    Args:
        row: Row, as `load` reads it.
        options: Options of the run.
        texts: Texts of the warm-up.
        connection: Connection to the parent, as described for `start`.

    Raises:
        UserError: The model did not use the recorded experts in the warm-up.
    """
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with load(row, options) as loaded, forced_routing(loaded.model) as force, torch.inference_mode():
        with recording(loaded.model) as recorder:
            for text in texts:
                decode(loaded, force, text)
            experts, _ = recorder.pop_concatenated()
        if not np.array_equal(experts, np.concatenate([text.experts.numpy() for text in texts])):
            raise UserError("--model: uses other experts than the recorded ones; run tools/make_bench_model.py")
        connection.send(loaded.expert_bytes)
        with suppress(EOFError):
            while True:
                connection.send(decode(loaded, force, connection.recv()))


def decode(loaded: Loaded, force: Callable[[Tensor], None], text: Text) -> Decoded:
    """Decode a text token by token.

    Args:
        loaded: Model to measure.
        force: Function of `forced_routing`.
        text: Tokens and their routing.
    """
    cache, seconds, before = DynamicCache(config=loaded.model.config), [], counts(loaded)
    with timed_experts(loaded.model) as expert_seconds:
        for place, token_id in enumerate(text.token_ids):
            loaded.before_token()
            force(text.experts[place : place + 1])
            began = time.perf_counter()
            loaded.model(token_id[None, None], past_key_values=cache, use_cache=True)
            seconds.append(time.perf_counter() - began)
    return Decoded(seconds, expert_seconds, {name: count - before[name] for name, count in counts(loaded).items()})


def counts(loaded: Loaded) -> dict[str, float]:
    """Return counts and sums since the process began.

    Returns:
        Bytes that the process has read from disk, and for a run in slots: hits, late hits, misses, transfers, seconds
        by their use, and bytes by source.
    """
    found = {"read_bytes": float(Path("/proc/self/io").read_text().partition("read_bytes:")[2].split()[0])}
    if loaded.run is not None:
        telemetry = loaded.run.telemetry
        found |= dict(zip(COUNTERS, loaded.run.cache.state.counters.sum(axis=0).tolist(), strict=True))
        found |= {name: getattr(telemetry.decode, name) for name in ("cache_s", "predictor_s", "wait_s", "compute_s")}
        found |= {f"{name}_bytes": count for name, count in telemetry.sources._asdict().items()}
    return found


BEST = "belief+p>0.5"
"""Policy and prefetcher with the least stall on other text: see the rows of a replay, then those of this tool."""
ALL = ["accelerate", "lru", BEST, "resident"]
"""Rows of the table by default."""


def main() -> None:
    """Parse the options, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder that tools/make_bench_model.py wrote")
    parser.add_argument("--data", required=True, help="trace set with the routing")
    parser.add_argument("--split", help="split of the trace set (default: all)")
    parser.add_argument("--budget", default="10%", help="memory for experts: 10%%, 166 (slots), 0.7GB (default: 10%%)")
    parser.add_argument("--rows", nargs="+", default=ALL, help=f"rows to measure (default: {' '.join(ALL)})")
    parser.add_argument("--predictor", default=PREDICTOR, help=f"predictor (default: {PREDICTOR})")
    parser.add_argument("--profile", default=PROFILE, help=f"usage profile of belief (default: {PROFILE})")
    parser.add_argument("--readers", type=int, default=READERS, help=f"threads that read (default: {READERS})")
    parser.add_argument("--sequences", type=int, default=6, help="sequences per repeat (default: 6)")
    parser.add_argument("--tokens", type=int, help="tokens of each sequence (default: all)")
    parser.add_argument("--slow-tokens", type=int, default=4, help="tokens per repeat of accelerate (default: 4)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads that compute (default: 1)")
    parser.add_argument("--overhead", action="store_true", help="measure the time that slots add to a layer, instead")
    parser.add_argument("--policies", nargs="+", default=POLICIES, help="policies of --overhead (default: lru belief)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    geometry, traces = load_preset(str(args.model)).geometry, TraceSet(args.data)
    if geometry.shape() != traces.geometry.shape():
        raise SystemExit(f"{args.data}: has {traces.geometry.describe_shape()}; make a model from this trace set")
    options = Options(
        args.model.absolute(), geometry, budget_slots(args.budget, geometry), args.threads,
        args.predictor, args.profile, args.readers,
    )  # fmt: skip
    texts = [
        Text(
            torch.from_numpy(trace.token_ids.astype(np.int64)), torch.from_numpy(trace.experts.astype(np.int64))
        ).first(args.tokens)
        for trace in itertools.islice(traces.traces(args.split), args.sequences)
    ]
    settings = {"slots": options.slots, "threads": args.threads, "readers": args.readers, "traces": traces.describe()}
    if args.overhead:
        found = measure_overhead(options, texts, args.repeats, args.policies)
        show_overhead(found, CONSOLE)
        if args.json:
            write_json(args.json, {**settings, "overhead_us": found})
        return
    short = [texts[0].first(args.slow_tokens)]
    machine = describe_machine(options.model, options.expert_bytes)
    decoded: dict[str, list[list[Decoded]]] = {row: [] for row in args.rows}
    with ExitStack() as stack:
        warm_up = {row: texts if row == "resident" else short for row in args.rows}
        rows = {row: stack.enter_context(start(row, options, warm_up[row])) for row in args.rows}
        try:
            expert_bytes = {row: connection.recv() for row, connection in rows.items()}
            for _, (row, connection) in itertools.product(range(args.repeats), rows.items()):
                decoded[row].append([])
                for text in short if row == "accelerate" else texts:
                    connection.send(text)
                    decoded[row][-1].append(connection.recv())
        except EOFError as error:
            raise SystemExit("a row failed; its error is above") from error
    figures = {row: summary(repeats, expert_bytes[row]) for row, repeats in decoded.items()}
    show(figures, machine, options)
    if args.json:
        write_json(args.json, {"machine": machine, **settings, "rows": figures})


def summary(repeats: list[list[Decoded]], expert_bytes: int) -> dict[str, Any]:
    """Summarise the measurements of a row.

    Args:
        repeats: Measurements of each repeat.
        expert_bytes: Memory for experts in bytes.
    """
    seconds = [[second for decoded in repeat for second in decoded.seconds] for repeat in repeats]
    calls = [second for repeat in repeats for decoded in repeat for second in decoded.expert_seconds]
    tokens = sum(map(len, seconds))
    totals = [decoded.counts for repeat in repeats for decoded in repeat]
    return {
        "tokens": tokens,
        "tokens_per_second": [len(times) / sum(times) for times in seconds],
        "token_ms": 1e3 * statistics.median(itertools.chain(*seconds)),
        "experts_call_us": 1e6 * statistics.median(calls),
        "expert_bytes": expert_bytes,
        "per_token": {name: sum(counts[name] for counts in totals) / tokens for name in totals[0]},
    }


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "tokens/s": lambda row: f"{statistics.median(row['tokens_per_second']):.2f}",
    "ms per token": lambda row: f"{row['token_ms']:.1f}",
    "us per experts call": lambda row: f"{row['experts_call_us']:,.0f}",
    "MB read": lambda row: f"{row['per_token']['read_bytes'] / 1e6:,.1f}",
    "MB for experts": lambda row: f"{row['expert_bytes'] / 1e6:,.1f}",
}
"""Columns of all rows."""
RUN_COLUMNS: dict[str, Callable[[Mapping[str, float]], str]] = {
    "hits": lambda token: f"{token['hits']:.1f}",
    "late": lambda token: f"{token['late_hits']:.1f}",
    "misses": lambda token: f"{token['misses']:.1f}",
    "prefetched": lambda token: f"{token['prefetch_transfers']:.1f}",
    "stall ms": lambda token: f"{1e3 * token['wait_s']:.1f}",
    "compute ms": lambda token: f"{1e3 * token['compute_s']:.1f}",
    "cache ms": lambda token: f"{1e3 * token['cache_s']:.2f}",
    "predictor ms": lambda token: f"{1e3 * token['predictor_s']:.2f}",
    "MB disk": lambda token: f"{token['disk_bytes'] / 1e6:.1f}",
    "MB page cache": lambda token: f"{token['page_cache_bytes'] / 1e6:.1f}",
}
"""Columns of runs in slots, per token."""


def show(figures: Mapping[str, Mapping[str, Any]], machine: Mapping[str, Any], options: Options) -> None:
    """Print the machine and the tables.

    Args:
        figures: Row -> result of `summary`; ratios are those to the first row.
        machine: Result of `describe_machine`.
        options: Options of the run.
    """
    reads = ", ".join(f"{ms:.2f} ({readers} readers)" for readers, ms in machine["direct_read_ms"].items())
    CONSOLE.print(
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, "
        f"load {machine['load']:.1f}; {options.threads} threads compute, {options.readers} read; "
        f"read-ahead {machine['read_ahead_kb']} KB"
    )
    CONSOLE.print(f"{options.slots} slots of {options.expert_bytes / 1e6:.2f} MB; ms per direct read: {reads}")
    base = next(iter(figures.values()))["tokens_per_second"]
    speeds, runs = Table(title="speed"), Table(title="runs in slots, per token")
    for table, columns in ((speeds, ["ratio", *COLUMNS]), (runs, RUN_COLUMNS)):
        table.add_column("row")
        for column in columns:
            table.add_column(column, justify="right")
    for row, found in figures.items():
        ratio = statistics.median(map(float.__truediv__, found["tokens_per_second"], base))
        speeds.add_row(row, f"{ratio:.1f}", *(column(found) for column in COLUMNS.values()))
        if "hits" in found["per_token"]:
            runs.add_row(row, *(column(found["per_token"]) for column in RUN_COLUMNS.values()))
    CONSOLE.print(speeds)
    CONSOLE.print(runs)


if __name__ == "__main__":
    main()
