"""From options to settings: budgets, shared settings, strategies with their scores, and the measured text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from moe_beyond.cache.misses import MOVE
from moe_beyond.cache.pools import proportional_quotas
from moe_beyond.errors import UserError, unknown
from moe_beyond.evaluation.named_strategies import strategy_names
from moe_beyond.evaluation.options import ALL_SPLITS, SCOPES, ReplayOptions
from moe_beyond.evaluation.results import Unavailable
from moe_beyond.evaluation.sources import (
    ScoreSource,
    load_profile,
    name_of_folder,
    pretrained_for,
    pretrained_source,
)
from moe_beyond.evaluation.strategies import Quotas, even_split, grid, named_strategies
from moe_beyond.geometry import parse_budget
from moe_beyond.lookahead import Lookahead, parse_lookahead
from moe_beyond.predictors.training_text import MeasuredText, measured_text
from moe_beyond.pretrained import find_predictor
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.devices import load_device
from moe_beyond.traces.reader import TraceSet
from moe_beyond.usage_profile import UsageProfile


@dataclass(frozen=True)
class SharedSettings:
    """Settings that all strategies of a replay share.

    Attributes:
        common: Settings without budget, policy and prefetcher.
        quotas: Slots of each layer by the number of slots.
        profile: Usage profile of training text; None without one (default: None).
        fitted: Name and training record of the profile's predictor; empty without a profile (default: empty).
    """

    common: ReplaySettings
    quotas: Quotas = even_split
    profile: UsageProfile | None = None
    fitted: tuple[tuple[str, Mapping[str, Any] | None], ...] = ()


@dataclass(frozen=True)
class ResolvedStrategies:
    """Strategies of a replay at every budget, without baselines.

    Attributes:
        settings: Settings of the strategies.
        sources: Sources of their scores.
        unavailable: Named strategies that cannot be replayed (default: none).
    """

    settings: list[ReplaySettings]
    sources: list[ScoreSource]
    unavailable: tuple[Unavailable, ...] = ()


def resolve_bits(options: ReplayOptions, traces: TraceSet) -> float:
    """Return the bits per parameter.

    Raises:
        UserError: The number is not positive and finite.
    """
    bits = traces.manifest.bits if options.quantization is None else options.quantization
    if options.quantization is not None and traces.geometry.expert_bytes is not None:
        raise UserError(
            f"--quantization: {traces.folder} has the stored bytes of its experts (got {bits:g}); remove the option"
        )
    if not 0 < bits < float("inf"):
        raise UserError(f"--quantization: bits per parameter must be more than 0 (got {bits:g}); give 4, 8 or 16")
    return float(bits)


def resolve_budgets(options: ReplayOptions, traces: TraceSet) -> list[int]:
    """Return the budgets in slots.

    Raises:
        UserError: A budget cannot be read.
    """
    return list(_budgets(options, traces))


def exact_budgets(
    strategies: Iterable[ReplaySettings], options: ReplayOptions, traces: TraceSet
) -> list[ReplaySettings]:
    """Return settings with the exact bytes of their budgets, where layers differ.

    Args:
        strategies: Settings whose slots `resolve_budgets` returned.
        options: Options of the replay.
        traces: Trace set to replay.

    Raises:
        UserError: A budget cannot be read.
    """
    exact = _budgets(options, traces)
    return [replace(settings, budget_bytes=exact.get(settings.slots)) for settings in strategies]


def _budgets(options: ReplayOptions, traces: TraceSet) -> dict[int, int | None]:
    """Return slots -> exact bytes of each budget, None where the slots are exact."""
    bits = resolve_bits(options, traces)
    exact: dict[int, int | None] = {}
    for text in options.budget:
        budget = parse_budget(text, traces.geometry, bits)
        if exact.setdefault(budget.slots, budget.bytes) != budget.bytes:
            raise UserError(
                f"--budget: two budgets differ by less than an expert (got {', '.join(map(str, options.budget))}); "
                "replay one at a time"
            )
    return exact


def resolve_settings(options: ReplayOptions, traces: TraceSet) -> SharedSettings:
    """Return the settings that all strategies share.

    Raises:
        UserError: An option cannot be read, or requires another one.
    """
    if options.scope not in SCOPES:
        raise unknown("scope", options.scope, SCOPES)
    folder = _profile_folder(options, traces)
    profile = None if folder is None else load_profile(folder, traces.manifest, traces.folder)
    common = ReplaySettings(
        slots=traces.geometry.total_experts,
        scope=options.scope,
        warm_start=options.warm_start,
        warmup_tokens=options.warmup_tokens,
        first_layer_prefetch=not options.no_first_layer_prefetch,
        sequential=options.sequential,
        prefill_chunk=options.prefill_chunk,
        batch_size=options.batch_size,
        carry_over=options.carry_over,
        cold_host=options.cold_host,
        device=None if options.device is None else load_device(options.device),
        bits=resolve_bits(options, traces),
    )
    fitted = () if folder is None else (_profile_training(folder),)
    return SharedSettings(common, _resolve_quotas(options, traces, profile), profile, fitted)


def _profile_folder(options: ReplayOptions, traces: TraceSet) -> Path | None:
    """Find the named profile; for named strategies otherwise the pretrained history, if one fits."""
    if options.profile is not None:
        return find_predictor(options.profile)
    return pretrained_for("history", traces) if options.strategy else None


def _profile_training(folder: Path) -> tuple[str, Mapping[str, Any] | None]:
    """Return name and training record of a profile's predictor."""
    from moe_beyond.predictors.io.folder import read_config  # imports torch, which a plain replay does not need

    config = read_config(folder)
    return f"profile {name_of_folder(folder, config['architecture'])}", config.get("training")


def _resolve_quotas(options: ReplayOptions, traces: TraceSet, profile: UsageProfile | None) -> Quotas:
    """Return the slots of each layer by the number of slots."""
    if options.quotas is None or options.quotas == "even":
        return even_split
    if options.scope != "per-layer":
        raise UserError(f"--quotas {options.quotas}: quotas need a cache per layer; add --scope per-layer")
    if options.quotas == "proportional":
        if profile is None:
            raise UserError("--quotas proportional: the split needs the layers' demand in training; give --profile")
        return lambda slots: proportional_quotas(traces.geometry, slots, profile.popularity)
    try:
        listed = tuple(int(part) for part in options.quotas.split(","))
    except ValueError as error:
        raise UserError(
            f"--quotas: cannot be read (got {options.quotas!r}); write even, proportional or slots per layer: 10,8,8"
        ) from error
    return lambda slots: listed


def resolve_grid(
    options: ReplayOptions,
    traces: TraceSet,
    shared: SharedSettings,
    source: ScoreSource | None,
    default_lookaheads: Sequence[Lookahead] = (),
) -> list[ReplaySettings]:
    """Return the grid of policies and prefetchers at every budget.

    Args:
        options: Options of the replay.
        traces: Trace set to replay.
        shared: Settings that all strategies share.
        source: Source of scores; None without scores.
        default_lookaheads: Lookaheads to select by if the options name none (default: the first of the source).

    Raises:
        UserError: An option cannot be read, or the source lacks a lookahead.
    """
    available = source.lookaheads if source else ()
    lookaheads = [parse_lookahead(text) for text in options.lookahead]
    for lookahead in lookaheads:
        if lookahead not in available:
            if source is None:
                raise UserError(f"--lookahead {lookahead}: there are no scores; add --predictor or --scores")
            listed = ", ".join(map(str, available))
            raise UserError(f"--lookahead {lookahead}: {source.name} has no such scores; choose from {listed}")
    return grid(
        shared.common,
        resolve_budgets(options, traces),
        options.policy or ("lru",),
        options.prefetch or ((f"top{traces.geometry.top_k}",) if source else ("none",)),
        source,
        lookaheads or default_lookaheads,
        shared.quotas,
        options.misses or (MOVE,),
    )


def resolve_strategies(
    options: ReplayOptions, traces: TraceSet, shared: SharedSettings, source: ScoreSource | None
) -> ResolvedStrategies:
    """Return named strategies, or otherwise the grid of policies and prefetchers, at every budget.

    Args:
        options: Options of the replay.
        traces: Trace set to replay.
        shared: Settings that all strategies share.
        source: Source of scores; None without scores.

    Raises:
        UserError: An option cannot be read or excludes another, or every named strategy is unavailable.
    """
    if not options.strategy:
        lookaheads = source.lookaheads[:1] if source else ()
        return ResolvedStrategies(
            resolve_grid(options, traces, shared, source, lookaheads), [source] if source is not None else []
        )
    if options.policy or options.prefetch or options.lookahead or options.misses:
        raise UserError(
            "--strategy: a strategy has its own policy, prefetcher and miss handling; leave out --policy, --prefetch, "
            "--lookahead and --misses"
        )
    settings, sources, unavailable = named_strategies(
        strategy_names(options.strategy),
        shared.common,
        resolve_budgets(options, traces),
        traces.geometry.top_k,
        source,
        cache(lambda architecture: pretrained_source(architecture, traces)),
        shared.quotas,
        has_profile=shared.profile is not None,
    )
    if not settings:
        raise UserError("; ".join(f"strategy {each.strategy}: not available: {each.reason}" for each in unavailable))
    return ResolvedStrategies(settings, sources, tuple(unavailable))


def resolve_text(
    traces: TraceSet, split: str | None, shared: SharedSettings, sources: Sequence[ScoreSource]
) -> MeasuredText:
    """Choose the measured split, and relate its text to the predictors whose scores or counts are used.

    Args:
        traces: Trace set to replay.
        split: Name of a split; ``all`` for every split; None for one that no predictor was fitted on, if there is one.
        shared: Settings that all strategies share.
        sources: Sources of scores.

    Raises:
        UserError: The trace set has no such split, or a training record is damaged.
    """
    fitted = [*((source.name, source.training) for source in sources), *shared.fitted]
    splits = traces.manifest.splits
    if split == ALL_SPLITS and ALL_SPLITS not in splits:
        return MeasuredText(None, tuple(note for name in splits for note in measured_text(traces, name, fitted).notes))
    return measured_text(traces, split, fitted)
