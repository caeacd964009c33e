"""Batches: the input of predictors."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_beyond.traces.trace import Trace


@dataclass(frozen=True)
class Batch:
    """Sequences, or segments of long sequences, padded on the right.

    Attributes:
        token_ids: Token ids ``(B, T)`` int64, 0 where padded.
        experts: Expert ids ``(B, T, L, K)`` uint8 or int16 as in a `Trace`, 0 where padded; use `ids` for indexing.
        lengths: Number of tokens of each row, ``(B,)`` int64.
        sequence_ids: Sequence id of each row.
        starts: Position in its sequence at which each row starts; above 0 only for later segments of a sequence.
        gate_weights: Gate weights ``(B, T, L, K)`` float16, 0 where padded; None if they were not recorded.
        router_inputs: Inputs of the routers of the S layers with states, ``(B, T, S, W)`` float16 as stored; None if
            they were not requested.
        layer_inputs: Inputs of these layers before their attention, ``(B, T, S, W)`` float16 as stored; None if they
            were not requested.
    """

    token_ids: Tensor
    experts: Tensor
    lengths: Tensor
    sequence_ids: tuple[str, ...]
    starts: tuple[int, ...]
    gate_weights: Tensor | None = None
    router_inputs: Tensor | None = None
    layer_inputs: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """Mask ``(B, T)`` bool of real tokens."""
        positions = torch.arange(self.token_ids.shape[1], device=self.lengths.device)
        return positions < self.lengths[:, None]

    def ids(self, num_experts: int) -> Tensor:
        """Return expert ids ``(B, T, L, K)`` int64; padding of the top-k is E, padded tokens have 0.

        Args:
            num_experts: Experts per layer, E.
        """
        ids = self.experts.long()
        return ids.masked_fill((ids < 0) | (ids >= num_experts), num_experts)

    def targets(self, num_experts: int) -> Tensor:
        """Return ``(B, T, L, E)`` bool: whether each expert was selected; false where padded.

        Args:
            num_experts: Experts per layer, E.
        """
        shape = (*self.experts.shape[:-1], num_experts + 1)  # the last index holds the padding
        targets = torch.zeros(shape, dtype=torch.bool, device=self.experts.device)
        targets.scatter_(-1, self.ids(num_experts), True)
        return targets[..., :num_experts] & self.mask[:, :, None, None]

    def gate_shares(self, num_experts: int) -> Tensor | None:
        """Return each expert's share of a token's gate weights, ``(B, T, L, E)`` float32; 0 where padded.

        Args:
            num_experts: Experts per layer, E.

        Returns:
            The shares, or None if gate weights were not recorded.
        """
        if self.gate_weights is None:
            return None
        weights = self.gate_weights.float()
        shares = torch.zeros(*self.experts.shape[:-1], num_experts + 1, device=weights.device)
        shares.scatter_(-1, self.ids(num_experts), weights / weights.sum(-1, keepdim=True).clamp(min=1e-12))
        return shares[..., :num_experts] * self.mask[:, :, None, None]

    def to(self, device: torch.device | str, **kwargs: Any) -> "Batch":
        """Return the batch on another device.

        Args:
            device: Device of the returned tensors.
            **kwargs: Further arguments of `torch.Tensor.to`.
        """
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device, **kwargs) for name, tensor in tensors.items()})


def collate(traces: Sequence[Trace], starts: Sequence[int] | None = None) -> Batch:
    """Pad traces, or segments of traces, into a batch.

    Args:
        traces: At least one trace; all have the same geometry.
        starts: Position of each trace in its sequence (default: 0 for all).
    """
    lengths = [len(trace) for trace in traces]
    longest, first = max(lengths), traces[0].experts
    token_ids = np.zeros((len(traces), longest), np.int64)
    experts = np.zeros((len(traces), longest, *first.shape[1:]), first.dtype)
    for row, (trace, length) in enumerate(zip(traces, lengths, strict=True)):
        token_ids[row, :length] = trace.token_ids
        experts[row, :length] = trace.experts
    hidden_states = [trace.hidden_states for trace in traces]
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        experts=torch.from_numpy(experts),
        lengths=torch.tensor(lengths),
        sequence_ids=tuple(trace.sequence_id for trace in traces),
        starts=tuple(starts) if starts is not None else (0,) * len(traces),
        gate_weights=_padded([trace.gate_weights for trace in traces], longest),
        router_inputs=_padded([None if states is None else states.router_inputs for states in hidden_states], longest),
        layer_inputs=_padded([None if states is None else states.layer_inputs for states in hidden_states], longest),
    )


def _padded(rows: Sequence[npt.NDArray[Any] | None], longest: int) -> Tensor | None:
    """Pad rows ``(T, ...)`` with zeros; return None if any row is missing."""
    arrays = [row for row in rows if row is not None]
    if len(arrays) < len(rows):
        return None
    padded = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), arrays[0].dtype)
    for target, array in zip(padded, arrays, strict=True):
        target[: len(array)] = array
    return torch.from_numpy(padded)
