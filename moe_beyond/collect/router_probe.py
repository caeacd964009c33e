"""Finding each layer's router: the weight that scores experts, and what is done to its scores before the choice.

How a router is written differs from architecture to architecture, but what it does does not: a product of what it reads
with a weight of a row a choice, a function of that, perhaps a bias that decides the choice alone, and the top K. So the
model reads a few random tokens while `Watch` keeps the products and the choices of each mixture, and the router is the
product whose scores choose what was recorded.

For saving routers beside hidden states, so that scores can be computed of any layer's states; and for steering
(`moe_beyond.collect.steering`).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from moe_beyond.collect.devices import embedding_rows, input_device
from moe_beyond.collect.recorder import Hooked, find_experts, mixture_name, recording
from moe_beyond.geometry import Geometry
from moe_beyond.router_activations import ROUTER_ACTIVATIONS
from moe_beyond.traces.router_weights import Routers

LEAST_AGREEMENT = 0.9
PROBE = (8, 16)
"""Sequences and their tokens that a model reads so that its routers are found."""

PRODUCTS = {torch.mm, torch.matmul, torch.Tensor.mm, torch.Tensor.matmul, torch.Tensor.__matmul__}
CHOICES = {torch.topk, torch.Tensor.topk}


@dataclass(frozen=True)
class Router:
    """What scores a layer's experts.

    Attributes:
        name: Of the weight's parameter in the model; of the mixture, where what is multiplied is no parameter itself
            but made of some, as an adapter makes it.
        module: The module whose first argument is what the router reads: hook it to see that. The hidden states of the
            mixture in most; where a router norms or projects them first, what comes out of that.
        weight: ``(C, W)``, a row a choice: the experts, and identity or skip experts after them. W is the width of what
            is read, which is the hidden size but for a router of several maps (zaya).
        bias: ``(C,)`` that the logits have, or None.
        scoring: Of `ROUTER_ACTIVATIONS`: what is made of the logits before the choice.
        selection_bias: ``(C,)`` float32 that is added to the scores for the choice but not for the weights, or None.
        num_experts: Of the choices, those that are experts.
        agreement: The share of recorded choices that are among the top K of `scores`, in a probe. 1 but where groups
            limit the choice, which these scores do not know.
    """

    name: str
    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    scoring: str
    selection_bias: Tensor | None
    num_experts: int
    agreement: float

    def scores(self, states: Tensor) -> Tensor:
        """Score what the router reads, ``(..., W)``: float32 ``(..., C)``, whose top K is the choice."""
        bias = None if self.bias is None else self.bias.float()
        return _scores(functional.linear(states.float(), self.weight.float(), bias), self.scoring, self.selection_bias)


@dataclass(frozen=True)
class Product:
    """A product with a weight.

    Attributes:
        read: What was multiplied, ``(N, W)`` float32.
        name: Of the weight's parameter in the mixture; None where it is no parameter.
        weight: The parameter, or else what took its place, ``(C, W)``.
        bias: What was added, or None.
    """

    read: Tensor
    name: str | None
    weight: Tensor
    bias: Tensor | None


class Watch(TorchFunctionMode):
    """Keeps what a mixture's forward multiplies with a router's weight, and what it chooses among.

    Weights are looked up at each call: an offloaded one is there only while its module runs.

    Args:
        mixture: Whose forward it is.

    Attributes:
        products: With what may be a router's weight, in the order of the calls.
        chosen_from: What each `topk` was given, ``(N, C)``, and its k.
        small: Small parameters and buffers, by name: what may be added to scores for the choice.
    """

    def __init__(self, mixture: "Mixture") -> None:
        super().__init__()
        self._mixture = mixture
        self.products: list[Product] = []
        self.chosen_from: list[tuple[Tensor, int]] = []
        self.small: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Keep a call, and let it be."""
        kwargs = kwargs or {}
        if (product := product_of(func, args, kwargs)) is not None:
            read, used, bias = product
            weights = self._mixture.weights()
            names = [name for name, known in weights.items() if is_weight(used, known)]
            named: list[tuple[str | None, Tensor]] = [(name, weights[name]) for name in names]
            named = named or [(None, used.detach())]
            if names or self._mixture.may_route(used):
                kept = read.reshape(-1, read.shape[-1]).float()
                self.products += [Product(kept, name, weight, bias) for name, weight in named]
                self.small |= self._mixture.small_tensors()
        elif func in CHOICES:
            k = args[1] if len(args) > 1 else kwargs["k"]
            self.chosen_from.append((args[0].reshape(-1, args[0].shape[-1]).float(), int(k)))
            self.small |= self._mixture.small_tensors()
        return func(*args, **kwargs)


def product_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return what a call multiplies, ``(..., W)``, with which weight, ``(C, W)``, and the bias; None of other calls."""
    if func is functional.linear:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        return given["input"], given["weight"], given.get("bias")
    if func in PRODUCTS and args[1].ndim == 2:
        return args[0], args[1].t(), None
    return None


def is_weight(used: Tensor, known: Tensor) -> bool:
    """Tell whether what is used in a product is a parameter, or its first rows are; routers cast it to float32."""
    return (
        used.ndim == 2
        and not known.is_meta
        and used.shape[1] == known.shape[1]
        and len(used) >= len(known)
        and (used.data_ptr() == known.data_ptr() or torch.equal(used[: len(known)].to(known.dtype), known))
    )


def find_routers(model: Any) -> dict[int, Router]:
    """Find the router of each layer that holds experts, by running the model over random tokens.

    Args:
        model: A transformers mixture of experts, on any device.

    Returns:
        Routers by the index of the model's layer. A layer whose choice no scores explain has none: hash routing.

    Raises:
        UserError: It is no mixture of experts.
    """
    mixtures = {layer: Mixture.of(model, hooked) for layer, hooked in find_experts(model).items()}
    with recording(model) as recorder:
        seen = {layer: Seen(Watch(mixture)) for layer, mixture in mixtures.items()}
        handles = [handle for layer, mixture in mixtures.items() for handle in seen[layer].watch(mixture)]
        try:
            read_probe(model)
        finally:
            for handle in handles:
                handle.remove()
        experts, _ = recorder.take()
    found = {
        layer: _router(mixtures[layer], seen[layer], torch.from_numpy(experts[:, column]))
        for column, layer in enumerate(recorder.moe_layers)
    }
    return {layer: router for layer, router in found.items() if router is not None}


def stored_routers(found: Mapping[int, Router], geometry: Geometry) -> Routers | None:
    """Return the routers as a trace set holds them; None where a layer has none, or one of its own kind.

    Args:
        found: What `find_routers` found.
        geometry: The model's shape.
    """
    routers = [found.get(layer) for layer in geometry.moe_layers]
    there = [router for router in routers if router is not None]
    if len(there) < len(routers) or len({(router.scoring, router.weight.shape[1]) for router in there}) > 1:
        return None
    experts = geometry.num_experts

    def stacked(tensors: Sequence[Tensor | None]) -> Any:
        if all(tensor is None for tensor in tensors):
            return None
        rows = [torch.zeros(experts) if one is None else one[:experts].float().cpu() for one in tensors]
        return torch.stack(rows).numpy()

    return Routers(
        weight=stacked([router.weight for router in there]),
        scoring=there[0].scoring,
        bias=stacked([router.bias for router in there]),
        selection_bias=stacked([router.selection_bias for router in there]),
    )


def read_probe(model: Any) -> None:
    """Let a model read a few random tokens, as in evaluation; the same ones each time."""
    token_ids = torch.randint(embedding_rows(model), PROBE, generator=torch.Generator().manual_seed(0))
    was_training = model.training
    model.train(False)
    try:
        with torch.inference_mode():
            model(token_ids.to(input_device(model)), use_cache=False)
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Mixture:
    """The module around a layer's experts, whose forward routes.

    Attributes:
        name: Of it in the model.
        block: It.
        hooked: What tells the layer's choice.
    """

    name: str
    block: nn.Module
    hooked: Hooked

    @classmethod
    def of(cls, model: nn.Module, hooked: Hooked) -> "Mixture":
        """Find it: what holds the experts module, or the router."""
        name = mixture_name(model, hooked)
        return cls(name, model.get_submodule(name), hooked)

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters that may be a router's weight: maps to at least a number an expert."""
        return {
            name: tensor.detach()
            for name, tensor in self.block.named_parameters()
            if tensor.ndim == 2 and len(tensor) >= self.hooked.num_experts
        }

    def may_route(self, used: Tensor) -> bool:
        """Tell whether a multiplied tensor that is no parameter may be a router's weight: about one row per expert."""
        return used.ndim == 2 and self.hooked.num_experts <= len(used) <= 2 * self.hooked.num_experts

    def small_tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers in memory that hold about one number per expert."""
        tensors = itertools.chain(self.block.named_parameters(), self.block.named_buffers())
        return {
            name: tensor.detach().flatten()
            for name, tensor in tensors
            if self.may_route(tensor.flatten()[:, None]) and tensor.is_floating_point() and not tensor.is_meta
        }

    def readers(self, weight: str | None) -> list[nn.Module]:
        """Return the modules that may be given what a weight is multiplied with, the innermost first."""
        if weight is None:
            return [module for module in self.block.modules() if module is not self.block] + [self.block]
        path = weight.split(".")[:-1]
        return [self.block.get_submodule(".".join(path[:end])) for end in range(len(path), -1, -1)]


class Seen:
    """What was seen of a mixture while the model read the probe."""

    def __init__(self, watch: Watch) -> None:
        self.calls = watch
        self.given: dict[nn.Module, Tensor] = {}

    def watch(self, mixture: Mixture) -> list[Any]:
        """Hook a mixture; returns what removes the hooks."""
        modules = (module for module in mixture.block.modules() if mixture.hooked.module not in module.modules())
        kept = (module.register_forward_pre_hook(self._keep, with_kwargs=True) for module in {mixture.block, *modules})
        return [*within(mixture.block, self.calls), *kept]

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next(iter((*args, *kwargs.values())), None)
        if isinstance(first, Tensor):
            self.given[module] = first.detach().reshape(-1, first.shape[-1]).float()


def within(block: nn.Module, mode: TorchFunctionMode) -> list[Any]:
    """Let a mode see the torch calls of a module's forward; returns what removes that."""

    def enter(module: nn.Module, args: Any) -> None:
        mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave, always_call=True)]


def _router(mixture: Mixture, seen: Seen, experts: Tensor) -> Router | None:
    """Find the product, scoring and selection bias that choose what was recorded, ``(N, K)``."""
    count, top_k = mixture.hooked.num_experts, experts.shape[-1]
    fit = (scores for scores, k in seen.calls.chosen_from if k == top_k and len(scores) == len(experts))
    among = [scores for scores in fit if scores.shape[-1] >= count]
    chosen_from = among[-1] if among else None  # groups are chosen before; a router that takes maxima tells nothing
    best, found = (LEAST_AGREEMENT, -torch.inf), None
    for product in seen.calls.products:
        choices = len(product.weight) if chosen_from is None else chosen_from.shape[-1]
        reader = next((m for m in mixture.readers(product.name) if _same(seen.given.get(m), product.read)), None)
        if reader is None or len(product.read) != len(experts) or choices > len(product.weight):
            continue
        weight, bias = product.weight[:choices], None if product.bias is None else product.bias.detach()[:choices]
        logits = functional.linear(product.read, weight.float(), None if bias is None else bias.float())
        for scoring, selection_bias in itertools.product(
            ROUTER_ACTIVATIONS, _selection_biases(seen.calls.small, choices, bias)
        ):
            scores = _scores(logits, scoring, selection_bias)
            kept, off = _kept(scores, chosen_from)
            if (how_good := (_agreement(kept, experts, count), -off)) > best:
                best, agreement = how_good, _agreement(scores, experts, count)
                name = mixture.name if product.name is None else f"{mixture.name}.{product.name}"
                found = Router(name, reader, weight, bias, scoring, selection_bias, count, agreement)
    return found


def _selection_biases(small: Mapping[str, Tensor], choices: int, bias: Tensor | None) -> list[Tensor | None]:
    """Return what may be added to the scores of so many choices, nothing first; the logits' own bias is none."""
    fit = (tensor for tensor in small.values() if len(tensor) == choices)
    return [None, *(tensor.float() for tensor in fit if bias is None or tensor.data_ptr() != bias.data_ptr())]


def _scores(logits: Tensor, scoring: str, selection_bias: Tensor | None) -> Tensor:
    scores = ROUTER_ACTIVATIONS[scoring](logits)
    return scores if selection_bias is None else scores + selection_bias.float()


def _kept(scores: Tensor, chosen_from: Tensor | None) -> tuple[Tensor, float]:
    """Leave scores of the groups that the router kept, and say how far they are from what it chose among."""
    if chosen_from is None:
        return scores, 0.0
    kept = chosen_from.isfinite() & (chosen_from != 0)  # routers mask by minus infinity, or by 0
    return scores.where(kept, chosen_from), float((scores - chosen_from)[kept].abs().mean())


def _agreement(scores: Tensor, experts: Tensor, num_experts: int) -> float:
    """Return the share of recorded choices, ``(N, K)``, that the top K of scores has; what is no expert is one kind."""
    top = scores.topk(experts.shape[-1]).indices
    counts = [
        functional.one_hot(ids.where((ids >= 0) & (ids < num_experts), num_experts), num_experts + 1).sum(1)
        for ids in (top.to(experts.device), experts)
    ]
    return float(torch.minimum(*counts).sum() / experts.numel())


def _same(given: Tensor | None, read: Tensor) -> bool:
    return given is not None and given.shape == read.shape and torch.equal(given, read)
