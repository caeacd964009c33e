"""Finding each layer's router: the weight that scores experts, and the function of its scores before the choice.

Architectures write routers differently, but all compute the same: the product of their input with a weight of one row
per choice, a function of it, for some a bias for the choice only, and the top K. Therefore the model runs over a few
random tokens while `RouterProbe` records the products and choices of each block. The router is the product whose
scores explain the recorded choice.

Routers are stored next to hidden states, so that any layer's states can be scored, and used for steering
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
from moe_beyond.collect.recorder import HookTarget, block_name, find_experts, recording
from moe_beyond.geometry import Geometry
from moe_beyond.router_activations import ROUTER_ACTIVATIONS
from moe_beyond.traces.router_weights import Routers

MIN_AGREEMENT = 0.9
"""Smallest share of recorded choices that a router must explain."""
PROBE_SHAPE = (8, 16)
"""Sequences and tokens per sequence of the probe."""

MATMUL_FUNCTIONS = {torch.mm, torch.matmul, torch.Tensor.mm, torch.Tensor.matmul, torch.Tensor.__matmul__}
TOPK_FUNCTIONS = {torch.topk, torch.Tensor.topk}


@dataclass(frozen=True)
class Router:
    """The scores of a layer's experts: weight, bias and activation.

    Attributes:
        name: Name of the weight's parameter in the model; name of the block if the weight is computed from several
            parameters, as an adapter does.
        module: Module whose first argument is the router's input; a hook on it sees that input. For most models this
            is the hidden state of the block, for routers with a norm or projection the output of that.
        weight: ``(C, W)``, one row per choice: the experts, then identity or skip experts. W is the width of the
            input, which differs from the hidden size for a router of several maps (zaya).
        bias: ``(C,)`` added to the logits, or None.
        scoring: Key of `ROUTER_ACTIVATIONS`: the activation of the logits before the choice.
        selection_bias: ``(C,)`` float32 added to the scores for the choice, but not for the gate weights, or None.
        num_experts: Number of choices that are experts.
        agreement: Share of recorded choices among the top K of `scores` in the probe. It is 1 unless groups, which
            these scores ignore, limit the choice.
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
        """Score router inputs; the top K of the scores are the choice.

        Args:
            states: Router inputs, ``(..., W)``.

        Returns:
            Scores, ``(..., C)`` float32.
        """
        bias = None if self.bias is None else self.bias.float()
        return _scores(functional.linear(states.float(), self.weight.float(), bias), self.scoring, self.selection_bias)


@dataclass(frozen=True)
class MatmulRecord:
    """A product with a weight.

    Attributes:
        input: Multiplied tensor, ``(N, W)`` float32.
        name: Name of the weight's parameter in the block; None if the weight is no parameter.
        weight: Parameter, or the tensor used in its place, ``(C, W)``.
        bias: Added bias, or None.
    """

    input: Tensor
    name: str | None
    weight: Tensor
    bias: Tensor | None


class RouterProbe(TorchFunctionMode):
    """Records possible router products of a block's forward, and the scores of its choices.

    Weights are looked up at each call: an offloaded weight exists only while its module runs.

    Args:
        block: Block whose forward is observed.

    Attributes:
        products: Products with possible router weights, in the order of the calls.
        choices: Scores that each `topk` received, ``(N, C)``, and its k.
        small: Small parameters and buffers, by name: possible selection biases.
    """

    def __init__(self, block: "MoEBlock") -> None:
        super().__init__()
        self._block = block
        self.products: list[MatmulRecord] = []
        self.choices: list[tuple[Tensor, int]] = []
        self.small: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record a call, and pass it through."""
        kwargs = kwargs or {}
        if (operands := matmul_operands(func, args, kwargs)) is not None:
            read, used, bias = operands
            weights = self._block.weights()
            names = [name for name, weight in weights.items() if same_weight(used, weight)]
            candidates: list[tuple[str | None, Tensor]] = [(name, weights[name]) for name in names]
            candidates = candidates or [(None, used.detach())]
            if names or self._block.may_route(used):
                rows = read.reshape(-1, read.shape[-1]).float()
                self.products += [MatmulRecord(rows, name, weight, bias) for name, weight in candidates]
                self.small |= self._block.small_tensors()
        elif func in TOPK_FUNCTIONS:
            k = args[1] if len(args) > 1 else kwargs["k"]
            self.choices.append((args[0].reshape(-1, args[0].shape[-1]).float(), int(k)))
            self.small |= self._block.small_tensors()
        return func(*args, **kwargs)


def matmul_operands(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return the operands of a torch call that multiplies with a weight.

    Args:
        func: Torch function that was called.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        Input ``(..., W)``, weight ``(C, W)`` and bias (or None); None for other calls.
    """
    if func is functional.linear:
        arguments = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        return arguments["input"], arguments["weight"], arguments.get("bias")
    if func in MATMUL_FUNCTIONS and args[1].ndim == 2:
        return args[0], args[1].t(), None
    return None


def same_weight(used: Tensor, parameter: Tensor) -> bool:
    """Return whether a multiplied tensor is a parameter, or starts with its rows; routers cast it to float32.

    Args:
        used: Multiplied tensor, ``(C, W)``.
        parameter: Parameter of the block, ``(C', W)``.
    """
    return (
        used.ndim == 2
        and not parameter.is_meta
        and used.shape[1] == parameter.shape[1]
        and len(used) >= len(parameter)
        and (
            used.data_ptr() == parameter.data_ptr()
            or torch.equal(used[: len(parameter)].to(parameter.dtype), parameter)
        )
    )


def find_routers(model: Any) -> dict[int, Router]:
    """Find the router of each MoE layer by running the model over random tokens.

    Args:
        model: MoE model of transformers, on any device.

    Returns:
        Index of the model's layer -> router. A layer whose choice no scores explain (hash routing) is absent.

    Raises:
        UserError: The model is no MoE.
    """
    blocks = {layer: MoEBlock.of(model, target) for layer, target in find_experts(model).items()}
    with recording(model) as recorder:
        records = {layer: ProbeRecord(RouterProbe(block)) for layer, block in blocks.items()}
        handles = [handle for layer, block in blocks.items() for handle in records[layer].attach(block)]
        try:
            run_probe(model)
        finally:
            for handle in handles:
                handle.remove()
        experts, _ = recorder.pop_concatenated()
    routers = {
        layer: _router(blocks[layer], records[layer], torch.from_numpy(experts[:, column]))
        for column, layer in enumerate(recorder.moe_layers)
    }
    return {layer: router for layer, router in routers.items() if router is not None}


def stored_routers(routers: Mapping[int, Router], geometry: Geometry) -> Routers | None:
    """Convert routers to the form that a trace set stores.

    Args:
        routers: Result of `find_routers`.
        geometry: Geometry of the model.

    Returns:
        Router weights of all layers; None if a layer has no router, or kinds or widths differ.
    """
    by_layer = [routers.get(layer) for layer in geometry.moe_layers]
    present = [router for router in by_layer if router is not None]
    if len(present) < len(by_layer) or len({(router.scoring, router.weight.shape[1]) for router in present}) > 1:
        return None
    experts = geometry.num_experts

    def stacked(tensors: Sequence[Tensor | None]) -> Any:
        if all(tensor is None for tensor in tensors):
            return None
        rows = [torch.zeros(experts) if tensor is None else tensor[:experts].float().cpu() for tensor in tensors]
        return torch.stack(rows).numpy()

    return Routers(
        weight=stacked([router.weight for router in present]),
        scoring=present[0].scoring,
        bias=stacked([router.bias for router in present]),
        selection_bias=stacked([router.selection_bias for router in present]),
    )


def run_probe(model: Any) -> None:
    """Run a model over a few random tokens, the same at each call, in evaluation mode.

    Args:
        model: MoE model of transformers, on any device.
    """
    token_ids = torch.randint(embedding_rows(model), PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    was_training = model.training
    model.train(False)
    try:
        with torch.inference_mode():
            model(token_ids.to(input_device(model)), use_cache=False)
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class MoEBlock:
    """The module around a layer's experts, whose forward routes.

    Attributes:
        name: Name of the module in the model.
        module: Module whose forward routes.
        target: HookTarget module that shows the choice.
    """

    name: str
    module: nn.Module
    target: HookTarget

    @classmethod
    def of(cls, model: nn.Module, target: HookTarget) -> "MoEBlock":
        """Find the block of a layer.

        Args:
            model: MoE model of transformers.
            target: HookTarget module of the layer.
        """
        name = block_name(model, target)
        return cls(name, model.get_submodule(name), target)

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters that may be a router's weight: matrices of at least one row per expert."""
        return {
            name: tensor.detach()
            for name, tensor in self.module.named_parameters()
            if tensor.ndim == 2 and len(tensor) >= self.target.num_experts
        }

    def may_route(self, used: Tensor) -> bool:
        """Return whether a multiplied tensor that is no parameter may be a router's weight: about one row per expert.

        Args:
            used: Multiplied tensor of the call.
        """
        return used.ndim == 2 and self.target.num_experts <= len(used) <= 2 * self.target.num_experts

    def small_tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers in memory that have about one number per expert."""
        tensors = itertools.chain(self.module.named_parameters(), self.module.named_buffers())
        return {
            name: tensor.detach().flatten()
            for name, tensor in tensors
            if self.may_route(tensor.flatten()[:, None]) and tensor.is_floating_point() and not tensor.is_meta
        }

    def input_modules(self, weight: str | None) -> list[nn.Module]:
        """Return the modules that may receive the input of a weight, the innermost first.

        Args:
            weight: Name of the weight's parameter in the block, or None.
        """
        if weight is None:
            return [module for module in self.module.modules() if module is not self.module] + [self.module]
        path = weight.split(".")[:-1]
        return [self.module.get_submodule(".".join(path[:end])) for end in range(len(path), -1, -1)]


class ProbeRecord:
    """The calls and inputs of a block while the model ran the probe.

    Args:
        calls: Probe of the block.
    """

    def __init__(self, calls: RouterProbe) -> None:
        self.calls = calls
        self.inputs: dict[nn.Module, Tensor] = {}

    def attach(self, block: MoEBlock) -> list[Any]:
        """Hook a block.

        Args:
            block: Block to observe.

        Returns:
            Handles that remove the hooks.
        """
        inner = (module for module in block.module.modules() if block.target.module not in module.modules())
        handles = (
            module.register_forward_pre_hook(self._record_input, with_kwargs=True) for module in {block.module, *inner}
        )
        return [*run_inside(block.module, self.calls), *handles]

    def _record_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next(iter((*args, *kwargs.values())), None)
        if isinstance(first, Tensor):
            self.inputs[module] = first.detach().reshape(-1, first.shape[-1]).float()


def run_inside(module: nn.Module, mode: TorchFunctionMode) -> list[Any]:
    """Apply a mode to the torch calls of a module's forward.

    Args:
        module: Module whose forward is observed.
        mode: Mode to enter and leave around each forward.

    Returns:
        Handles that remove the hooks.
    """

    def enter(module: nn.Module, args: Any) -> None:
        mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def _router(block: MoEBlock, record: ProbeRecord, experts: Tensor) -> Router | None:
    """Find the product, activation and selection bias that explain the recorded choice, ``(N, K)``."""
    count, top_k = block.target.num_experts, experts.shape[-1]
    choices = (scores for scores, k in record.calls.choices if k == top_k and len(scores) == len(experts))
    wide = [scores for scores in choices if scores.shape[-1] >= count]
    choice_scores = wide[-1] if wide else None  # earlier calls choose groups; a router that takes maxima has none
    best, router = (MIN_AGREEMENT, -torch.inf), None
    for product in record.calls.products:
        width = len(product.weight) if choice_scores is None else choice_scores.shape[-1]
        modules = block.input_modules(product.name)
        module = next((m for m in modules if _equal(record.inputs.get(m), product.input)), None)
        if module is None or len(product.input) != len(experts) or width > len(product.weight):
            continue
        weight, bias = product.weight[:width], None if product.bias is None else product.bias.detach()[:width]
        logits = functional.linear(product.input, weight.float(), None if bias is None else bias.float())
        for scoring, selection_bias in itertools.product(
            ROUTER_ACTIVATIONS, _selection_biases(record.calls.small, width, bias)
        ):
            scores = _scores(logits, scoring, selection_bias)
            allowed, distance = _allowed_scores(scores, choice_scores)
            if (quality := (_agreement(allowed, experts, count), -distance)) > best:
                best, agreement = quality, _agreement(scores, experts, count)
                name = block.name if product.name is None else f"{block.name}.{product.name}"
                router = Router(name, module, weight, bias, scoring, selection_bias, count, agreement)
    return router


def _selection_biases(small: Mapping[str, Tensor], width: int, bias: Tensor | None) -> list[Tensor | None]:
    """Return possible selection biases of that many choices, None first, without the bias of the logits."""
    tensors = (tensor for tensor in small.values() if len(tensor) == width)
    return [None, *(tensor.float() for tensor in tensors if bias is None or tensor.data_ptr() != bias.data_ptr())]


def _scores(logits: Tensor, scoring: str, selection_bias: Tensor | None) -> Tensor:
    scores = ROUTER_ACTIVATIONS[scoring](logits)
    return scores if selection_bias is None else scores + selection_bias.float()


def _allowed_scores(scores: Tensor, choice_scores: Tensor | None) -> tuple[Tensor, float]:
    """Mask scores outside the router's groups, and return their mean distance from the scores of its choice."""
    if choice_scores is None:
        return scores, 0.0
    allowed = choice_scores.isfinite() & (choice_scores != 0)  # routers mask with minus infinity, or with 0
    return scores.where(allowed, choice_scores), float((scores - choice_scores)[allowed].abs().mean())


def _agreement(scores: Tensor, experts: Tensor, num_experts: int) -> float:
    """Return the share of recorded choices, ``(N, K)``, in the top K of scores; all padding counts as one id."""
    top = scores.topk(experts.shape[-1]).indices
    counts = [
        functional.one_hot(ids.where((ids >= 0) & (ids < num_experts), num_experts), num_experts + 1).sum(1)
        for ids in (top.to(experts.device), experts)
    ]
    return float(torch.minimum(*counts).sum() / experts.numel())


def _equal(tensor: Tensor | None, other: Tensor) -> bool:
    return tensor is not None and tensor.shape == other.shape and torch.equal(tensor, other)
