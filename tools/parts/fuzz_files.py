"""Part of `fuzz.py`: descriptions of models, configurations and prompts, as targets."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from moe_beyond.collect.prompts import COLUMNS, read_prompts
from moe_beyond.errors import UserError
from moe_beyond.files import sealed
from moe_beyond.geometry import Geometry, load_preset
from moe_beyond.safe_text import UNPRINTABLE
from moe_beyond.traces.manifest import Manifest, ShardInfo, Tokenizer
from moe_beyond.traces.steering import Steering, read_steering
from parts.fuzz_mutations import edited_bytes, edited_json, edited_lines, edited_table, several
from parts.fuzz_seeds import CONFIG_FILES, CONFIGS, GEOMETRIES, MIXED, PROMPTS, SMALL, STEERINGS
from parts.fuzz_targets import Target, json_files

# Models.


def read_model(path: Path) -> str | None:
    """Read a geometry file or a ``config.json``."""
    preset = load_preset(str(path))
    written = json.loads(json.dumps(preset.geometry.to_json(), allow_nan=False))
    if Geometry.from_json(written) != preset.geometry:
        return "another geometry after writing it"
    sizes = [size for size in (preset.vocab_size, preset.hidden_size) if size is not None]
    return None if all(type(size) is int and 0 < size <= 2**24 for size in sizes) else f"sizes {sizes}"


def make_manifest(chance: Random, folder: Path) -> Any:
    """Return the fields of a manifest, mostly with the counts and hashes of the changed shards."""
    content = several(edited_json, chance.choice(manifests()), chance)
    return resealed(content) if chance.random() < 0.8 else content


def resealed(content: Any) -> Any:
    """Return a manifest whose counts and hashes fit its other fields, as far as these can be read."""
    try:
        geometry = Geometry.from_json(content["geometry"])
        shards = tuple(ShardInfo(**shard) for shard in content["shards"])
        tokenizer = Tokenizer("any", 10, content["tokenizer"]["sha256"])
        counted = Manifest(geometry, tokenizer, "any", 16.0, "any", "any", "0", shards=(), hidden_size=None)
        derived = replace(
            counted, shards=shards, hidden_size=1 if any(shard.states_bytes for shard in shards) else None
        )
        content = {**content, "splits": derived.counts(), "fingerprint": derived.fingerprint}
        return sealed({name: value for name, value in content.items() if name != "content_sha256"})
    except (UserError, TypeError, KeyError, AttributeError, UnicodeEncodeError, ValueError):
        return content


def read_manifest(content: Any) -> str | None:
    """Build a manifest from its fields, and write it again."""
    manifest = Manifest.from_json(content, source="input")
    again = json.loads(json.dumps(manifest.to_json(), allow_nan=False))
    if Manifest.from_json(again) != manifest:
        return "another manifest after writing it"
    texts = [manifest.model_id, manifest.author, manifest.source, manifest.tokenizer.name, *manifest.splits]
    texts += [manifest.geometry.model, *(shard.file for shard in manifest.shards)]
    return "unprintable" if any(UNPRINTABLE.search(text) for text in texts) else None


def read_steering_file(path: Path) -> str | None:
    """Read a steering and compare it with a model."""
    steering = read_steering(path)
    steering.check_fits(SMALL, str(path))
    return None if Steering.from_json(steering.to_json(), source="again") == steering else "another steering"


@cache
def manifests() -> tuple[Any, ...]:
    """Return the fields of valid manifests: with and without tokenizer, hidden states, steering and generation."""
    shard = ShardInfo("train-00000.parquet", "train", 3, 40, 1000, "a" * 64)
    other = ShardInfo("validation-00000.parquet", "validation", 1, 9, 500, "b" * 64)
    plain = Manifest(SMALL, Tokenizer("t", 32, "c" * 64), "m", 16.0, "dataset", "prompts", "0.1", shards=(shard, other))
    states = replace(shard, states_bytes=64, states_sha256="d" * 64)
    rich = replace(
        plain, shards=(states,), hidden_size=8, routers_sha256="e" * 64, revision="main",
        generation={"tokens": 4, "temperature": 0.5, "seed": 1}, steering=Steering(((1, 2),), ((3, 4),)),
    )  # fmt: skip
    measured = replace(plain, geometry=MIXED, quantization_bits=None, engine_log_sha256="f" * 64)
    return tuple(json.loads(json.dumps(manifest.to_json())) for manifest in (plain, rich, measured))


# Configurations of fits.


@cache
def config_parser() -> Any:
    """Return the parser of a configuration of `moe-beyond fit`, which builds nothing."""
    import lightning as L

    from moe_beyond.cli.config_files import ConfigFile, guard_configurations
    from moe_beyond.cli.train import Parser, PredictorCLI
    from moe_beyond.datamodules import TraceDataModule
    from moe_beyond.tasks import PredictorTask
    from moe_beyond.tasks.registry import import_tasks

    guard_configurations(trusted=False)
    import_tasks()
    parser = Parser(exit_on_error=False)
    parser.add_argument("-c", "--config", action=ConfigFile)
    parser.add_lightning_class_args(L.Trainer, "trainer")
    parser.add_lightning_class_args(PredictorTask, "model", subclass_mode=True, required=False)
    parser.add_lightning_class_args(TraceDataModule, "data", subclass_mode=True, required=False)
    PredictorCLI.add_arguments_to_parser(cast(Any, None), parser)  # links the task's sizes
    return parser


def make_config(chance: Random, folder: Path) -> Path:
    """Write a configuration, changed as values, as lines or as bytes."""
    content = several(edited_json, chance.choice(CONFIGS), chance)
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
    if chance.random() < 0.3:
        text = "\n".join(several(edited_lines, text.split("\n"), chance))
    path = folder / "config.yaml"
    path.write_bytes(text.encode("utf-8", "replace"))
    return path


def read_config(path: Path) -> str | None:
    """Parse a configuration; nothing is built."""
    config_parser().parse_args(["-c", str(path)])
    return None


# Prompts.


def make_prompts(chance: Random, folder: Path) -> str:
    """Write prompts in one of their formats; return the name that the option takes."""
    suffix = chance.choice((".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet"))
    records = several(edited_json, chance.choice(PROMPTS), chance)
    path = folder / f"prompts{suffix}"
    if suffix == ".parquet":
        table = pa.table({"text": ["a b", "c"], "id": ["x", "y"], "n": [1, 2]})
        pq.write_table(several(edited_table, table, chance), path)
        if chance.random() < 0.2:
            path.write_bytes(edited_bytes(path.read_bytes(), chance))
    else:
        if suffix in (".jsonl", ".json") and isinstance(records, list):
            lines = [json.dumps(records)] if suffix == ".json" else [json.dumps(record) for record in records]
        else:
            mark = "\t" if suffix == ".tsv" else ","
            lines = several(
                edited_lines, [mark.join(row) for row in (("text", "id"), ("a b", "1"), ('"c, d"', "2"))], chance
            )
        content = "\n".join(lines).encode("utf-8", "replace")
        path.write_bytes(edited_bytes(content, chance) if chance.random() < 0.2 else content)
    column = chance.choice(("", "", "", ":text", ":id", f":{chance.choice(COLUMNS)}"))
    return f"{path}{column}"


def read_prompt_file(name: str) -> str | None:
    """Read all prompts of a file."""
    prompts = list(read_prompts(name))
    for prompt in prompts:
        if not prompt.text or not prompt.sequence_id.strip() or UNPRINTABLE.search(prompt.sequence_id):
            return f"prompt {prompt.sequence_id!r} of {prompt.text!r}"
        json.dumps(prompt.text).encode()
    return None


FILE_TARGETS: dict[str, Target] = {
    "geometries": Target(json_files(GEOMETRIES), read_model, ("input.json",), 3),
    "config.json": Target(json_files(CONFIG_FILES), read_model, ("input.json",), 4),
    "manifests": Target(make_manifest, read_manifest, ("input",), 4),
    "steering": Target(json_files(STEERINGS), read_steering_file, ("input.json",), 3),
    "configurations": Target(make_config, read_config, ("config.yaml", "model", "data", "trainer"), 0.3),
    "prompts": Target(make_prompts, read_prompt_file, ("prompts.",), 2),
}  # fmt: skip
