"""A step of a recurrent network over layers, sooner than torch or numpy can be called for its parts."""

import numpy as np
import numpy.typing as npt

from moe_beyond.compiling import compiled

Floats = npt.NDArray[np.float32]


@compiled
def gru_step(
    state: Floats,
    experts: npt.NDArray[np.int64],
    inputs: Floats,
    bias: Floats,
    hidden: Floats,
    hidden_bias: Floats,
    logits: Floats,
    from_expert: Floats,
) -> Floats:
    """Return the state after one more layer, and add to the logits of later layers what its experts say of them.

    The state is a gated recurrent unit's, as torch defines it.

    Args:
        state: ``(width,)``, before.
        experts: ``(K,)`` or fewer, what the layer was routed to.
        inputs: ``(E, 3 * width)``, what each expert of the layer adds to the gates.
        bias: ``(3 * width,)``, of the inputs.
        hidden: ``(width, 3 * width)``, from the state to the gates.
        hidden_bias: ``(3 * width,)``, of that.
        logits: ``(later, E)``, changed in place.
        from_expert: ``(E, later, E)``.
    """
    width, one = len(state), np.float32(1)
    given, kept = bias.copy(), hidden_bias.copy()
    for expert in experts:
        for i in range(3 * width):
            given[i] += inputs[expert, i]
        for layer in range(len(logits)):
            for other in range(logits.shape[1]):
                logits[layer, other] += from_expert[expert, layer, other]
    for feature in range(width):
        for i in range(3 * width):
            kept[i] += state[feature] * hidden[feature, i]
    after = np.empty_like(state)
    for i in range(width):
        reset = one / (one + np.exp(-(given[i] + kept[i])))
        keep = one / (one + np.exp(-(given[width + i] + kept[width + i])))
        fresh = np.tanh(given[2 * width + i] + reset * kept[2 * width + i])
        after[i] = fresh + keep * (state[i] - fresh)
    return after
