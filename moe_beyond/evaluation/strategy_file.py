"""Strategy files: a budget and a strategy as YAML, which ``tune`` writes, and ``run`` and ``replay`` read."""

from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from moe_beyond.cache.misses import MISSES, MOVE
from moe_beyond.cache.policies import POLICIES
from moe_beyond.cache.prefetchers import parse_prefetch
from moe_beyond.errors import UserError, unknown
from moe_beyond.evaluation.options import SCOPES
from moe_beyond.files import replacing
from moe_beyond.json_fields import build
from moe_beyond.lookahead import parse_lookahead
from moe_beyond.safe_text import shown
from moe_beyond.yaml_files import read_yaml_file

TEXTS = ("policy", "prefetch", "scope", "misses")
"""Fields that are text."""
OPTIONAL_TEXTS = ("predictor", "profile")
"""Fields that are text, or null."""


@dataclass(frozen=True)
class StrategyChoice:
    """A strategy and its budget, by the names of options.

    Attributes:
        budget: Memory for experts, such as ``"10%"``, ``"2.9GB"`` or a number of slots.
        policy: Eviction policy (default: ``"lru"``).
        prefetch: Prefetcher (default: ``"none"``).
        lookahead: Lookahead of the scores that the prefetcher selects by (default: None).
        scope: ``"global"`` or ``"per-layer"`` (default: ``"global"``).
        predictor: Predictor of the scores (default: None).
        profile: Predictor of the usage profile (default: None).
        misses: Miss handling, ``"move"``, ``"cpu"`` or ``"best"`` (default: ``"move"``).
    """

    budget: str | int
    policy: str = "lru"
    prefetch: str = "none"
    lookahead: str | int | None = None
    scope: str = "global"
    predictor: str | None = None
    profile: str | None = None
    misses: str = MOVE

    def __post_init__(self) -> None:
        """Check types and names.

        Raises:
            UserError: A field has the wrong type, or is an unknown name.
        """
        expected = {name: str for name in TEXTS} | {name: str | None for name in OPTIONAL_TEXTS}
        for name, kind in (expected | {"budget": str | int, "lookahead": str | int | None}).items():
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, kind):
                raise UserError(f"{name}: has the wrong type (got {shown(value)}); write it as the option takes it")
        names = (("policy", POLICIES), ("scope", SCOPES), ("misses", MISSES))
        for field, known in names:
            if (name := getattr(self, field)) not in known:
                raise unknown(field, name, known)
        parse_prefetch(self.prefetch)
        if self.lookahead is not None:
            parse_lookahead(self.lookahead)

    def options(self) -> dict[str, str | int]:
        """Return the values of the options that have one, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def write_strategy(path: str | Path, choice: StrategyChoice, comments: tuple[str, ...] = ()) -> None:
    """Write a strategy file.

    Args:
        path: File to write or replace.
        choice: Strategy and budget.
        comments: Lines before them, without a line break (default: none).
    """
    lines = [f"# {comment}" for comment in comments]
    with replacing(path) as temporary:
        content = yaml.safe_dump(choice.options(), sort_keys=False, allow_unicode=True)
        temporary.write_text("\n".join([*lines, content]), encoding="utf-8")


def read_strategy(path: str | Path) -> StrategyChoice:
    """Read a strategy file.

    Args:
        path: File that `write_strategy` or a user wrote.

    Raises:
        UserError: The file is missing or is no YAML, or a field is unknown or has the wrong type.
    """
    if not Path(path).is_file():
        raise UserError(f"--config {path}: is no file; name a strategy file, as moe-beyond tune --out writes it")
    try:
        content = read_yaml_file(path)
    except UserError as error:
        raise UserError(f"--config {error}; write it with moe-beyond tune --out") from error
    try:
        choice: StrategyChoice = build(StrategyChoice, content, "strategy file")
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from error
    return choice
