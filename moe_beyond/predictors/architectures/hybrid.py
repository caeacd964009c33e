"""hybrid: cross_layer, and a recurrent reader of the hidden states of the current token's layers.

The part that reads ids is a whole `cross_layer`. Readers of hidden states add to its logits. A learned vector replaces
a state that is not available, so the predictor falls back to ids there. Hidden states of earlier tokens are not read:
a prefix needs none.
"""

from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.predictors.architectures.cross_layer import CrossLayer, CrossLayerStepper
from moe_beyond.predictors.argument_limits import check_arguments
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet, StateKind
from moe_beyond.predictors.modules.state_projection import ProjectedStates, StateProjections
from moe_beyond.predictors.modules.state_reader import StateReader
from moe_beyond.predictors.stepper import Stepper
from moe_beyond.predictors.stepping.state_reader import StateReaderSteps
from moe_beyond.predictors.training_stats import TrainingStats


class Hybrid(CrossLayer):
    """Predicts the next layer once a layer is computed, and lookaheads 1 .. H once it is routed.

    One reader reads the router inputs of the layers that are routed, in order, and adds logits of the next H layers. A
    second one reads the input of the next MoE layer before its attention, and adds logits of that layer.

    Args:
        geometry: Shape of the model.
        vocab_size: Number of token ids of the tokenizer.
        hidden_size: Width of the hidden states, W.
        lookaheads: Number of lookaheads of a routed layer, H (default: 3).
        width: Features per token (default: 256).
        depth: Number of transformer blocks over tokens (default: 3).
        heads: Number of attention heads; must divide width (default: 8).
        window: Tokens that a block attends to; bounds the stepper's state (default: 128).
        copy_heads: Number of copy-attention heads, which attend when a token starts; 0 disables them (default: 4).
        objective: Training objective, a name of `moe_beyond.predictors.objectives.OBJECTIVES` (default: subset). If
            tokens may use fewer than K experts, only sigmoid is valid.
        layer_width: Features of the recurrent state over layers (default: 256).
        layer_copy_heads: Number of copy-attention heads that attend after every layer; 0 disables them (default: 1).
        next_token_head: Whether lookahead ``"next"`` is predicted as well (default: true).
        state_width: Features that a reader maps each hidden state to (default: 128).
        memory_tokens: Maximum number of tokens whose routing in training is stored; 0 disables it (default: 12288).
        memory_prefixes: Maximum number of prefixes of training sequences whose routing is stored; 0 disables it
            (default: 4096).
        known_tokens: Maximum number of tokens with a learned embedding; 0 disables it (default: 0).
        min_count: Minimum training occurrences of a token with a learned embedding (default: 2).
        ngram_buckets: Number of vectors that all character n-grams share; 0 disables n-grams (default: 0).
        dropout: Probability of dropping a feature in training (default: 0.15).
        token_dropout: Probability of treating a token as unknown in training (default: 0.1).
        state_dropout: Probability of treating a token's hidden states as not available in training (default: 0.1).
        projected_from: Width of the model's hidden states, D, if those of the traces are projected (default: None).

    Raises:
        UserError: The traces, which determine the widths, contain no hidden states.
    """

    architecture: ClassVar[str] = "hybrid"

    def __init__(
        self,
        geometry: Geometry,
        vocab_size: int,
        hidden_size: int,
        lookaheads: int = 3,
        width: int = 256,
        depth: int = 3,
        heads: int = 8,
        window: int = 128,
        copy_heads: int = 4,
        objective: Literal["softmax", "subset", "sigmoid", "ranking"] = "subset",
        layer_width: int = 256,
        layer_copy_heads: int = 1,
        next_token_head: bool = True,
        state_width: int = 128,
        memory_tokens: int = 12288,
        memory_prefixes: int = 4096,
        known_tokens: int = 0,
        min_count: int = 2,
        ngram_buckets: int = 0,
        dropout: float = 0.15,
        token_dropout: float = 0.1,
        state_dropout: float = 0.1,
        projected_from: int | None = None,
    ) -> None:
        check_arguments(self.architecture, {"state_width": state_width, "state_dropout": state_dropout})
        super().__init__(
            geometry,
            vocab_size,
            lookaheads=lookaheads,
            width=width,
            depth=depth,
            heads=heads,
            window=window,
            copy_heads=copy_heads,
            objective=objective,
            layer_width=layer_width,
            layer_copy_heads=layer_copy_heads,
            next_token_head=next_token_head,
            memory_tokens=memory_tokens,
            memory_prefixes=memory_prefixes,
            known_tokens=known_tokens,
            min_count=min_count,
            ngram_buckets=ngram_buckets,
            dropout=dropout,
            token_dropout=token_dropout,
        )
        layers, experts, _ = geometry.shape()
        kinds = self.information.hidden_states
        self.projections = StateProjections(self.architecture, layers, hidden_size, projected_from, kinds)
        self.hidden_size, self.projected_from = hidden_size, projected_from
        self.state_width, self.state_dropout = state_width, state_dropout
        # No reader reads the last layer's router input or the first layer's input: they serve no lookahead.
        self.routed_reader = StateReader(layers - 1, hidden_size, layer_width, state_width)
        self.computed_reader = StateReader(layers - 1, hidden_size, layer_width, state_width)
        scale = 0.5 * state_width**-0.5
        self.from_routed = nn.Parameter(torch.randn(lookaheads, layers - 1, 2 * state_width, experts) * scale)
        self.from_computed = nn.Parameter(torch.randn(layers - 1, 2 * state_width, experts) * scale)

    @property
    def information(self) -> InformationSet:
        """Causal; the next layer once a layer is computed, lookaheads 1 .. H once it is routed, and the next run."""
        lookaheads: list[Lookahead] = ["computed", *range(1, self.lookaheads + 1)]
        return InformationSet(
            (*lookaheads, "next") if self.next_token_head else tuple(lookaheads),
            hidden_states=("router_inputs", "layer_inputs"),
        )

    def prepare(self, stats: TrainingStats) -> None:
        """Read the training split's vocabulary and routing, and the projection of its hidden states.

        Raises:
            UserError: The traces have no projection, or one of another shape.
        """
        super().prepare(stats)
        self.projections.copy_from(stats.projection)

    def projection_of(self, kind: StateKind) -> ProjectedStates | None:
        """Return the projection of a kind of states; None if they are not projected."""
        return self.projections.of(kind)

    def _with_hidden_states(self, logits: Tensor, states: Tensor, batch: Batch) -> Tensor:
        """Add the readers' logits, and put those of lookahead ``"computed"`` first."""
        before, layers = states[:-1], self.geometry.num_layers
        available = torch.ones(before.shape[1], dtype=torch.bool, device=before.device)
        if self.training:
            available = torch.rand(before.shape[1], device=before.device) >= self.state_dropout
        router_inputs, layer_inputs = (self.projections.read(batch, kind) for kind in self.information.hidden_states)
        real = batch.mask
        features = self.routed_reader.features(router_inputs[real][:, :-1], available)
        vectors, routed = self.routed_reader(features, before)
        slices = []
        for ahead in range(1, self.lookaheads + 1):
            reached = max(layers - ahead, 0)
            added = torch.bmm(routed[:reached], self.from_routed[ahead - 1, :reached])
            slices.append(functional.pad(added, (0, 0, 0, 0, layers - reached, 0)))
        logits = logits + torch.stack(slices).permute(2, 0, 1, 3)
        features = self.computed_reader.features(layer_inputs[real][:, 1:], available)
        computed = self.computed_reader.after(features, before, vectors)
        added = functional.pad(torch.bmm(computed, self.from_computed), (0, 0, 0, 0, 1, 0))
        return torch.cat([logits[:, :1] + added.transpose(0, 1)[:, None], logits], 1)

    def stepper(self) -> Stepper:
        """Return a stepper; its state is keys and values of ``window`` tokens per block, and a few vectors."""
        return _HybridStepper(self)


class _HybridStepper(CrossLayerStepper):
    """Adds the readers' logits to those from ids."""

    _predictor: Hybrid

    @torch.inference_mode()
    def __init__(self, predictor: Hybrid) -> None:
        reached = range(predictor.geometry.num_layers - 1, 0, -1)  # layers after each layer but the last
        self._routed_reader = StateReaderSteps(predictor.routed_reader, predictor.projection_of("router_inputs"))
        self._computed_reader = StateReaderSteps(
            predictor.computed_reader, predictor.projection_of("layer_inputs"), skipped=1
        )
        self._from_routed = [
            torch.cat(list(predictor.from_routed[:later, layer]), 1).numpy() for layer, later in enumerate(reached)
        ]
        self._from_computed = predictor.from_computed.numpy()
        super().__init__(predictor)

    def _reset(self) -> None:
        self._hidden_state: npt.NDArray[np.float32] | None = None
        self._vector = self._routed_reader.nothing  # of the last layer that was routed
        super()._reset()

    def _start_token(self, token_id: int) -> None:
        self._vector = self._routed_reader.nothing
        super()._start_token(token_id)

    def _route(self, layer: int, experts: npt.NDArray[np.int64], state: npt.NDArray[np.float32] | None) -> None:
        self._hidden_state = state
        super()._route(layer, experts, state)

    def _logits_within_reach(self, routed: int) -> npt.NDArray[np.float32]:
        logits = super()._logits_within_reach(routed)
        if routed and len(logits):
            read = self._routed_reader.step(routed - 1, self._hidden_state, self._state, self._vector)
            self._vector = read[: len(self._vector)]
            logits += (read @ self._from_routed[routed - 1]).reshape(logits.shape)
        self._nearest = logits[:1]
        return logits

    def _compute(self, layer: int, state: npt.NDArray[np.float32] | None) -> None:
        if state is None or layer + 1 == len(self._scores):
            return
        read = self._computed_reader.step(layer, state, self._state, self._vector)
        logits, target = self._nearest + read @ self._from_computed[layer], np.array([layer + 1])
        self._scores = self._scores.copy()  # arrays returned by `scores` before stay unchanged
        self._scores[target] = self._predictor.step_probabilities(logits, np.zeros(1, np.int64), target)
