"""cross_layer: token_causal, and a recurrent network over the layers that a token was routed at so far.

It knows token ids and expert ids only: of earlier tokens everything, of the present token its id and the layers routed
so far. One pass gives lookaheads 1 .. H, and what each layer uses when it runs next.
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
from moe_beyond.predictors.architectures.token_causal import DECAYS, RETAINED, TokenCausal, TokenState, averaged
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import InformationSet
from moe_beyond.predictors.limits import check_arguments
from moe_beyond.predictors.modules.copy_attention import LayerCopyAttention
from moe_beyond.predictors.modules.next_token_head import NextTokenHead, NextTokenHeadState
from moe_beyond.predictors.stepper import Stepper
from moe_beyond.predictors.stepping.copy_attention import LayerCopyAttentionState
from moe_beyond.predictors.stepping.gru import gru_step


class CrossLayer(TokenCausal):
    """Predicts lookaheads 1 .. H from ids.

    To the logits that a `TokenCausal` has when the token starts it adds, of layer l, a map of the recurrent state over
    the layers routed so far, and one of every single expert routed so far.

    Args:
        geometry: The model's shape.
        vocab_size: Ids of the tokenizer.
        lookaheads: H.
        width: Features of a token's state.
        depth: Transformer blocks over tokens.
        heads: Attention heads.
        window: Tokens a block sees back; with it the stepper's state is bounded.
        copy_heads: Heads that pick earlier tokens.
        objective: What is fitted (`moe_beyond.predictors.architectures.token_causal.OBJECTIVES`; see there).
        layer_width: Features of the recurrent state over layers.
        layer_copy_heads: Heads that pick earlier tokens after every layer.
        next_token_head: Whether lookahead ``"next"`` is predicted as well.
        memory_tokens: Tokens whose routing in training is remembered; 0 does without.
        known_tokens: Tokens with an own vector; 0 does without.
        min_count: Training occurrences that an own vector needs.
        ngram_buckets: Vectors shared by all character n-grams; 0 does without.
        dropout: Probability of dropping a feature in training.
        token_dropout: Probability of treating a token as unknown in training.
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
        known_tokens: int = 0,
        min_count: int = 2,
        ngram_buckets: int = 0,
        dropout: float = 0.15,
        token_dropout: float = 0.1,
    ) -> None:
        check_arguments(self.architecture, locals())
        super().__init__(
            geometry, vocab_size, width, depth, heads, window, copy_heads, objective, memory_tokens, known_tokens,
            min_count, ngram_buckets, dropout, token_dropout,
        )  # fmt: skip
        if layer_copy_heads and window < 2:
            raise UserError("cross_layer: layer_copy_heads look at earlier tokens; window must be at least 2")
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
        # The layers that each part of `from_expert` maps from and to: every pair, earlier one first.
        self.register_buffer("pairs", torch.triu_indices(layers, layers, 1), persistent=False)

    pairs: Tensor

    @property
    def information(self) -> InformationSet:
        """Lookaheads 1 .. H, and perhaps the next run; known when the layer is routed, causal."""
        lookaheads: list[Lookahead] = list(range(1, self.lookaheads + 1))
        return InformationSet((*lookaheads, "next") if self.next_token_head else tuple(lookaheads))

    def _layers(self, x: Tensor, logits: Tensor, used: Tensor, batch: Batch) -> Tensor:
        """Return logits ``(N, H, L, E)`` of the N real tokens.

        Args:
            x: ``(B, T, width)`` states.
            logits: ``(N, L*E)``, what those and earlier tokens say.
            used: ``(B, T, L*E)``, 1 where the token is routed to the expert.
            batch: The tokens.
        """
        layers, experts, _ = self.geometry.shape()
        real = batch.mask
        start, own = torch.tanh(self.start(x[real]))[None], used[real]
        by_layer = own.view(-1, layers, experts).transpose(0, 1)
        states = torch.cat([start, self.recurrent(torch.bmm(by_layer, self.routed), start)[0]])
        states, after = self.drop(states).split([layers, 1])  # states[l] knows layers 0 .. l-1
        logits = logits + own @ self._from_layers_within_reach()
        logits = logits.view(-1, layers, experts)
        nearer = []
        for ahead in range(self.lookaheads, 0, -1):
            if ahead < min(self.lookaheads, layers):  # one source layer more than the lookahead before
                logits = logits + functional.pad(self._from_layer(by_layer, ahead), (0, 0, ahead, 0))
            waiting = min(ahead - 1, layers)  # layers so early that nothing of this token is routed yet
            known = torch.cat([states[:1].expand(waiting, -1, -1), states[: layers - waiting]])
            nearer.append(logits + torch.bmm(known, self.from_state[ahead - 1]).transpose(0, 1))
        found = torch.stack(nearer[::-1], 1)
        if self.layer_copying is not None:
            found = found + self.layer_copying(states, used.view(*real.shape, layers, experts), real)
        if self.following is not None:
            past = averaged(used, real, self.following.from_history)
            after = torch.cat([states[1:], after])
            following = self.following(x, used, batch.token_ids, real, after, past)
            found = torch.cat([found, following[:, None]], 1)
        return found

    def _from_layers_within_reach(self) -> Tensor:
        """Return the maps ``(L*E, L*E)`` between layers that are at least H apart."""
        layers, experts, _ = self.geometry.shape()
        (source, target), apart = self.pairs, self.pairs[1] - self.pairs[0] >= self.lookaheads
        maps = self.from_expert.new_zeros(layers, layers, experts, experts)
        maps = maps.index_put((source[apart], target[apart]), self.from_expert[apart])
        return maps.transpose(1, 2).reshape(layers * experts, -1)

    def _from_layer(self, by_layer: Tensor, ahead: int) -> Tensor:
        """What the experts of each layer say of the layer ``ahead`` later: ``(N, L - ahead, E)``."""
        maps = self.from_expert[self.pairs[1] - self.pairs[0] == ahead]
        return torch.bmm(by_layer[: len(maps)], maps).transpose(0, 1)

    def stepper(self) -> Stepper:
        """Return a stepper; its state is ``window`` tokens of keys and values a block, and a few vectors."""
        return _CrossLayerStepper(self)


class _CrossLayerStepper(Stepper):
    """Steps tokens in torch, and layers in numpy, which are so small that calling torch would take longer."""

    _predictor: CrossLayer

    @torch.inference_mode()
    def __init__(self, predictor: CrossLayer) -> None:
        recurrent = dict(predictor.recurrent.named_parameters())
        layers, lookaheads = predictor.geometry.num_layers, predictor.lookaheads
        # Laid out as a step reads them: of each layer, what its experts say of all later ones; and of each count of
        # routed layers, what the state says of those in reach.
        later = [layers - 1 - layer for layer in range(layers)]
        self._from_expert = [
            part.transpose(0, 1).contiguous().numpy() for part in torch.split(predictor.from_expert, later)
        ]
        self._from_state = [
            torch.cat([predictor.from_state[i, routed + i] for i in range(min(lookaheads, layers - routed))], 1).numpy()
            for routed in range(layers)
        ]
        # What an expert adds to the gates' inputs, and what all of a layer share.
        self._routed = (predictor.routed @ recurrent["weight_ih_l0"].T).numpy()
        self._bias, self._hidden_bias = recurrent["bias_ih_l0"].numpy(), recurrent["bias_hh_l0"].numpy()
        self._hidden = recurrent["weight_hh_l0"].T.contiguous().numpy()
        # What is scored once so many layers are routed: indices of lookaheads, and layers; the next run's is the last.
        self._scored = []
        for routed in range(layers + 1):
            ahead = list(range(min(lookaheads, layers - routed)))
            targets = [routed + i for i in ahead]
            if predictor.next_token_head and routed:
                ahead, targets = [*ahead, lookaheads], [*targets, routed - 1]
            self._scored.append((np.array(ahead, np.int64), np.array(targets, np.int64)))
        super().__init__(predictor)

    def _reset(self) -> None:
        self._tokens = TokenState(self._predictor)
        copying = self._predictor.layer_copying
        top_k = self._predictor.geometry.top_k
        self._copying = LayerCopyAttentionState(copying, top_k) if copying is not None else None
        following, shape = self._predictor.following, self._predictor.geometry.shape()[:2]
        self._following = NextTokenHeadState(following, RETAINED) if following is not None else None
        self._scores = np.full(shape, np.nan, np.float32)

    @torch.inference_mode()
    def _start_token(self, token_id: int) -> None:
        token, self._logits = self._tokens.start(token_id)
        if self._following is not None:
            self._following.start(token.numpy(), token_id, self._tokens.averages, self._tokens.past.rows)
        self._state = torch.tanh(self._predictor.start(token)).numpy()
        self._scores = self._scores.copy()
        if self._predictor.following is not None and np.isnan(self._scores[0, 0]):  # a sequence starts
            first, layers = self._predictor.following.first.numpy(), np.arange(len(self._scores))
            ahead = np.full(len(layers), self._predictor.lookaheads)
            self._scores = self._predictor.step_probabilities(first, ahead, layers)
        self._score(0)

    def _route(self, layer: int, experts: npt.NDArray[np.int64], state: npt.NDArray[np.float32] | None) -> None:
        self._tokens.route(layer, experts)
        self._state = gru_step(
            self._state, experts, self._routed[layer], self._bias, self._hidden, self._hidden_bias,
            self._logits[layer + 1 :], self._from_expert[layer],
        )  # fmt: skip
        self._scores = self._scores.copy()  # what `scores` returned before stays as it was
        self._scores[layer] = np.nan
        self._score(layer + 1, experts)

    def scores(self) -> npt.NDArray[np.float32]:
        return self._scores

    def _score(self, routed: int, experts: npt.NDArray[np.int64] | None = None) -> None:
        """Score the layers within reach once so many are routed, the last of them to these experts."""
        ahead, targets = self._scored[routed]
        logits = self._logits[routed : routed + self._predictor.lookaheads]
        if len(logits):
            logits = logits + (self._state @ self._from_state[routed]).reshape(logits.shape)
            if self._copying is not None:
                logits += self._copying.step(routed, self._state, self._tokens.past.rows)
        if self._following is not None and experts is not None:
            logits = np.concatenate([logits, self._following.step(routed - 1, experts, self._state)])
        self._scores[targets] = self._predictor.step_probabilities(logits, ahead, targets)
