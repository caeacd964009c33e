"""What steppers keep of earlier tokens, for the heads that copy their experts.

Experts are kept as ids, not as rows of zeros and ones: what a head copies is a sum over those few.
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
    """Of the last tokens, keys and ids.

    Args:
        model: The module.
    """

    def __init__(self, model: CopyAttention) -> None:
        scale = FEATURES**-0.5
        maps = [model.query.weight * scale, model.key.weight, model.gate.weight]
        biases = [model.query.bias * scale, model.key.bias, model.gate.bias]
        self._map, self._map_bias = torch.cat(maps).detach().numpy(), torch.cat(biases).detach().numpy()
        self._bias, self._same, self.weight = (x.detach().numpy() for x in (model.bias, model.same, model.weight))
        self._keys = RingBuffer(model.window - 1, model.heads, FEATURES)
        self._ids = RingBuffer(model.window - 1, 2, dtype=np.int64)  # of each, and of the one before it
        self._own: tuple[Floats, tuple[int, int]] | None = None

    def start(self, x: Floats, token_id: int) -> Floats:
        """Begin a token; return its shares ``(heads, t)`` in the t tokens before it, oldest first.

        Args:
            x: ``(width,)``, its state.
            token_id: Its id.
        """
        ids = token_id, -1
        if self._own is not None:  # the token before is an earlier one now
            key, before = self._own
            self._keys.append(key)
            self._ids.append(before)
            ids = token_id, before[0]
        queries, keys, gates = _mapped(self._map @ x + self._map_bias, len(self._bias))
        alike = self._ids.rows == ids
        alike[:, 1] &= alike[:, 0]
        self._own = keys, ids
        return _shares(queries, self._keys.rows, self._bias, gates, self._same @ alike.T.astype(np.float32))


class LayerCopyAttentionState:
    """Of the last tokens, keys after every layer.

    Args:
        model: The module.
        top_k: K.
    """

    def __init__(self, model: LayerCopyAttention, top_k: int) -> None:
        layers, self._experts = model.weight.shape[2:]
        self._lookaheads, self._top_k = model.lookaheads, top_k
        maps = torch.cat([model.query * FEATURES**-0.5, model.key, model.gate], -1).detach()
        self._maps, self._gate_bias = maps.numpy(), model.gate_bias.detach().numpy()
        self._bias, self._nothing = model.bias.detach().numpy(), np.zeros((model.heads, model.window), np.float32)
        self._weights = model.weights_ahead().flatten(2).detach().numpy()
        self._keys = [RingBuffer(model.window - 1, model.heads, FEATURES) for _ in range(layers)]

    def step(self, routed: int, state: Floats, past: Ids) -> Floats:
        """Return ``(n, E)``, what is added for the n <= H layers that come after so many are routed.

        Args:
            routed: How many. Every count below L comes once a token, in order.
            state: ``(layer_width,)``, the recurrent one.
            past: ``(t, L*K)``, what the t tokens before were routed to, as ``layer * E + expert``, -1 for none.
        """
        keys = self._keys[routed]
        coming = min(self._lookaheads, len(self._keys) - routed)
        queries, own, gates = _mapped(state @ self._maps[routed], len(self._bias))
        shares = _shares(queries, keys.rows, self._bias, gates + self._gate_bias[routed], self._nothing)
        keys.append(own)
        chosen = past[:, routed * self._top_k : (routed + coming) * self._top_k]
        found: Floats = copied(shares, chosen, self._weights[routed], routed * self._experts)
        return found.reshape(-1, self._experts)[:coming]


def _mapped(found: Floats, heads: int) -> tuple[Floats, Floats, Floats]:
    """Part into queries and keys, ``(heads, F)``, and gates, ``(heads,)``."""
    size = heads * FEATURES
    return found[:size].reshape(heads, -1), found[size : 2 * size].reshape(heads, -1), found[2 * size :]


@compiled
def copied(shares: Floats, chosen: Ids, weight: Floats, first: int = 0) -> Floats:
    """Return ``(N,)``, the sum of heads' shares in tokens, times the weights of what those were routed to.

    Args:
        shares: ``(heads, t)``.
        chosen: ``(t, m)``, ids of experts, -1 for none.
        weight: ``(heads, N)``, of the experts from ``first`` on.
        first: The id that the weights begin with.
    """
    out = np.zeros(weight.shape[1], np.float32)
    for head in range(len(shares)):
        for token in range(len(chosen)):
            share = shares[head, token]
            for expert in chosen[token]:
                if expert < 0:
                    continue
                out[expert - first] += share * weight[head, expert - first]
    return out


@compiled
def _shares(queries: Floats, keys: Floats, bias: Floats, gates: Floats, more: Floats) -> Floats:
    """Return ``(heads, t)``: gated softmaxes of queries ``(heads, F)`` times keys ``(t, heads, F)``, oldest first.

    Args:
        queries: Scaled.
        keys: Of the tokens before.
        bias: ``(heads, window)``, by distance.
        gates: ``(heads,)``, logits.
        more: ``(heads, t)``, added to what is compared.
    """
    shares = np.empty((len(queries), len(keys)), np.float32)
    for head in range(len(queries)):
        highest = np.float32(-np.inf)
        for token in range(len(keys)):
            match = bias[head, len(keys) - token] + more[head, token]
            for feature in range(queries.shape[1]):
                match += queries[head, feature] * keys[token, head, feature]
            shares[head, token] = match
            highest = max(highest, match)
        total = np.float32(0)
        for token in range(len(keys)):
            shares[head, token] = np.exp(shares[head, token] - highest)
            total += shares[head, token]
        for token in range(len(keys)):
            shares[head, token] /= total * (1 + np.exp(-gates[head]))
    return shares
