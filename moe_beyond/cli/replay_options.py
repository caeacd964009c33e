"""The options that say what to replay, shared by ``evaluate`` and ``replay``."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from moe_beyond.errors import UserError
from moe_beyond.evaluation.strategies import strategies
from moe_beyond.geometry import budget_slots
from moe_beyond.lookahead import Lookahead, parse_lookahead
from moe_beyond.replay import ReplaySettings
from moe_beyond.traces.reader import TraceSet

DEFAULT_BUDGET = "10%"


def add_replay(options: ArgumentParser) -> None:
    """Add the options."""
    options.add_argument(
        "--budget",
        action="append",
        metavar="B",
        help=f"10%, 166 (slots), 2.9GB or 2.7GiB; repeat for more (default: {DEFAULT_BUDGET})",
    )
    options.add_argument("--policy", action="append", metavar="P", help="lru (default), lfu or belady; repeat for more")
    options.add_argument(
        "--prefetch",
        action="append",
        metavar="F",
        help="none, top6, or top6@2 (whole-token scores, two layers ahead); repeat for more; with scores top<K>",
    )
    options.add_argument(
        "--lookahead",
        action="append",
        metavar="H",
        help="which of the scores: token, 1, 2, ...; repeat for more",
    )
    options.add_argument("--scope", default="global", help="global (default) or per-layer: an even share a layer")
    options.add_argument(
        "--warmup-tokens", type=int, default=0, metavar="N", help="tokens of a sequence that do not count (default: 0)"
    )
    options.add_argument(
        "--no-first-layer-prefetch",
        action="store_true",
        help="do not prefetch the layers whose scores exist when the token starts",
    )
    options.add_argument(
        "--quantization", type=float, metavar="BITS", help="bits per parameter, for budgets in bytes; the traces' own"
    )


def asked_strategies(
    args: Namespace,
    traces: TraceSet,
    *,
    lookaheads: Sequence[Lookahead] = (),
    predictor: str | None = None,
    causal: bool = True,
    prefetches: Sequence[str] = ("none",),
    default_lookaheads: Sequence[Lookahead] = (),
) -> list[ReplaySettings]:
    """List what the options ask for.

    Args:
        args: The parsed options.
        traces: What will be replayed.
        lookaheads: That the scores have.
        predictor: What to call the scores.
        causal: Whether they ignore later tokens.
        prefetches: Where no ``--prefetch`` is given.
        default_lookaheads: Where no ``--lookahead`` is given.

    Raises:
        UserError: An option cannot be read, or asks for what is not there.
    """
    bits = traces.manifest.quantization_bits if args.quantization is None else args.quantization
    if bits <= 0:
        raise UserError(f"--quantization {bits:g}: bits per parameter must be more than 0")
    wanted = [parse_lookahead(text) for text in args.lookahead or ()]
    for lookahead in wanted:
        if lookahead not in lookaheads:
            known = f"has {', '.join(map(str, lookaheads))}" if lookaheads else "is not given (--predictor or --scores)"
            raise UserError(f"--lookahead {lookahead}: the predictor {known}")
    return strategies(
        [budget_slots(budget, traces.geometry, bits) for budget in args.budget or (DEFAULT_BUDGET,)],
        policies=args.policy or ("lru",),
        prefetches=args.prefetch or prefetches,
        lookaheads=wanted or default_lookaheads,
        predictor=predictor,
        causal=causal,
        scope=args.scope,
        warmup_tokens=args.warmup_tokens,
        first_layer_prefetch=not args.no_first_layer_prefetch,
    )


@contextmanager
def showing_progress(traces: TraceSet, split: str | None, what: str) -> Iterator[Callable[[int], None]]:
    """Show a bar over the tokens of a split, on standard error and only on a terminal.

    Yields:
        What to call with the tokens that were done.
    """
    total = sum(shard.tokens for shard in traces.shards(split))
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda tokens: bar.advance(task, tokens)
