"""Decoding form of the reader of hidden states."""

import numpy as np
import numpy.typing as npt
import torch

from moe_beyond.compiling import compiled
from moe_beyond.predictors.modules.state_projection import ProjectedStates
from moe_beyond.predictors.modules.state_reader import EPSILON, StateReader

Floats = npt.NDArray[np.float32]


class StateReaderSteps:
    """Reads one hidden state at a time.

    Args:
        module: Reader that is stepped.
        projection: Projection of the training text's states; None if they are not projected.
        skipped: Number of the model's layers before the first layer that is read.
    """

    @torch.inference_mode()
    def __init__(self, module: StateReader, projection: ProjectedStates | None, skipped: int = 0) -> None:
        into = module.into
        self._into = {into.shape[1]: into.numpy()}  # by the width of a state
        if projection is not None:  # one map instead of two
            matrix = projection.matrix[skipped : skipped + len(into)]
            self._into[matrix.shape[2]] = torch.bmm(matrix.transpose(1, 2), into).numpy()
        parts = (module.gain, module.absent, module.from_layer, module.from_before)
        self._gain, self._absent, self._from_layer, self._from_before = (part.numpy() for part in parts)
        self._ones = np.ones(module.gain.shape[1], np.float32)

    @property
    def nothing(self) -> Floats:
        """Vector ``(width,)`` before the first layer."""
        return np.zeros(self._gain.shape[1], np.float32)

    def step(self, layer: int, state: Floats | None, of_layer: Floats, before: Floats) -> Floats:
        """Return the outputs ``(2 * width,)`` of a layer, its vector first.

        Args:
            layer: Number of the layer among those that are read.
            state: Hidden state ``(W,)`` or ``(D,)``; None if it is not available.
            of_layer: State ``(layer_width,)`` of the network that reads only ids.
            before: Vector ``(width,)`` of the layer before, or of another reader.
        """
        if state is None:
            mapped, mean_square, gain = self._absent[layer], np.float32(1), self._ones
        else:
            mapped = state @ self._into[len(state)][layer]
            mean_square, gain = np.float32(mapped @ mapped / len(mapped) + EPSILON), self._gain[layer]
        maps = self._from_layer[layer], self._from_before[layer]
        outputs: Floats = _outputs(mapped, gain, mean_square, of_layer, maps[0], before, maps[1])
        return outputs


@compiled
def _outputs(
    mapped: Floats,
    gain: Floats,
    mean_square: np.float32,
    of_layer: Floats,
    from_layer: Floats,
    before: Floats,
    from_before: Floats,
) -> Floats:
    """Return the outputs ``(2 * width,)`` of a layer: numpy would take four times as long for so few numbers.

    Args:
        mapped: Mapped hidden state ``(width,)``.
        gain: Gain ``(width,)`` of each feature.
        mean_square: Mean square of the mapped state.
        of_layer: State ``(layer_width,)`` of the network that reads only ids.
        from_layer: Map ``(layer_width, width)`` of that state.
        before: Vector ``(width,)`` of the layer before, or of another reader.
        from_before: Map ``(width, width)`` of that vector.
    """
    features = mapped * gain / np.sqrt(mean_square)
    width, outputs = len(features), np.empty(2 * len(features), np.float32)
    outputs[:width] = outputs[width:] = features
    for feature in range(len(of_layer)):
        for i in range(width):
            outputs[i] += of_layer[feature] * from_layer[feature, i]
    for feature in range(len(before)):
        for i in range(width):
            outputs[i] += before[feature] * from_before[feature, i]
    for i in range(width):
        outputs[i] /= np.float32(1) + np.exp(-outputs[i])
    return outputs
