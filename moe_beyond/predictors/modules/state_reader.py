"""A recurrent reader of the hidden states of a token's layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional

EPSILON = 1e-6  # added to mean squares


class StateReader(nn.Module):
    """Reads the hidden states of a token's layers one after another.

    Each layer maps its hidden state to features of unit root mean square, which a learned gain scales. A learned vector
    replaces those of a state that is not available. The layer's vector is the SiLU of these features plus maps of
    another vector and of the state of a network that reads only ids. The other vector is that of the layer before, or
    one of another reader. Outputs are the vector and the features: later logits are linear in the features.

    Args:
        layers: Number of layers that are read, n.
        hidden_size: Width of the hidden states, W.
        layer_width: Features of the network that reads only ids.
        width: Features of each vector.
    """

    def __init__(self, layers: int, hidden_size: int, layer_width: int, width: int) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.randn(layers, hidden_size, width) * hidden_size**-0.5)
        self.gain = nn.Parameter(torch.ones(layers, width))
        self.absent = nn.Parameter(torch.zeros(layers, width))
        self.from_layer = nn.Parameter(torch.randn(layers, layer_width, width) * layer_width**-0.5)
        self.from_before = nn.Parameter(torch.randn(layers, width, width) * 0.5 * width**-0.5)

    def features(self, states: Tensor, available: Tensor) -> Tensor:
        """Return the features ``(n, N, width)`` of hidden states.

        Args:
            states: Hidden states ``(N, n, W)``.
            available: Whether the states of each token are available, ``(N,)`` bool.
        """
        absent = self.absent[:, None].expand(-1, len(available), -1)
        mapped = torch.bmm(states.float().transpose(0, 1), self.into)
        read = functional.rms_norm(mapped, mapped.shape[-1:], eps=EPSILON) * self.gain[:, None]
        return torch.where(available[:, None], read, absent)

    def forward(self, features: Tensor, of_layers: Tensor) -> tuple[Tensor, Tensor]:
        """Read the layers, each with the vector of the layer before.

        Args:
            features: Features ``(n, N, width)`` that `features` returned.
            of_layers: States ``(n, N, layer_width)`` of the network that reads only ids.

        Returns:
            Vectors ``(n, N, width)``, and outputs ``(n, N, 2 * width)``.
        """
        inputs, vectors = features + torch.bmm(of_layers, self.from_layer), list[Tensor]()
        for layer, own in enumerate(inputs):
            vectors.append(functional.silu(own + vectors[-1] @ self.from_before[layer] if vectors else own))
        stacked = torch.stack(vectors) if vectors else inputs
        return stacked, torch.cat([stacked, features], -1)

    def after(self, features: Tensor, of_layers: Tensor, before: Tensor) -> Tensor:
        """Return the outputs ``(n, N, 2 * width)`` of layers that are read with a vector of another reader.

        Args:
            features: Features ``(n, N, width)`` that `features` returned.
            of_layers: States ``(n, N, layer_width)`` of the network that reads only ids.
            before: Vectors ``(n, N, width)`` of another reader.
        """
        inputs = features + torch.bmm(of_layers, self.from_layer) + torch.bmm(before, self.from_before)
        return torch.cat([functional.silu(inputs), features], -1)
