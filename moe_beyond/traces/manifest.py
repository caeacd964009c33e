"""The manifest of a trace set: what its shards hold, and their hashes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.traces.hidden_states import SUFFIX
from moe_beyond.traces.steering import Steering

MANIFEST_FILE = "manifest.json"
VOCABULARY_FILE = "tokenizer.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Tokenizer:
    """Which tokenizer the token ids belong to.

    Attributes:
        name: What it is called, or where it was loaded from.
        vocab_size: One more than the largest id it can produce.
        sha256: Hash of its ``tokenizer.json``, a copy of which lies in the trace set; None where there is none.
    """

    name: str
    vocab_size: int
    sha256: str | None = None


NO_TOKEN_IDS = Tokenizer("none", 1)
"""Of trace sets whose recording tells no token ids: all are 0, and nothing that reads token ids is fitted on them."""


@dataclass(frozen=True)
class ShardInfo:
    """One Parquet file of a trace set: name in the folder, split, counts, size in bytes and hash.

    Attributes:
        states_bytes: Size of the file of hidden states beside it; 0 where there is none.
        states_sha256: Its hash.
    """

    file: str
    split: str
    sequences: int
    tokens: int
    bytes: int
    sha256: str
    states_bytes: int = 0
    states_sha256: str | None = None

    @property
    def states_file(self) -> str:
        """Name of the file of hidden states."""
        return self.file.removesuffix(".parquet") + SUFFIX


@dataclass(frozen=True)
class Manifest:
    """Everything about a trace set but its entries.

    Attributes:
        geometry: The model's shape.
        tokenizer: The tokenizer of the token ids.
        model_id: Checkpoint that routed, as its publisher names it.
        revision: Revision of that checkpoint, if known.
        generation: How the model wrote what it wrote: at most how many ``tokens`` after each prompt, at which
            ``temperature`` (0: the most probable), drawn by which ``seed``; None where it wrote nothing.
        hidden_size: Width of the hidden states; None where none were recorded.
        routers_sha256: Hash of the file of the model's routers, if there is one.
        quantization_bits: Bits per parameter the model ran with.
        author: Who wrote the text: ``"dataset"`` (read by the model), ``"model"`` (written by it), ``"mixed"``, or
            ``"unknown"`` where the recording does not tell.
        source: Where the prompts came from.
        tool_version: Version of this package that wrote the set.
        shards: The shards, split by split.
        steering: Which experts were forced while it was recorded; None where the model was let be.
    """

    geometry: Geometry
    tokenizer: Tokenizer
    model_id: str
    quantization_bits: float
    author: str
    source: str
    tool_version: str
    revision: str | None = None
    generation: Mapping[str, float] | None = None
    hidden_size: int | None = None
    routers_sha256: str | None = None
    shards: tuple[ShardInfo, ...] = field(default=())
    steering: Steering | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the order of the shards."""
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    @property
    def has_token_ids(self) -> bool:
        """Whether the token ids were recorded."""
        return self.tokenizer != NO_TOKEN_IDS

    @property
    def tokens(self) -> int:
        """Tokens over all splits."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Hash of the geometry, the tokenizer and every shard's hash: two sets of equal content have equal ones."""
        content = [
            self.geometry.to_json(),
            self.tokenizer.sha256,
            [(shard.split, shard.sha256, *filter(None, [shard.states_sha256])) for shard in self.shards],
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the plain dictionary that `from_json` reads."""
        counts = {
            split: {
                "sequences": sum(s.sequences for s in self.shards if s.split == split),
                "tokens": sum(s.tokens for s in self.shards if s.split == split),
            }
            for split in self.splits
        }
        return {
            "format_version": FORMAT_VERSION,
            **asdict(self),
            "geometry": self.geometry.to_json(),
            "splits": counts,
            "fingerprint": self.fingerprint,
            "shards": [asdict(shard) for shard in self.shards],
            "steering": self.steering and self.steering.to_json(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], *, source: str = MANIFEST_FILE) -> "Manifest":
        """Build a manifest from what `to_json` returned.

        Args:
            content: The dictionary.
            source: Where it came from, for error messages.

        Raises:
            UserError: It is not a manifest of this format version.
        """
        if not isinstance(content, Mapping):
            raise UserError(f"{source}: is not a manifest; not a trace set?")
        if content.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{source}: format version {content.get('format_version')!r}, not {FORMAT_VERSION}; not a trace set?"
            )
        if not content.get("shards"):
            raise UserError(f"{source}: names no shards; the trace set is empty")
        fields = {k: v for k, v in content.items() if k not in ("format_version", "splits", "fingerprint")}
        steering = fields.get("steering")
        try:
            return cls(
                **{
                    **fields,
                    "geometry": Geometry.from_json(fields["geometry"], source=source),
                    "tokenizer": Tokenizer(**fields["tokenizer"]),
                    "shards": tuple(ShardInfo(**shard) for shard in fields["shards"]),
                    "steering": None
                    if steering is None
                    else Steering.from_json(steering, source=f"{source}: steering"),
                }
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{source}: fields are missing or unknown ({error})") from error
