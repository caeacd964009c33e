"""Recording a model's routing with one hook on each experts module, whatever the architecture.

In transformers 5 the experts of nearly every mixture are a module whose forward takes the hidden states, the chosen
experts and their weights, so that modules are found by their signature and what is recorded is what the experts
received: the router's logits would miss selection biases and groups. Where no module is given the choice (Llama 4,
JetMoE), the routers that transformers itself declares are hooked, and the choice is the top K of their logits, which is
how those select.

A block that computes its experts in one fused kernel never calls that module (gpt-oss in its native MXFP4, and what the
kernels library puts in place of a forward). What its router chooses is recorded then: of the router's call, or, where
the kernel reads the router's weight without calling it, of a call of our own on what the block was given.

What is given to no expert is none: an id from the number of experts on (longcat_flash has identity experts there), and
a weight of exactly 0, which adds nothing (a token of zaya that skips a layer is given to the first expert with it).
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moe_beyond.errors import UserError
from moe_beyond.traces.hidden_states import HiddenStates

# The second and third parameter of an experts module's forward; two spellings are in use.
SIGNATURES = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))
LAYER = re.compile(r"(?:layers|blocks)\.(\d+)\.")
ATTENTION = re.compile(r"attn|attention")
LARGEST = float(np.finfo(np.float16).max)
UNFUSED = "load it without fused kernels (use_kernels=False), or dequantized (Mxfp4Config(dequantize=True))"
EXPERTS = ("num_experts", "num_routed_experts", "n_routed_experts", "num_local_experts")
"""What modules call how many experts they hold; longcat_flash counts its identity experts in the first of them."""


@dataclass(frozen=True)
class HookTarget:
    """A module whose calls tell a layer's routing.

    Attributes:
        module: The experts module, or the router.
        name: Name of that module in the model.
        block: The model's layer that it is in.
        names: Of the parameters that hold the choice; None where a router's logits do.
        index: Of the logits among what a router returns.
        top_k: Experts that a router's top K are.
        num_experts: Real experts of the layer; ids from there on stand for none (identity and skip experts).
    """

    module: nn.Module
    name: str
    block: nn.Module
    names: tuple[str, str] | None
    index: int = 0
    top_k: int = 0
    num_experts: int = 0


@dataclass(frozen=True)
class ForwardRecord:
    """What one forward of the model routed.

    Attributes:
        experts: ``(N, L, K)`` int64 ids in the router's order, N tokens of all rows one after the other; -1 where a
            slot holds none.
        gate_weights: ``(N, L, K)`` float32, in the same order; 0 for none.
        hidden_states: Of all N, where they were asked for.
    """

    experts: npt.NDArray[np.int64]
    gate_weights: npt.NDArray[np.float32]
    hidden_states: HiddenStates | None = None


class Recorder:
    """What the hooked modules received since the last `calls`; made by `recording`.

    Attributes:
        moe_layers: Indices of the model's layers that hold experts, ascending.
        num_experts: Experts of each such layer.
        with_states: Whether it keeps hidden states.
    """

    def __init__(self, moe_layers: tuple[int, ...], num_experts: int, *, with_states: bool = False) -> None:
        self.moe_layers, self.num_experts, self.with_states = moe_layers, num_experts, with_states
        self._experts: dict[int, list[Tensor]] = {layer: [] for layer in moe_layers}
        self._weights: dict[int, list[Tensor]] = {layer: [] for layer in moe_layers}
        self._router_inputs: dict[int, list[Tensor]] = {layer: [] for layer in moe_layers}
        self._layer_inputs: dict[int, list[Tensor]] = {layer: [] for layer in moe_layers}

    def count(self, layer: int) -> int:
        """Return how often a layer has routed since the last `calls`."""
        return len(self._experts[layer])

    def layer_without_numbers(self) -> int | None:
        """Return the first layer with a gate weight that is not finite since the last `calls`, or None."""
        return next(
            (layer for layer in self.moe_layers if not all(w.isfinite().all() for w in self._weights[layer])), None
        )

    def _receive(self, layer: int, num_experts: int, experts: Tensor, weights: Tensor) -> None:
        there = (experts < num_experts) & (weights != 0)
        self._experts[layer].append(experts.detach().where(there, -1).reshape(-1, experts.shape[-1]))
        self._weights[layer].append(weights.detach().where(there, 0).reshape(-1, experts.shape[-1]).float())

    def calls(self) -> list[ForwardRecord]:
        """Return and forget what was recorded, one `ForwardRecord` per forward of the model.

        Raises:
            UserError: A layer did not route in each of them.
        """
        kept = self._experts, self._weights, self._router_inputs, self._layer_inputs
        counts = {layer: len(calls) for layer, calls in self._experts.items()}
        most = max(counts.values())
        if few := [layer for layer, count in counts.items() if count < most or not count]:
            raise UserError(
                f"layer {few[0]} routed in {counts[few[0]]} of {most} forwards of the model; its experts were not "
                f"called, and no router shows their choice; {UNFUSED}"
            )
        found = [self._call(number) for number in range(most)]
        for by_layer in kept:
            for calls in by_layer.values():
                calls.clear()
        return found

    def _call(self, number: int) -> ForwardRecord:
        def stacked(by_layer: dict[int, list[Tensor]]) -> npt.NDArray[Any]:
            found = torch.stack([by_layer[layer][number] for layer in self.moe_layers], 1)
            array: npt.NDArray[Any] = found.cpu().numpy()
            return array

        states = None
        if self.with_states:  # what was beyond half precision is infinite
            kept = (stacked(by_layer) for by_layer in (self._router_inputs, self._layer_inputs))
            states = HiddenStates(*(np.clip(array, -LARGEST, LARGEST, out=array) for array in kept))
        return ForwardRecord(stacked(self._experts), stacked(self._weights), states)

    def take(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return and forget what was recorded.

        Returns:
            Expert ids (-1 for none) and router weights, both ``(N, L, K)``, in the router's order; N counts tokens over
            all calls.
        """
        calls = self.calls()
        experts = np.concatenate([call.experts for call in calls]).astype(np.int64)
        return experts, np.concatenate([call.gate_weights for call in calls])


@contextmanager
def recording(model: nn.Module, readers: Mapping[int, nn.Module] | None = None) -> Iterator[Recorder]:
    """Record a model's routing while the block runs.

    Args:
        model: A transformers mixture of experts.
        readers: Given, hidden states are recorded as well: by layer, the module whose first argument is what the
            layer's router reads. Where it names none, that is what the experts get.

    Raises:
        UserError: No module of the model takes chosen experts.
    """
    found = find_experts(model)
    recorder = Recorder(
        tuple(sorted(found)),
        max(hooked.num_experts for hooked in found.values()),
        with_states=readers is not None,
    )
    handles = [handle for layer, hooked in found.items() for handle in _hook(model, recorder, layer, hooked)]
    if readers is not None:
        for layer, hooked in found.items():
            handles += [
                _keep_first(readers.get(layer, hooked.module), recorder._router_inputs[layer]),  # noqa: SLF001
                _keep_first(hooked.block, recorder._layer_inputs[layer]),  # noqa: SLF001
            ]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def find_experts(model: nn.Module) -> dict[int, HookTarget]:
    """Find the module of each layer whose calls show its routing; wrappers (such as LoRA's) are unwrapped.

    Raises:
        UserError: There is none: the model is dense, or of a kind that transformers does not declare. Or a layer has
            two, or holds a part of its experts only.
    """
    modules = dict(model.named_modules())
    names: dict[int, str] = {}
    for name, module in modules.items():
        takes_choice = tuple(inspect.signature(type(module).forward).parameters)[2:4] in SIGNATURES
        if takes_choice and (layer := LAYER.search(f"{name}.")):
            outer = names.get(int(layer[1]))
            if outer is not None and not name.startswith(f"{outer}."):
                raise UserError(
                    f"{type(model).__name__}: layer {layer[1]} has experts at {name} and elsewhere; record its "
                    "language model alone"
                )
            names[int(layer[1])] = name
    return {layer: _hooked(model, modules, name) for layer, name in names.items()} or _routers(model)


def _hooked(model: nn.Module, modules: Mapping[str, nn.Module], name: str) -> HookTarget:
    """Describe an experts module.

    Raises:
        UserError: It holds a part of the experts only.
    """
    module = modules[name]
    count = _count(module)
    if getattr(module, "_is_expert_parallel", False):
        raise UserError(
            f"{type(model).__name__}: its experts are spread over several processes (expert parallelism), and {name} "
            f"has {count} of them; load it with a device_map, or with tensor parallelism"
        )
    layer = LAYER.search(f"{name}.")
    assert layer is not None
    first, second = tuple(inspect.signature(type(module).forward).parameters)[2:4]
    return HookTarget(module, name, modules[name[: layer.end() - 1]], (first, second), num_experts=count)


def mixture_name(model: nn.Module, hooked: HookTarget) -> str:
    """Return the name of the module around a layer's experts, or its router, whose forward routes.

    Wrappers are climbed past: modules that pass on what they are given (``*args``), and those that hold a base layer.
    """
    name = hooked.name.rpartition(".")[0]
    while name and _wraps(model.get_submodule(name)):
        name = name.rpartition(".")[0]
    return name


def _wraps(module: nn.Module) -> bool:
    parameters = inspect.signature(type(module).forward).parameters.values()
    passes_on = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    return passes_on or isinstance(getattr(module, "base_layer", None), nn.Module)


def _routers(model: nn.Module) -> dict[int, HookTarget]:
    """Find the routers whose logits the model's own class declares; attention that is a mixture too is none."""
    declared: list[Any] = []
    for part in model.modules():
        of_part = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits", ())
        declared += of_part if isinstance(of_part, list) else [of_part] if of_part else []
    found: dict[int, HookTarget] = {}
    for one in declared:
        kind, index = getattr(one, "target_class", one), getattr(one, "index", 0)
        for name, module in model.named_modules():
            layer, top_k = LAYER.search(f"{name}."), getattr(module, "top_k", None)
            if isinstance(module, kind) and layer and top_k and not ATTENTION.search(name):
                block = model.get_submodule(name[: layer.end() - 1])
                found[int(layer[1])] = HookTarget(module, name, block, None, index, top_k, _count(module))
    if not found:
        raise UserError(f"{type(model).__name__}: no experts module found; is it a mixture of experts?")
    return found


def _count(module: nn.Module) -> int:
    """Return how many real experts a module holds, or chooses from."""
    counts = [count for name in EXPERTS if isinstance(count := getattr(module, name, None), int)]
    if not counts:
        raise UserError(f"{type(module).__name__}: does not say how many experts it has ({', '.join(EXPERTS)})")
    return min(counts)


def _weights(output: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """Return the gate weights of a router's choice: of scores that it returns beside its logits, else their softmax."""
    for part in output if isinstance(output, tuple) else ():
        if isinstance(part, Tensor) and part is not logits and part.shape == logits.shape:
            return part.gather(-1, experts)
    return logits.gather(-1, experts).softmax(-1)


def _keep_first(module: nn.Module, kept: list[Tensor]) -> Any:
    """Keep what a module is given first, in half precision: the one copy there has to be, since models add in place."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = args[0] if args else next(iter(kwargs.values()))
        kept.append(state.detach().to("cpu", torch.float16, copy=True).view(-1, state.shape[-1]))

    return module.register_forward_pre_hook(before, with_kwargs=True)


def _hook(model: nn.Module, recorder: Recorder, layer: int, hooked: HookTarget) -> list[Any]:
    names = hooked.names
    if names is None:

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            logits = output[hooked.index] if isinstance(output, tuple) else output
            if logits.shape[-1] != hooked.num_experts:
                raise UserError(
                    f"{type(module).__name__}: its router has logits of {logits.shape[-1]} choices, not of its "
                    f"{hooked.num_experts} experts; what it chooses cannot be recorded"
                )
            experts = logits.topk(hooked.top_k).indices
            weights = _weights(output, logits, experts)
            recorder._receive(layer, hooked.num_experts, experts, weights)  # noqa: SLF001

        return [hooked.module.register_forward_hook(after)]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        received = dict(zip(("hidden_states", *names), args, strict=False)) | kwargs
        recorder._receive(layer, hooked.num_experts, received[names[0]], received[names[1]])  # noqa: SLF001

    called = hooked.module.register_forward_pre_hook(before, with_kwargs=True)
    return [called, *_hook_fused(model, recorder, layer, hooked)]


def _hook_fused(model: nn.Module, recorder: Recorder, layer: int, hooked: HookTarget) -> list[Any]:
    """Record a layer's router in each forward of its mixture that did not call the experts module."""
    mixture = model.get_submodule(mixture_name(model, hooked))
    if mixture is hooked.block:  # the layer itself routes: there is no block that a kernel could stand for
        return []
    routers = [m for name, m in mixture.named_children() if re.search("router|gate", name)]
    begun: list[int] = []
    returned: list[Any] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begun.append(recorder.count(layer))
        returned.clear()

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        returned.append(output)

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if recorder.count(layer) > begun.pop():
            return
        outputs = list(returned)
        if not outputs:
            states = args[0] if args else next(iter(kwargs.values()))
            outputs = [router(states.reshape(-1, states.shape[-1])) for router in routers]
        choice = next(filter(None, map(_choice, outputs)), None)
        if choice is None:
            raise UserError(
                f"{type(model).__name__}: layer {layer} computes its experts without calling {hooked.name}, and its "
                f"router does not show which it chooses; {UNFUSED}"
            )
        recorder._receive(layer, hooked.num_experts, *choice)  # noqa: SLF001

    return [
        mixture.register_forward_pre_hook(begin, with_kwargs=True),
        *(router.register_forward_hook(keep) for router in routers),
        mixture.register_forward_hook(end, prepend=True, with_kwargs=True),  # before steering leaves the mixture
    ]


def _choice(output: Any) -> tuple[Tensor, Tensor] | None:
    """Return the ids and weights, both ``(N, K)``, of a router's output that holds them; None of another."""
    tensors = [part for part in output if isinstance(part, Tensor)] if isinstance(output, tuple) else []
    ids = next((tensor for tensor in tensors if tensor.dtype in (torch.int64, torch.int32) and tensor.ndim > 1), None)
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    if ids is None:
        return None
    weights = next((tensor for tensor in reversed(floating) if tensor.shape == ids.shape), None)
    if weights is None:  # of all experts
        every = next((t for t in reversed(floating) if t.ndim == ids.ndim and t.shape[:-1] == ids.shape[:-1]), None)
        weights = None if every is None else every.gather(-1, ids.long())
    return None if weights is None else (ids.long(), weights)
