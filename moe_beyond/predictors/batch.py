"""The batch that predictors read."""

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
    """Sequences (or pieces of long ones), padded on the right.

    Attributes:
        token_ids: ``(B, T)`` int64, 0 where padded.
        experts: ``(B, T, L, K)`` uint8 or int16, 0 where padded, as in a `Trace` elsewhere; `ids` is to index with.
        lengths: ``(B,)`` int64, tokens of each row.
        sequence_ids: One a row.
        starts: Position in its sequence at which each row starts; not 0 only for later pieces of a long sequence.
        gate_weights: ``(B, T, L, K)`` float16, 0 where padded, or None where they were not recorded.
        router_inputs: ``(B, T, L, D)`` float16, what each layer's router read, where hidden states were asked for.
        layer_inputs: ``(B, T, L, D)`` float16, what each layer read before its attention, likewise.
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
        """``(B, T)`` bool, true where there is a token."""
        positions = torch.arange(self.token_ids.shape[1], device=self.lengths.device)
        return positions < self.lengths[:, None]

    def ids(self, num_experts: int) -> Tensor:
        """``(B, T, L, K)`` int64 ids of experts, E where a slot holds none; 0 where padded."""
        found = self.experts.long()
        return found.masked_fill((found < 0) | (found >= num_experts), num_experts)

    def targets(self, num_experts: int) -> Tensor:
        """``(B, T, L, E)`` bool, true where the expert was chosen; false where padded."""
        shape = (*self.experts.shape[:-1], num_experts + 1)  # the last one is none
        chosen = torch.zeros(shape, dtype=torch.bool, device=self.experts.device)
        chosen.scatter_(-1, self.ids(num_experts), True)
        return chosen[..., :num_experts] & self.mask[:, :, None, None]

    def gate_shares(self, num_experts: int) -> Tensor | None:
        """``(B, T, L, E)`` float32 shares of a token's gate weights; 0 where padded; None where none were recorded."""
        if self.gate_weights is None:
            return None
        weights = self.gate_weights.float()
        shares = torch.zeros(*self.experts.shape[:-1], num_experts + 1, device=weights.device)
        shares.scatter_(-1, self.ids(num_experts), weights / weights.sum(-1, keepdim=True).clamp(min=1e-12))
        return shares[..., :num_experts] * self.mask[:, :, None, None]

    def to(self, device: torch.device | str, **kwargs: Any) -> "Batch":
        """Move the tensors to a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device, **kwargs) for name, tensor in tensors.items()})


def collate(traces: Sequence[Trace], starts: Sequence[int] | None = None) -> Batch:
    """Pad traces (or pieces of them) into a batch.

    Args:
        traces: At least one, all of one geometry.
        starts: Position at which each starts in its sequence; all 0 by default.
    """
    lengths = [len(trace) for trace in traces]
    longest, first = max(lengths), traces[0].experts
    token_ids = np.zeros((len(traces), longest), np.int64)
    experts = np.zeros((len(traces), longest, *first.shape[1:]), first.dtype)
    for row, (trace, length) in enumerate(zip(traces, lengths, strict=True)):
        token_ids[row, :length] = trace.token_ids
        experts[row, :length] = trace.experts
    states = [trace.hidden_states for trace in traces]
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        experts=torch.from_numpy(experts),
        lengths=torch.tensor(lengths),
        sequence_ids=tuple(trace.sequence_id for trace in traces),
        starts=tuple(starts) if starts is not None else (0,) * len(traces),
        gate_weights=_padded([trace.gate_weights for trace in traces], longest),
        router_inputs=_padded([None if one is None else one.router_inputs for one in states], longest),
        layer_inputs=_padded([None if one is None else one.layer_inputs for one in states], longest),
    )


def _padded(rows: Sequence[npt.NDArray[Any] | None], longest: int) -> Tensor | None:
    """Pad rows ``(T, ...)`` with zeros; None where any has none."""
    there = [row for row in rows if row is not None]
    if len(there) < len(rows):
        return None
    padded = np.zeros((len(there), longest, *there[0].shape[1:]), there[0].dtype)
    for place, row in zip(padded, there, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(padded)
