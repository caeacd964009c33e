"""One step of a recurrent network over layers, compiled: its parts are too small for calls of torch or numpy."""

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
    """Return the recurrent state after one more layer, and add the layer's experts to the logits of later layers.

    The state is that of a gated recurrent unit, as torch defines it.

    Args:
        state: State ``(width,)`` before the layer.
        experts: Ids ``(n,)`` of the layer's experts, n <= K.
        inputs: Input of the gates from each expert of the layer, ``(E, 3 * width)``.
        bias: Bias ``(3 * width,)`` of the inputs.
        hidden: Map ``(width, 3 * width)`` from the state to the gates.
        hidden_bias: Bias ``(3 * width,)`` of that map.
        logits: Logits ``(later, E)`` of the later layers, changed in place.
        from_expert: Logits ``(E, later, E)`` that each expert of the layer adds.
    """
    width, unit = len(state), np.float32(1)
    from_inputs, from_state = bias.copy(), hidden_bias.copy()
    for expert in experts:
        for i in range(3 * width):
            from_inputs[i] += inputs[expert, i]
        for layer in range(len(logits)):
            for other in range(logits.shape[1]):
                logits[layer, other] += from_expert[expert, layer, other]
    for feature in range(width):
        for i in range(3 * width):
            from_state[i] += state[feature] * hidden[feature, i]
    after = np.empty_like(state)
    for i in range(width):
        reset = unit / (unit + np.exp(-(from_inputs[i] + from_state[i])))
        update = unit / (unit + np.exp(-(from_inputs[width + i] + from_state[width + i])))
        candidate = np.tanh(from_inputs[2 * width + i] + reset * from_state[2 * width + i])
        after[i] = candidate + update * (state[i] - candidate)
    return after
