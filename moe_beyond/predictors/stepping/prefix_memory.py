"""A stepper's walk through the known prefixes."""

import numpy as np
import numpy.typing as npt

from moe_beyond.predictors.modules.prefix_memory import PrefixMemory


class PrefixMemoryState:
    """Finds the prefix that ends at each token of a sequence, as `PrefixMemory` does for batches.

    Args:
        memory: Module that is stepped.
    """

    def __init__(self, memory: PrefixMemory) -> None:
        self._keys, self._vocab_size = memory.keys.numpy(), memory.vocab_size
        self._experts, self._weight = memory.experts.numpy(), memory.weight.detach().numpy()
        self._parent = 0  # that of the next token; -1 after a token that ends no known prefix

    def add(self, logits: npt.NDArray[np.float32], token_id: int) -> None:
        """Start a token; add the weights of the prefix that ends with it.

        Args:
            logits: Logits ``(L, E)``, changed in place.
            token_id: Id of the token.
        """
        key = self._parent * self._vocab_size + token_id
        known = self._parent >= 0 and 0 <= token_id < self._vocab_size
        row = int(np.searchsorted(self._keys, key)) if known else len(self._keys)
        if row == len(self._keys) or self._keys[row] != key:
            self._parent = -1
            return
        self._parent = row + 1
        layer, place = np.nonzero(self._experts[row] < logits.shape[1])
        logits[layer, self._experts[row][layer, place]] += self._weight[layer]
