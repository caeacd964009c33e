"""The card of a trace set: what routed, whose text, how much of it, and where `datasets` finds the splits."""

from typing import Any

import yaml

from moe_beyond.traces.manifest import Manifest
from moe_beyond.traces.schema import experts_dtype, padding_id

AUTHORS: dict[str, tuple[str, list[str]]] = {
    "dataset": ("read by the model; people or another program wrote it", ["found"]),
    "model": ("written by the model itself", ["machine-generated"]),
    "mixed": ("written by the model itself in part, and read by it in part", ["found", "machine-generated"]),
}
"""By a manifest's author: who wrote the text, in words and as the Hub says it."""
STATES = """Beside a shard `NAME.parquet` lie its tokens' hidden states in
`NAME.states.safetensors`, float16, tokens x {layers} layers x {size}: `router_inputs`, what each layer's router read,
and `layer_inputs`, the residual stream before the layer's attention{routers}.
"""


def configs(manifest: Manifest) -> list[dict[str, Any]]:
    """Return what `datasets` reads in a card's metadata: which shards are of which split."""
    by_split = [
        {"split": split, "path": [shard.file for shard in manifest.shards if shard.split == split]}
        for split in manifest.splits
    ]
    return [{"config_name": "default", "data_files": by_split}]


def author(manifest: Manifest) -> tuple[str, list[str]]:
    """Say who wrote the text, in words and as the Hub says it."""
    return AUTHORS.get(manifest.author, (f"author: {manifest.author}", ["other"]))


def traces_card(manifest: Manifest) -> str:
    """Write a trace set's card, with the metadata by which ``datasets.load_dataset`` reads the folder as it is."""
    geometry, tokenizer = manifest.geometry, manifest.tokenizer
    revision = f", revision {manifest.revision}" if manifest.revision else ""
    hashed = f", `tokenizer.json` of sha256 `{tokenizer.sha256}`" if tokenizer.sha256 else ""
    named = f"{tokenizer.name}, {tokenizer.vocab_size:,} ids{hashed}"
    steering = manifest.steering
    steered = f"- Steered: {steering}, in all that it read and wrote; it would route otherwise.\n" if steering else ""
    size = manifest.hidden_size
    routers = "; in `routers.safetensors`, the routers' weights" if manifest.routers_sha256 else ""
    states = "" if size is None else STATES.format(layers=geometry.num_layers, size=size, routers=routers)
    splits = "\n".join(_split_row(manifest, split) for split in manifest.splits)
    metadata = yaml.safe_dump({"configs": configs(manifest)}, sort_keys=False, allow_unicode=True)
    return f"""---
{metadata}---

# Where {manifest.model_id} routes: {manifest.source}

Which experts every token of a text was routed to, layer by layer, in the router's order.

- Model: {manifest.model_id}{revision}, {geometry.describe_shape()}, run with {manifest.quantization_bits:g} bits a
  parameter. Expert ids hold for this checkpoint alone.
{steered}- Text: {manifest.source}; {author(manifest)[0]}{_written(manifest)}.
- Tokenizer: {named if manifest.has_token_ids else "none; no token ids were recorded, and all are 0"}.
- Written by moe-beyond {manifest.tool_version}; fingerprint `{manifest.fingerprint}`.

| split | sequences | tokens | entries (a token at a layer) |
|---|---|---|---|
{splits}

A row is a sequence: `sequence_id`, `source`, `token_ids`, `decode_start` (the first token that was decoded, not read),
and `experts`, flat: tokens x {geometry.num_layers} layers x {geometry.top_k} ids from 0 to {geometry.num_experts - 1},
or {padding_id(experts_dtype(geometry))} in a slot without an expert, as a model with identity or skip experts has them;
where they were recorded, `gate_weights` lie likewise. {states}`manifest.json` has every shard's sha256.
"""


def _written(manifest: Manifest) -> str:
    """Say how the model wrote, where that is known."""
    if manifest.generation is None:
        return ""
    tokens, temperature = manifest.generation["tokens"], manifest.generation["temperature"]
    how = f"drawn at temperature {temperature:g}" if temperature else "the most probable ones"
    return f", at most {tokens:,} tokens after each prompt, {how}"


def _split_row(manifest: Manifest, split: str) -> str:
    shards = [shard for shard in manifest.shards if shard.split == split]
    sequences, tokens = sum(shard.sequences for shard in shards), sum(shard.tokens for shard in shards)
    return f"| {split} | {sequences:,} | {tokens:,} | {tokens * manifest.geometry.num_layers:,} |"
