"""Options of a replay, shared by ``evaluate``, ``replay`` and ``plan``.

Nothing here imports what a replay needs: parsers are built for ``--help`` and for completion, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from moe_beyond.cache.misses import MOVE
from moe_beyond.cache.policies import POLICIES
from moe_beyond.cache.prefetchers import SYNTAX
from moe_beyond.cli.options import TRACES_HELP, check_file
from moe_beyond.errors import UserError
from moe_beyond.evaluation.named_strategies import ALL, STRATEGIES
from moe_beyond.evaluation.options import ALL_SPLITS, DEFAULT_BUDGET, SCOPES, ReplayOptions

if TYPE_CHECKING:
    from moe_beyond.evaluation.sources import ScoreSource

SPLIT_HELP = f"split of the trace set to measure, or {ALL_SPLITS}"
UNFITTED = "a split that the predictor was not fitted on, if any"
BUDGET_HELP = "memory budget: 10% of all experts, 166 slots, 2.9GB or 2.7GiB; repeatable"
DEVICE_HELP = (
    "device of the timing model: preset (`moe-beyond devices` lists them) or JSON file, with optional changes "
    "DEVICE,FIELD=VALUE,..."
)
PREDICTOR_HELP = (
    "a predictor folder, a pretrained name, hf:ORG/REPO, or the folder of a run (its exported predictor, otherwise its "
    "best checkpoint, otherwise its last one)"
)


def quoted(text: str) -> str:
    """Return the text of a prefetcher as a shell takes it."""
    return f"'{text}'" if ">" in text else text


def choices(names: Iterable[str]) -> str:
    """Return the names of a registry for a help text."""
    return ", ".join(names)


def add_measured_traces(parser: ArgumentParser, *, default: str = "", split_default: str = UNFITTED) -> None:
    """Add ``--traces`` and ``--split``.

    Args:
        parser: Parser of a command.
        default: Trace set that is measured without ``--traces``, in words (default: ``--traces`` is required).
        split_default: Split that is measured without ``--split``, in words (default: `UNFITTED`).
    """
    help_text = f"{TRACES_HELP}; {default}" if default else TRACES_HELP
    parser.add_argument("--traces", metavar="DIR", required=not default, help=help_text)
    parser.add_argument("--split", metavar="SPLIT", help=f"{SPLIT_HELP} (default: {split_default})")


def add_budgets(parser: ArgumentParser, help_text: str = BUDGET_HELP) -> None:
    """Add ``--budget``.

    Args:
        parser: Parser of a command.
        help_text: Purpose and form of a budget (default: `BUDGET_HELP`).
    """
    parser.add_argument("--budget", action="append", metavar="BUDGET", help=f"{help_text} (default: {DEFAULT_BUDGET})")


def add_strategies(parser: ArgumentParser) -> None:
    """Add ``--strategy``, the options of a grid, and those of its scores."""
    parser.add_argument(
        "--strategy",
        action="append",
        metavar="NAME",
        help="named strategy in place of --policy and --prefetch: "
        f"{choices(STRATEGIES)}, or {ALL}; repeatable (default: none)",
    )
    add_grid(parser)
    parser.add_argument("--predictor", metavar="PREDICTOR", help=f"predictor whose scores are used: {PREDICTOR_HELP}")
    parser.add_argument(
        "--scores", metavar="DIR", help="scores folder of `moe-beyond predict`, in place of --predictor (default: none)"
    )


def add_grid(parser: ArgumentParser, lookahead_default: str = "the predictor's first") -> None:
    """Add the options that form a grid: policies, prefetchers, lookaheads and miss handlings.

    Args:
        parser: Parser of a command.
        lookahead_default: Lookaheads without ``--lookahead``, in words (default: the predictor's first).
    """
    parser.add_argument(
        "--policy",
        action="append",
        metavar="POLICY",
        help=f"eviction policy: {choices(POLICIES)}; repeatable (default: lru)",
    )
    parser.add_argument(
        "--prefetch",
        action="append",
        metavar="PREFETCHER",
        help=f"prefetcher: {choices(map(quoted, SYNTAX))}; quote it, because a shell reads > as a redirection; top6 "
        "and p>0.5 take a distance in layers for whole-token scores (top6@2); repeatable (default: top<K> with scores, "
        "none without)",
    )
    parser.add_argument(
        "--lookahead",
        action="append",
        metavar="LOOKAHEAD",
        help="lookahead of the scores that prefetchers select by: computed (once the layer before is computed), 1 "
        "(once it is routed), 2, ..., token (before the token's first layer); when a token starts, layers without an "
        "earlier layer at that distance use the first lookahead in this order; repeatable (default: "
        f"{lookahead_default})",
    )
    add_misses(parser)


def add_misses(parser: ArgumentParser) -> None:
    """Add ``--misses``."""
    parser.add_argument(
        "--misses",
        action="append",
        metavar="HANDLING",
        help="miss handling on --device: move transfers a missing expert; cpu computes it on the host; best does the "
        "sooner of both, and the output of a run with cpu or best equals the model's up to rounding; repeatable "
        f"(default: {MOVE})",
    )


def add_conditions(parser: ArgumentParser, scope_default: str | None = "global") -> None:
    """Add the options that all strategies of a replay share.

    Args:
        parser: Parser of a command.
        scope_default: Scope of the cache without ``--scope``; None if both are tried (default: global).
    """
    parser.add_argument("--device", metavar="DEVICE", help=f"{DEVICE_HELP} (default: no timing)")
    parser.add_argument(
        "--scope",
        default=scope_default,
        metavar="SCOPE",
        help=f"scope of the cache: {' or '.join(SCOPES)} (default: {scope_default or 'both are tried'})",
    )
    parser.add_argument(
        "--quotas",
        metavar="QUOTAS",
        help="slots per layer with --scope per-layer: even, proportional, or a list such as 10,8,8 (default: even)",
    )
    parser.add_argument(
        "--profile",
        metavar="PREDICTOR",
        help="fitted history or popularity predictor for policies that need a usage profile (default: none; with "
        "--strategy, the pretrained history)",
    )
    parser.add_argument(
        "--warm-start",
        action="store_true",
        help="start every sequence with the profile's most popular experts; their transfers count",
    )
    parser.add_argument("--carry-over", action="store_true", help="keep the cache from the previous sequence")
    parser.add_argument(
        "--cold-host",
        action="store_true",
        help="start with empty host memory on a device with flash (default: with as many experts as fit)",
    )
    parser.add_argument(
        "--prefill-chunk", type=int, default=0, metavar="N", help="prompt tokens per step (default: 0, one step each)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="sequences decoded together (default: 1)"
    )
    parser.add_argument(
        "--sequential", action="store_true", help="make every access its own event, as libCacheSim does"
    )
    parser.add_argument(
        "--warmup-tokens",
        type=int,
        default=0,
        metavar="N",
        help="tokens at the start of each sequence that do not count; sequences of N tokens or fewer are excluded "
        "(default: 0)",
    )
    parser.add_argument(
        "--no-first-layer-prefetch",
        action="store_true",
        help="do not prefetch, at a token's start, layers that have no earlier layer at the lookahead",
    )
    parser.add_argument(
        "--quantization",
        type=float,
        metavar="BITS",
        help="bits per parameter, used for bytes and times (default: as recorded in the trace set)",
    )


def add_online(parser: ArgumentParser, scored: str) -> None:
    """Add ``--online`` and ``--online-state``.

    Args:
        parser: Parser of a command.
        scored: Text whose tokens correct the scores, in words.
    """
    parser.add_argument(
        "--online",
        action="store_true",
        help=f"correct the predictor's scores by the experts of earlier tokens, sequence after sequence, in the order "
        f"of {scored} (default: the scores as they are)",
    )
    parser.add_argument(
        "--online-state",
        metavar="FILE",
        help="file of the corrections: read at the start if it exists, written at the end (default: none, start with "
        "no corrections)",
    )


def check_online(args: Namespace, excluded: Iterable[str] = ()) -> None:
    """Refuse options that exclude ``--online``, before anything takes long.

    Args:
        args: Parsed arguments with ``online`` and ``online_state``.
        excluded: Names of options that exclude it, besides several workers and batches (default: none).

    Raises:
        UserError: One is given, or ``--online-state`` without ``--online``, or its file cannot be written.
    """
    if not args.online:
        if args.online_state is not None:
            raise UserError("--online-state: is the file of --online; add --online, or leave it out")
        return
    check_file("--online-state", args.online_state)
    for name in ("workers", "batch_size"):
        if args.get(name, 1) > 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option}: online updates read one sequence after another; leave --{option} out")
    for name in excluded:
        if args.get(name):
            option = name.replace("_", "-")
            raise UserError(f"--online: excludes --{option}; leave one of them out")


def open_source(args: Namespace) -> ScoreSource | None:
    """Open the named predictor or scores; None without either.

    Raises:
        UserError: Both are named, or the named one cannot be read.
    """
    if args.predictor and args.scores:
        raise UserError("--predictor and --scores exclude each other; give one")
    if args.get("online") and not args.predictor:
        got = "--scores" if args.scores else "none"
        raise UserError(f"--online: corrects the scores of a predictor (got {got}); give --predictor")
    if args.predictor:
        from moe_beyond.evaluation.checkpoints import find_source  # imports torch, which stored scores do not need
        from moe_beyond.evaluation.sources import with_online

        source = find_source(args.predictor)
        return with_online(source, args.online_state) if args.get("online") else source
    if args.scores:
        from moe_beyond.evaluation.sources import from_scores_folder  # imports what a replay needs, as help does not

        return from_scores_folder(args.scores)
    return None


def options_from_args(args: Namespace) -> ReplayOptions:
    """Return the options of a replay from parsed arguments; absent ones keep their defaults."""
    names = [field.name for field in fields(ReplayOptions)]
    return ReplayOptions(**{name: args[name] for name in names if args.get(name) is not None})
