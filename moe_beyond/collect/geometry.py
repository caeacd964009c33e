"""Measuring the geometry of a loaded model on its modules."""

from torch import Tensor, nn

from moe_beyond.collect.recorder import HookTarget, find_experts
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry


def measured_geometry(model: nn.Module, name: str, top_k: int) -> Geometry:
    """Measure a model's geometry on its modules.

    The biases of an expert count, because they move with its matrices. Other parameters are those of the first MoE
    layer.

    Args:
        model: MoE model of transformers.
        name: Name of the model in the geometry.
        top_k: Experts per token and layer.

    Raises:
        UserError: The model has no experts, or the number or size of experts differs between layers.
    """
    targets = find_experts(model)
    layers = sorted(targets)
    first = layers[0]
    sizes = {layer: (targets[layer].num_experts, _params_per_expert(model, targets[layer])) for layer in layers}
    for layer, size in sizes.items():
        if size != sizes[first]:
            count, params = sizes[first]
            raise UserError(
                f"{type(model).__name__}: layer {layer} has {size[0]} experts of {size[1]:,} parameters, layer {first} "
                f"has {count} of {params:,}; a geometry has one size for all layers"
            )
    expert_params = sum(weight.numel() for weight in _expert_weights(model, targets[first]))
    count, params = sizes[first]
    return Geometry(
        model=name,
        moe_layers=tuple(layers),
        num_experts=count,
        top_k=top_k,
        params_per_expert=params,
        other_params_per_layer=sum(weight.numel() for weight in targets[first].layer.parameters()) - expert_params,
    )


def _expert_weights(model: nn.Module, target: HookTarget) -> list[Tensor]:
    """Return the parameters of a layer's experts."""
    block = model.get_submodule(target.name.rpartition(".")[0])  # a hooked router has the experts next to it
    holder = target.module if target.parameters is not None else getattr(block, "experts", None)
    if holder is not None:
        return list(holder.parameters())
    return [weight for weight in block.parameters() if weight.ndim == 3]  # JetMoE has no module for its experts


def _params_per_expert(model: nn.Module, target: HookTarget) -> int:
    count = target.num_experts
    # Weights may also have rows for identity experts, which are never transferred.
    return max(
        1,
        sum(
            weight.numel() // (max(len(weight), count) if weight.ndim == 3 else count)
            for weight in _expert_weights(model, target)
        ),
    )
