"""token_causal: a causal transformer over tokens; all layers of a token from one pass, before its first is routed.

It knows token ids and expert ids only: of earlier tokens everything, of the present token its id.
"""

from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_beyond.errors import UserError, unknown
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.base import GradientPredictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.limits import check_arguments
from moe_beyond.predictors.modules.copy_attention import CopyAttention
from moe_beyond.predictors.modules.routing_memory import RoutingMemory
from moe_beyond.predictors.modules.token_embedding import TokenEmbedding
from moe_beyond.predictors.modules.window_attention import WindowBlock
from moe_beyond.predictors.objectives import (
    binary_cross_entropy,
    k_positive_cross_entropy,
    ranking_loss,
    subset_cross_entropy,
)
from moe_beyond.predictors.stepper import Stepper, TokenStepper
from moe_beyond.predictors.stepping.copy_attention import CopyAttentionState, copied
from moe_beyond.predictors.stepping.ring_buffer import RingBuffer
from moe_beyond.predictors.training_stats import TrainingStats

# How fast the running averages of a sequence's own experts forget, per token: a sentence, and a conversation.
DECAYS = (0.7, 0.97)
RETAINED = np.array(DECAYS, np.float32)[:, None]
# What can be fitted: the loss, and the link that makes probabilities of its logits.
OBJECTIVES: dict[
    str, tuple[Callable[[Tensor, Batch, Tensor | None], Tensor], Literal["sigmoid", "softmax", "subset"]]
] = {
    "softmax": (k_positive_cross_entropy, "softmax"),
    "subset": (subset_cross_entropy, "subset"),
    "sigmoid": (binary_cross_entropy, "sigmoid"),
    "ranking": (ranking_loss, "subset"),
}


class TokenCausal(GradientPredictor):
    """Predicts a token's experts at all layers when the token starts.

    Logits are the sum of maps: of the token's state, of running averages of the sequence's own experts, of the experts
    of earlier tokens that it picks, and of what training routed the token to.

    Args:
        geometry: The model's shape.
        vocab_size: Ids of the tokenizer.
        width: Features of a token's state.
        depth: Transformer blocks over tokens.
        heads: Attention heads.
        window: Tokens a block sees back; with it the stepper's state is bounded.
        copy_heads: Heads that pick earlier tokens.
        objective: What is fitted (`OBJECTIVES`; `moe_beyond.predictors.objectives`). Where tokens may have fewer than
            K experts, sigmoid: probabilities of the others add up to K.
        memory_tokens: Tokens whose routing in training is remembered; 0 does without.
        known_tokens: Tokens with an own vector; 0 does without.
        min_count: Training occurrences that an own vector needs.
        ngram_buckets: Vectors shared by all character n-grams; 0 does without.
        dropout: Probability of dropping a feature in training.
        token_dropout: Probability of treating a token as unknown in training.
    """

    architecture: ClassVar[str] = "token_causal"
    activation: Literal["sigmoid", "softmax", "subset"] = "softmax"

    def __init__(
        self,
        geometry: Geometry,
        vocab_size: int,
        width: int = 256,
        depth: int = 3,
        heads: int = 8,
        window: int = 128,
        copy_heads: int = 4,
        objective: Literal["softmax", "subset", "sigmoid", "ranking"] = "subset",
        memory_tokens: int = 12288,
        known_tokens: int = 0,
        min_count: int = 2,
        ngram_buckets: int = 0,
        dropout: float = 0.15,
        token_dropout: float = 0.1,
    ) -> None:
        super().__init__(geometry, vocab_size)
        check_arguments(self.architecture, locals())
        if width % heads:
            raise UserError(f"{self.architecture}: heads must divide width (got heads {heads}, width {width})")
        if copy_heads and window < 2:
            raise UserError(f"{self.architecture}: copy_heads look at earlier tokens; window must be at least 2")
        if objective not in OBJECTIVES:
            raise unknown(f"{self.architecture}: objective", objective, OBJECTIVES)
        self.width, self.depth, self.heads, self.window = width, depth, heads, window
        self.copy_heads, self.objective, self.activation = copy_heads, objective, OBJECTIVES[objective][1]
        self.known_tokens, self.min_count, self.ngram_buckets = known_tokens, min_count, ngram_buckets
        self.dropout, self.token_dropout = dropout, token_dropout
        total = geometry.total_experts
        self.tokens = TokenEmbedding(vocab_size, width, known_tokens, min_count, ngram_buckets)
        self.previous = nn.Linear(total, width, bias=False)
        self.blocks = nn.ModuleList(WindowBlock(width, heads, window, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)
        self.from_token = nn.Linear(width, total)
        self.from_history = nn.Parameter(torch.zeros(len(DECAYS), total))
        self.copying = CopyAttention(width, copy_heads, window, total) if copy_heads else None
        self.memory_tokens = memory_tokens
        self.memory = RoutingMemory(vocab_size, memory_tokens, total, width) if memory_tokens else None
        self.from_memory = nn.Linear(width, total, bias=False) if memory_tokens else None
        nn.init.normal_(self.previous.weight, std=0.02)

    @property
    def information(self) -> InformationSet:
        """Before the token's first layer, causal."""
        return InformationSet(("token",))

    def prepare(self, text: TrainingStats) -> None:
        """Take in the training split's vocabulary, and what was routed where if that is to be remembered."""
        self.tokens.prepare(text)
        if self.memory is not None:
            self.memory.prepare(text)

    def loss(self, logits: Tensor, batch: Batch, soft_targets: Tensor | None = None) -> Tensor:
        """The objective."""
        return OBJECTIVES[self.objective][0](logits, batch, soft_targets)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B, T, H, L, E)``; zero where padded."""
        real = batch.mask
        used = batch.targets(self.geometry.num_experts).flatten(2).float()  # (B, T, L*E)
        hidden = torch.rand(real.shape, device=real.device) < self.token_dropout if self.training else None
        before = functional.pad(used[:, :-1], (0, 0, 1, 0))  # of the token before each
        x = self.tokens(batch.token_ids, hidden) + self.previous(before)
        memory = None if self.memory is None else self.memory(batch.token_ids, hidden, used)
        x = self.drop(x if memory is None else x + memory)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits = self.from_token(x[real]) + averaged(before, real, self.from_history)
        if memory is not None and self.from_memory is not None:
            logits = logits + self.from_memory(memory[real])
        if self.copying is not None:
            logits = logits + self.copying(x, used, batch.token_ids)[real]
        logits = self._layers(x, logits, used, batch)
        out = logits.new_zeros(*real.shape, *logits.shape[1:])
        out[real] = logits
        return out

    def _layers(self, x: Tensor, logits: Tensor, used: Tensor, batch: Batch) -> Tensor:
        """Return logits ``(N, H, L, E)`` of the N real tokens.

        Args:
            x: ``(B, T, width)`` states.
            logits: ``(N, L*E)``, what those and earlier tokens say.
            used: ``(B, T, L*E)``, 1 where the token is routed to the expert; not for this predictor to see.
            batch: The tokens.
        """
        return logits.view(-1, 1, *self.geometry.shape()[:2])

    def stepper(self) -> Stepper:
        """Return a stepper; its state is ``window`` tokens of keys and values a block, and a few vectors."""
        return _TokenCausalStepper(self)


def averaged(used: Tensor, real: Tensor, weights: Tensor) -> Tensor:
    """Return what running averages say: the part of the logits ``(N, L*E)`` of the N real tokens.

    Args:
        used: ``(B, T, L*E)``, what is averaged, each token's own included.
        real: ``(B, T)`` bool.
        weights: ``(averages, L*E)``.
    """
    position = torch.arange(real.shape[1], device=real.device)
    age = position[:, None] - position
    total = used.new_zeros(int(real.sum()), used.shape[2])
    for decay, weight in zip(DECAYS, weights, strict=True):
        share = torch.where(age >= 0, (1 - decay) * decay ** age.clamp(min=0), 0.0)
        total = total + (share @ used)[real] * weight
    return total


class TokenState:
    """What a stepper keeps of the tokens so far.

    Args:
        model: The predictor.

    Attributes:
        past: The last ``window - 1`` tokens' experts, as ``layer * E + expert``, -1 for none: rows ``(L*K,)``.
        averages: ``(averages, L*E)``, of the tokens before the present one.
    """

    def __init__(self, model: TokenCausal) -> None:
        layers, experts, top_k = model.geometry.shape()
        self._model = model
        self._caches: list[tuple[Tensor, Tensor] | None] = [None] * model.depth
        self._previous = model.previous.weight.detach().T.contiguous()
        maps = model.from_token.weight, model.from_token.bias, model.from_history
        self._from_token, self._bias, self._from_history = (part.detach().numpy() for part in maps)
        self._from_memory = None if model.from_memory is None else model.from_memory.weight.detach().numpy()
        self.averages = np.zeros(self._from_history.shape, np.float32)
        self._shape, self._top_k = (layers, experts), top_k
        self.past = RingBuffer(max(model.window - 1, 1), layers * top_k, dtype=np.int32)
        self._chosen: npt.NDArray[np.int32] | None = None
        self._copying = CopyAttentionState(model.copying) if model.copying is not None else None

    def route(self, layer: int, experts: npt.NDArray[np.int64]) -> None:
        """Note a layer's experts."""
        assert self._chosen is not None
        first = layer * self._top_k
        self._chosen[first : first + len(experts)] = experts + layer * self._shape[1]

    def start(self, token_id: int) -> tuple[Tensor, npt.NDArray[np.float32]]:
        """Begin a token; return its state ``(width,)``, and logits ``(L, E)`` of that and the history."""
        model = self._model
        self.averages = RETAINED * self.averages
        ids = torch.tensor([[token_id]])
        x = model.tokens(ids)
        if self._chosen is not None:  # the token before is an earlier one now
            self.past.append(self._chosen)
            chosen = self._chosen[self._chosen >= 0]
            self.averages[:, chosen] += 1 - RETAINED
            x = x + self._previous[torch.from_numpy(chosen)].sum(0)
        memory = None if model.memory is None else model.memory(ids)
        x = x if memory is None else x + memory
        for index, block in enumerate(model.blocks):
            assert isinstance(block, WindowBlock)
            x, self._caches[index] = block.step(x, self._caches[index])
        state = model.norm(x)[0, 0]
        token = state.numpy()
        logits = self._from_token @ token + self._bias + (self.averages * self._from_history).sum(0)
        if memory is not None and self._from_memory is not None:
            logits += self._from_memory @ memory[0, 0].numpy()
        if self._copying is not None:
            logits += copied(self._copying.start(token, token_id), self.past.rows, self._copying.weight)
        self._chosen = np.full(self.past.rows.shape[1], -1, np.int32)
        return state, logits.reshape(self._shape)


class _TokenCausalStepper(TokenStepper):
    def _reset(self) -> None:
        super()._reset()
        assert isinstance(self._predictor, TokenCausal)
        self._state = TokenState(self._predictor)

    def _logits(self, token_id: int) -> Tensor:
        return torch.from_numpy(self._state.start(token_id)[1])

    def _route(self, layer: int, experts: npt.NDArray[np.int64], state: npt.NDArray[np.float32] | None) -> None:
        super()._route(layer, experts, state)
        self._state.route(layer, experts)
