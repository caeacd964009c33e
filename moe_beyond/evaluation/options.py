"""What a replay is asked for, in a user's words: budgets, policies, prefetchers, devices; and what that comes to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_beyond.cache.pools import proportional_quotas
from moe_beyond.errors import UserError
from moe_beyond.evaluation.profiles import load_profile
from moe_beyond.evaluation.sources import ScoreSource, name_of_folder, published_for, published_source
from moe_beyond.evaluation.strategies import Quotas, combinations, evenly
from moe_beyond.evaluation.systems import Unavailable, system_names, system_strategies
from moe_beyond.geometry import budget_slots
from moe_beyond.lookahead import Lookahead, parse_lookahead
from moe_beyond.predictors.io.folder import read_config
from moe_beyond.predictors.training_text import MeasuredText, Training, measured_text
from moe_beyond.pretrained import find_predictor
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.devices import load_device
from moe_beyond.traces.reader import TraceSet
from moe_beyond.usage_profile import UsageProfile

DEFAULT_BUDGET = "10%"


@dataclass(frozen=True)
class Request:
    """The options of the command line, or the arguments of `moe_beyond.replay`, by the same names.

    Attributes:
        budget: ``10%``, ``166`` (slots), ``2.9GB`` or ``2.7GiB``.
        strategy: Named systems, in place of policies and prefetchers.
        policy: Eviction policies.
        prefetch: Prefetchers; with scores ``top<K>`` by default.
        lookahead: Which scores to ask by; the first there are by default.
        device: A preset, or a JSON file.
        scope: ``global`` or ``per-layer``.
        quotas: Of ``per-layer``: ``even``, ``proportional``, or slots by layer.
        profile: A fitted ``history`` or ``popularity`` predictor.
        warm_start: Start with the profile's most popular experts.
        carry_over: A sequence finds the cache as the one before left it.
        cold_host: Host memory before flash begins empty.
        prefill_chunk: Prompt tokens that are read in a step.
        batch_size: Sequences that are decoded together.
        sequential: Access by access, as other simulators do.
        warmup_tokens: Tokens of a sequence that do not count.
        no_first_layer_prefetch: Not to prefetch layers whose scores exist when the token starts.
        quantization: Bits per parameter; those of the traces by default.
    """

    budget: Sequence[str] = (DEFAULT_BUDGET,)
    strategy: Sequence[str] = ()
    policy: Sequence[str] = ()
    prefetch: Sequence[str] = ()
    lookahead: Sequence[str | int] = ()
    device: str | None = None
    scope: str = "global"
    quotas: str | None = None
    profile: str | None = None
    warm_start: bool = False
    carry_over: bool = False
    cold_host: bool = False
    prefill_chunk: int = 0
    batch_size: int = 1
    sequential: bool = False
    warmup_tokens: int = 0
    no_first_layer_prefetch: bool = False
    quantization: float | None = None


def bits_of(request: Request, traces: TraceSet) -> float:
    """Return the bits per parameter that count.

    Raises:
        UserError: They are not positive.
    """
    bits = traces.manifest.quantization_bits if request.quantization is None else request.quantization
    if not 0 < bits < float("inf"):
        raise UserError(f"--quantization {bits:g}: bits per parameter must be more than 0")
    return float(bits)


def asked_slots(request: Request, traces: TraceSet) -> list[int]:
    """Return the budgets in slots."""
    bits = bits_of(request, traces)
    return [budget_slots(budget, traces.geometry, bits) for budget in request.budget]


@dataclass(frozen=True)
class Conditions:
    """The conditions that all strategies share.

    Attributes:
        common: Settings, but for slots and policy.
        profile: Statistics of training text, or None.
        quotas: Slots by layer.
        fitted: Name and training record of the profile's predictor, if there is one.
    """

    common: ReplaySettings
    profile: UsageProfile | None
    quotas: Quotas
    fitted: tuple[tuple[str, Training | None], ...] = ()


def asked_conditions(request: Request, traces: TraceSet) -> Conditions:
    """Settle what all strategies share.

    Raises:
        UserError: One cannot be read, or needs another.
    """
    folder = _profile_folder(request, traces)
    profile = None if folder is None else load_profile(folder, traces)
    fitted = () if folder is None else (_fitted(folder),)
    common = ReplaySettings(
        slots=traces.geometry.total_experts,
        scope=request.scope,
        warm_start=request.warm_start,
        warmup_tokens=request.warmup_tokens,
        first_layer_prefetch=not request.no_first_layer_prefetch,
        sequential=request.sequential,
        prefill_chunk=request.prefill_chunk,
        batch_size=request.batch_size,
        carry_over=request.carry_over,
        cold_host=request.cold_host,
        device=None if request.device is None else load_device(request.device),
        bits=bits_of(request, traces),
    )
    return Conditions(common, profile, _quotas(request, traces, profile), fitted)


def _fitted(folder: Path) -> tuple[str, Any]:
    """Return the name of a profile, and what is recorded of its training."""
    config = read_config(folder)
    return f"profile {name_of_folder(folder, config['architecture'])}", config.get("training")


def _profile_folder(request: Request, traces: TraceSet) -> Path | None:
    """Find the profile, if one is named; for named strategies else the published one, if there is one."""
    if request.profile is not None:
        return find_predictor(request.profile)
    return published_for("history", traces) if request.strategy else None


def text_to_measure(
    traces: TraceSet, split: str | None, conditions: Conditions, sources: Sequence[ScoreSource]
) -> MeasuredText:
    """Settle which split is measured, and say what its text is to the predictors whose scores or counts are used.

    Args:
        traces: The trace set.
        split: The split that the user named; None chooses one that nothing was fitted on, where there is one.
        conditions: Conditions that all strategies share.
        sources: Sources of the scores.

    Raises:
        UserError: There is no such split.
    """
    return measured_text(traces, split, [*((one.name, one.training) for one in sources), *conditions.fitted])


def _quotas(request: Request, traces: TraceSet, profile: UsageProfile | None) -> Quotas:
    """Return how slots are split among layers."""
    if request.quotas is None or request.quotas == "even":
        return evenly
    if request.scope != "per-layer":
        raise UserError(f"--quotas {request.quotas} is for --scope per-layer")
    if request.quotas == "proportional":
        if profile is None:
            raise UserError(
                "--quotas proportional splits by how layers spread their demand in training; give --profile"
            )
        return lambda slots: proportional_quotas(traces.geometry, slots, profile.popularity)
    try:
        listed = tuple(int(part) for part in request.quotas.split(","))
    except ValueError as error:
        raise UserError(
            f"--quotas {request.quotas!r}: write even, proportional, or slots by layer: 10,8,8,..."
        ) from error
    return lambda slots: listed


def asked_combinations(
    request: Request,
    traces: TraceSet,
    conditions: Conditions,
    source: ScoreSource | None,
    default_lookaheads: Sequence[Lookahead] = (),
) -> list[ReplaySettings]:
    """List the combinations that the options ask for.

    Args:
        request: What is asked for.
        traces: What will be replayed.
        conditions: What all share.
        source: Of scores.
        default_lookaheads: Where no ``--lookahead`` is given.

    Raises:
        UserError: An option cannot be read, or asks for what is not there.
    """
    lookaheads = source.lookaheads if source else ()
    wanted = [parse_lookahead(text) for text in request.lookahead]
    for lookahead in wanted:
        if lookahead not in lookaheads:
            known = f"has {', '.join(map(str, lookaheads))}" if lookaheads else "is not given (--predictor or --scores)"
            raise UserError(f"--lookahead {lookahead}: the predictor {known}")
    return combinations(
        conditions.common,
        asked_slots(request, traces),
        request.policy or ("lru",),
        request.prefetch or ((f"top{traces.geometry.top_k}",) if source else ("none",)),
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


def asked_strategies(request: Request, traces: TraceSet, conditions: Conditions, source: ScoreSource | None) -> Asked:
    """List what is asked for at every budget.

    Args:
        request: What is asked for.
        traces: What will be replayed.
        conditions: What all share.
        source: Of scores.

    Raises:
        UserError: An option cannot be read, or asks for what is not there; or nothing that is asked for is available.
    """
    if not request.strategy:
        lookaheads = source.lookaheads[:1] if source else ()
        found = asked_combinations(request, traces, conditions, source, lookaheads)
        return Asked(found, [source] if source else [], [])
    if request.policy or request.prefetch or request.lookahead:
        raise UserError("--strategy names policy and prefetch; give it without --policy, --prefetch and --lookahead")
    asked = Asked(
        *system_strategies(
            system_names(request.strategy),
            conditions.common,
            asked_slots(request, traces),
            traces.geometry.top_k,
            source,
            lambda architecture: published_source(architecture, traces),
            conditions.quotas,
        )
    )
    if not asked.strategies:
        raise UserError("; ".join(f"strategy {one.strategy}: not available: {one.why}" for one in asked.missing))
    return asked
