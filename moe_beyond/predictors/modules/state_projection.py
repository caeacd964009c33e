"""The projection of hidden states that a predictor's traces were recorded with, for states in full width."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_beyond.errors import UserError
from moe_beyond.predictors.argument_limits import check_arguments
from moe_beyond.predictors.batch import Batch
from moe_beyond.predictors.information import StateKind
from moe_beyond.traces.state_projection import Half, StateProjection

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


class StateProjections(nn.ModuleDict):
    """The projection of each kind of hidden state that a predictor reads; empty if its traces are not projected.

    Args:
        architecture: Name of the predictor's architecture, for error messages.
        layers: Number of MoE layers, L.
        hidden_size: Width of the hidden states of the traces, W.
        projected_from: Width of the model's hidden states, D, if those of the traces are projected; otherwise None.
        kinds: Kinds of hidden states that the predictor reads.

    Raises:
        UserError: The traces, which determine the widths, contain no hidden states, or the widths contradict.
    """

    def __init__(
        self, architecture: str, layers: int, hidden_size: int, projected_from: int | None, kinds: Sequence[StateKind]
    ) -> None:
        if not isinstance(hidden_size, int) or hidden_size < 1:
            raise UserError(
                f"{architecture} reads hidden states, and the traces have none; collect them with --record "
                "experts,gate_weights,hidden_states"
            )
        check_arguments(architecture, {"projected_from": projected_from})
        if projected_from is not None and projected_from <= hidden_size:
            raise UserError(
                f"{architecture}: projected_from must exceed hidden_size {hidden_size} (got {projected_from})"
            )
        stored = () if projected_from is None else kinds
        super().__init__({kind: ProjectedStates(layers, hidden_size, projected_from or 0) for kind in stored})
        self._architecture, self._projected_from = architecture, projected_from

    def copy_from(self, projection: StateProjection | None) -> None:
        """Copy the projection of a trace set, if this predictor has any.

        Args:
            projection: Projection of the trace set; None if its states are not projected.

        Raises:
            UserError: The traces have no projection, or one of another shape.
        """
        for kind, module in self.items():
            assert isinstance(module, ProjectedStates)
            if projection is None:
                raise UserError(f"{self._architecture}: projected_from is given, and the traces are not projected")
            module.copy_from(getattr(projection, kind))

    def of(self, kind: StateKind) -> ProjectedStates | None:
        """Return the projection of a kind of hidden state; None if the traces are not projected."""
        module = self[kind] if kind in self else None
        assert module is None or isinstance(module, ProjectedStates)
        return module

    def read(self, batch: Batch, kind: StateKind) -> Tensor:
        """Return the hidden states of a batch as the predictor's traces store them, ``(B, T, L, W)``.

        Args:
            batch: Batch with hidden states.
            kind: Kind of the states.

        Raises:
            UserError: The batch has no hidden states.
        """
        states: Tensor | None = getattr(batch, kind)
        if states is None:
            raise UserError(f"{self._architecture} reads hidden states, and the batch has none")
        projection = self.of(kind)
        return projection(states) if projection is not None and states.shape[-1] == self._projected_from else states
