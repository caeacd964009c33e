"""A model whose experts are moved into slots while it runs."""

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial, wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moe_beyond.cache.cache import Wave
from moe_beyond.cache.misses import MOVE
from moe_beyond.collect.devices import describe, input_device
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.runtime.experts import ExpertsLayer
from moe_beyond.runtime.memory import Memory, memory_of
from moe_beyond.runtime.options import READERS
from moe_beyond.runtime.result import run_result
from moe_beyond.runtime.slots.copies import Copier, make_copier
from moe_beyond.runtime.slots.host_kernel import HostKernel
from moe_beyond.runtime.slots.kernels import SlotKernel
from moe_beyond.runtime.slots.mover import Mover
from moe_beyond.runtime.slots.pool import SlotPool
from moe_beyond.runtime.slots.registry import ATTRIBUTE, refuse_compilation, slot_kernels
from moe_beyond.runtime.stepping.controller import make_controller
from moe_beyond.runtime.stepping.ledger import make_ledger
from moe_beyond.runtime.stepping.prediction_log import PredictionLog
from moe_beyond.runtime.stepping.sequences import SequenceLog
from moe_beyond.runtime.stepping.states import watch_states
from moe_beyond.runtime.stepping.telemetry import Telemetry
from moe_beyond.runtime.stepping.turns import Turns
from moe_beyond.runtime.storage.store import ExpertStore, HostStore
from moe_beyond.runtime.strategy import RunStrategy
from moe_beyond.safe_text import shown
from moe_beyond.simulator import Result
from moe_beyond.traces.manifest import Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moe_beyond.predictors.information import StateKind
    from moe_beyond.predictors.online import OnlineUpdates


Ints = npt.NDArray[np.int64]

TIMEOUT_S = 60.0


class OffloadedRun:
    """A model whose experts are moved into slots when they are needed, within a block.

    Leaving the block restores the registry of transformers, removes all hooks, and ends all threads. A model that was
    loaded whole gets its experts back; a model that was loaded without experts cannot run any more.

    Args:
        model: MoE model of transformers.
        layers: Experts of the model.
        store: Source of the experts; the run closes it at its end.
        strategy: Strategy of the run.
        manifest: Description of the model.
        state_modules: Modules that receive the hidden states that the predictor reads, by kind (default: none).
        tokenizer: Tokenizer of the model (default: None).
        readers: Number of threads that read experts (default: 4).
        timeout_s: Seconds without progress after which a forward that waits fails (default: 60).
        keep_rows: Whether telemetry is kept for every event, about 5 KB per token for 26 layers (default: False).
        keeps_store: Whether the store stays open after the run (default: False).

    Attributes:
        model: Model without its experts, which generates within the block.
        tokenizer: Tokenizer of the model; None if the caller loaded the model.
        strategy: Strategy of the run.
        manifest: Description of the model, as a trace set of the run has it.
        cache: Cache core of the run, with its counters.
        pool: Memory of the slots.
        store: Source of the experts.
        telemetry: Times and bytes of the run.
        log: Sequences that the model has read.
        predictions: Figures of a predictor that scores without acting; None without one.
        demanded: Number of experts that were demanded, token by token.
        readers: Number of threads that read experts.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        layers: Mapping[int, ExpertsLayer],
        store: ExpertStore,
        strategy: RunStrategy,
        manifest: Manifest,
        state_modules: "Mapping[StateKind, Mapping[int, nn.Module]] | None" = None,
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        readers: int = READERS,
        timeout_s: float = TIMEOUT_S,
        keep_rows: bool = False,
        keeps_store: bool = False,
    ) -> None:
        if not isinstance(readers, int) or readers < 1:
            raise UserError(f"readers must be a whole number of at least 1 (got {shown(readers)})")
        if not isinstance(timeout_s, int | float) or not timeout_s > 0:
            raise UserError(f"timeout_s must be a number of seconds above 0 (got {shown(timeout_s)})")
        self.model, self.tokenizer, self.store = model, tokenizer, store
        self.strategy, self.manifest, geometry = strategy, manifest, manifest.geometry
        self.telemetry, self.log = Telemetry(keep_rows), SequenceLog(geometry)
        self.demanded = 0
        self._layers, self._state_modules = layers, state_modules or {}
        self.pool = SlotPool(strategy.settings.slots, store.layouts, input_device(model))
        self._ledger = make_ledger(geometry, strategy, self.pool, self.telemetry)
        self.cache = self._ledger.cache
        self.predictions = None
        if strategy.scored is not None:
            sizes = [store.layouts[layer].nbytes for layer in range(geometry.num_layers)]
            self.predictions = PredictionLog(geometry, strategy.scored, self.cache, sizes)
        self._keeps_store = keeps_store
        self.readers, self._timeout_s = readers, timeout_s
        self._block = ExitStack()
        self._entered = False
        self._turns = Turns()
        self._running = False  # whether a forward is running
        # Converting a model changes its parameters in place, but not the experts outside of it.
        self._kept = next(model.parameters())
        self._kept_form = self._kept.dtype, self._kept.device

    @property
    def online(self) -> "OnlineUpdates | None":
        """Online updates of the predictor, which are complete after the block; None without them."""
        return (self.strategy.scored or self.strategy).online

    @property
    def geometry(self) -> Geometry:
        """Geometry of the model."""
        return self.manifest.geometry

    def __enter__(self) -> Self:
        """Move the experts out of the model, and serve them from slots.

        Raises:
            UserError: The model is offloaded already, or this run has ended.
        """
        if self._entered:
            raise UserError(f"{type(self.model).__name__}: a run is entered once; create another one")
        self._entered = True
        with ExitStack() as block:
            if not self._keeps_store:
                block.callback(self.store.close)
            block.callback(self.pool.free)
            copier = make_copier(self.pool, self.store)
            block.callback(copier.close)
            mover = Mover(
                self.store, copier, next_prefetch=self._ledger.next_prefetch, arrived=self._ledger.arrived,
                readers=self.readers, timeout_s=self._timeout_s,
            )  # fmt: skip
            block.callback(mover.close)
            weakref.finalize(self, _close, mover, copier)  # for a run that is dropped without an exit
            self._controller = make_controller(self.geometry, self.strategy, self._ledger, mover, copier)
            for layer, experts in self._layers.items():
                self._take_experts(block, layer, experts)
            block.enter_context(slot_kernels())
            self._wrap_forward(block)
            self._wrap_generate(block)
            for handle in self._hooks():
                block.callback(handle.remove)
            self._block = block.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the run and free its slots; its counts and telemetry stay.

        A running forward of another thread ends before.
        """
        with self._turns.forward:
            if self.online is not None and error is None:
                (self.predictions or self._controller).end()
            self._block.close()

    def memory(self) -> Memory:
        """Return the memory of the run now, without activations and the cache of keys and values."""
        return memory_of(self.model, self._layers, self.pool, self.store, self.readers)

    def event(self, layer: int, routed: Ints, gate_weights: Tensor) -> Iterator[Wave]:
        """Make the experts of an event resident, for `moe_beyond.runtime.slots.kernels`.

        Raises:
            UserError: The model itself was not called.
        """
        if not self._running:
            raise UserError(
                f"{type(self.model).__name__}: its experts ran outside of its own call; call the model itself, instead "
                "of a part"
            )
        yield from self._controller.event(layer, routed)
        if self.predictions is not None:
            self.predictions.event(layer, routed, gate_weights)
        self.log.add(routed)
        self.demanded += routed.size

    def result(self) -> Result:
        """Return the counts so far and the measured times."""
        return run_result(
            self.geometry, self.strategy.settings, cache=self.cache, telemetry=self.telemetry, log=self.log,
            demanded=self.demanded, device=describe(self.model),
        )  # fmt: skip

    def wait(self, experts: list[int]) -> None:
        """Wait until experts are in their slots, for `moe_beyond.runtime.slots.kernels`."""
        self._controller.wait(experts)

    def computed_on_host(self, seconds: float) -> None:
        """Note the seconds of computing on the host, for `moe_beyond.runtime.slots.kernels`."""
        self._controller.computed_on_host(seconds)

    def _take_experts(self, block: ExitStack, layer: int, experts: ExpertsLayer) -> None:
        """Take a layer's parameters out of the model, and let slots serve it."""
        module = experts.module
        if ATTRIBUTE in module.__dict__:
            raise UserError(f"{type(self.model).__name__}: is offloaded already; end that run first")
        weights, host = self.pool.views(self.store.layouts[layer]), None
        if self.strategy.settings.misses != MOVE and isinstance(self.store, HostStore):
            host = HostKernel(module, layer, experts.num_experts, self.store)
        kernel = SlotKernel(module, layer, experts.num_experts, weights, self, host)
        module.__dict__[ATTRIBUTE] = kernel
        block.callback(module.__dict__.pop, ATTRIBUTE)
        for field in experts.layout.fields:
            parameter = getattr(module, field.name)
            if parameter is not None:
                block.callback(setattr, module, field.name, parameter)
                setattr(module, field.name, None)

    def _hooks(self) -> Iterator[Any]:
        """Hook saving, and the hidden states that the predictor reads."""
        for module in (self.model, *(experts.module for experts in self._layers.values())):
            yield module.register_state_dict_pre_hook(_refuse_saving)  # type: ignore[no-untyped-call]
        for kind, modules in self._state_modules.items():
            yield from watch_states(modules, partial((self.predictions or self._controller).take_state, kind))

    def _wrap_forward(self, block: ExitStack) -> None:
        """Let the run know the begin and the end of each forward, however it ends.

        PyTorch's hooks are not called after a forward that Ctrl-C has ended.
        """
        forward = self.model.forward

        @wraps(forward)
        def run_forward(*args: Any, **kwargs: Any) -> Any:
            refuse_compilation()
            with self._turns.text, self._turns.forward:
                self._check_unchanged()
                began = time.perf_counter()
                try:
                    self._running = True
                    self._begin_forward(args, kwargs)
                    output = forward(*args, **kwargs)
                    if self.pool.memory.is_cuda:  # kernels are still running
                        torch.cuda.current_stream(self.pool.memory.device).synchronize()
                    self._turns.note(kwargs.get("past_key_values"), output)
                    return output
                finally:
                    self._controller.end_step(time.perf_counter() - began)
                    self._running = False

        self._override(block, "forward", run_forward)

    def _wrap_generate(self, block: ExitStack) -> None:
        """Let threads that generate take turns, so that each sequence is read without others in between."""
        generate = getattr(self.model, "generate", None)
        if generate is None:
            return

        @wraps(generate)
        def generate_in_turn(*args: Any, **kwargs: Any) -> Any:
            with self._turns.text:
                return generate(*args, **kwargs)

        self._override(block, "generate", generate_in_turn)

    def _override(self, block: ExitStack, name: str, function: Callable[..., Any]) -> None:
        """Replace a method of the model until the block ends."""
        model: Any = self.model
        if name in vars(model):
            block.callback(setattr, model, name, getattr(model, name))
        else:
            block.callback(delattr, model, name)
        setattr(model, name, function)

    def _begin_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a step with the arguments of the model's forward."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        token_ids, past = None, 0
        if isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) == 1:
            cache = kwargs.get("past_key_values")
            token_ids, past = ids[0].cpu().numpy().astype(np.int64), _past_length(cache)
            if past < 0 or (past > 0 and not self._turns.continues(cache)):
                token_ids = None
        states = kwargs.get("inputs_embeds") if ids is None else ids
        shape = tuple(states.shape[:2]) if isinstance(states, Tensor) else (0, 0)
        sequence = self.log.begin(token_ids, past)
        followed = token_ids if sequence >= 0 else None
        self._controller.begin_step(followed, past, shape, sequence)
        if self.predictions is not None:
            self.predictions.begin_step(followed, past)

    def _check_unchanged(self) -> None:
        """Check that nobody has converted the model.

        Raises:
            UserError: The model has another type or device.
        """
        if (self._kept.dtype, self._kept.device) != self._kept_form:
            dtype, device = self._kept_form
            raise UserError(
                f"{type(self.model).__name__}: was converted during the run (got {self._kept.dtype} on "
                f"{self._kept.device}); leave it in {dtype} on {device}, or convert it before"
            )


def _close(mover: Mover, copier: Copier) -> None:
    """End the threads, then unpin the memory that they read into."""
    mover.close()
    copier.close()


def _refuse_saving(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise UserError(f"{type(model).__name__}: its state has no experts while it is offloaded; save it after the run")


def _past_length(past: Any) -> int:
    """Return the number of tokens that a cache of keys and values holds; -1 if it is unknown."""
    if past is None:
        return 0
    length = getattr(past, "get_seq_length", None)
    return -1 if length is None else int(length())
