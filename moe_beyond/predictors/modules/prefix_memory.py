"""The routing of prefixes of training sequences.

A causal model routes a token by the tokens before it and by nothing else. The first tokens of a sequence are therefore
routed as in every training sequence that starts with the same tokens, but for rounding. Short prefixes recur: a start
token, a template, "What is the".
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_beyond.predictors.training_stats import LONGEST_PREFIX, NO_PREFIX, TrainingStats, find_prefixes

INITIAL_WEIGHT = 4.0  # log-odds: 98 % of the stored experts are used again in DeepSeek-V2-Lite


class PrefixMemory(nn.Module):
    """Adds a learned weight per layer to the logits of the experts that a known prefix used in training.

    Prefixes are rows of a trie, as in `TrainingStats`; a binary search finds the row of the next token. The experts of
    a row are the K that its last token used most in training; ties go to the lower id. In training, the counts exclude
    the current sequence.

    Args:
        vocab_size: Number of token ids of the tokenizer, V.
        memory_prefixes: Maximum number of prefixes, N: the most frequent prefixes of training sequences.
        shape: Layers, experts per layer and top-k of the model, L, E and K.
    """

    keys: Tensor
    experts: Tensor

    def __init__(self, vocab_size: int, memory_prefixes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.vocab_size, self._shape = vocab_size, shape
        layers, experts, top_k = shape
        self.weight = nn.Parameter(torch.full((layers,), INITIAL_WEIGHT))
        self.register_buffer("keys", torch.full((memory_prefixes,), NO_PREFIX))
        dtype = torch.uint8 if experts < 256 else torch.int16  # id E: no expert
        self.register_buffer("experts", torch.full((memory_prefixes, layers, top_k), experts, dtype=dtype))
        # Used in training only and equal in all processes: a buffer would be broadcast at every step.
        self._counts: Tensor | None = None

    def prepare(self, stats: TrainingStats) -> None:
        """Read the most frequent prefixes of the training sequences, and their routing.

        Args:
            stats: Statistics of the training split.
        """
        keys, counts = stats.prefixes(len(self.keys))
        self._counts = torch.zeros(len(self.keys), counts.shape[1], dtype=torch.int32)
        self._counts[: len(counts)] = torch.from_numpy(counts)
        self.keys.fill_(NO_PREFIX)
        self.keys[: len(keys)] = torch.from_numpy(keys)
        self.experts.copy_(self._most_used(self._counts))

    def weights_fault(self) -> str | None:
        """Describe keys or experts that no training split gives; None if all are valid."""
        used = self.keys[self.keys != NO_PREFIX]
        rows = torch.arange(len(used), device=used.device)
        ordered = (used[1:] > used[:-1]).all() and (self.keys[len(used) :] == NO_PREFIX).all()
        if not ordered or not ((used >= 0) & (used // self.vocab_size <= rows)).all():
            return "keys are not those of a trie"
        experts = self.experts.sort(-1).values
        if not ((experts >= 0) & (experts <= self._shape[1])).all():
            return f"experts are not in 0..{self._shape[1]}"
        repeated = (experts[..., 1:] == experts[..., :-1]) & (experts[..., 1:] < self._shape[1])
        return "experts of a prefix are repeated" if repeated.any() else None

    def forward(self, token_ids: Tensor, starts: Tensor, used: Tensor | None = None) -> Tensor:
        """Return logits ``(B, T, L*E)``, zero where no known prefix ends.

        Args:
            token_ids: Token ids ``(B, T)``.
            starts: Position of each row in its sequence, ``(B,)``; only a row with position 0 has prefixes.
            used: 1 if a token is routed to an expert, ``(B, T, L*E)``. Training subtracts it from the counts.
        """
        layers, experts, _ = self._shape
        rows = find_prefixes(self.keys, self.vocab_size, token_ids[:, :LONGEST_PREFIX])
        rows = rows.masked_fill(starts[:, None] != 0, -1)
        if self.training and self._counts is not None and used is not None:
            if self._counts.device != rows.device:
                self._counts = self._counts.to(rows.device)
            # At least zero, also if the batch was not part of the counted training split.
            elsewhere = (self._counts[rows] - used[:, : rows.shape[1]].to(self._counts.dtype)).clamp(min=0)
            ids = self._most_used(elsewhere)
        else:
            ids = self.experts[rows].long()
        ids = ids.masked_fill((rows < 0)[..., None, None], experts)
        logits = self.weight.new_zeros(*rows.shape, layers, experts + 1)
        logits = logits.scatter(-1, ids, self.weight[:, None].expand(ids.shape))[..., :experts].flatten(2)
        padded: Tensor = functional.pad(logits, (0, 0, 0, token_ids.shape[1] - rows.shape[1]))
        return padded

    def _most_used(self, counts: Tensor) -> Tensor:
        """Return the ids ``(..., L, K)`` of the most used experts; E in place of experts without a use.

        Args:
            counts: Uses of each expert, ``(..., L*E)``.
        """
        layers, experts, top_k = self._shape
        by_layer = counts.view(*counts.shape[:-1], layers, experts).long()
        order = by_layer * experts - torch.arange(experts, device=counts.device)  # no two are equal
        ids = order.topk(top_k).indices
        return ids.masked_fill(by_layer.gather(-1, ids) == 0, experts)
