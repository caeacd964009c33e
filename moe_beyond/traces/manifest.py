"""The manifest of a trace set: model, tokenizer, splits, counts and hashes."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_beyond.errors import UserError
from moe_beyond.files import SEAL, check_seal, sealed
from moe_beyond.geometry import Geometry
from moe_beyond.json_fields import (
    PLAIN_NAME,
    SHA256,
    TEXT,
    TOKENIZER_FIELDS,
    FieldRule,
    build,
    check_fields,
    number,
    optional,
    whole,
)
from moe_beyond.safe_text import shown
from moe_beyond.traces.hidden_states import SUFFIX, StateFormat
from moe_beyond.traces.steering import Steering

MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
FORMAT_VERSION = 1

AUTHORS = ("dataset", "model", "mixed", "unknown")
COUNT = whole(1, 2**48)
SHARD_FIELDS = {
    "file": PLAIN_NAME,
    "split": PLAIN_NAME,
    "sequences": COUNT,
    "tokens": COUNT,
    "bytes": COUNT,
    "sha256": SHA256,
    "states_bytes": whole(0, 2**48),
    "states_sha256": optional(SHA256),
}
GENERATION_FIELDS = {"tokens": COUNT, "temperature": number(-1e-9, 1e6), "seed": whole(-(2**64), 2**64)}
MANIFEST_FIELDS = {
    "model_id": TEXT,
    "quantization_bits": optional(number(0, 64)),
    "author": FieldRule(" or ".join(map(repr, AUTHORS)), lambda value: value in AUTHORS),
    "source": TEXT,
    "tool_version": TEXT,
    "revision": optional(TEXT),
    "generation": optional(FieldRule("an object", lambda value: isinstance(value, Mapping))),
    "hidden_size": optional(whole(1, 2**24)),
    "routers_sha256": optional(SHA256),
    "engine_log_sha256": optional(SHA256),
}
"""Kinds of the fields of the classes below, by class."""


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of the token ids.

    Attributes:
        name: Name of the tokenizer, or the path from which it was loaded.
        vocab_size: Number of token ids, all of which are smaller.
        sha256: Hash of the ``tokenizer.json`` that the trace set contains; None if it contains none.
    """

    name: str
    vocab_size: int
    sha256: str | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(TOKENIZER_FIELDS, vars(self), "tokenizer: ")


NO_TOKEN_IDS = Tokenizer("none", 1)
"""Tokenizer of a trace set without token ids: all ids are 0, and predictors that read token ids cannot be fitted."""


@dataclass(frozen=True)
class ShardInfo:
    """One Parquet file of a trace set.

    Attributes:
        file: Name of the file in the folder.
        split: Name of the split.
        sequences: Number of sequences.
        tokens: Number of tokens.
        bytes: Size of the file in bytes.
        sha256: Hash of the file.
        states_bytes: Size in bytes of the shard's file of hidden states; 0 if there is none.
        states_sha256: Hash of the file of hidden states; None if there is none.
    """

    file: str
    split: str
    sequences: int
    tokens: int
    bytes: int
    sha256: str
    states_bytes: int = 0
    states_sha256: str | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        location = f"shard {shown(self.file)}: "
        check_fields(SHARD_FIELDS, vars(self), location)
        if not self.file.endswith(".parquet"):
            raise UserError(f"{location}the name does not end with .parquet")
        if self.tokens < self.sequences:
            raise UserError(f"{location}has fewer tokens than sequences (got {self.tokens} and {self.sequences})")
        if (self.states_sha256 is None) != (self.states_bytes == 0):
            raise UserError(f"{location}states_bytes and states_sha256 go together; restore the missing field")

    @property
    def states_file(self) -> str:
        """Name of the file of hidden states."""
        return self.file.removesuffix(".parquet") + SUFFIX


@dataclass(frozen=True)
class Manifest:
    """Description of a trace set.

    Attributes:
        geometry: Shape of the model.
        tokenizer: Tokenizer of the token ids.
        model_id: Name of the recorded checkpoint, as its publisher writes it.
        revision: Revision of that checkpoint, or None if it is unknown.
        generation: Settings of text generation: largest number of ``tokens`` after each prompt, ``temperature`` (0: the
            most probable token) and ``seed``; None if the model generated nothing.
        hidden_size: Width of the stored hidden states; None if they were not recorded.
        states: Form of the stored hidden states (default: float16 of all MoE layers, not projected); None if they were
            not recorded.
        routers_sha256: Hash of the file of router weights; None if there is none.
        engine_log_sha256: Hash of the file of another engine's log; None if there is none.
        quantization_bits: Bits per parameter with which the model ran; None if the geometry has only bytes.
        author: Author of the text: ``"dataset"`` (the model read it), ``"model"`` (the model generated it),
            ``"mixed"``, or ``"unknown"``.
        source: Origin of the prompts.
        tool_version: Version of this package that wrote the set.
        shards: The shards, split by split.
        steering: Experts that were forced on or off during the recording; None if none were.
    """

    geometry: Geometry
    tokenizer: Tokenizer
    model_id: str
    quantization_bits: float | None
    author: str
    source: str
    tool_version: str
    revision: str | None = None
    generation: Mapping[str, float] | None = None
    hidden_size: int | None = None
    routers_sha256: str | None = None
    shards: tuple[ShardInfo, ...] = field(default=())
    steering: Steering | None = None
    engine_log_sha256: str | None = None
    states: StateFormat | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UserError: A field has a wrong type or value, a shard occurs twice, or shards disagree.
        """
        check_fields(MANIFEST_FIELDS, vars(self))
        if self.quantization_bits is None and self.geometry.expert_bytes is None:
            raise UserError("quantization_bits is null, but the geometry has no bytes; give the bits per parameter")
        if self.generation is not None:
            _check_generation(self.generation)
        if self.states is not None:
            _check_states(self.states, self.hidden_size, self.geometry)
        elif self.hidden_size is not None:
            object.__setattr__(self, "states", StateFormat("float16", self.geometry.moe_layers))
        for name in ("file", "sha256"):
            if (twice := _first_twice(getattr(shard, name) for shard in self.shards)) is not None:
                raise UserError(f"two shards have the {name} {twice}; list every shard once")
        for shard in self.shards:
            if (shard.states_sha256 is None) != (self.hidden_size is None):
                with_or_without = "without" if self.hidden_size is None else "with"
                raise UserError(f"shard {shard.file}: all shards of this set must be {with_or_without} hidden states")

    @property
    def bits(self) -> float:
        """Bits per parameter for sizes; 16 if unknown, which no size reads then."""
        return 16.0 if self.quantization_bits is None else self.quantization_bits

    @property
    def full_hidden_size(self) -> int | None:
        """Width of the model's hidden states, before any projection; None if they were not recorded."""
        return self.hidden_size if self.states is None else self.states.projected_from or self.hidden_size

    @property
    def states_shape(self) -> tuple[int, int] | None:
        """Shape ``(S, W)`` of a token's stored hidden states; None if they were not recorded."""
        return None if self.states is None or self.hidden_size is None else (len(self.states.layers), self.hidden_size)

    @property
    def states_description(self) -> str | None:
        """Form of the stored hidden states in words; None if they were not recorded."""
        if self.states is None or self.hidden_size is None:
            return None
        return self.states.describe(self.hidden_size, self.geometry.num_layers)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the order of the shards."""
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    @property
    def has_token_ids(self) -> bool:
        """Whether the set has token ids."""
        return self.tokenizer != NO_TOKEN_IDS

    @property
    def tokens(self) -> int:
        """Number of tokens in all splits."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Hash of the geometry, the tokenizer, and the split and hash of every shard; equal for equal content.

        The other fields, such as counts and names, are covered by the hash that `to_json` adds.
        """
        content = [
            self.geometry.to_json(),
            self.tokenizer.sha256,
            [(shard.split, shard.sha256, *filter(None, [shard.states_sha256])) for shard in self.shards],
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the plain dictionary that `from_json` reads."""
        fields = asdict(self)
        if self.engine_log_sha256 is None:
            del fields["engine_log_sha256"]
        return sealed(
            {
                "format_version": FORMAT_VERSION,
                **fields,
                "geometry": self.geometry.to_json(),
                "splits": self.counts(),
                "fingerprint": self.fingerprint,
                "shards": [asdict(shard) for shard in self.shards],
                "steering": self.steering and self.steering.to_json(),
            }
        )

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the ``sequences`` and ``tokens`` of every split."""
        return {
            split: {
                "sequences": sum(s.sequences for s in self.shards if s.split == split),
                "tokens": sum(s.tokens for s in self.shards if s.split == split),
            }
            for split in self.splits
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], *, source: str = MANIFEST_FILE) -> "Manifest":
        """Build a manifest from the result of `to_json`.

        Args:
            content: Plain dictionary of a manifest.
            source: Path of the manifest, for error messages.

        Raises:
            UserError: The format version or a field is wrong, or the shards differ from the fingerprint and the counts.
        """
        if not isinstance(content, Mapping):
            raise UserError(f"{source}: is not a manifest; not a trace set?")
        version = content.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise UserError(f"{source}: format version {shown(version)}, not {FORMAT_VERSION}; not a trace set?")
        if not content.get("shards"):
            raise UserError(f"{source}: lists no shards, so the trace set is empty; write it again")
        derived = ("format_version", "splits", "fingerprint", SEAL)
        geometry = Geometry.from_json(content.get("geometry", {}), source=source)
        try:
            manifest = _manifest({name: value for name, value in content.items() if name not in derived}, geometry)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        for name, expected in (("splits", manifest.counts()), ("fingerprint", manifest.fingerprint)):
            if content.get(name) != expected:
                raise UserError(
                    f"{source}: {name} and shards disagree, because a shard was removed, changed or moved to another "
                    "split; restore the file, or write the set again"
                )
        if SEAL in content:  # absent from sets of the first version
            check_seal(content, source, "restore the file; if you edited it, remove that field")
        return manifest


def _manifest(content: Mapping[str, Any], geometry: Geometry) -> Manifest:
    if not isinstance(content["shards"], list):
        raise UserError(f"shards must be a list (got {shown(content['shards'])})")
    shards = tuple(build(ShardInfo, shard, f"shard {number}") for number, shard in enumerate(content["shards"]))
    parts: dict[str, Any] = {"geometry": geometry, "shards": shards}
    if "tokenizer" in content:
        parts["tokenizer"] = build(Tokenizer, content["tokenizer"], "tokenizer")
    if content.get("states") is not None:
        parts["states"] = build(StateFormat, content["states"], "states")
    if content.get("steering") is not None:
        parts["steering"] = steering = Steering.from_json(content["steering"], source="steering")
        steering.check_fits(geometry, "steering")
    return build(Manifest, {**content, **parts}, "manifest")


def _check_states(states: StateFormat, hidden_size: int | None, geometry: Geometry) -> None:
    """Compare the form of the hidden states with the other fields."""
    if hidden_size is None:
        raise UserError("states and hidden_size go together; restore the missing field")
    if unknown := [layer for layer in states.layers if layer not in geometry.moe_layers]:
        raise UserError(f"states: layer {unknown[0]} is no MoE layer of the geometry; restore the file")
    if states.projected_from is not None and states.projected_from <= hidden_size:
        raise UserError(
            f"states: projected_from must exceed hidden_size {hidden_size} (got {states.projected_from}); restore the "
            "file"
        )


def _check_generation(generation: Mapping[str, Any]) -> None:
    if unknown := set(generation) - set(GENERATION_FIELDS):
        raise UserError(f"generation: unknown field {shown(min(unknown))}")
    for name in ("tokens", "temperature"):
        if name not in generation:
            raise UserError(f"generation: field {name!r} is missing")
    given = {name: kind for name, kind in GENERATION_FIELDS.items() if name in generation}
    check_fields(given, generation, "generation: ")


def _first_twice(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)
