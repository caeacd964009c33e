"""The options that say what to replay, shared by ``evaluate``, ``replay`` and ``plan``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields

from jsonargparse import ArgumentParser, Namespace

from moe_beyond.cli.options import progress_bar
from moe_beyond.errors import UserError
from moe_beyond.evaluation.checkpoints import find_source
from moe_beyond.evaluation.options import DEFAULT_BUDGET, Request
from moe_beyond.evaluation.sources import ScoreSource, from_scores_folder
from moe_beyond.evaluation.systems import SYSTEMS
from moe_beyond.traces.reader import TraceSet


def add_budgets(parser: ArgumentParser) -> None:
    """Add ``--budget``."""
    parser.add_argument(
        "--budget",
        action="append",
        metavar="B",
        help=f"10%, 166 (slots), 2.9GB or 2.7GiB; repeat for more (default: {DEFAULT_BUDGET})",
    )


def add_strategies(parser: ArgumentParser) -> None:
    """Add ``--strategy``, and what it does without: policies, prefetchers, and the scores that they use."""
    parser.add_argument(
        "--strategy",
        action="append",
        metavar="S",
        help=f"a named system instead of --policy and --prefetch: {', '.join(SYSTEMS)}, or all; repeat for more",
    )
    add_combinations(parser)
    parser.add_argument(
        "--predictor",
        metavar="P",
        help="predictor whose scores are used: a folder, a published name, hf:ORG/REPO, or a run's folder "
        "(its exported predictor, else its best checkpoint, else its last)",
    )
    parser.add_argument(
        "--scores", metavar="DIR", help="scores that `moe-beyond predict` wrote, instead of --predictor"
    )


def add_combinations(parser: ArgumentParser) -> None:
    """Add the options that combine policies and prefetchers."""
    parser.add_argument(
        "--policy",
        action="append",
        metavar="P",
        help="lru (default), lfu, lfu_in_cache, lfru, class_lru, static, least_stale, moe_infinity, moe_spac, hobbit, "
        "belief, belady or belady_bypass; repeat for more",
    )
    parser.add_argument(
        "--prefetch",
        action="append",
        metavar="F",
        help="none, top6, 'p>0.5', 'top6,p>0.1' (in quotes: a shell takes > for a file), each also with a distance for "
        "whole-token scores (top6@2); adaptive, moe_infinity or oracle; repeat for more (default with scores: top<K>)",
    )
    parser.add_argument(
        "--lookahead",
        action="append",
        metavar="H",
        help="scores to ask by: token, 1, 2, ... (default: the first); at a token's start, layers before which none "
        "runs are prefetched by those of the smallest lookahead; repeat for more",
    )


def add_conditions(parser: ArgumentParser) -> None:
    """Add the options that all strategies of a replay share."""
    parser.add_argument("--device", metavar="D", help="a preset of `moe-beyond devices`, or a JSON file: counts time")
    parser.add_argument("--scope", default="global", help="global (default) or per-layer")
    parser.add_argument(
        "--quotas",
        metavar="Q",
        help="of --scope per-layer: even (default), proportional, or slots by layer: 10,8,8,...",
    )
    parser.add_argument("--profile", metavar="P", help="a fitted history or popularity predictor, named likewise")
    parser.add_argument(
        "--warm-start",
        action="store_true",
        help="each sequence starts with the profile's most popular experts, whose transfers count",
    )
    parser.add_argument("--carry-over", action="store_true", help="a sequence finds the cache as the last one left it")
    parser.add_argument(
        "--cold-host",
        action="store_true",
        help="host memory of a device with flash begins empty (default: with as many experts as fit)",
    )
    parser.add_argument(
        "--prefill-chunk", type=int, default=0, metavar="N", help="prompt tokens of a step (default: each is a step)"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="B", help="sequences of a step (default: 1)")
    parser.add_argument("--sequential", action="store_true", help="access by access, as other simulators do")
    parser.add_argument(
        "--warmup-tokens",
        type=int,
        default=0,
        metavar="N",
        help="tokens of a sequence that do not count; a sequence with no more is left out (default: 0)",
    )
    parser.add_argument(
        "--no-first-layer-prefetch",
        action="store_true",
        help="do not prefetch the layers whose scores exist when the token starts",
    )
    parser.add_argument(
        "--quantization", type=float, metavar="BITS", help="bits per parameter, for bytes and times; the traces' own"
    )


def asked_source(args: Namespace) -> ScoreSource | None:
    """Open the predictor or the scores that are named, if any.

    Raises:
        UserError: Both are, or what is named is none.
    """
    if args.predictor and args.scores:
        raise UserError("--predictor and --scores exclude each other; give one")
    if args.predictor:
        return find_source(args.predictor)
    return from_scores_folder(args.scores) if args.scores else None


def request_of(args: Namespace) -> Request:
    """Return what the options ask for."""
    given = {field.name: args[field.name] for field in fields(Request) if args.get(field.name) is not None}
    return Request(**given)


@contextmanager
def showing_progress(
    traces: TraceSet, split: str | None, what: str, strategies: int = 1, *, quiet: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show a bar over the tokens of a split, times the strategies, on standard error and only on a terminal.

    Yields:
        What to call with the tokens that were done.
    """
    total, done = sum(shard.tokens for shard in traces.shards(split)) * strategies, 0

    with progress_bar(what, quiet=quiet) as progress:

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(done, total)

        yield advance
