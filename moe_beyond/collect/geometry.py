"""A model's geometry, measured on its modules."""

from torch import nn

from moe_beyond.collect.recorder import find_experts
from moe_beyond.geometry import Geometry


def measured_geometry(model: nn.Module, name: str, top_k: int) -> Geometry:
    """Read a model's geometry off its modules.

    Args:
        model: A transformers mixture of experts.
        name: What to call it.
        top_k: Experts that a token is routed to.
    """
    found = find_experts(model)
    layers = sorted(found)
    hooked = found[layers[0]]
    count = hooked.num_experts
    first = next(name for name, module in model.named_modules() if module is hooked.module)
    beside = model.get_submodule(first.rpartition(".")[0])  # where a router is hooked, experts are its neighbours
    holder = hooked.module if hooked.names is not None else getattr(beside, "experts", None)
    if holder is not None:
        weights = list(holder.parameters())
    else:  # JetMoE has no module for them: of all maps there, those with a row an expert are theirs
        weights = [w for w in beside.parameters() if w.ndim == 3]
    inside = sum(w.numel() for w in weights)
    return Geometry(
        model=name,
        moe_layers=tuple(layers),
        num_experts=count,
        top_k=top_k,
        # Weights may have rows of identity experts too, which nobody moves.
        params_per_expert=max(1, sum(w.numel() // (max(len(w), count) if w.ndim == 3 else count) for w in weights)),
        other_params_per_layer=sum(w.numel() for w in hooked.block.parameters()) - inside,
    )
