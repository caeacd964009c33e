"""Part of `damage.py`: accidents of files, and edits that recompute the hashes."""

import copy
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from _helpers.damage import edit_manifest, edit_shard, shard_of, with_column
from safetensors.torch import load_file, save_file

from moe_beyond.files import SEAL, sealed

Edit = tuple[str, Callable[[Path], None]]
"""A description, and the function that damages a file or folder."""
WRONG: dict[type, tuple[Any, ...]] = {
    str: (-1, 5.5, [], {"a": 1}, True, "\x1b[31m", "../x", "a\nb", "x" * 5000),
    int: ("text", 1.5, float("nan"), [], {}, True, -7, 2**70, 10**400, None),
    float: ("text", float("nan"), float("inf"), [], {}, True, 10**400),
    bool: ("no", 2, [], None),
    list: ("text", {}, 5, None, [None], [[]]),
    dict: ("text", [], 5, [{}]),
    type(None): ([], 5.5, {"a": []}, "\x00"),
}
"""Type of a JSON value -> values in its place."""


def accidents(folder: Path, chance: random.Random) -> Edit:
    """Return a random accident of a random file, with which hashes are not recomputed.

    Args:
        folder: Undamaged file or folder.
        chance: Source of random numbers.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
    file = chance.choice(files)
    name, size, seed = file.relative_to(folder), file.stat().st_size, chance.random()
    others = [path for path in files if path.suffix == file.suffix and path != file]
    kinds = (
        ["flip"] * 8 + ["cut"] * 4 + ["zeros", "doubled", "emptied", "missing", "longer", "garbage", "fifo", "folder"]
    )
    kind = chance.choice(kinds + ["link out"] * folder.is_dir() + ["swapped"] * 2 * bool(others))
    other = chance.choice(others).relative_to(folder) if kind == "swapped" else None

    def damage(copied: Path) -> None:
        path, number = copied / name, random.Random(seed)
        content = bytearray(path.read_bytes())
        position = number.randrange(max(size, 1))
        if kind == "swapped":
            content = bytearray((copied / str(other)).read_bytes())
            (copied / str(other)).write_bytes(path.read_bytes())
        elif kind == "flip" and size:
            content[position] ^= 1 << number.randrange(8)
        elif kind == "cut":
            del content[position:]
        elif kind == "zeros":
            content[position : position + 64] = bytes(len(content[position : position + 64]))
        elif kind == "doubled":
            content[position:position] = content[position : position + 64]
        elif kind == "emptied":
            content.clear()
        elif kind == "longer":
            content += b"\0" * 7
        elif kind == "garbage":
            content = bytearray(number.randbytes(max(size, 8)))
        if kind == "link out":
            path.rename(copied.parent / f"moved{path.suffix}")
            path.symlink_to(copied.parent / f"moved{path.suffix}")
            return
        path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind != "missing":
            path.write_bytes(content)

    return f"{name}: {kind}{'' if other is None else f' with {other}'}", damage


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the keys and indices of every value in a JSON object."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def json_edit(
    file: Path, chance: random.Random, rehash: Callable[[Path, Any], None], within: str | None = None
) -> Edit:
    """Return an edit of one value of a JSON file: one of another type, missing, unknown or out of range.

    Args:
        file: Undamaged file to edit.
        chance: Source of random numbers.
        rehash: Function that writes the edited content with its hashes.
        within: Top-level field to edit (default: any).
    """
    content = json.loads(file.read_text())
    seen = [path for path in places(content) if SEAL not in path and within in (None, path[0])]
    # Every depth is as likely: a file has hundreds of numbers and few fields.
    depth = chance.choice(sorted({len(path) for path in seen}))
    path = chance.choice([path for path in seen if len(path) == depth])
    *parents, key = path
    action = chance.choice(["missing", "unknown"] + ["wrong"] * 8)
    parent = content
    for step in parents:
        parent = parent[step]
    old = copy.deepcopy(parent[key])
    new = chance.choice(WRONG[type(old)])
    if action == "missing":
        del parent[key]
    elif action == "unknown" and isinstance(parent, dict):
        parent["unknown field"] = old
    else:
        action, parent[key] = f"{json.dumps(new)[:40]} for {json.dumps(old)[:40]}", new
    return f"{file.name}: {'.'.join(map(str, path))}: {action}", lambda copied: rehash(copied, content)


def seal_in(name: str) -> Callable[[Path, Any], None]:
    """Return a function that writes a sealed JSON file of a folder."""
    return lambda folder, content: _write(folder / name, json.dumps(sealed(content)))


def seal_manifest(folder: Path, content: Any) -> None:
    """Write a manifest with its counts, fingerprint and seal, as far as its fields permit it."""
    path = folder / "manifest.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(content))
    try:
        if any(content[name] != before[name] for name in ("splits", "fingerprint")):
            raise ValueError("the edited field itself")
        edit_manifest(folder, lambda _: None)
    except (KeyError, TypeError, AttributeError, ValueError):
        path.write_text(json.dumps(sealed(content)))


def write_plain(path: Path, content: Any) -> None:
    """Write a JSON file without hashes."""
    _write(path, json.dumps(content))


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def shard_edit(folder: Path, chance: random.Random) -> Edit:
    """Return an edit of a column of a shard, whose hashes are recomputed.

    Args:
        folder: Undamaged trace set.
        chance: Source of random numbers.
    """
    number = chance.randrange(len(json.loads((folder / "manifest.json").read_text())["shards"]))
    column = chance.choice(["token_ids", "experts", "decode_start", "gate_weights", "sequence_id", "rows", "dtype"])
    values: dict[str, tuple[Any, ...]] = {
        "token_ids": (-1, 2**31 - 1, 32, None),
        "experts": (8, 200, None, "twice"),
        "decode_start": (-5, 1000, None),
        "gate_weights": (float("nan"), float("inf"), -1.0, None),
        "sequence_id": ("of the next", None),
        "rows": ("fewer", "twice", "none", "reversed ids"),
        "dtype": ("token_ids", "experts", "decode_start", "gate_weights", "sequence_id"),
    }
    value = chance.choice(values[column])

    def change(table: pa.Table) -> pa.Table:
        if column == "rows":
            if value == "reversed ids":
                return with_column(table, "decode_start", [0] * len(table)).slice(1)
            return {"fewer": table.slice(1), "twice": pa.concat_tables([table, table]), "none": table.slice(0, 0)}[
                value
            ]
        if column == "dtype":
            kinds = {"token_ids": pa.list_(pa.int64()), "experts": pa.list_(pa.int16()), "decode_start": pa.int64()}
            kinds |= {"gate_weights": pa.list_(pa.float32()), "sequence_id": pa.large_string()}
            index = table.schema.get_field_index(value)
            return table.set_column(index, value, table[value].cast(kinds[value]))
        rows = table[column].to_pylist()
        first = rows[0]
        if value == "of the next":
            rows[0] = rows[-1] if len(rows) > 1 else "s1"
        elif value == "twice":
            rows[0] = [first[1], *first[1:]]
        else:
            rows[0] = [value, *first[1:]] if isinstance(first, list) else value
        return with_column(table, column, rows)

    name = shard_of(folder, number)["file"]
    return f"{name}: {column}: {value}", lambda copied: edit_shard(copied, change, number)


def weights_edit(folder: Path, chance: random.Random) -> Edit:
    """Return an edit of the weights of a predictor folder, whose hashes are recomputed.

    Args:
        folder: Undamaged predictor folder.
        chance: Source of random numbers.
    """
    weights = load_file(folder / "model.safetensors")
    filled = [name for name, tensor in weights.items() if tensor.numel()]
    name = chance.choice(filled)
    tensor = weights[name].clone()
    floating = tensor.is_floating_point()
    values = [float("nan"), float("inf"), float("-inf")] if floating else [-3]
    kinds = ["missing", "extra", "renamed", "shape", "dtype", "header", *["value"] * 6]
    kind, value, position = chance.choice(kinds), chance.choice(values), chance.randrange(tensor.numel())
    if kind == "missing":
        del weights[name]
    elif kind in ("extra", "renamed"):
        weights["bonus"] = tensor if kind == "extra" else weights.pop(name).clone()
    elif kind == "shape":
        weights[name] = torch.cat([tensor.flatten(), tensor.flatten()])
    elif kind == "dtype":
        value = chance.choice([torch.int64, torch.bool, torch.uint8] if floating else [torch.float32, torch.bool])
        weights[name] = tensor.to(value)
    elif kind == "value":
        tensor.view(-1)[position] = value
        weights[name] = tensor

    def damage(copied: Path) -> None:
        path = copied / "model.safetensors"
        save_file(weights, path)
        if kind == "header":
            content = path.read_bytes()
            path.write_bytes((2 ** chance.randrange(30, 62)).to_bytes(8, "little") + content[8:])
        config = json.loads((copied / "config.json").read_text())
        config["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (copied / "config.json").write_text(json.dumps(sealed(config)))

    return f"model.safetensors: {name}: {kind} {value if kind in ('value', 'dtype') else ''}", damage


def checkpoint_edit(file: Path, chance: random.Random) -> Edit:
    """Return an edit of the content of a checkpoint.

    Args:
        file: Undamaged checkpoint to edit.
        chance: Source of random numbers.
    """
    content = torch.load(file, weights_only=True)
    state, about = content["state_dict"], content["moe_beyond"]
    name = chance.choice([name for name in state if state[name].is_floating_point()])
    kind = chance.choice(["nan", "view", "missing", "field", "argument", "key", "training"])
    field = ""
    if kind == "nan":
        state[name].view(-1)[0] = float("nan")
    elif kind == "view":  # one stored number in place of all
        state[name] = torch.zeros(1).expand(state[name].numel()).view(1, -1).expand(10**9, -1)
    elif kind == "missing":
        del state[name]
    elif kind == "key":
        field = chance.choice(["epoch", "global_step", "state_dict", "moe_beyond"])
        content[field] = chance.choice([None, "text", [], -1])
    elif kind == "field":
        field = chance.choice(list(about))
        about[field] = chance.choice(WRONG[type(about[field])]) if type(about[field]) in WRONG else None
    elif kind == "training":
        field = chance.choice(list(about["training"]))
        about["training"][field] = chance.choice(WRONG[type(about["training"][field])])
    else:
        field = chance.choice(list(about["arguments"]))
        about["arguments"][field] = chance.choice([8192, 2**24, 10**9, -1, None, "text", {}])
    return f"{kind} {field}", lambda path: torch.save(content, path)


def text_edit(file: Path, chance: random.Random) -> Edit:
    """Return an edit of a text file: a character or a line that is changed, missing or twice.

    Args:
        file: Undamaged file to edit.
        chance: Source of random numbers.
    """
    lines = file.read_text().splitlines(keepends=True)
    row = chance.randrange(len(lines))
    kind = chance.choice(["line missing", "line twice", "character", "number", "bytes", "cut"])
    text = list(lines[row])
    position = chance.randrange(len(text))
    content = b""
    if kind == "line missing":
        del lines[row]
    elif kind == "line twice":
        lines.insert(row, lines[row])
    elif kind == "number":
        digits = [place for place, character in enumerate(text) if character.isdigit()]
        if digits:
            text[chance.choice(digits)] = chance.choice(["999", "-", "", "1e999", "nan", "9" * 5000])
        lines[row] = "".join(text)
    else:
        text[position] = chance.choice("\x00\x1b\u2028\ufeff\"'[{,:;%é")
        lines[row] = "".join(text)
    content = "".join(lines).encode()
    if kind == "bytes":
        content = content.replace(b"e", b"\xff\xfe", 1)
    elif kind == "cut":
        content = content[: chance.randrange(len(content))]
    return f"{file.name}: {kind} in line {row + 1}", lambda path: path.write_bytes(content) and None


def into(name: str, edit: Edit) -> Edit:
    """Return an edit of a file as an edit of its folder."""
    description, damage = edit
    return f"{name}: {description}", lambda folder: damage(folder / name)
