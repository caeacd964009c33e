"""layer_mlp: one two-layer perceptron per layer, on the router input s layers earlier (ProMoE, arXiv 2410.22134)."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_beyond.geometry import Geometry
from moe_beyond.predictors.activation import Activation
from moe_beyond.predictors.architectures._hidden_states import HiddenStatePredictor
from moe_beyond.predictors.argument_limits import check_arguments
from moe_beyond.predictors.base import GradientPredictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.objectives import subset_cross_entropy


class LayerMlp(HiddenStatePredictor, GradientPredictor):
    """Predicts lookahead s from router inputs.

    The inputs are scaled to unit root mean square, like the model's norms do.

    Args:
        geometry: Shape of the model.
        vocab_size: Number of token ids of the tokenizer.
        hidden_size: Width of the router inputs, W.
        stride: Lookahead s in layers, at least 1; a larger one leaves more time for transfers (default: 1).
        width: Hidden units of each perceptron (default: 256).
        projected_from: Width of the model's hidden states, D, if those of the traces are projected (default: None).
    """

    architecture: ClassVar[str] = "layer_mlp"
    activation: Activation = "subset"

    def __init__(
        self,
        geometry: Geometry,
        vocab_size: int,
        hidden_size: int,
        stride: int = 1,
        width: int = 256,
        projected_from: int | None = None,
    ) -> None:
        check_arguments(self.architecture, {"stride": stride, "width": width})
        super().__init__(geometry, vocab_size, hidden_size, (stride,), projected_from)
        self.stride, self.width = stride, width
        layers, experts, _ = geometry.shape()
        reached = max(layers - stride, 0)
        self.first = nn.Parameter(torch.zeros(min(stride, layers), experts))
        self.into = nn.Parameter(torch.randn(reached, hidden_size, width) * hidden_size**-0.5)
        self.into_bias = nn.Parameter(torch.zeros(reached, width))
        self.out = nn.Parameter(torch.randn(reached, width, experts) * 0.5 * width**-0.5)
        self.out_bias = nn.Parameter(torch.zeros(reached, experts))

    @property
    def information(self) -> InformationSet:
        """Router inputs, available when a layer is routed."""
        return InformationSet(self.ahead, token_ids=False, hidden_states=("router_inputs",))

    def prior_logits(self) -> Tensor:
        """Return the learned logits of the first layers."""
        return self.first

    def logits_from_states(self, states: Tensor, ahead: int, layers: slice) -> Tensor:
        """Apply the layers' perceptrons."""
        part = slice(layers.start - self.stride, layers.stop - self.stride)
        scaled = functional.rms_norm(states, states.shape[-1:])
        hidden = functional.silu(torch.einsum("nld,ldw->nlw", scaled, self.into[part]) + self.into_bias[part])
        return torch.einsum("nlw,lwe->nle", hidden, self.out[part]) + self.out_bias[part]

    def loss(self, logits: Tensor, batch: Batch, soft_targets: Tensor | None = None) -> Tensor:
        """Return the cross-entropy of each expert's selection, given that K are selected."""
        return subset_cross_entropy(logits, batch, soft_targets)
