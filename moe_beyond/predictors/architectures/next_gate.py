"""next_gate: an earlier layer's router input, read by a later layer's router.

What the residual stream holds changes slowly from layer to layer, so that a later router names much of what it will
choose already now. Nothing is trained: FATE (arXiv 2502.12224) and AdapMoE (arXiv 2408.10284) do so one layer ahead.
"""

from typing import ClassVar

import torch
from torch import Tensor

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.architectures._hidden_states import HiddenStatePredictor
from moe_beyond.predictors.base import CountingPredictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.limits import check_arguments
from moe_beyond.predictors.training_stats import TrainingStats
from moe_beyond.router_activations import ROUTER_ACTIVATIONS


class NextGate(HiddenStatePredictor, CountingPredictor):
    """Predicts lookaheads 1 .. H by the model's own routers.

    Layers before which no router has read are scored by popularity, which is all that is counted. Groups that limit a
    router's choice are not known here.

    Args:
        geometry: The model's shape.
        vocab_size: Ids of the tokenizer.
        hidden_size: Width of what a router reads, D.
        lookaheads: H.
    """

    architecture: ClassVar[str] = "next_gate"
    activation = "subset"

    weight: Tensor
    bias: Tensor
    selection_bias: Tensor
    scoring: Tensor
    counts: Tensor
    tokens: Tensor

    def __init__(self, geometry: Geometry, vocab_size: int, hidden_size: int, lookaheads: int = 3) -> None:
        check_arguments(self.architecture, {"lookaheads": lookaheads})
        super().__init__(geometry, vocab_size, hidden_size, tuple(range(1, lookaheads + 1)))
        self.lookaheads = lookaheads
        layers, experts, _ = geometry.shape()
        self.register_buffer("weight", torch.zeros(layers, experts, hidden_size))
        self.register_buffer("bias", torch.zeros(layers, experts))
        self.register_buffer("selection_bias", torch.zeros(layers, experts))
        self.register_buffer("scoring", torch.zeros((), dtype=torch.int64))  # its place in ROUTER_ACTIVATIONS
        self.register_buffer("counts", torch.zeros(min(lookaheads, layers), experts, dtype=torch.int64))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))

    @property
    def information(self) -> InformationSet:
        """Router inputs, which exist when a layer is routed."""
        return InformationSet(self.ahead, token_ids=False, hidden_states="router_inputs")

    def prepare(self, text: TrainingStats) -> None:
        """Take in the routers.

        Raises:
            UserError: The traces hold none.
        """
        routers = text.routers
        if routers is None or routers.scoring not in ROUTER_ACTIVATIONS:
            raise UserError(
                "next_gate reads the model's routers, and the traces hold none: they are recorded with hidden states, "
                "where one weight a layer explains the choice"
            )
        self.weight.copy_(torch.from_numpy(routers.weight))
        for name in ("bias", "selection_bias"):
            if (found := getattr(routers, name)) is not None:
                getattr(self, name).copy_(torch.from_numpy(found))
        self.scoring.fill_(list(ROUTER_ACTIVATIONS).index(routers.scoring))

    def partial_fit(self, batch: Batch) -> None:
        """Count a batch's first layers."""
        chosen = batch.targets(self.geometry.num_experts)
        self.counts += chosen[:, :, : len(self.counts)].sum((0, 1))
        self.tokens += batch.lengths.sum()

    def prior_logits(self) -> Tensor:
        """Return the log-odds of the first layers' popularity."""
        _, experts, top_k = self.geometry.shape()
        return torch.logit((self.counts.double() + top_k / experts) / (self.tokens + 1), eps=1e-9).float()

    def logits_from_states(self, states: Tensor, ahead: int, layers: slice) -> Tensor:
        """Let the layers' routers read."""
        logits = torch.einsum("nld,led->nle", states, self.weight[layers]) + self.bias[layers]
        if not self.selection_bias.any():  # of all layers: a layer scores alike, alone and with others
            return logits  # in the order of any scoring
        return ROUTER_ACTIVATIONS[list(ROUTER_ACTIVATIONS)[int(self.scoring)]](logits) + self.selection_bias[layers]
