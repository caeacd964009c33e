"""The projection of hidden states that a predictor's traces were recorded with, for states in full width."""

import torch
from torch import Tensor, nn

from moe_beyond.errors import UserError
from moe_beyond.traces.state_projection import Half

TOLERANCE = 0.01
"""Largest relative difference between projections that count as equal, and between a row's length and 1."""


class ProjectedStates(nn.Module):
    """One projection matrix per MoE layer, for one kind of hidden state.

    Args:
        layers: Number of MoE layers, L.
        hidden_size: Width of the projected states, W.
        projected_from: Width of the model's hidden states, D.
    """

    matrix: Tensor

    def __init__(self, layers: int, hidden_size: int, projected_from: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.zeros(layers, hidden_size, projected_from))

    def copy_from(self, matrices: Half) -> None:
        """Copy the matrices of a trace set.

        Args:
            matrices: ``(L, W, D)`` float16.

        Raises:
            UserError: The matrices have another shape.
        """
        if matrices.shape != self.matrix.shape:
            raise UserError(
                f"the projection of the traces has shape {matrices.shape}, not {tuple(self.matrix.shape)}; give traces "
                "with the hidden states of all MoE layers"
            )
        self.matrix.copy_(torch.from_numpy(matrices))

    def forward(self, states: Tensor) -> Tensor:
        """Return the projected states ``(..., L, W)`` float32 of states ``(..., L, D)``."""
        return torch.einsum("...ld,lwd->...lw", states.float(), self.matrix)

    def one(self, state: Tensor, layer: int) -> Tensor:
        """Return the projected state ``(W,)`` of a state ``(D,)`` float32 of one layer."""
        return self.matrix[layer] @ state

    def equals(self, matrices: Half) -> bool:
        """Return whether matrices ``(L, W, D)`` project alike; machines round them differently."""
        difference = torch.from_numpy(matrices).float() - self.matrix
        return bool(difference.norm() <= TOLERANCE * self.matrix.norm())

    def weights_fault(self) -> str | None:
        """Describe a row whose length is not 1; None without a fault."""
        lengths = self.matrix.norm(dim=-1)
        return None if bool(((lengths - 1).abs() <= TOLERANCE).all()) else "a row of the projection has not length 1"
