"""cross_layer: token_causal, and a recurrent network over the layers of the current token that are routed so far.

It reads token ids and expert ids only: all of earlier tokens; of the current token, its id and its routed layers. One
pass predicts lookaheads 1 .. H, and each layer's next run.
"""

from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.lookahead import Lookahead
from moe_beyond.predictors.architectures.token_causal import DECAYS, RETAINED, TokenCausal, TokenState, average_logits
from moe_beyond.predictors.argument_limits import check_arguments
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.modules.copy_attention import LayerCopyAttention
from moe_beyond.predictors.modules.next_token_head import NextTokenHead
from moe_beyond.predictors.stepper import Stepper
from moe_beyond.predictors.stepping.copy_attention import LayerCopyAttentionState
from moe_beyond.predictors.stepping.gru import gru_step
from moe_beyond.predictors.stepping.next_token_head import NextTokenHeadState


class CrossLayer(TokenCausal):
    """Predicts lookaheads 1 .. H from token ids and expert ids.

    To the logits of a `TokenCausal` it adds, for each layer, a map of the recurrent state over the layers routed so far
    and a map of every expert of those layers.

    Args:
        geometry: Shape of the model.
        vocab_size: Number of token ids of the tokenizer.
        lookaheads: Number of lookaheads, H (default: 3).
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
        memory_tokens: Maximum number of tokens whose routing in training is stored; 0 disables it (default: 12288).
        memory_prefixes: Maximum number of prefixes of training sequences whose routing is stored; 0 disables it
            (default: 4096).
        known_tokens: Maximum number of tokens with a learned embedding; 0 disables it (default: 0).
        min_count: Minimum training occurrences of a token with a learned embedding (default: 2).
        ngram_buckets: Number of vectors that all character n-grams share; 0 disables n-grams (default: 0).
        dropout: Probability of dropping a feature in training (default: 0.15).
        token_dropout: Probability of treating a token as unknown in training (default: 0.1).
    """

    architecture: ClassVar[str] = "cross_layer"

    def __init__(
        self,
        geometry: Geometry,
        vocab_size: int,
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
        memory_tokens: int = 12288,
        memory_prefixes: int = 4096,
        known_tokens: int = 0,
        min_count: int = 2,
        ngram_buckets: int = 0,
        dropout: float = 0.15,
        token_dropout: float = 0.1,
    ) -> None:
        check_arguments(self.architecture, locals())
        super().__init__(
            geometry,
            vocab_size,
            width=width,
            depth=depth,
            heads=heads,
            window=window,
            copy_heads=copy_heads,
            objective=objective,
            memory_tokens=memory_tokens,
            memory_prefixes=memory_prefixes,
            known_tokens=known_tokens,
            min_count=min_count,
            ngram_buckets=ngram_buckets,
            dropout=dropout,
            token_dropout=token_dropout,
        )
        if layer_copy_heads and window < 2:
            raise UserError(
                f"cross_layer: layer_copy_heads attend to earlier tokens (got window {window}); set window to 2 or more"
            )
        self.lookaheads, self.layer_width, self.layer_copy_heads = lookaheads, layer_width, layer_copy_heads
        layers, experts, _ = geometry.shape()
        self.start = nn.Linear(width, layer_width)
        self.routed = nn.Parameter(torch.randn(layers, experts, layer_width) * 0.1)
        self.recurrent = nn.GRU(layer_width, layer_width)
        self.from_state = nn.Parameter(torch.randn(lookaheads, layers, layer_width, experts) * layer_width**-0.5)
        self.from_expert = nn.Parameter(torch.zeros(layers * (layers - 1) // 2, experts, experts))
        self.layer_copying = (
            LayerCopyAttention(layers, experts, layer_width, lookaheads, layer_copy_heads, window)
            if layer_copy_heads
            else None
        )
        self.next_token_head = next_token_head
        self.following = (
            NextTokenHead(layers, experts, width, layer_width, len(DECAYS), copy_heads, window)
            if next_token_head
            else None
        )
        # Source and target layer of each map in `from_expert`: every pair, the earlier layer first.
        self.register_buffer("pairs", torch.triu_indices(layers, layers, 1), persistent=False)

    pairs: Tensor

    @property
    def information(self) -> InformationSet:
        """Causal; lookaheads 1 .. H, available when a layer is routed, and the next run if it is predicted."""
        lookaheads: list[Lookahead] = list(range(1, self.lookaheads + 1))
        return InformationSet((*lookaheads, "next") if self.next_token_head else tuple(lookaheads))

    def _layers(self, x: Tensor, logits: Tensor, used: Tensor, batch: Batch) -> Tensor:
        """Return the logits ``(N, H, L, E)`` of the N real tokens.

        Args:
            x: Features ``(B, T, width)`` of the tokens.
            logits: Logits ``(N, L*E)`` that are available when a token starts.
            used: 1 if the token is routed to the expert, ``(B, T, L*E)``.
            batch: Batch of the tokens.
        """
        layers, experts, _ = self.geometry.shape()
        real = batch.mask
        start, current = torch.tanh(self.start(x[real]))[None], used[real]
        by_layer = current.view(-1, layers, experts).transpose(0, 1)
        states = torch.cat([start, self.recurrent(torch.bmm(by_layer, self.routed), start)[0]])
        states, last_state = self.drop(states).split([layers, 1])  # states[l] depends on layers 0 .. l-1
        logits = logits + current @ self._maps_beyond_lookaheads()
        logits = logits.view(-1, layers, experts)
        slices = []
        for ahead in range(self.lookaheads, 0, -1):
            if ahead < min(self.lookaheads, layers):  # one source layer more than for the lookahead before
                logits = logits + functional.pad(self._logits_ahead(by_layer, ahead), (0, 0, ahead, 0))
            early = min(ahead - 1, layers)  # layers predicted before any layer of this token is routed
            sources = torch.cat([states[:1].expand(early, -1, -1), states[: layers - early]])
            slices.append(logits + torch.bmm(sources, self.from_state[ahead - 1]).transpose(0, 1))
        stacked = torch.stack(slices[::-1], 1)
        if self.layer_copying is not None:
            stacked = stacked + self.layer_copying(states, used.view(*real.shape, layers, experts), real)
        after = torch.cat([states[1:], last_state])
        stacked = self._with_hidden_states(stacked, after, batch)
        if self.following is not None:
            past = average_logits(used, real, self.following.from_history)
            following = self.following(x, used, batch.token_ids, real, after, past)
            stacked = torch.cat([stacked, following[:, None]], 1)
        return stacked

    def _with_hidden_states(self, logits: Tensor, states: Tensor, batch: Batch) -> Tensor:
        """Return the logits ``(N, H, L, E)`` unchanged; a subclass that reads hidden states adds to them.

        Args:
            logits: Logits of the N real tokens from ids.
            states: Recurrent states ``(L, N, layer_width)``; states[l] depends on the layers up to l.
            batch: Batch of the tokens.
        """
        return logits

    def _maps_beyond_lookaheads(self) -> Tensor:
        """Return the maps ``(L*E, L*E)`` from experts to experts of layers that are at least H layers apart."""
        layers, experts, _ = self.geometry.shape()
        (source, target), apart = self.pairs, self.pairs[1] - self.pairs[0] >= self.lookaheads
        maps = self.from_expert.new_zeros(layers, layers, experts, experts)
        maps = maps.index_put((source[apart], target[apart]), self.from_expert[apart])
        return maps.transpose(1, 2).reshape(layers * experts, -1)

    def _logits_ahead(self, by_layer: Tensor, ahead: int) -> Tensor:
        """Return the logits ``(N, L - ahead, E)`` that the experts of each layer add ``ahead`` layers later."""
        maps = self.from_expert[self.pairs[1] - self.pairs[0] == ahead]
        return torch.bmm(by_layer[: len(maps)], maps).transpose(0, 1)

    def stepper(self) -> Stepper:
        """Return a stepper; its state is keys and values of ``window`` tokens per block, and a few vectors."""
        return CrossLayerStepper(self)


class CrossLayerStepper(Stepper):
    """Steps tokens in torch, and layers in numpy: a layer is so small that a call of torch would take longer."""

    _predictor: CrossLayer

    @torch.inference_mode()
    def __init__(self, predictor: CrossLayer) -> None:
        recurrent = dict(predictor.recurrent.named_parameters())
        layers, lookaheads = predictor.geometry.num_layers, predictor.lookaheads
        first = predictor.information.lookaheads.index(1)
        # In the order in which a step reads them: for each layer, the maps of its experts to all later layers; for each
        # number of routed layers, the maps of the state to the layers within reach.
        later = [layers - 1 - layer for layer in range(layers)]
        self._from_expert = [
            part.transpose(0, 1).contiguous().numpy() for part in torch.split(predictor.from_expert, later)
        ]
        self._from_state = [
            torch.cat([predictor.from_state[i, routed + i] for i in range(min(lookaheads, layers - routed))], 1).numpy()
            for routed in range(layers)
        ]
        # Input of the gates from each expert, and the parts of the GRU that all layers share.
        self._routed = (predictor.routed @ recurrent["weight_ih_l0"].T).numpy()
        self._bias, self._hidden_bias = recurrent["bias_ih_l0"].numpy(), recurrent["bias_hh_l0"].numpy()
        self._hidden = recurrent["weight_hh_l0"].T.contiguous().numpy()
        # Scores to compute once a number of layers is routed: indices of lookaheads, and layers; the next run is last.
        self._scored = []
        for routed in range(layers + 1):
            targets = list(range(routed, min(routed + lookaheads, layers)))
            ahead = [first + i for i in range(len(targets))]
            if not routed:
                ahead[0] = 0  # the first layer has all its scores when the token starts: the nearest is used
            if predictor.next_token_head and routed:
                ahead, targets = [*ahead, first + lookaheads], [*targets, routed - 1]
            self._scored.append((np.array(ahead, np.int64), np.array(targets, np.int64)))
        super().__init__(predictor)

    def _reset(self) -> None:
        predictor = self._predictor
        self._tokens = TokenState(predictor)
        copying, following = predictor.layer_copying, predictor.following
        self._copying = LayerCopyAttentionState(copying, self._shape[2]) if copying is not None else None
        self._following = NextTokenHeadState(following, RETAINED) if following is not None else None
        self._scores = np.full(self._shape[:2], np.nan, np.float32)

    @torch.inference_mode()
    def _start_token(self, token_id: int) -> None:
        token, self._logits = self._tokens.start(token_id)
        if self._following is not None:
            self._following.start(token.numpy(), token_id, self._tokens.averages, self._tokens.past.rows)
        self._state = torch.tanh(self._predictor.start(token)).numpy()
        self._scores = self._scores.copy()
        if self._predictor.following is not None and np.isnan(self._scores[0, 0]):  # a sequence starts
            first, layers = self._predictor.following.first.numpy(), np.arange(len(self._scores))
            ahead = np.full(len(layers), len(self._predictor.information.lookaheads) - 1)
            self._scores = self._predictor.step_probabilities(first, ahead, layers)
        self._score(0)

    def _route(self, layer: int, experts: npt.NDArray[np.int64], state: npt.NDArray[np.float32] | None) -> None:
        self._tokens.route(layer, experts)
        self._state = gru_step(
            self._state,
            experts,
            self._routed[layer],
            self._bias,
            self._hidden,
            self._hidden_bias,
            self._logits[layer + 1 :],
            self._from_expert[layer],
        )
        self._scores = self._scores.copy()  # arrays returned by `scores` before stay unchanged
        self._scores[layer] = np.nan
        self._score(layer + 1, experts)

    def scores(self) -> npt.NDArray[np.float32]:
        """Return the probabilities ``(L, E)`` of each layer's next run, and NaN where no score is available."""
        return self._scores

    def _score(self, routed: int, experts: npt.NDArray[np.int64] | None = None) -> None:
        """Score the layers within reach.

        Args:
            routed: Number of routed layers.
            experts: Experts of the last of them; None if none is routed.
        """
        ahead, targets = self._scored[routed]
        logits = self._logits_within_reach(routed)
        if self._following is not None and experts is not None:
            logits = np.concatenate([logits, self._following.step(routed - 1, experts, self._state)])
        self._scores[targets] = self._predictor.step_probabilities(logits, ahead, targets)

    def _logits_within_reach(self, routed: int) -> npt.NDArray[np.float32]:
        """Return the logits ``(n, E)`` of the n layers within reach, in new memory.

        Args:
            routed: Number of routed layers.
        """
        logits = self._logits[routed : routed + self._predictor.lookaheads].copy()
        if len(logits):
            logits += (self._state @ self._from_state[routed]).reshape(logits.shape)
            if self._copying is not None:
                logits += self._copying.step(routed, self._state, self._tokens.past.rows)
        return logits
