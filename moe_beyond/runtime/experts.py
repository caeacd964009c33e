"""The experts modules of a model whose experts can be moved between memories, and the refusals of all others.

transformers decorates the experts classes of nearly all architectures with `use_experts_implementation`. Their forward
is looked up in the registry `ALL_EXPERTS_FUNCTIONS`, whose functions read only the parameters of the module. An expert
of such a module is one row of each parameter.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_beyond.collect.devices import input_device
from moe_beyond.collect.recorder import HookTarget, block_name, find_experts
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.runtime.slab import SlabLayout
from moe_beyond.safe_text import brief

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
"""Experts implementations of transformers that read an expert from the rows of the parameters."""
REMEDIES = {
    "bitsandbytes": "bitsandbytes leaves fused experts in 16 bits, so load it without quantization",
    "mxfp4": "in Python, load it with Mxfp4Config(dequantize=True), then call offload",
    "fp8": "in Python, load it with FineGrainedFP8Config(dequantize=True), then call offload",
    "mxfp8": "in Python, load it with FineGrainedFP8Config(dequantize=True), then call offload",
    "gguf": "GGUF experts are computed outside transformers' experts registry, so load safetensors weights",
}
"""Quantization method -> advice."""


@dataclass(frozen=True)
class ExpertsLayer:
    """The experts of one MoE layer.

    Attributes:
        layer: Index of the model's layer.
        target: Experts module, as the recorder hooks it.
        layout: Positions of one expert's parameters in a slab.
    """

    layer: int
    target: HookTarget
    layout: SlabLayout

    @property
    def module(self) -> nn.Module:
        """Experts module."""
        return self.target.module

    @property
    def name(self) -> str:
        """Name of the module in the model."""
        return self.target.name

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return self.target.num_experts


def find_offloadable(model: nn.Module) -> dict[int, ExpertsLayer]:
    """Find the experts modules of a model that is loaded completely into host memory.

    Args:
        model: MoE model of transformers.

    Returns:
        Position among the MoE layers -> experts.

    Raises:
        UserError: The model is dense; its experts are quantized, wrapped by an adapter, elsewhere, or computed outside
            the experts registry; or its layers differ in their number of experts.
    """
    where = type(model).__name__
    check_unquantized(where, getattr(model, "config", None))
    layers = experts_layers(model)
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UserError(
            f"{where}: accelerate moves its weights (device_map); load it whole on the CPU, or use load_offloaded"
        )
    devices = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta}
    if devices - {"cpu"}:
        raise UserError(
            f"{where}: its experts are in the memory of a GPU already (got {', '.join(sorted(devices))}); load it with "
            f'load_offloaded(NAME, device="{min(devices - {"cpu"})}"), which leaves them out'
        )
    for layer in layers.values():
        for field in layer.layout.fields:
            parameter = getattr(layer.module, field.name)
            if parameter.is_meta:
                raise UserError(
                    f"{where}: {layer.name}.{field.name} has no weights (meta device); load the model whole, or use "
                    "load_offloaded"
                )
            if type(parameter.data) is not torch.Tensor:
                raise UserError(
                    f"{where}: {layer.name}.{field.name} is quantized or spread over processes (got "
                    f"{type(parameter.data).__name__}); load the model without that"
                )
    return layers


def experts_layers(model: nn.Module) -> dict[int, ExpertsLayer]:
    """Find the experts modules of a model, which may be on the meta device.

    Args:
        model: MoE model of transformers.

    Returns:
        Position among the MoE layers -> experts.

    Raises:
        UserError: The experts cannot be moved, as `find_offloadable` explains.
    """
    targets = find_experts(model)
    layers = {
        position: ExpertsLayer(layer, targets[layer], _layout(model, targets[layer]))
        for position, layer in enumerate(sorted(targets))
    }
    counts = {layer.num_experts: layer.name for layer in layers.values()}
    if len(counts) > 1:
        (count, name), (other, other_name) = list(counts.items())[:2]
        raise UserError(
            f"{type(model).__name__}: {name} has {count} experts and {other_name} has {other}; give a model whose "
            "layers have the same number"
        )
    return layers


def check_unquantized(where: str, config: Any) -> None:
    """Refuse a configuration with a quantization, since its experts are no plain rows.

    Args:
        where: Name of the model, for the message.
        config: Configuration of the model.

    Raises:
        UserError: The configuration has a quantization.
    """
    parts = (config, getattr(config, "text_config", None))
    settings = next(filter(None, (getattr(part, "quantization_config", None) for part in parts)), None)
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, Mapping) else getattr(settings, "quant_method", None)
    method = str(getattr(method, "value", method))
    remedy = REMEDIES.get(method, "give the unquantized model")
    raise UserError(f"{where}: its experts cannot be moved while it is quantized (got {method}); {remedy}")


def runtime_geometry(model: nn.Module, layers: Mapping[int, ExpertsLayer], name: str, top_k: int) -> Geometry:
    """Measure the geometry of a model, with or without its experts' parameters.

    Other parameters are those of the first MoE layer.

    Args:
        model: MoE model of transformers.
        layers: Experts, as `find_offloadable` returns them.
        name: Name of the model in the geometry.
        top_k: Experts per token and layer.

    Returns:
        Geometry whose experts have the size of the largest one.
    """
    first = layers[0]
    held = [getattr(first.module, field.name) for field in first.layout.fields]
    in_layer = sum(parameter.numel() for parameter in first.target.layer.parameters())
    return Geometry(
        model=name,
        moe_layers=tuple(layer.layer for layer in layers.values()),
        num_experts=first.num_experts,
        top_k=top_k,
        params_per_expert=max(layer.layout.params for layer in layers.values()),
        other_params_per_layer=in_layer - sum(parameter.numel() for parameter in held if parameter is not None),
    )


class _Routed(Exception):
    """Ends a forward at its first layer of experts.

    Attributes:
        top_k: Number of experts of a token.
    """

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k


def experts_per_token(model: Any, layers: Mapping[int, ExpertsLayer]) -> int:
    """Measure the number of experts per token, with one token up to the first layer of experts.

    Args:
        model: MoE model of transformers, with or without its experts.
        layers: Experts of the model.
    """

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = [*args, *kwargs.values()][1]
        raise _Routed(int(index.shape[-1]))

    handles = [experts.module.register_forward_pre_hook(stop, with_kwargs=True) for experts in layers.values()]
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 1, dtype=torch.long, device=input_device(model)), use_cache=False)
    except _Routed as routed:
        return routed.top_k
    except Exception as error:  # a wrong configuration may fail anywhere in the model
        raise UserError(
            f"{type(model).__name__}: cannot route a token ({brief(error)}); check its config.json"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    raise UserError(f"{type(model).__name__}: a token reaches no layer of experts; such a model cannot be offloaded")


def _layout(model: nn.Module, target: HookTarget) -> SlabLayout:
    """Return the layout of one expert of a module that the experts registry serves.

    Raises:
        UserError: The registry does not serve the module, or another module changes its parameters.
    """
    where, module = type(model).__name__, target.module
    kind = type(module).__name__
    interface = _interface(module)
    if target.parameters is None or interface is None:
        raise UserError(
            f"{where}: its experts are computed outside transformers' experts registry ({kind}); such a model "
            "cannot be offloaded"
        )
    if interface is not ALL_EXPERTS_FUNCTIONS:
        raise UserError(
            f"{where}: {kind} computes its experts in a registry of its own ({type(interface).__name__}); load the "
            "model dequantized"
        )
    parent = target.name.rpartition(".")[0]
    if parametrize.is_parametrized(module) or block_name(model, target) != parent:
        raise UserError(
            f"{where}: an adapter wraps {target.name}; merge it into the model (merge_and_unload of PEFT), or remove it"
        )
    implementation = getattr(module.config, "_experts_implementation", None)
    if implementation not in (*IMPLEMENTATIONS, None):
        raise UserError(
            f"{where}: its experts implementation cannot be offloaded (got {implementation}); call "
            f"set_experts_implementation with one of: {', '.join(IMPLEMENTATIONS)}"
        )
    fields = {
        name: (tuple(parameter.shape[1:]), parameter.dtype)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1 and len(parameter) == target.num_experts
    }
    if not fields:
        raise UserError(
            f"{where}: {target.name} has no parameters of its {target.num_experts} experts; give a model with its "
            "weights"
        )
    return SlabLayout.of(fields)


def _interface(module: nn.Module) -> Any:
    """Return the registry in which a module's forward is looked up; None if its class is not decorated."""
    forward = type(module).forward
    if not hasattr(forward, "__wrapped__") or not hasattr(module, "is_transposed"):
        return None
    return inspect.getclosurevars(forward).nonlocals.get("experts_interface")
