"""Offloading the experts of a loaded model, and loading a model without its experts."""

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from moe_beyond.cache.misses import MOVE
from moe_beyond.collect.config import DTYPES
from moe_beyond.collect.devices import embedding_rows, one_device
from moe_beyond.collect.load import Checkpoint, open_checkpoint
from moe_beyond.collect.router_probe import Router, find_routers
from moe_beyond.collect.tokenizer_files import recorded_tokenizer
from moe_beyond.errors import UserError, unknown
from moe_beyond.geometry import Geometry
from moe_beyond.runtime.experts import ExpertsLayer, experts_per_token, find_offloadable, runtime_geometry
from moe_beyond.runtime.options import READERS, TIERS
from moe_beyond.runtime.run import TIMEOUT_S, OffloadedRun
from moe_beyond.runtime.slots.registry import ATTRIBUTE
from moe_beyond.runtime.stepping.states import state_modules
from moe_beyond.runtime.storage.bare_loading import load_bare
from moe_beyond.runtime.storage.checkpoint_index import index_checkpoint
from moe_beyond.runtime.storage.disk_store import DiskStore
from moe_beyond.runtime.storage.store import ExpertStore, HostStore
from moe_beyond.runtime.strategy import RunStrategy, StrategyOptions, resolve_predict_only, resolve_strategy
from moe_beyond.safe_text import shown
from moe_beyond.traces.manifest import NO_TOKEN_IDS, Manifest, Tokenizer
from moe_beyond.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moe_beyond.predictors.base import Predictor
    from moe_beyond.predictors.information import StateKind


def offload(
    model: "PreTrainedModel",
    budget: str | int = "10%",
    policy: str = "lru",
    *,
    predictor: "Predictor | str | Path | None" = None,
    prefetch: str | None = None,
    lookahead: int | str | None = None,
    profile: str | Path | None = None,
    scope: str = "global",
    misses: str = MOVE,
    online: bool = False,
    online_state: str | Path | None = None,
    readers: int = READERS,
    timeout_s: float = TIMEOUT_S,
    keep_rows: bool = False,
    predict_only: bool = False,
) -> OffloadedRun:
    """Move the experts of a loaded model into slots when they are needed.

    ``with moe_beyond.offload(model, budget="3GB") as run: run.model.generate(...)``.

    The experts stay in host memory and are copied into slots on demand. Outputs equal those of the unmodified model bit
    for bit, unless ``misses`` lets the host compute some.

    Args:
        model: MoE model of transformers, loaded whole on the CPU; `load_offloaded` serves a GPU.
        budget: Memory for experts: ``"10%"`` of all experts, ``"166"`` slots, ``"3GB"`` or ``"2.7GiB"`` (default: 10%).
        policy: Eviction policy (default: ``"lru"``).
        predictor: Predictor of the model's routing: an instance, a folder, or a pretrained one's name (default: None).
        prefetch: Prefetcher (default: ``top<K>`` with a predictor, ``"none"`` without).
        lookahead: Lookahead of the scores that the prefetcher selects by (default: the first of the predictor).
        profile: Fitted ``history`` or ``popularity`` predictor, for policies that need a usage profile (default: None).
        scope: ``"global"`` or ``"per-layer"`` (default: ``"global"``).
        misses: Miss handling: ``"move"`` copies a missing expert into a slot, ``"cpu"`` computes it on the host, and
            ``"best"`` does the sooner of both. With the last two, outputs equal the model's up to rounding (default:
            ``"move"``).
        online: Whether the predictor's scores are corrected by the experts of earlier tokens; ``run.online`` has the
            corrections (default: False).
        online_state: File with the corrections to start with, if it exists (default: None).
        readers: Number of threads that move experts (default: 4).
        timeout_s: Seconds without progress after which a forward that waits fails (default: 60).
        keep_rows: Whether telemetry is kept for every event (default: False).
        predict_only: Whether the predictor scores without acting; ``run.predictions`` then has its figures, and those
            of the prefetches that it would cause (default: False).

    Returns:
        The run, to be used as a context manager.

    Raises:
        UserError: The model cannot be offloaded, an option cannot be read, or the budget is below one event.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"offload: model must be a loaded transformers model (got {shown(model)}); load_offloaded(NAME) loads one"
        )
    if hasattr(model, "_orig_mod"):
        raise UserError("offload: an offloaded model cannot be compiled; give the model without torch.compile")
    if any(ATTRIBUTE in module.__dict__ for module in model.modules()):
        raise UserError(f"{type(model).__name__}: is offloaded already; end that run first")
    layers = find_offloadable(model)
    options = StrategyOptions(
        budget, policy, predictor, prefetch, lookahead, profile, scope, misses, online, online_state
    )
    manifest = describe_model(model, layers)
    store = HostStore.of_model(layers)
    resolve = resolve_predict_only if predict_only else resolve_strategy
    strategy = resolve(options, manifest, slot_bits(store, manifest.geometry))
    modules = _state_modules(strategy, layers, lambda: find_routers(model))
    return OffloadedRun(
        model, layers, store, strategy, manifest, modules, readers=readers, timeout_s=timeout_s, keep_rows=keep_rows
    )


def load_offloaded(
    name: str | Path | Checkpoint,
    *,
    budget: str | int = "10%",
    policy: str = "lru",
    predictor: "Predictor | str | Path | None" = None,
    prefetch: str | None = None,
    lookahead: int | str | None = None,
    profile: str | Path | None = None,
    scope: str = "global",
    misses: str = MOVE,
    online: bool = False,
    online_state: str | Path | None = None,
    tier: str = "disk",
    device: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    direct_io: bool = False,
    readers: int = READERS,
    timeout_s: float = TIMEOUT_S,
    keep_rows: bool = False,
    predict_only: bool = False,
) -> OffloadedRun:
    """Load a model without its experts, and read each expert when it is needed.

    ``with moe_beyond.load_offloaded("ORG/REPO", budget="3GB") as run: run.model.generate(...)``.

    Each expert is read on its own from the checkpoint when it gets a slot.

    Args:
        name: Folder of a model, name of a model that ships with this package, ``ORG/REPO`` on the Hub, or an opened
            checkpoint.
        budget: Memory for experts: ``"10%"`` of all experts, ``"166"`` slots, ``"3GB"`` or ``"2.7GiB"`` (default: 10%).
        policy: Eviction policy (default: ``"lru"``).
        predictor: Predictor of the model's routing: an instance, a folder, or a pretrained one's name (default: None).
        prefetch: Prefetcher (default: ``top<K>`` with a predictor, ``"none"`` without).
        lookahead: Lookahead of the scores that the prefetcher selects by (default: the first of the predictor).
        profile: Fitted ``history`` or ``popularity`` predictor, for policies that need a usage profile (default: None).
        scope: ``"global"`` or ``"per-layer"`` (default: ``"global"``).
        misses: Miss handling: ``"move"`` copies a missing expert into a slot, ``"cpu"`` computes it on the host, and
            ``"best"`` does the sooner of both. With the last two, outputs equal the model's up to rounding, and
            ``tier`` is ``"host"`` (default: ``"move"``).
        online: Whether the predictor's scores are corrected by the experts of earlier tokens; ``run.online`` has the
            corrections (default: False).
        online_state: File with the corrections to start with, if it exists (default: None).
        tier: ``"disk"`` reads experts from the checkpoint whenever they are needed; ``"host"`` reads all of them once
            into host memory (default: ``"disk"``).
        device: Device of the slots and of all other weights (default: a GPU if there is one, otherwise the CPU).
        dtype: Data type to compute in (default: ``"auto"``, as stored).
        revision: Branch, tag or commit on the Hub (default: ``main``).
        direct_io: Whether reads bypass the page cache of the system (default: False).
        readers: Number of threads that read experts (default: 4).
        timeout_s: Seconds without progress after which a forward that waits fails (default: 60).
        keep_rows: Whether telemetry is kept for every event (default: False).
        predict_only: Whether the predictor scores without acting; ``run.predictions`` then has its figures, and those
            of the prefetches that it would cause (default: False).

    Returns:
        The run, to be used as a context manager; ``run.model`` and ``run.tokenizer`` are the model and its tokenizer.

    Raises:
        UserError: The model cannot be loaded or offloaded, an option cannot be read, or the budget is below one event.
    """
    if not isinstance(name, str | Path | Checkpoint):
        raise UserError(f"load_offloaded: name must be a folder or a name (got {shown(name)}); offload takes a model")
    if tier not in TIERS:
        raise unknown("tier", tier, TIERS)
    if tier == "host" and direct_io:
        raise UserError(
            "direct I/O: reads experts from the disk during the run (got tier host); leave it out, or choose tier disk"
        )
    if misses != MOVE and tier != "host":
        raise UserError(
            f"misses {misses}: the host computes experts from its memory (got tier {tier}); choose tier host, or "
            f"misses {MOVE}"
        )
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    place = one_device(device)
    checkpoint = name if isinstance(name, Checkpoint) else open_checkpoint(str(name), revision)
    model, layers = load_bare(checkpoint, dtype, place)
    store: ExpertStore = DiskStore(index_checkpoint(checkpoint, model, layers), direct_io=direct_io)
    try:
        manifest = describe_model(model, layers, checkpoint.tokenizer, checkpoint.model_id, checkpoint.revision)
        options = StrategyOptions(
            budget, policy, predictor, prefetch, lookahead, profile, scope, misses, online, online_state
        )
        resolve = resolve_predict_only if predict_only else resolve_strategy
        strategy = resolve(options, manifest, slot_bits(store, manifest.geometry))

        def routers() -> dict[int, Router]:
            plain = resolve_strategy(
                StrategyOptions(manifest.geometry.top_k), manifest, slot_bits(store, manifest.geometry)
            )
            with OffloadedRun(model, layers, store, plain, manifest, keeps_store=True):
                return find_routers(model)

        modules = _state_modules(strategy, layers, routers)
        if tier == "host":
            with closing(store) as files:
                store = HostStore.filled(files, layers[0].num_experts)
        run = OffloadedRun(
            model, layers, store, strategy, manifest, modules, tokenizer=checkpoint.tokenizer, readers=readers,
            timeout_s=timeout_s, keep_rows=keep_rows,
        )  # fmt: skip
        _refuse_calls_without_experts(model, layers)
        return run
    except BaseException:
        store.close()
        raise


def _refuse_calls_without_experts(model: nn.Module, layers: Mapping[int, ExpertsLayer]) -> None:
    """Let a model that was loaded without experts name the reason when it, or a part, is called outside of its run."""

    def refuse(module: nn.Module, args: tuple[Any, ...]) -> None:
        if ATTRIBUTE not in layers[0].module.__dict__:
            raise UserError(f"{type(model).__name__}: was loaded without its experts; call it within its run")

    for module in (model, *(experts.module for experts in layers.values())):
        module.register_forward_pre_hook(refuse)


def _state_modules(
    strategy: RunStrategy, layers: Mapping[int, ExpertsLayer], routers: Callable[[], Mapping[int, Router]]
) -> "dict[StateKind, dict[int, nn.Module]]":
    """Return the modules that receive the hidden states that the predictor reads, by kind."""
    predictor = (strategy.scored or strategy).predictor
    kinds = () if predictor is None else predictor.information.hidden_states
    probed = routers() if "router_inputs" in kinds else {}
    modules = {layer: router.module for layer, router in probed.items()}
    return {kind: state_modules(layers, kind, modules) for kind in kinds}


def describe_model(
    model: "PreTrainedModel",
    layers: Mapping[int, ExpertsLayer],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    model_id: str | None = None,
    revision: str | None = None,
) -> Manifest:
    """Describe a model as a trace set of its run would.

    Args:
        model: MoE model of transformers, with or without its experts.
        layers: Experts of the model.
        tokenizer: Tokenizer of the model (default: unknown, except its number of ids).
        model_id: Name of the model (default: the name or path that it was loaded from).
        revision: Revision of the model (default: unknown).
    """
    name = model_id or model.config.name_or_path or type(model).__name__
    if Path(name).is_dir():
        name = Path(name).resolve().name
    geometry = runtime_geometry(model, layers, Path(name).name, experts_per_token(model, layers))
    if tokenizer is None:
        described = Tokenizer("unknown", embedding_rows(model) or NO_TOKEN_IDS.vocab_size)
    else:
        recorded = recorded_tokenizer(model, tokenizer)
        described = Tokenizer(Path(name).name, recorded.vocab_size, recorded.sha256)
    return Manifest(
        geometry=geometry,
        tokenizer=described,
        model_id=name,
        quantization_bits=8.0 * layers[0].layout.fields[0].dtype.itemsize,
        author="model",
        source="run",
        tool_version=__version__,
        revision=revision,
        hidden_size=getattr(model.config.get_text_config(), "hidden_size", None),
    )


def slot_bits(store: ExpertStore, geometry: Geometry) -> float:
    """Return the bits of a slot per expert parameter; gaps between parameters count."""
    return 8 * max(layout.stride for layout in store.layouts.values()) / geometry.params_per_expert
