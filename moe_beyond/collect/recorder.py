"""Recording a model's routing with one hook on each experts module, for every architecture.

In transformers 5 the experts of nearly every architecture are a module whose forward takes the hidden states, the
selected experts and their gate weights. Such modules are found by their signature. The record holds the arguments of
the experts; the router's logits would miss selection biases and groups. In Llama 4 and JetMoE no module receives the
choice. There the routers that transformers itself declares are hooked, and the choice is the top K of their logits.

A block that computes its experts in one fused kernel never calls the experts module (gpt-oss in its native MXFP4, and
forwards replaced by the kernels library). Then the choice of its router is recorded: from the router's call or, if the
kernel reads the router's weight directly, from an extra call of the router on the block's input.

Some ids and weights stand for padding. Ids from the number of experts on do (identity experts of longcat_flash), and so
does a weight of exactly 0, which adds nothing (zaya assigns the first expert to tokens that skip a layer).
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
from moe_beyond.traces.hidden_states import HiddenStates, StateFormat, to_int8
from moe_beyond.traces.state_projection import StateProjection

# Second and third parameter of an experts module's forward; two spellings are in use.
SIGNATURES = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))
LAYER = re.compile(r"(?:layers|blocks)\.(\d+)\.")
ATTENTION = re.compile(r"attn|attention")
LARGEST = float(np.finfo(np.float16).max)
UNFUSED_HINT = "load it without fused kernels (use_kernels=False), or dequantized (Mxfp4Config(dequantize=True))"
COUNT_ATTRIBUTES = ("num_experts", "num_routed_experts", "n_routed_experts", "num_local_experts")
"""Attributes in which modules store their number of experts; longcat_flash counts identity experts in the first."""


@dataclass(frozen=True)
class HookTarget:
    """A module whose calls show the routing of one layer.

    Attributes:
        module: Experts module, or router.
        name: Name of the module in the model.
        layer: Layer of the model that contains the module.
        parameters: Names of the forward parameters that hold the choice and its weights; None for a router, whose
            logits show the choice.
        index: Position of the logits in the output of a router (default: 0).
        top_k: Experts per token, for a router (default: 0).
        num_experts: Real experts of the layer; larger ids are padding: identity and skip experts (default: 0).
    """

    module: nn.Module
    name: str
    layer: nn.Module
    parameters: tuple[str, str] | None
    index: int = 0
    top_k: int = 0
    num_experts: int = 0


@dataclass(frozen=True)
class ForwardRecord:
    """The routing of one forward of the model.

    Attributes:
        experts: ``(N, L, K)`` int64 ids in router order, for N tokens of all rows in sequence; -1 for padding.
        gate_weights: ``(N, L, K)`` float32, in the same order; 0 for padding.
        hidden_states: Hidden states of all N tokens at the recorded layers, or None.
    """

    experts: npt.NDArray[np.int64]
    gate_weights: npt.NDArray[np.float32]
    hidden_states: HiddenStates | None = None


class Recorder:
    """Collects the inputs of hooked modules until `pop` returns them; made by `recording`.

    Args:
        moe_layers: Indices of the model's MoE layers, ascending.
        num_experts: Experts per MoE layer.
        states: Form of the recorded hidden states (default: None, no hidden states).
    """

    def __init__(self, moe_layers: tuple[int, ...], num_experts: int, *, states: StateFormat | None = None) -> None:
        self.moe_layers, self.num_experts, self.states = moe_layers, num_experts, states
        self._experts: dict[int, list[Tensor]] = {layer: [] for layer in moe_layers}
        self._weights: dict[int, list[Tensor]] = {layer: [] for layer in moe_layers}
        self._router_inputs: dict[int, list[Tensor]] = {layer: [] for layer in moe_layers}
        self._layer_inputs: dict[int, list[Tensor]] = {layer: [] for layer in moe_layers}

    def count(self, layer: int) -> int:
        """Return how often a layer has routed since the last `pop`.

        Args:
            layer: Index of the model's layer.
        """
        return len(self._experts[layer])

    def first_nonfinite_layer(self) -> int | None:
        """Return the first layer with a gate weight that is not finite since the last `pop`, or None."""
        return next(
            (layer for layer in self.moe_layers if not all(w.isfinite().all() for w in self._weights[layer])), None
        )

    def _record(self, layer: int, num_experts: int, experts: Tensor, weights: Tensor) -> None:
        real = (experts < num_experts) & (weights != 0)
        self._experts[layer].append(experts.detach().where(real, -1).reshape(-1, experts.shape[-1]))
        self._weights[layer].append(weights.detach().where(real, 0).reshape(-1, experts.shape[-1]).float())

    def pop(self) -> list[ForwardRecord]:
        """Return the records since the last call, one per forward of the model, and clear them.

        Raises:
            UserError: A layer did not route in every forward.
        """
        buffers = self._experts, self._weights, self._router_inputs, self._layer_inputs
        counts = {layer: len(tensors) for layer, tensors in self._experts.items()}
        most = max(counts.values())
        if incomplete := [layer for layer, count in counts.items() if count < most or not count]:
            raise UserError(
                f"layer {incomplete[0]} routed in {counts[incomplete[0]]} of {most} forwards of the model; its experts "
                f"were not called, and no router shows their choice; {UNFUSED_HINT}"
            )
        records = [self._forward_record(number) for number in range(most)]
        for by_layer in buffers:
            for tensors in by_layer.values():
                tensors.clear()
        return records

    def _forward_record(self, number: int) -> ForwardRecord:
        def stacked(by_layer: dict[int, list[Tensor]], layers: tuple[int, ...]) -> npt.NDArray[Any]:
            array: npt.NDArray[Any] = torch.stack([by_layer[layer][number] for layer in layers], 1).cpu().numpy()
            return array

        states = None
        if self.states is not None:  # half precision has turned larger values into infinity
            arrays = (stacked(by_layer, self.states.layers) for by_layer in (self._router_inputs, self._layer_inputs))
            states = HiddenStates(*(np.clip(array, -LARGEST, LARGEST, out=array) for array in arrays))
            states = to_int8(states) if self.states.dtype == "int8" else states
        return ForwardRecord(stacked(self._experts, self.moe_layers), stacked(self._weights, self.moe_layers), states)

    def pop_concatenated(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the routing since the last call, all forwards concatenated, and clear it.

        Returns:
            Expert ids (-1 for padding) and gate weights, both ``(N, L, K)``, in router order; N counts the tokens of
            all forwards.
        """
        records = self.pop()
        experts = np.concatenate([record.experts for record in records]).astype(np.int64)
        return experts, np.concatenate([record.gate_weights for record in records])


@contextmanager
def recording(
    model: nn.Module,
    inputs: Mapping[int, nn.Module] | None = None,
    states: StateFormat | None = None,
    projection: StateProjection | None = None,
) -> Iterator[Recorder]:
    """Record a model's routing while the block runs.

    Args:
        model: MoE model of transformers.
        inputs: Layer -> module whose first argument is the input of the layer's router. If given, hidden states are
            recorded; for layers that it lacks, the input of the experts is recorded (default: None).
        states: Form of the recorded hidden states (default: float16 of all MoE layers).
        projection: Projection of the hidden states, one matrix per layer of ``states`` (default: none).

    Raises:
        UserError: No module of the model receives selected experts.
    """
    targets = find_experts(model)
    moe_layers = tuple(sorted(targets))
    if inputs is not None and states is None:
        states = StateFormat("float16", moe_layers)
    recorder = Recorder(moe_layers, max(target.num_experts for target in targets.values()), states=states)
    handles = [handle for layer, target in targets.items() for handle in _hook(model, recorder, layer, target)]
    if inputs is not None and states is not None:
        for position, layer in enumerate(states.layers):
            target = targets[layer]
            of_router, of_layer = (None, None) if projection is None else projection.at(position)
            handles += [
                _record_input(inputs.get(layer, target.module), recorder._router_inputs[layer], of_router),  # noqa: SLF001
                _record_input(target.layer, recorder._layer_inputs[layer], of_layer),  # noqa: SLF001
            ]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def find_experts(model: nn.Module) -> dict[int, HookTarget]:
    """Find the module of each layer whose calls show its routing; wrappers (such as LoRA's) are unwrapped.

    Args:
        model: MoE model of transformers.

    Returns:
        Index of the model's layer -> module.

    Raises:
        UserError: The model is dense, or transformers does not declare its routers; or a layer has two experts modules,
            or holds only a part of its experts.
    """
    modules = dict(model.named_modules())
    names: dict[int, str] = {}
    for name, module in modules.items():
        takes_choice = tuple(inspect.signature(type(module).forward).parameters)[2:4] in SIGNATURES
        if takes_choice and (layer := LAYER.search(f"{name}.")):
            outer = names.get(int(layer[1]))
            if outer is not None and not name.startswith(f"{outer}."):
                raise UserError(
                    f"{type(model).__name__}: layer {layer[1]} has experts at {name} and at {outer}; record only its "
                    "language model"
                )
            names[int(layer[1])] = name
    return {layer: _experts_target(model, modules, name) for layer, name in names.items()} or _router_targets(model)


def _experts_target(model: nn.Module, modules: Mapping[str, nn.Module], name: str) -> HookTarget:
    """Describe an experts module.

    Raises:
        UserError: The module holds only a part of the experts.
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


def block_name(model: nn.Module, target: HookTarget) -> str:
    """Return the name of the MoE block around a layer's experts or router: the module whose forward routes.

    Wrappers between them are skipped: modules that pass on their arguments (``*args``) or have a base layer.

    Args:
        model: MoE model of transformers.
        target: HookTarget module of the layer.
    """
    name = target.name.rpartition(".")[0]
    while name and _is_wrapper(model.get_submodule(name)):
        name = name.rpartition(".")[0]
    return name


def _is_wrapper(module: nn.Module) -> bool:
    parameters = inspect.signature(type(module).forward).parameters.values()
    passes_on = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    return passes_on or isinstance(getattr(module, "base_layer", None), nn.Module)


def _router_targets(model: nn.Module) -> dict[int, HookTarget]:
    """Find the routers whose logits the model's class declares; routers of attention are excluded."""
    declared: list[Any] = []
    for part in model.modules():
        outputs = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits", ())
        declared += outputs if isinstance(outputs, list) else [outputs] if outputs else []
    targets: dict[int, HookTarget] = {}
    for output in declared:
        kind, index = getattr(output, "target_class", output), getattr(output, "index", 0)
        for name, module in model.named_modules():
            layer, top_k = LAYER.search(f"{name}."), getattr(module, "top_k", None)
            if isinstance(module, kind) and layer and top_k and not ATTENTION.search(name):
                parent = model.get_submodule(name[: layer.end() - 1])
                targets[int(layer[1])] = HookTarget(module, name, parent, None, index, top_k, _count(module))
    if not targets:
        raise UserError(f"{type(model).__name__}: has no experts module; give a mixture-of-experts model")
    return targets


def _count(module: nn.Module) -> int:
    """Return the number of real experts of an experts module or a router."""
    counts = [count for name in COUNT_ATTRIBUTES if isinstance(count := getattr(module, name, None), int)]
    if not counts:
        raise UserError(
            f"{type(module).__name__}: has no attribute with its number of experts ({', '.join(COUNT_ATTRIBUTES)}); "
            "such a model cannot be recorded"
        )
    return min(counts)


def _router_weights(output: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """Return the gate weights of a choice: from scores next to the logits in the output, otherwise by softmax."""
    for part in output if isinstance(output, tuple) else ():
        if isinstance(part, Tensor) and part is not logits and part.shape == logits.shape:
            return part.gather(-1, experts)
    return logits.gather(-1, experts).softmax(-1)


def _record_input(module: nn.Module, buffer: list[Tensor], matrix: npt.NDArray[np.float16] | None = None) -> Any:
    """Copy the first argument of a module in half precision; the copy is needed because models add in place.

    With a matrix ``(W, D)``, its product with the half-precision input is copied, computed where the input is.
    """
    by_device: dict[torch.device, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = args[0] if args else next(iter(kwargs.values()))
        rows = state.detach().reshape(-1, state.shape[-1])
        if matrix is not None:
            if rows.device not in by_device:
                by_device[rows.device] = torch.from_numpy(matrix).to(rows.device, torch.float32)
            rows = rows.to(torch.float16).clamp(-LARGEST, LARGEST).float() @ by_device[rows.device].T
        buffer.append(rows.to("cpu", torch.float16, copy=True))

    return module.register_forward_pre_hook(before, with_kwargs=True)


def _hook(model: nn.Module, recorder: Recorder, layer: int, target: HookTarget) -> list[Any]:
    parameters = target.parameters
    if parameters is None:

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            logits = output[target.index] if isinstance(output, tuple) else output
            if logits.shape[-1] != target.num_experts:
                raise UserError(
                    f"{type(module).__name__}: its router has {logits.shape[-1]} logits for {target.num_experts} "
                    "experts; such a model cannot be recorded"
                )
            experts = logits.topk(target.top_k).indices
            weights = _router_weights(output, logits, experts)
            recorder._record(layer, target.num_experts, experts, weights)  # noqa: SLF001

        return [target.module.register_forward_hook(after)]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = dict(zip(("hidden_states", *parameters), args, strict=False)) | kwargs
        experts, weights = (arguments[name] for name in parameters)
        recorder._record(layer, target.num_experts, experts, weights)  # noqa: SLF001

    handle = target.module.register_forward_pre_hook(before, with_kwargs=True)
    return [handle, *_hook_fused(model, recorder, layer, target)]


def _hook_fused(model: nn.Module, recorder: Recorder, layer: int, target: HookTarget) -> list[Any]:
    """Record a layer's router in each forward of its block that did not call the experts module."""
    block = model.get_submodule(block_name(model, target))
    if block is target.layer:  # the layer itself routes: a kernel cannot replace a block
        return []
    routers = [module for name, module in block.named_children() if re.search("router|gate", name)]
    counts: list[int] = []
    outputs: list[Any] = []

    def before_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counts.append(recorder.count(layer))
        outputs.clear()

    def after_router(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output)

    def after_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if recorder.count(layer) > counts.pop():
            return
        router_outputs = list(outputs)
        if not router_outputs:
            states = args[0] if args else next(iter(kwargs.values()))
            router_outputs = [router(states.reshape(-1, states.shape[-1])) for router in routers]
        choice = next(filter(None, map(_choice, router_outputs)), None)
        if choice is None:
            raise UserError(
                f"{type(model).__name__}: layer {layer} computes its experts without calling {target.name}, and its "
                f"router does not show its choice; {UNFUSED_HINT}"
            )
        recorder._record(layer, target.num_experts, *choice)  # noqa: SLF001

    return [
        block.register_forward_pre_hook(before_block, with_kwargs=True),
        *(router.register_forward_hook(after_router) for router in routers),
        block.register_forward_hook(after_block, prepend=True, with_kwargs=True),  # before steering is removed
    ]


def _choice(output: Any) -> tuple[Tensor, Tensor] | None:
    """Return the ids and weights, both ``(N, K)``, in the output of a router; None if it has no ids."""
    tensors = [part for part in output if isinstance(part, Tensor)] if isinstance(output, tuple) else []
    ids = next((tensor for tensor in tensors if tensor.dtype in (torch.int64, torch.int32) and tensor.ndim > 1), None)
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    if ids is None:
        return None
    weights = next((tensor for tensor in reversed(floating) if tensor.shape == ids.shape), None)
    if weights is None:  # the output has weights of all experts
        scores = next((t for t in reversed(floating) if t.ndim == ids.ndim and t.shape[:-1] == ids.shape[:-1]), None)
        weights = None if scores is None else scores.gather(-1, ids.long())
    return None if weights is None else (ids.long(), weights)
