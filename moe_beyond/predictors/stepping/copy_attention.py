"""Decoding state of copy attention: keys and experts of earlier tokens.

Experts are kept as ids, not as rows of zeros and ones, because a head's output is a sum over a few experts.
"""

import numpy as np
import numpy.typing as npt
import torch

from moe_beyond.compiling import compiled
from moe_beyond.predictors.modules.copy_attention import FEATURES, CopyAttention, LayerCopyAttention
from moe_beyond.predictors.stepping.ring_buffer import RingBuffer

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]


class CopyAttentionState:
    """Keys and token ids of the last tokens.

    Args:
        module: Copy attention that is stepped.

    Attributes:
        weight: Weight of each head and expert, ``(heads, L*E)``.
    """

    def __init__(self, module: CopyAttention) -> None:
        scale = FEATURES**-0.5
        maps = [module.query.weight * scale, module.key.weight, module.gate.weight]
        biases = [module.query.bias * scale, module.key.bias, module.gate.bias]
        self._map, self._map_bias = torch.cat(maps).detach().numpy(), torch.cat(biases).detach().numpy()
        self._bias, self._same, self.weight = (x.detach().numpy() for x in (module.bias, module.same, module.weight))
        self._keys = RingBuffer(module.window - 1, module.heads, FEATURES)
        self._ids = RingBuffer(module.window - 1, 2, dtype=np.int64)  # ids of a token and of the token before it
        self._current: tuple[Floats, tuple[int, int]] | None = None

    def start(self, x: Floats, token_id: int) -> Floats:
        """Start a token and return its attention to earlier tokens.

        Args:
            x: Features ``(width,)`` of the token.
            token_id: Id of the token.

        Returns:
            Gated attention ``(heads, t)`` to the t tokens before it, oldest first.
        """
        ids = token_id, -1
        if self._current is not None:  # the last token becomes an earlier token
            key, last_ids = self._current
            self._keys.append(key)
            self._ids.append(last_ids)
            ids = token_id, last_ids[0]
        queries, keys, gates = _split(self._map @ x + self._map_bias, len(self._bias))
        same = self._ids.rows == ids
        same[:, 1] &= same[:, 0]
        self._current = keys, ids
        return _attention(queries, self._keys.rows, self._bias, gates, self._same @ same.T.astype(np.float32))


class LayerCopyAttentionState:
    """Keys of the last tokens after every layer.

    Args:
        module: Layer copy attention that is stepped.
        top_k: Experts per token and layer, K.
    """

    def __init__(self, module: LayerCopyAttention, top_k: int) -> None:
        layers, self._experts = module.weight.shape[2:]
        self._lookaheads, self._top_k = module.lookaheads, top_k
        maps = torch.cat([module.query * FEATURES**-0.5, module.key, module.gate], -1).detach()
        self._maps, self._gate_bias = maps.numpy(), module.gate_bias.detach().numpy()
        self._bias, self._no_bonus = module.bias.detach().numpy(), np.zeros((module.heads, module.window), np.float32)
        self._weights = module.weights_ahead().flatten(2).detach().numpy()
        self._keys = [RingBuffer(module.window - 1, module.heads, FEATURES) for _ in range(layers)]

    def step(self, routed: int, state: Floats, past: Ids) -> Floats:
        """Return the logits ``(n, E)`` that are added for the n <= H layers after ``routed`` layers.

        Args:
            routed: Number of routed layers; each number below L comes once per token, in order.
            state: Recurrent state ``(layer_width,)``.
            past: Experts of the t tokens before, ``(t, L*K)``, as ``layer * E + expert``; -1 for padding.
        """
        keys = self._keys[routed]
        reached = min(self._lookaheads, len(self._keys) - routed)
        queries, current_keys, gates = _split(state @ self._maps[routed], len(self._bias))
        attention = _attention(queries, keys.rows, self._bias, gates + self._gate_bias[routed], self._no_bonus)
        keys.append(current_keys)
        experts = past[:, routed * self._top_k : (routed + reached) * self._top_k]
        logits: Floats = copy_experts(attention, experts, self._weights[routed], routed * self._experts)
        return logits.reshape(-1, self._experts)[:reached]


def _split(mapped: Floats, heads: int) -> tuple[Floats, Floats, Floats]:
    """Split into queries ``(heads, F)``, keys ``(heads, F)`` and gates ``(heads,)``."""
    size = heads * FEATURES
    return mapped[:size].reshape(heads, -1), mapped[size : 2 * size].reshape(heads, -1), mapped[2 * size :]


@compiled
def copy_experts(attention: Floats, experts: Ids, weight: Floats, first: int = 0) -> Floats:
    """Return the logits ``(N,)`` that heads copy: sums of attention times the weights of the attended tokens' experts.

    Args:
        attention: Attention ``(heads, t)`` to t tokens.
        experts: Expert ids ``(t, m)`` of those tokens; -1 for padding.
        weight: Weights ``(heads, N)`` of the N experts from ``first`` on.
        first: Id of the first expert (default: 0).
    """
    out = np.zeros(weight.shape[1], np.float32)
    for head in range(len(attention)):
        for token in range(len(experts)):
            share = attention[head, token]
            for expert in experts[token]:
                if expert < 0:
                    continue
                out[expert - first] += share * weight[head, expert - first]
    return out


@compiled
def _attention(queries: Floats, keys: Floats, bias: Floats, gates: Floats, bonus: Floats) -> Floats:
    """Return gated softmaxes ``(heads, t)`` of query times key, oldest token first.

    Args:
        queries: Scaled queries ``(heads, F)``.
        keys: Keys ``(t, heads, F)`` of the tokens before.
        bias: Bias ``(heads, window)`` by distance.
        gates: Logits ``(heads,)`` of the gates.
        bonus: Values ``(heads, t)`` that are added before the softmax.
    """
    attention = np.empty((len(queries), len(keys)), np.float32)
    for head in range(len(queries)):
        highest = np.float32(-np.inf)
        for token in range(len(keys)):
            match = bias[head, len(keys) - token] + bonus[head, token]
            for feature in range(queries.shape[1]):
                match += queries[head, feature] * keys[token, head, feature]
            attention[head, token] = match
            highest = max(highest, match)
        total = np.float32(0)
        for token in range(len(keys)):
            attention[head, token] = np.exp(attention[head, token] - highest)
            total += attention[head, token]
        for token in range(len(keys)):
            attention[head, token] /= total * (1 + np.exp(-gates[head]))
    return attention
