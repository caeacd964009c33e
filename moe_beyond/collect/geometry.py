"""A model's geometry, measured on its modules."""

from torch import Tensor, nn

from moe_beyond.collect.recorder import HookTarget, find_experts
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry


def measured_geometry(model: nn.Module, name: str, top_k: int) -> Geometry:
    """Read a model's geometry off its modules.

    An expert's biases count, as its matrices do: both move with it. Other parameters are those of the first layer that
    holds experts.

    Args:
        model: A transformers mixture of experts.
        name: What to call it.
        top_k: Experts that a token is routed to.

    Raises:
        UserError: It holds no experts, or experts that differ by layer in number or size.
    """
    hooked = find_experts(model)
    layers = sorted(hooked)
    first = layers[0]
    sizes = {layer: (hooked[layer].num_experts, _params_per_expert(model, hooked[layer])) for layer in layers}
    for layer, size in sizes.items():
        if size != sizes[first]:
            count, params = sizes[first]
            raise UserError(
                f"{type(model).__name__}: layer {layer} holds {size[0]} experts of {size[1]:,} parameters, layer "
                f"{first} {count} of {params:,}; a geometry has one size for all layers"
            )
    inside = sum(weight.numel() for weight in _expert_weights(model, hooked[first]))
    count, params = sizes[first]
    return Geometry(
        model=name,
        moe_layers=tuple(layers),
        num_experts=count,
        top_k=top_k,
        params_per_expert=params,
        other_params_per_layer=sum(weight.numel() for weight in hooked[first].block.parameters()) - inside,
    )


def _expert_weights(model: nn.Module, hooked: HookTarget) -> list[Tensor]:
    """Return the parameters of a layer's experts."""
    mixture = model.get_submodule(hooked.name.rpartition(".")[0])  # where a router is hooked, experts are next to it
    holder = hooked.module if hooked.names is not None else getattr(mixture, "experts", None)
    if holder is not None:
        return list(holder.parameters())
    return [weight for weight in mixture.parameters() if weight.ndim == 3]  # JetMoE has no module for its experts


def _params_per_expert(model: nn.Module, hooked: HookTarget) -> int:
    count = hooked.num_experts
    # Weights may have rows of identity experts too, which nobody moves.
    return max(
        1,
        sum(
            weight.numel() // (max(len(weight), count) if weight.ndim == 3 else count)
            for weight in _expert_weights(model, hooked)
        ),
    )
