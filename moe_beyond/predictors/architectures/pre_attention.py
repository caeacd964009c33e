"""pre_attention: two linear maps a layer, on what the layer reads before its attention (arXiv 2511.10676).

That is what the layer before has computed: its scores come later than those of a predictor that waits for routing
alone, and leave one attention for transfers.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.architectures._hidden_states import HiddenStatePredictor
from moe_beyond.predictors.base import GradientPredictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.limits import check_arguments

CHOSEN, OTHERS = 3.0, 0.5  # weights of their cross-entropies
MARGIN, HINGE = 0.1, 0.3  # by which the chosen shall be above the others; and that term's weight


class PreAttention(HiddenStatePredictor, GradientPredictor):
    """Predicts lookahead 1, computed.

    The published objective, a cross-entropy that weighs experts by their rank and a hinge on pairs, as far as traces
    tell ranks: which K experts come before all others.

    Args:
        geometry: The model's shape.
        vocab_size: Ids of the tokenizer.
        hidden_size: Width of what a layer reads, D.
        width: Between the two maps.
    """

    architecture: ClassVar[str] = "pre_attention"
    activation = "sigmoid"

    def __init__(self, geometry: Geometry, vocab_size: int, hidden_size: int, width: int = 256) -> None:
        check_arguments(self.architecture, {"width": width})
        super().__init__(geometry, vocab_size, hidden_size, (1,))
        self.width = width
        layers, experts, _ = geometry.shape()
        self.first = nn.Parameter(torch.zeros(1, experts))
        self.into = nn.Parameter(torch.randn(layers - 1, hidden_size, width) * hidden_size**-0.5)
        self.out = nn.Parameter(torch.randn(layers - 1, width, experts) * 0.5 * width**-0.5)
        self.out_bias = nn.Parameter(torch.zeros(layers - 1, experts))

    @property
    def information(self) -> InformationSet:
        """Layer inputs, which exist when the layer before is computed."""
        return InformationSet(self.ahead, available_after="computed", token_ids=False, hidden_states="layer_inputs")

    def prior_logits(self) -> Tensor:
        """Return what was learned for the first layer."""
        return self.first

    def logits_from_states(self, states: Tensor, ahead: int, layers: slice) -> Tensor:
        """Map the layers' states."""
        part = slice(layers.start - 1, layers.stop - 1)
        scaled = functional.rms_norm(states, states.shape[-1:])
        hidden = torch.einsum("nld,ldw->nlw", scaled, self.into[part])
        return torch.einsum("nlw,lwe->nle", hidden, self.out[part]) + self.out_bias[part]

    def loss(self, logits: Tensor, batch: Batch, soft_targets: Tensor | None = None) -> Tensor:
        """Return the weighted cross-entropy of each expert being chosen, and the hinge of chosen over other experts.

        Raises:
            UserError: Something is soft_targets in place of the choices.
        """
        if soft_targets is not None:
            raise UserError("pre_attention fits an order, not probabilities; give it no teachers")
        experts = logits.shape[-1]
        found, chosen = logits[batch.mask][:, 0].float(), batch.targets(experts)[batch.mask]  # (N, L, E)
        weights = torch.where(chosen, CHOSEN, OTHERS)
        entropy = functional.binary_cross_entropy_with_logits(found, chosen.float(), weights) * experts
        ids = batch.ids(experts)[batch.mask]
        of_chosen = functional.pad(found, (0, 1)).gather(-1, ids)  # (N, L, K)
        pairs = (ids < experts)[..., None] & ~chosen[..., None, :]
        short = functional.relu(MARGIN - of_chosen[..., None] + found[..., None, :])
        return entropy + HINGE * ((short * pairs).sum((-2, -1)) / pairs.sum((-2, -1)).clamp(min=1)).mean()
