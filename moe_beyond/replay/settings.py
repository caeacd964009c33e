"""What to replay."""

import re
from dataclasses import dataclass

from moe_beyond.errors import UserError
from moe_beyond.lookahead import Lookahead, parse_lookahead


@dataclass(frozen=True)
class ReplaySettings:
    """One line of a replay table.

    Attributes:
        slots: The budget.
        policy: Eviction policy.
        scope: ``"global"``, or ``"per-layer"``: an even share for each layer.
        prefetch: ``"none"``; ``"top6"``, the 6 best-scored experts of a layer, asked for as soon as their scores are
            known; or ``"top6@2"``, two layers ahead, for scores that are known for the whole token.
        lookahead: When the scores are known; None without a predictor.
        predictor: What to call it.
        causal: Whether the scores ignore later tokens.
        warmup_tokens: Tokens at a sequence's start that do not count.
        first_layer_prefetch: Whether layers whose scores exist when the token starts are prefetched then (at lookahead
            0: whether layer 0 is prefetched).
    """

    slots: int
    policy: str = "lru"
    scope: str = "global"
    prefetch: str = "none"
    lookahead: Lookahead | None = None
    predictor: str | None = None
    causal: bool = True
    warmup_tokens: int = 0
    first_layer_prefetch: bool = True

    def __post_init__(self) -> None:
        """Check what does not depend on the model.

        Raises:
            UserError: The prefetcher cannot be read, or its scores are missing.
        """
        if self.warmup_tokens < 0:
            raise UserError(f"--warmup-tokens {self.warmup_tokens} is negative")
        if self.lookahead is not None:
            parse_lookahead(self.lookahead)
        if self.names > 0 and self.lookahead is None:
            raise UserError(f"prefetch {self.prefetch!r} needs scores; give --predictor or --scores")
        if self._match["d"] is not None and self.lookahead != "token":
            raise UserError(
                f"prefetch {self.prefetch!r}: a distance is for scores known for the whole token; "
                f"these are known {self.lookahead} layers ahead, and asked for then"
            )

    @property
    def _match(self) -> re.Match[str]:
        match = re.fullmatch(r"none|top(?P<m>[1-9]\d*)(@(?P<d>[1-9]\d*))?", self.prefetch, re.ASCII)
        if match is None:
            raise UserError(f"prefetch {self.prefetch!r} cannot be read; write none, top6 or top6@2")
        return match

    @property
    def names(self) -> int:
        """Experts of a layer that the prefetcher names."""
        return int(self._match["m"] or 0)

    @property
    def distance(self) -> int:
        """Layers between asking and needing: the lookahead; for whole-token scores what the prefetcher says, or 1."""
        return int(self._match["d"] or 1) if self.lookahead == "token" else int(self.lookahead or 0)

    @property
    def strategy(self) -> str:
        """A short name for tables."""
        return self.policy if self.prefetch == "none" else f"{self.policy} + {self.prefetch}"
