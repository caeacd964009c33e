"""The options that say what to replay, shared by ``evaluate``, ``replay`` and ``plan``."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn

from moe_beyond.cache.pools import proportional_quotas
from moe_beyond.errors import UserError
from moe_beyond.evaluation.profiles import load_profile
from moe_beyond.evaluation.sources import (
    ScoreSource,
    from_predictor_folder,
    from_scores_folder,
    published_for,
    published_source,
)
from moe_beyond.evaluation.strategies import Quotas, combinations, evenly
from moe_beyond.evaluation.systems import SYSTEMS, Unavailable, system_names, system_strategies
from moe_beyond.geometry import budget_slots
from moe_beyond.lookahead import Lookahead, parse_lookahead
from moe_beyond.profile import Profile
from moe_beyond.published import find_predictor
from moe_beyond.replay import ReplaySettings
from moe_beyond.replay.devices import load_device
from moe_beyond.traces.reader import TraceSet

DEFAULT_BUDGET = "10%"


def add_budgets(options: ArgumentParser) -> None:
    """Add ``--budget``."""
    options.add_argument(
        "--budget",
        action="append",
        metavar="B",
        help=f"10%, 166 (slots), 2.9GB or 2.7GiB; repeat for more (default: {DEFAULT_BUDGET})",
    )


def add_strategies(options: ArgumentParser) -> None:
    """Add ``--strategy``, and what it does without: policies, prefetchers, and the scores that they use."""
    options.add_argument(
        "--strategy",
        action="append",
        metavar="S",
        help=f"a named system instead of --policy and --prefetch: {', '.join(SYSTEMS)}, or all; repeat for more",
    )
    add_combinations(options)
    options.add_argument(
        "--predictor", metavar="P", help="predictor whose scores serve: a folder, a published name, or hf:ORG/REPO"
    )
    options.add_argument(
        "--scores", metavar="DIR", help="scores that `moe-beyond predict` wrote, instead of --predictor"
    )


def add_combinations(options: ArgumentParser) -> None:
    """Add the options that combine policies and prefetchers."""
    options.add_argument(
        "--policy",
        action="append",
        metavar="P",
        help="lru (default), lfu, lfu_in_cache, lfru, class_lru, static, least_stale, moe_infinity, moe_spac, hobbit, "
        "belief, belady or belady_bypass; repeat for more",
    )
    options.add_argument(
        "--prefetch",
        action="append",
        metavar="F",
        help="none, top6, p>0.5, top6,p>0.1, each also with a distance for whole-token scores (top6@2); adaptive, "
        "moe_infinity or oracle; repeat for more; with scores top<K>",
    )
    options.add_argument(
        "--lookahead", action="append", metavar="H", help="which scores to ask by: token, 1, 2, ...; repeat for more"
    )


def add_conditions(options: ArgumentParser) -> None:
    """Add the options that all strategies of a replay share."""
    options.add_argument("--device", metavar="D", help="a preset of `moe-beyond devices`, or a JSON file: counts time")
    options.add_argument("--scope", default="global", help="global (default) or per-layer")
    options.add_argument(
        "--quotas",
        metavar="Q",
        help="of --scope per-layer: even (default), proportional, or slots by layer: 10,8,8,...",
    )
    options.add_argument("--profile", metavar="P", help="a fitted history or popularity predictor, named likewise")
    options.add_argument("--warm-start", action="store_true", help="start with the profile's most popular experts")
    options.add_argument("--carry-over", action="store_true", help="a sequence finds the cache as the last one left it")
    options.add_argument("--prefill-chunk", type=int, default=0, metavar="N", help="read N prompt tokens a step")
    options.add_argument("--batch-size", type=int, default=1, metavar="B", help="decode B sequences together")
    options.add_argument("--sequential", action="store_true", help="access by access, as other simulators do")
    options.add_argument(
        "--warmup-tokens", type=int, default=0, metavar="N", help="tokens of a sequence that do not count (default: 0)"
    )
    options.add_argument(
        "--no-first-layer-prefetch",
        action="store_true",
        help="do not prefetch the layers whose scores exist when the token starts",
    )
    options.add_argument(
        "--quantization", type=float, metavar="BITS", help="bits per parameter, for bytes and times; the traces' own"
    )


def bits_of(args: Namespace, traces: TraceSet) -> float:
    """Return the bits per parameter that count.

    Raises:
        UserError: They are not positive.
    """
    bits = traces.manifest.quantization_bits if args.quantization is None else args.quantization
    if not 0 < bits < float("inf"):
        raise UserError(f"--quantization {bits:g}: bits per parameter must be more than 0")
    return float(bits)


def asked_slots(args: Namespace, traces: TraceSet) -> list[int]:
    """Return the budgets in slots."""
    bits = bits_of(args, traces)
    return [budget_slots(budget, traces.geometry, bits) for budget in args.budget or (DEFAULT_BUDGET,)]


@dataclass(frozen=True)
class Conditions:
    """What all strategies share: settings but for slots and policy, the training text's profile, slots by layer."""

    common: ReplaySettings
    profile: Profile | None
    quotas: Quotas


def asked_conditions(args: Namespace, traces: TraceSet) -> Conditions:
    """Read the options that `add_conditions` adds.

    Raises:
        UserError: One cannot be read, or needs another.
    """
    profile = _profile(args, traces)
    common = ReplaySettings(
        slots=traces.geometry.total_experts,
        scope=args.scope,
        warm_start=args.warm_start,
        warmup_tokens=args.warmup_tokens,
        first_layer_prefetch=not args.no_first_layer_prefetch,
        sequential=args.sequential,
        prefill_chunk=args.prefill_chunk,
        batch_size=args.batch_size,
        carry_over=args.carry_over,
        device=None if args.device is None else load_device(args.device),
        bits=bits_of(args, traces),
    )
    return Conditions(common, profile, _quotas(args, traces, profile))


def _profile(args: Namespace, traces: TraceSet) -> Profile | None:
    """Load the profile, if one is named; for named strategies else the published one, if there is one."""
    if args.profile is not None:
        return load_profile(find_predictor(args.profile), traces)
    folder = published_for("history", traces) if getattr(args, "strategy", None) else None
    return None if folder is None else load_profile(folder, traces)


def _quotas(args: Namespace, traces: TraceSet, profile: Profile | None) -> Quotas:
    """Return how slots are split among layers."""
    if args.quotas is None or args.quotas == "even":
        return evenly
    if args.scope != "per-layer":
        raise UserError(f"--quotas {args.quotas} is for --scope per-layer")
    if args.quotas == "proportional":
        if profile is None:
            raise UserError(
                "--quotas proportional splits by how layers spread their demand in training; give --profile"
            )
        return lambda slots: proportional_quotas(traces.geometry, slots, profile.popularity)
    try:
        listed = tuple(int(part) for part in args.quotas.split(","))
    except ValueError as error:
        raise UserError(f"--quotas {args.quotas!r}: write even, proportional, or slots by layer: 10,8,8,...") from error
    return lambda slots: listed


def asked_source(args: Namespace) -> ScoreSource | None:
    """Open the predictor or the scores that are named, if any.

    Raises:
        UserError: Both are, or what is named is none.
    """
    if args.predictor and args.scores:
        raise UserError("--predictor and --scores exclude each other; give one")
    if args.predictor:
        return from_predictor_folder(find_predictor(args.predictor))
    return from_scores_folder(args.scores) if args.scores else None


def asked_combinations(
    args: Namespace,
    traces: TraceSet,
    conditions: Conditions,
    source: ScoreSource | None,
    default_lookaheads: Sequence[Lookahead] = (),
) -> list[ReplaySettings]:
    """List the combinations that the options ask for.

    Args:
        args: The parsed options.
        traces: What will be replayed.
        conditions: What all share.
        source: Of scores.
        default_lookaheads: Where no ``--lookahead`` is given.

    Raises:
        UserError: An option cannot be read, or asks for what is not there.
    """
    lookaheads = source.lookaheads if source else ()
    wanted = [parse_lookahead(text) for text in args.lookahead or ()]
    for lookahead in wanted:
        if lookahead not in lookaheads:
            known = f"has {', '.join(map(str, lookaheads))}" if lookaheads else "is not given (--predictor or --scores)"
            raise UserError(f"--lookahead {lookahead}: the predictor {known}")
    return combinations(
        conditions.common,
        asked_slots(args, traces),
        args.policy or ("lru",),
        args.prefetch or ((f"top{traces.geometry.top_k}",) if source else ("none",)),
        source,
        wanted or default_lookaheads,
        conditions.quotas,
    )


@dataclass(frozen=True)
class Asked:
    """What is asked for: strategies, the scores that they use, and which are missing something."""

    strategies: list[ReplaySettings]
    sources: list[ScoreSource]
    missing: list[Unavailable]


def asked_strategies(args: Namespace, traces: TraceSet, conditions: Conditions) -> Asked:
    """List what the options ask for at every budget.

    Raises:
        UserError: An option cannot be read, or asks for what is not there; or nothing that is asked for is available.
    """
    source = asked_source(args)
    if not args.strategy:
        lookaheads = source.lookaheads[:1] if source else ()
        found = asked_combinations(args, traces, conditions, source, lookaheads)
        return Asked(found, [source] if source else [], [])
    if args.policy or args.prefetch or args.lookahead:
        raise UserError("--strategy names policy and prefetch; give it without --policy, --prefetch and --lookahead")
    asked = Asked(
        *system_strategies(
            system_names(args.strategy),
            conditions.common,
            asked_slots(args, traces),
            traces.geometry.top_k,
            source,
            lambda architecture: published_source(architecture, traces),
            conditions.quotas,
        )
    )
    if not asked.strategies:
        raise UserError("; ".join(f"strategy {one.strategy}: not available: {one.why}" for one in asked.missing))
    return asked


@contextmanager
def showing_progress(
    traces: TraceSet, split: str | None, what: str, strategies: int = 1
) -> Iterator[Callable[[int], None]]:
    """Show a bar over the tokens of a split, times the strategies, on standard error and only on a terminal.

    Yields:
        What to call with the tokens that were done.
    """
    total = sum(shard.tokens for shard in traces.shards(split)) * strategies
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:3], TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda tokens: bar.advance(task, tokens)
