"""Arrange a clone of MoE-Beyond's public repository (github.com/ngavhane/moe-beyond) for reproduce_moe_beyond.py.

    python tools/arrange_moe_beyond_release.py CLONE OUT

OUT receives ``puffin`` (``prompt_N_data.csv``), ``webglm`` (``prompt_N_data_formatted.csv``) and
``webglm_moe_beyond_predictions`` (``prompt_N_data_predicted.csv``). ``arranged.json`` lists the pairs.

Files are found by name anywhere in CLONE, except in hidden folders. In a stored listing of that repository, the Puffin
recordings were in ``training_data_eamc`` (prompts up to 1001) and in a folder of that name within
``expert_activation_scripts`` (from 1002 on). The WebGLM test was in ``test_datasets/formatted_csvs`` and
``test_datasets/predicted_csvs``: 100 files each, whose numbers do not agree (predictions 1 and 2 are for the experts
of recordings 20 and 34). Therefore predictions are paired with the recording that has the same experts in every layer
at every position, in any order, and take its number.
"""

import argparse
import filecmp
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_beyond.errors import UserError
from moe_beyond.files import is_earlier_result, replacing_folder, write_json
from moe_beyond.geometry import PRESETS
from moe_beyond.traces.formats.moe_beyond_csv import column_ids, layer_order, read_csv

FOLDERS = {
    "puffin": "prompt_{}_data.csv",
    "webglm": "prompt_{}_data_formatted.csv",
    "webglm_moe_beyond_predictions": "prompt_{}_data_predicted.csv",
}
MARKER = "arranged.json"
GEOMETRY = PRESETS["deepseek-v2-lite"].geometry


@dataclass(frozen=True)
class Pairing:
    """Pairs of recordings and predictions.

    Attributes:
        pairs: Number of each recording -> number of its predictions.
        recordings: Numbers of recordings without predictions.
        predictions: Numbers of predictions without a recording.
        alike: Groups of recordings and predictions with the same experts, paired in order.
    """

    pairs: dict[int, int]
    recordings: list[int]
    predictions: list[int]
    alike: list[tuple[list[int], list[int]]]


def find_prompts(clone: Path, name: str) -> dict[int, Path]:
    """Find a kind of file anywhere in the clone, by number.

    Args:
        clone: Folder of the clone.
        name: File name, with ``{}`` for the number.

    Raises:
        UserError: There is no such file, or two files of one number differ.
    """
    pattern = re.escape(name).replace(r"\{\}", r"(\d+)")
    found: dict[int, Path] = {}
    for path in sorted(clone.rglob(name.format("*"))):
        match = re.fullmatch(pattern, path.name, re.ASCII)
        if match is None or not path.is_file() or any(part[0] == "." for part in path.relative_to(clone).parts):
            continue
        first = found.setdefault(int(match[1]), path)
        if first is not path and not filecmp.cmp(first, path, shallow=False):
            raise UserError(
                f"{path}: differs from {first}, although both are prompt {int(match[1])}; delete one of them"
            )
    if not found:
        raise UserError(f"{clone}: contains no {name.format('N')}; give a clone of github.com/ngavhane/moe-beyond")
    return dict(sorted(found.items()))


def experts_of(path: Path) -> bytes:
    """Return a prompt's activated experts, sorted by layer, position and id."""
    table = read_csv(path)
    order, _, _ = layer_order(path, table, GEOMETRY)
    return np.sort(column_ids(path, table["Activated Expert IDs"], GEOMETRY)[order]).tobytes()


def pair(recordings: dict[int, Path], predictions: dict[int, Path]) -> Pairing:
    """Pair recordings and predictions by their experts."""
    waiting: dict[bytes, list[int]] = defaultdict(list)
    for number, path in predictions.items():
        waiting[experts_of(path)].append(number)
    same: dict[bytes, list[int]] = defaultdict(list)
    for number, path in recordings.items():
        same[experts_of(path)].append(number)
    pairs = {
        recording: prediction
        for experts, numbers in same.items()
        for recording, prediction in zip(numbers, waiting[experts], strict=False)
    }
    return Pairing(
        pairs=dict(sorted(pairs.items())),
        recordings=sorted(set(recordings) - set(pairs)),
        predictions=sorted(set(predictions) - set(pairs.values())),
        alike=[
            (numbers, waiting[experts])
            for experts, numbers in same.items()
            if waiting[experts] and len(numbers) + len(waiting[experts]) > 2
        ],
    )


def arrange(clone: Path, out: Path) -> tuple[Pairing, dict[str, int]]:
    """Copy the release's files into the layout.

    Args:
        clone: Folder of the clone.
        out: Output folder; an earlier result is replaced.

    Returns:
        The pairs, and the number of files per folder.

    Raises:
        UserError: ``out`` is no earlier result, or the clone's files do not fit; nothing is left behind.
    """
    if not clone.is_dir():
        raise UserError(f"{clone}: is not a folder")
    inside, outside = clone.resolve(), out.resolve()
    if outside.is_relative_to(inside) or inside.is_relative_to(outside):
        raise UserError(f"{out}: must be outside {clone}; choose another folder")
    with replacing_folder(out, overwrite=is_ours(out)) as temporary:
        puffin, recordings, predictions = (find_prompts(clone, name) for name in FOLDERS.values())
        found = pair(recordings, predictions)
        if not found.pairs:
            raise UserError(f"{clone}: no predictions match the experts of any recording")
        files = {
            "puffin": puffin,
            "webglm": {number: recordings[number] for number in found.pairs},
            "webglm_moe_beyond_predictions": {to: predictions[of] for to, of in found.pairs.items()},
        }
        for folder, paths in files.items():
            (temporary / folder).mkdir()
            for number, path in paths.items():
                shutil.copyfile(path, temporary / folder / FOLDERS[folder].format(number))
        content = {
            "predictions_by_recording": {str(to): of for to, of in found.pairs.items()},
            "recordings_without_predictions": found.recordings,
            "predictions_without_recording": found.predictions,
            "recordings_and_predictions_alike": found.alike,
        }
        write_json(temporary / MARKER, content)
    return found, {folder: len(paths) for folder, paths in files.items()}


def is_ours(out: Path) -> bool:
    """Check whether a folder is an earlier result and contains nothing else."""
    return is_earlier_result(out, MARKER, *FOLDERS) and all(
        path.is_file() and re.fullmatch(r"prompt_\d+_data\w*\.csv", path.name)
        for folder in FOLDERS
        for path in out.glob(f"{folder}/*")
    )


def listed(numbers: Iterable[int]) -> str:
    """Format numbers of prompts."""
    return ", ".join(map(str, numbers))


def main() -> None:
    """Parse the options, arrange the files and print the pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, metavar="CLONE", help="clone of github.com/ngavhane/moe-beyond")
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder; an earlier result is replaced")
    args = parser.parse_args()
    try:
        found, counts = arrange(args.clone, args.out)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except OSError as error:
        parser.exit(2, f"{parser.prog}: error: {error.filename}: {error.strerror}\n")
    renumbered = sum(to != of for to, of in found.pairs.items())
    for folder, count in counts.items():
        print(f"{args.out / folder}: {count:,} prompts")
    print(f"{len(found.pairs)} predictions match a recording; {renumbered} of them were renumbered")
    if found.recordings:
        print(f"excluded: {len(found.recordings)} recordings without predictions: {listed(found.recordings)}")
    if found.predictions:
        print(f"excluded: {len(found.predictions)} predictions without a recording: {listed(found.predictions)}")
    for recordings, predictions in found.alike:
        print(
            f"paired in order, all with the same experts: recordings {listed(recordings)}, "
            f"predictions {listed(predictions)}"
        )


if __name__ == "__main__":
    main()
