"""The strategy of a run: policy, prefetcher, predictor and profile, checked against the model."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_beyond.cache.misses import MOVE
from moe_beyond.cache.policies import load_policy
from moe_beyond.cache.prefetchers import parse_prefetch
from moe_beyond.errors import UserError
from moe_beyond.evaluation.checkpoints import find_trained, load_trained
from moe_beyond.evaluation.sources import from_predictor, load_profile, name_of_folder
from moe_beyond.evaluation.strategies import strategy
from moe_beyond.geometry import Geometry, budget_slots
from moe_beyond.lookahead import parse_lookahead
from moe_beyond.predictors.io.folder import check_fits, read_config
from moe_beyond.pretrained import find_predictor
from moe_beyond.safe_text import shown
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.settings import offers_scores, reads_scores
from moe_beyond.traces.manifest import Manifest
from moe_beyond.usage_profile import UsageProfile

if TYPE_CHECKING:
    from moe_beyond.predictors.base import Predictor
    from moe_beyond.predictors.online import OnlineUpdates

FEW_SLOTS_POLICY = "belief"
"""Policy to advise for a budget below the demand of one token."""
OPTION_TYPES: dict[str, tuple[Any, str]] = {
    "budget": (str | int, "text such as '10%', '3GB' or '166', or a number of slots"),
    "policy": (str, "the name of a policy"),
    "prefetch": (str | None, "text such as 'top6' or 'p>0.5'"),
    "lookahead": (str | int | None, "'computed', 'token' or a number of layers"),
    "profile": (str | Path | None, "the name or the folder of a predictor"),
    "scope": (str, "'global' or 'per-layer'"),
    "misses": (str, "'move', 'cpu' or 'best'"),
    "online_state": (str | Path | None, "the name of a file"),
}
"""Type of each option, and its description in error messages."""


@dataclass(frozen=True)
class StrategyOptions:
    """Options of a run that choose its strategy.

    Attributes:
        budget: Memory for experts: ``"10%"`` of all experts, ``"166"`` slots, ``"3GB"`` or ``"2.7GiB"`` (default: 10%).
        policy: Eviction policy (default: ``"lru"``).
        predictor: Predictor of the model's routing: an instance, a folder, or the name of a pretrained one (default:
            None).
        prefetch: Prefetcher (default: ``top<K>`` with a predictor, ``"none"`` without).
        lookahead: Lookahead of the scores that the prefetcher selects by (default: the first of the predictor).
        profile: Fitted ``history`` or ``popularity`` predictor, for policies that need a usage profile (default: None).
        scope: ``"global"`` or ``"per-layer"`` (default: ``"global"``).
        misses: Miss handling: ``"move"``, ``"cpu"`` or ``"best"`` (default: ``"move"``).
        online: Whether the predictor's scores are corrected by online updates (default: False).
        online_state: File with the corrections to start with, if it exists (default: None).
    """

    budget: str | int = "10%"
    policy: str = "lru"
    predictor: "Predictor | str | Path | None" = None
    prefetch: str | None = None
    lookahead: str | int | None = None
    profile: str | Path | None = None
    scope: str = "global"
    misses: str = MOVE
    online: bool = False
    online_state: str | Path | None = None

    def __post_init__(self) -> None:
        """Check the types.

        Raises:
            UserError: An option has the wrong type.
        """
        for name, (kinds, expected) in OPTION_TYPES.items():
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, kinds):
                raise UserError(f"{name} must be {expected} (got {shown(value)})")
        if not isinstance(self.online, bool):
            raise UserError(f"online must be True or False (got {shown(self.online)})")
        if self.online_state is not None and not self.online:
            raise UserError("online_state: is the file of online updates; set online, or leave it out")


@dataclass(frozen=True)
class RunStrategy:
    """A strategy that fits a model.

    Attributes:
        settings: Settings of an equal replay, except its steps.
        predictor: Predictor that gives scores; None without one.
        profile: Usage profile of the policy; None without one.
        notices: Lines that a user should read before the run.
        options: Options that it was made from.
        fingerprints: ``"predictor"`` and ``"profile"`` -> sha256 of the weights, None for an instance; absent without
            one.
        scored: Strategy of a predictor that scores without acting; None without one (default: None).
        online: Online updates of the predictor, which change during the run; None without them (default: None).
        online_start: The updates as they were read from a file; None without a file (default: None).
    """

    settings: ReplaySettings
    predictor: "Predictor | None"
    profile: UsageProfile | None
    notices: tuple[str, ...]
    options: StrategyOptions
    fingerprints: Mapping[str, str | None]
    scored: "RunStrategy | None" = None
    online: "OnlineUpdates | None" = None
    online_start: "OnlineUpdates | None" = None


def resolve_strategy(options: StrategyOptions, manifest: Manifest, slot_bits: float) -> RunStrategy:
    """Read the options of a run.

    Args:
        options: Options that choose the strategy.
        manifest: Description of the model, as a trace set of the run would have it.
        slot_bits: Bits of a slot per expert parameter, gaps included.

    Raises:
        UserError: An option cannot be read or excludes another one; the predictor or the profile belongs to another
            model or tokenizer; the policy needs a profile; the strategy needs the future; or the budget is too small
            for one event.
    """
    geometry = manifest.geometry
    slots = budget_slots(options.budget, geometry, slot_bits)
    predictor, source = None, None
    fingerprints = dict[str, str | None]()
    if options.predictor is not None:
        predictor, name, sha256, fingerprints["predictor"] = _predictor(options.predictor)
        check_fits(predictor, manifest, manifest.model_id, sha256)
        predictor.stepper()  # refuses predictors that cannot decode
        source = from_predictor(predictor, f"{name} online" if options.online else name)
    prefetch = options.prefetch or ("none" if source is None else f"top{geometry.top_k}")
    lookahead = None if options.lookahead is None else parse_lookahead(options.lookahead)
    if lookahead is not None and (source is None or lookahead not in source.lookaheads):
        listed = "" if source is None else ", ".join(map(str, source.lookaheads))
        available = f"choose from {listed}" if listed else "there is no predictor"
        raise UserError(f"lookahead {lookahead}: no such scores; {available}")
    if source is None:
        _check_needs_no_scores(options.policy, prefetch)
    common = ReplaySettings(
        slots=geometry.total_experts, scope=options.scope, carry_over=True, bits=manifest.bits,
        measured_times=True, misses=options.misses,
    )  # fmt: skip
    settings = strategy(common, slots, options.policy, prefetch, source, lookahead)
    if "future" in settings.needs:
        raise UserError(
            f"{settings.strategy}: needs the future, which only a replay knows; choose another policy and prefetcher"
        )
    if load_policy(options.policy).HOOKS.bypass:
        raise UserError(f"policy {options.policy}: needs extra slots, which a run does not have; choose another policy")
    reads = reads_scores(options.policy) or parse_prefetch(prefetch).prefetcher.reads_scores
    if source is not None and not reads:
        raise UserError(
            f"predictor {source.name}: neither policy {options.policy} nor prefetch {prefetch} reads "
            "scores; leave it out, or give another policy or prefetch"
        )
    profile = None
    if options.profile is not None:
        folder = find_predictor(str(options.profile))
        profile = load_profile(folder, manifest, manifest.model_id)
        fingerprints["profile"] = _fingerprint(folder)
    elif "profile" in settings.needs:
        raise UserError(f"policy {options.policy}: needs the popularity of experts in training text; give a profile")
    online, online_start = _online(options, predictor)
    return RunStrategy(
        settings, predictor, profile, _notices(options, slots, geometry), options, fingerprints, online=online,
        online_start=online_start,
    )  # fmt: skip


def resolve_predict_only(options: StrategyOptions, manifest: Manifest, slot_bits: float) -> RunStrategy:
    """Read the options of a run whose predictor scores without acting.

    Args:
        options: Options that choose the strategy; the prefetcher is only counted.
        manifest: Description of the model, as a trace set of the run would have it.
        slot_bits: Bits of a slot per expert parameter, gaps included.

    Returns:
        Strategy without the predictor, which has the predictor's as ``scored``.

    Raises:
        UserError: There is no predictor, the policy reads scores, the prefetcher selects by more than the scores of one
            lookahead, or an option is wrong as `resolve_strategy` explains.
    """
    if options.predictor is None:
        raise UserError("predict-log: needs a predictor to score (got none); give one")
    if reads_scores(options.policy):
        raise UserError(
            f"predict-log: its predictor does not act, and policy {options.policy} reads scores; choose another "
            "policy, such as lru"
        )
    scored = resolve_strategy(options, manifest, slot_bits)
    if not parse_prefetch(scored.settings.prefetch).prefetcher.reads_one_lookahead:
        raise UserError(
            f"predict-log: counts prefetches by score only (got {scored.settings.prefetch}); write top<m> or p><t>"
        )
    acting = replace(options, predictor=None, prefetch=None, lookahead=None, online=False, online_state=None)
    return replace(resolve_strategy(acting, manifest, slot_bits), scored=scored, online_start=scored.online_start)


def _online(
    options: StrategyOptions, predictor: "Predictor | None"
) -> "tuple[OnlineUpdates | None, OnlineUpdates | None]":
    """Return the online updates of a predictor, and their start if a file has it.

    Raises:
        UserError: There is no predictor, or the file belongs to another one or is damaged.
    """
    from moe_beyond.predictors.online import OnlineUpdates

    if not options.online:
        return None, None
    if predictor is None:
        raise UserError("online: corrects the scores of a predictor (got none); give a predictor")
    if options.online_state is None or not Path(options.online_state).exists():
        return OnlineUpdates(predictor), None
    start = OnlineUpdates.load(options.online_state, predictor)
    return start.copy(), start


def _notices(options: StrategyOptions, slots: int, geometry: Geometry) -> tuple[str, ...]:
    """Return the notice that a budget is below the demand of one token, if it is."""
    if slots >= geometry.demand_per_token or options.policy == FEW_SLOTS_POLICY:
        return ()
    line = f"{slots} slots hold less than the {geometry.demand_per_token} experts of one token"
    if options.policy == "lru":
        line += ": lru evicts each expert before its next use and has hardly any hits"
    return (f"{line}; policy {FEW_SLOTS_POLICY} usually has more hits",)


def _fingerprint(path: Path) -> str:
    """Return the sha256 of a predictor's weights, or of a checkpoint of a run."""
    return str(read_config(path)["sha256"]) if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()


def _check_needs_no_scores(policy: str, prefetch: str) -> None:
    """Refuse a strategy that needs the scores of a predictor.

    Raises:
        UserError: The policy or the prefetcher needs scores.
    """
    if parse_prefetch(prefetch).prefetcher.reads_scores and not offers_scores(policy):
        raise UserError(f"prefetch {prefetch!r} needs scores; give a predictor")
    if "scores" in load_policy(policy).NEEDS:
        raise UserError(f"policy {policy} needs scores; give a predictor, such as a fitted eamc")


def _predictor(predictor: "Predictor | str | Path") -> "tuple[Predictor, str, str | None, str | None]":
    """Return a predictor, its name, the hash of the tokenizer that it was fitted with, and that of its weights."""
    fingerprint = None
    if isinstance(predictor, str | Path):
        path = find_trained(str(predictor))
        loaded, training = load_trained(path)
        name, fingerprint = name_of_folder(path, loaded.architecture), _fingerprint(path)
    elif not hasattr(predictor, "stepper"):
        raise UserError(f"predictor must be a predictor, its folder or its name (got {shown(predictor)})")
    else:
        loaded, training = predictor, dict(predictor.fitted_on or {})
        name = predictor.architecture
    tokenizer = training.get("tokenizer") or {}
    return loaded, name, tokenizer.get("sha256"), fingerprint
