"""pre_attention: two linear maps per layer, on the layer's input before its attention (arXiv 2511.10676).

The input is the output of the layer before. The scores are therefore available later than those of a predictor that
waits only for routing, and leave the time of one attention for transfers.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.activation import Activation
from moe_beyond.predictors.architectures._hidden_states import HiddenStatePredictor
from moe_beyond.predictors.argument_limits import check_arguments
from moe_beyond.predictors.base import GradientPredictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet

SELECTED_WEIGHT, OTHER_WEIGHT = 3.0, 0.5  # weights of the cross-entropies of selected and other experts
MARGIN, HINGE_WEIGHT = 0.1, 0.3  # distance by which selected experts should rank above others, and weight of that term


class PreAttention(HiddenStatePredictor, GradientPredictor):
    """Predicts lookahead ``"computed"`` from layer inputs.

    The objective is the paper's: a cross-entropy that weights experts by rank, plus a hinge on pairs. Traces contain
    only part of the ranks: which K experts rank above all others.

    Args:
        geometry: Shape of the model.
        vocab_size: Number of token ids of the tokenizer.
        hidden_size: Width of the layer inputs, W.
        width: Features between the two maps (default: 256).
        projected_from: Width of the model's hidden states, D, if those of the traces are projected (default: None).
    """

    architecture: ClassVar[str] = "pre_attention"
    activation: Activation = "sigmoid"

    def __init__(
        self,
        geometry: Geometry,
        vocab_size: int,
        hidden_size: int,
        width: int = 256,
        projected_from: int | None = None,
    ) -> None:
        check_arguments(self.architecture, {"width": width})
        super().__init__(geometry, vocab_size, hidden_size, (1,), projected_from)
        self.width = width
        layers, experts, _ = geometry.shape()
        self.first = nn.Parameter(torch.zeros(1, experts))
        self.into = nn.Parameter(torch.randn(layers - 1, hidden_size, width) * hidden_size**-0.5)
        self.out = nn.Parameter(torch.randn(layers - 1, width, experts) * 0.5 * width**-0.5)
        self.out_bias = nn.Parameter(torch.zeros(layers - 1, experts))

    @property
    def information(self) -> InformationSet:
        """Layer inputs, available when the layer before is computed."""
        return InformationSet(("computed",), token_ids=False, hidden_states=("layer_inputs",))

    def prior_logits(self) -> Tensor:
        """Return the learned logits of the first layer."""
        return self.first

    def logits_from_states(self, states: Tensor, ahead: int, layers: slice) -> Tensor:
        """Apply the layers' maps."""
        part = slice(layers.start - 1, layers.stop - 1)
        scaled = functional.rms_norm(states, states.shape[-1:])
        hidden = torch.einsum("nld,ldw->nlw", scaled, self.into[part])
        return torch.einsum("nlw,lwe->nle", hidden, self.out[part]) + self.out_bias[part]

    def loss(self, logits: Tensor, batch: Batch, soft_targets: Tensor | None = None) -> Tensor:
        """Return the weighted cross-entropy of each expert's selection, plus the hinge of selected over other experts.

        Raises:
            UserError: There are soft targets.
        """
        if soft_targets is not None:
            raise UserError("pre_attention: fits an order and takes no probabilities; remove the teachers")
        experts = logits.shape[-1]
        scores, selected = logits[batch.mask][:, 0].float(), batch.targets(experts)[batch.mask]  # (N, L, E)
        weights = torch.where(selected, SELECTED_WEIGHT, OTHER_WEIGHT)
        entropy = functional.binary_cross_entropy_with_logits(scores, selected.float(), weights) * experts
        ids = batch.ids(experts)[batch.mask]
        of_selected = functional.pad(scores, (0, 1)).gather(-1, ids)  # (N, L, K)
        pairs = (ids < experts)[..., None] & ~selected[..., None, :]
        shortfall = functional.relu(MARGIN - of_selected[..., None] + scores[..., None, :])
        return entropy + HINGE_WEIGHT * ((shortfall * pairs).sum((-2, -1)) / pairs.sum((-2, -1)).clamp(min=1)).mean()
