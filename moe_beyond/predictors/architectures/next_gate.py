"""next_gate: an earlier layer's router input, passed to a later layer's router.

The residual stream changes slowly from layer to layer, so a later router selects mostly the same experts from an
earlier input. Nothing is trained. FATE (arXiv 2502.12224) and AdapMoE (arXiv 2408.10284) do this one layer ahead.
"""

from typing import ClassVar

import torch
from torch import Tensor

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.activation import Activation
from moe_beyond.predictors.architectures._hidden_states import HiddenStatePredictor
from moe_beyond.predictors.argument_limits import check_arguments
from moe_beyond.predictors.base import CountingPredictor, in_range
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.training_stats import TrainingStats
from moe_beyond.router_activations import ROUTER_ACTIVATIONS


class NextGate(HiddenStatePredictor, CountingPredictor):
    """Predicts lookaheads 1 .. H with the model's own routers.

    The first layers, for which no router input exists yet, are scored by popularity; only that is counted. Expert
    groups that limit a router's selection are ignored.

    Args:
        geometry: Shape of the model.
        vocab_size: Number of token ids of the tokenizer.
        hidden_size: Width of the router inputs, D, which must not be projected.
        lookaheads: Number of lookaheads, H (default: 3).
    """

    architecture: ClassVar[str] = "next_gate"
    activation: Activation = "subset"

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
        self.register_buffer("scoring", torch.zeros((), dtype=torch.int64))  # index into ROUTER_ACTIVATIONS
        self.register_buffer("counts", torch.zeros(min(lookaheads, layers), experts, dtype=torch.int64))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))

    @property
    def information(self) -> InformationSet:
        """Router inputs, available when a layer is routed."""
        return InformationSet(self.ahead, token_ids=False, hidden_states=("router_inputs",))

    def prepare(self, stats: TrainingStats) -> None:
        """Copy the routers' weights.

        Args:
            stats: Statistics of the training split.

        Raises:
            UserError: The traces contain no routers.
        """
        routers = stats.routers
        if routers is None or routers.scoring not in ROUTER_ACTIVATIONS:
            raise UserError(
                "next_gate reads the model's routers, and the traces have none: they are recorded with hidden states, "
                "if one weight matrix per layer explains the selection; collect with --record "
                "experts,gate_weights,hidden_states"
            )
        self.weight.copy_(torch.from_numpy(routers.weight))
        for name in ("bias", "selection_bias"):
            if (values := getattr(routers, name)) is not None:
                getattr(self, name).copy_(torch.from_numpy(values))
        self.scoring.fill_(list(ROUTER_ACTIVATIONS).index(routers.scoring))

    def partial_fit(self, batch: Batch) -> None:
        """Add the first layers of a batch to the counts."""
        used = batch.targets(self.geometry.num_experts)
        self.counts += used[:, :, : len(self.counts)].sum((0, 1))
        self.tokens += batch.lengths.sum()

    def prior_logits(self) -> Tensor:
        """Return the log-odds of the first layers' popularity."""
        _, experts, top_k = self.geometry.shape()
        return torch.logit((self.counts.double() + top_k / experts) / (self.tokens + 1), eps=1e-9).float()

    def logits_from_states(self, states: Tensor, ahead: int, layers: slice) -> Tensor:
        """Apply the layers' routers."""
        logits = torch.einsum("nld,led->nle", states, self.weight[layers]) + self.bias[layers]
        if not self.selection_bias.any():  # of all layers, so a layer's scores do not depend on `layers`
            return logits  # every activation keeps their order
        return ROUTER_ACTIVATIONS[list(ROUTER_ACTIVATIONS)[int(self.scoring)]](logits) + self.selection_bias[layers]

    def weights_fault(self) -> str | None:
        """Describe counts that are negative or exceed the number of tokens, and an unknown function of the routers."""
        if not in_range(self.scoring, 0, len(ROUTER_ACTIVATIONS) - 1):
            return f"scoring is not in 0..{len(ROUTER_ACTIVATIONS) - 1}"
        return None if in_range(self.counts, 0, self.tokens) else "counts are not in 0..tokens"
