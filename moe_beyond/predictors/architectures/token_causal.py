"""token_causal: a causal transformer over tokens; one pass predicts all layers of a token before its first is routed.

It reads token ids and expert ids only: all of earlier tokens, and the id of the current token.
"""

from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_beyond.errors import UserError, unknown
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.activation import Activation
from moe_beyond.predictors.argument_limits import check_arguments
from moe_beyond.predictors.base import GradientPredictor
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.modules.copy_attention import CopyAttention
from moe_beyond.predictors.modules.prefix_memory import PrefixMemory
from moe_beyond.predictors.modules.routing_memory import RoutingMemory
from moe_beyond.predictors.modules.token_embedding import TokenEmbedding
from moe_beyond.predictors.modules.window_attention import WindowBlock
from moe_beyond.predictors.objectives import OBJECTIVES
from moe_beyond.predictors.stepper import Stepper, TokenStepper
from moe_beyond.predictors.stepping.copy_attention import CopyAttentionState, copy_experts
from moe_beyond.predictors.stepping.prefix_memory import PrefixMemoryState
from moe_beyond.predictors.stepping.ring_buffer import RingBuffer
from moe_beyond.predictors.training_stats import TrainingStats

# Decay per token of the running averages of the sequence's experts: about a sentence, and about a conversation.
DECAYS = (0.7, 0.97)
RETAINED = np.array(DECAYS, np.float32)[:, None]


class TokenCausal(GradientPredictor):
    """Predicts a token's experts at all layers when the token starts.

    The logits are a sum of maps: of the token's features, of running averages of the sequence's experts, of the experts
    of earlier tokens that copy heads attend to, and of the token's routing in training. The first tokens of a sequence
    add the experts that training used after the same tokens.

    Args:
        geometry: Shape of the model.
        vocab_size: Number of token ids of the tokenizer.
        width: Features per token (default: 256).
        depth: Number of transformer blocks over tokens (default: 3).
        heads: Number of attention heads; must divide width (default: 8).
        window: Tokens that a block attends to; bounds the stepper's state (default: 128).
        copy_heads: Number of copy-attention heads; 0 disables them (default: 4).
        objective: Training objective, a name of `moe_beyond.predictors.objectives.OBJECTIVES` (default: subset). If
            tokens may use fewer than K experts, only sigmoid is valid.
        memory_tokens: Maximum number of tokens whose routing in training is stored; 0 disables it (default: 12288).
        memory_prefixes: Maximum number of prefixes of training sequences whose routing is stored; 0 disables it
            (default: 4096).
        known_tokens: Maximum number of tokens with a learned embedding; 0 disables it (default: 0).
        min_count: Minimum training occurrences of a token with a learned embedding (default: 2).
        ngram_buckets: Number of vectors that all character n-grams share; 0 disables n-grams (default: 0).
        dropout: Probability of dropping a feature in training (default: 0.15).
        token_dropout: Probability of treating a token as unknown in training (default: 0.1).
    """

    architecture: ClassVar[str] = "token_causal"
    activation: Activation = "softmax"

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
        memory_prefixes: int = 4096,
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
            raise UserError(
                f"{self.architecture}: copy_heads attend to earlier tokens (got window {window}); set window to 2 or "
                "more"
            )
        if objective not in OBJECTIVES:
            raise unknown(f"{self.architecture}: objective", objective, OBJECTIVES)
        self.width, self.depth, self.heads, self.window = width, depth, heads, window
        self.copy_heads, self.objective, self.activation = copy_heads, objective, OBJECTIVES[objective][1]
        self.known_tokens, self.min_count, self.ngram_buckets = known_tokens, min_count, ngram_buckets
        self.memory_tokens, self.memory_prefixes = memory_tokens, memory_prefixes
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
        self.memory = RoutingMemory(vocab_size, memory_tokens, total, width) if memory_tokens else None
        self.from_memory = nn.Linear(width, total, bias=False) if memory_tokens else None
        self.prefixes = PrefixMemory(vocab_size, memory_prefixes, geometry.shape()) if memory_prefixes else None
        nn.init.normal_(self.previous.weight, std=0.02)

    @property
    def information(self) -> InformationSet:
        """Causal; available before the token's first layer."""
        return InformationSet(("token",))

    def prepare(self, stats: TrainingStats) -> None:
        """Read the training split's vocabulary, and its routing if the predictor has a memory of it."""
        self.tokens.prepare(stats)
        if self.memory is not None:
            self.memory.prepare(stats)
        if self.prefixes is not None:
            self.prefixes.prepare(stats)

    def loss(self, logits: Tensor, batch: Batch, soft_targets: Tensor | None = None) -> Tensor:
        """Return the objective."""
        return OBJECTIVES[self.objective][0](logits, batch, soft_targets)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B, T, H, L, E)``; zero where padded."""
        real = batch.mask
        used = batch.targets(self.geometry.num_experts).flatten(2).float()  # (B, T, L*E)
        hidden = torch.rand(real.shape, device=real.device) < self.token_dropout if self.training else None
        before = functional.pad(used[:, :-1], (0, 0, 1, 0))  # experts of the token before
        x = self.tokens(batch.token_ids, hidden) + self.previous(before)
        memory = None if self.memory is None else self.memory(batch.token_ids, hidden, used)
        x = self.drop(x if memory is None else x + memory)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits = self.from_token(x[real]) + average_logits(before, real, self.from_history)
        if memory is not None and self.from_memory is not None:
            logits = logits + self.from_memory(memory[real])
        if self.copying is not None:
            logits = logits + self.copying(x, used, batch.token_ids)[real]
        if self.prefixes is not None:
            starts = torch.tensor(batch.starts, device=real.device)
            logits = logits + self.prefixes(batch.token_ids, starts, used)[real]
        logits = self._layers(x, logits, used, batch)
        out = logits.new_zeros(*real.shape, *logits.shape[1:])
        out[real] = logits
        return out

    def _layers(self, x: Tensor, logits: Tensor, used: Tensor, batch: Batch) -> Tensor:
        """Return the logits ``(N, H, L, E)`` of the N real tokens.

        Args:
            x: Features ``(B, T, width)`` of the tokens.
            logits: Logits ``(N, L*E)`` that are available when a token starts.
            used: 1 if the token is routed to the expert, ``(B, T, L*E)``; this class may not read it.
            batch: Batch of the tokens.
        """
        return logits.view(-1, 1, *self.geometry.shape()[:2])

    def stepper(self) -> Stepper:
        """Return a stepper; its state is keys and values of ``window`` tokens per block, and a few vectors."""
        return _TokenCausalStepper(self)


def average_logits(used: Tensor, real: Tensor, weights: Tensor) -> Tensor:
    """Return the logits ``(N, L*E)`` of the N real tokens that running averages of experts add.

    Args:
        used: Values ``(B, T, L*E)`` to average; the average of a token includes the token's own values.
        real: Mask ``(B, T)`` bool of real tokens.
        weights: Weight of each average and expert, ``(averages, L*E)``.
    """
    position = torch.arange(real.shape[1], device=real.device)
    age = position[:, None] - position
    total = used.new_zeros(int(real.sum()), used.shape[2])
    for decay, weight in zip(DECAYS, weights, strict=True):
        share = torch.where(age >= 0, (1 - decay) * decay ** age.clamp(min=0), 0.0)
        total = total + (share @ used)[real] * weight
    return total


class TokenState:
    """A stepper's state over tokens.

    Args:
        predictor: Predictor that is stepped.

    Attributes:
        past: Experts of the last ``window - 1`` tokens, rows ``(L*K,)`` of ``layer * E + expert``; -1 for padding.
        averages: Running averages ``(averages, L*E)`` over the tokens before the current one.
    """

    def __init__(self, predictor: TokenCausal) -> None:
        layers, experts, top_k = predictor.geometry.shape()
        self._predictor = predictor
        self._caches: list[tuple[Tensor, Tensor] | None] = [None] * predictor.depth
        self._previous = predictor.previous.weight.detach().T.contiguous()
        maps = predictor.from_token.weight, predictor.from_token.bias, predictor.from_history
        self._from_token, self._bias, self._from_history = (part.detach().numpy() for part in maps)
        self._from_memory = None if predictor.from_memory is None else predictor.from_memory.weight.detach().numpy()
        self.averages = np.zeros(self._from_history.shape, np.float32)
        self._shape, self._top_k = (layers, experts), top_k
        self.past = RingBuffer(max(predictor.window - 1, 1), layers * top_k, dtype=np.int32)
        self._current: npt.NDArray[np.int32] | None = None  # experts of the current token, as in `past`
        self._copying = CopyAttentionState(predictor.copying) if predictor.copying is not None else None
        self._prefixes = PrefixMemoryState(predictor.prefixes) if predictor.prefixes is not None else None

    def route(self, layer: int, experts: npt.NDArray[np.int64]) -> None:
        """Store the experts of a layer of the current token.

        Args:
            layer: MoE layer, counted from 0.
            experts: Ids ``(n,)`` of its experts, n <= K.
        """
        assert self._current is not None
        first = layer * self._top_k
        self._current[first : first + len(experts)] = experts + layer * self._shape[1]

    def start(self, token_id: int) -> tuple[Tensor, npt.NDArray[np.float32]]:
        """Start a token.

        Args:
            token_id: Id of the token.

        Returns:
            Features ``(width,)`` of the token, and its logits ``(L, E)`` before any layer is routed.
        """
        predictor = self._predictor
        self.averages = RETAINED * self.averages
        ids = torch.tensor([[token_id]])
        x = predictor.tokens(ids)
        if self._current is not None:  # the last token becomes an earlier token
            self.past.append(self._current)
            experts = self._current[self._current >= 0]
            self.averages[:, experts] += 1 - RETAINED
            x = x + self._previous[torch.from_numpy(experts)].sum(0)
        memory = None if predictor.memory is None else predictor.memory(ids)
        x = x if memory is None else x + memory
        for index, block in enumerate(predictor.blocks):
            assert isinstance(block, WindowBlock)
            x, self._caches[index] = block.step(x, self._caches[index])
        features = predictor.norm(x)[0, 0]
        token = features.numpy()
        logits = self._from_token @ token + self._bias + (self.averages * self._from_history).sum(0)
        if memory is not None and self._from_memory is not None:
            logits += self._from_memory @ memory[0, 0].numpy()
        if self._copying is not None:
            logits += copy_experts(self._copying.start(token, token_id), self.past.rows, self._copying.weight)
        logits = logits.reshape(self._shape)
        if self._prefixes is not None:
            self._prefixes.add(logits, token_id)
        self._current = np.full(self.past.rows.shape[1], -1, np.int32)
        return features, logits


class _TokenCausalStepper(TokenStepper):
    _predictor: TokenCausal

    def _reset(self) -> None:
        super()._reset()
        self._state = TokenState(self._predictor)

    def _logits(self, token_id: int) -> Tensor:
        return torch.from_numpy(self._state.start(token_id)[1])

    def _route(self, layer: int, experts: npt.NDArray[np.int64], state: npt.NDArray[np.float32] | None) -> None:
        super()._route(layer, experts, state)
        self._state.route(layer, experts)
