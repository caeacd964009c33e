"""MoE-Beyond's table and classifier figures (arXiv 2508.17137), by its own method, from the CSV files of its release.

    python tools/reproduce_moe_beyond.py --data DIR [--json FILE]

DIR contains three folders of prompts: ``puffin`` (``prompt_N_data.csv``), ``webglm`` (``prompt_N_data_formatted.csv``)
and ``webglm_moe_beyond_predictions`` (``prompt_N_data_predicted.csv``), with any number of prompts.

The method: a prompt's rows are (token, layer) pairs, tokens outermost. One LRU cache for all layers is filled at
random for each prompt. The experts of rows 0 to 260 warm it, one row after another: the first 10 tokens and one more
row. From row 260 on, each row first touches its predicted experts, uncounted. Then it touches its true experts, which
count as hits or misses. "MoE-Infinity" is the paper's approximation of that system: for each layer, the experts that
nine Puffin prompts used most. Rates are means over random fillings, which matter for large caches.
"""

import argparse
import csv
import json
import random
import re
import statistics
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from moe_beyond.errors import UserError
from moe_beyond.files import write_json

LAYERS, EXPERTS, TOP_K = 26, 64, 6
WARMUP_ROWS = 10 * LAYERS
SIZES = [LAYERS * EXPERTS * tenth // 10 for tenth in range(1, 11)]
POPULARITY_PROMPTS = range(1, 10)

Rows = npt.NDArray[np.int64]
"""``(T * L, K)`` expert ids, tokens outermost."""


@dataclass(frozen=True)
class Prompt:
    """A test prompt: its rows' true and predicted experts."""

    true: Rows
    predicted: Rows


def numbered(folder: Path) -> dict[int, Path]:
    """Return a folder's prompt files by number."""
    files = {int(m[1]): path for path in folder.glob("*.csv") if (m := re.match(r"prompt_(\d+)_", path.name))}
    if not files:
        raise UserError(f"{folder}: contains no prompt_N_*.csv file; give the folder of the release")
    return dict(sorted(files.items()))


def read_rows(path: Path, column: str) -> Rows:
    """Read a column of expert lists, in rows of (token, layer) pairs.

    Raises:
        UserError: The column is missing, or the rows are no such pairs.
    """
    with path.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    if not table or column not in table[0] or "Layer ID" not in table[0]:
        raise UserError(f"{path}: has no rows, or no column {column!r} or 'Layer ID'")
    by_layer: dict[int, list[list[int]]] = {}
    for number, row in enumerate(table):
        try:
            experts = json.loads(row[column])
        except ValueError as error:
            raise UserError(f"{path}: row {number + 2}: {column} is not a list of numbers") from error
        if len(experts) != TOP_K or not all(0 <= expert < EXPERTS for expert in experts):
            raise UserError(f"{path}: row {number + 2}: {column} is not {TOP_K} experts of 0..{EXPERTS - 1}")
        by_layer.setdefault(int(row["Layer ID"]), []).append(experts)
    if len(by_layer) != LAYERS or len({len(rows) for rows in by_layer.values()}) != 1:
        raise UserError(f"{path}: does not have {LAYERS} layers of equally many tokens")
    return np.array([by_layer[layer] for layer in sorted(by_layer)]).transpose(1, 0, 2).reshape(-1, TOP_K)


def read_prompts(data: Path) -> list[Prompt]:
    """Read the test prompts with their predictions, paired by number.

    Raises:
        UserError: A prompt has no predictions, or they are for other experts.
    """
    predicted = numbered(data / "webglm_moe_beyond_predictions")
    prompts = []
    for number, path in numbered(data / "webglm").items():
        if number not in predicted:
            raise UserError(f"{path}: has no predictions in {data / 'webglm_moe_beyond_predictions'}")
        true = read_rows(path, "Activated Expert IDs")
        again = read_rows(predicted[number], "Activated Expert IDs")
        if not np.array_equal(np.sort(true), np.sort(again)):
            raise UserError(f"{predicted[number]}: its activated experts are not those of {path}")
        prompts.append(Prompt(true, read_rows(predicted[number], "Predicted Expert IDs")))
    return prompts


def popular_rows(data: Path) -> Rows:
    """Return, for each layer, the K experts that the first Puffin prompts used most: ``(L, K)``."""
    files = numbered(data / "puffin")
    counts = np.zeros((LAYERS, EXPERTS))
    for number in POPULARITY_PROMPTS:
        if number in files:
            rows = read_rows(files[number], "Activated Expert IDs").reshape(-1, LAYERS, TOP_K)
            for layer in range(LAYERS):
                counts[layer] += np.bincount(rows[:, layer].ravel(), minlength=EXPERTS)
    return np.argsort(-counts, axis=1, kind="stable")[:, :TOP_K]


def hit_rate(prompts: Sequence[tuple[Rows, Rows]], slots: int, seed: int) -> float:
    """Return the share of counted accesses that hit; NaN if no prompt is longer than 10 tokens.

    Args:
        prompts: True rows of each prompt, and the rows touched before them.
        slots: Number of experts that the cache holds.
        seed: Random seed of the filling.
    """
    hits = accesses = 0
    for number, (true, before) in enumerate(prompts):
        filling = random.Random(f"{seed} {number}").sample(range(LAYERS * EXPERTS), slots)
        cache = OrderedDict.fromkeys(filling)
        offset = np.arange(len(true))[:, None] % LAYERS * EXPERTS
        true_ids, before_ids = (true + offset).tolist(), (before + offset).tolist()
        for row in true_ids[: WARMUP_ROWS + 1]:
            for expert in row:
                _touch(cache, expert, slots)
        for row, named in zip(true_ids[WARMUP_ROWS:], before_ids[WARMUP_ROWS:], strict=True):
            for expert in named:
                _touch(cache, expert, slots)
            hits += sum([_touch(cache, expert, slots) for expert in row])
            accesses += len(row)
    return hits / accesses if accesses else float("nan")


def _touch(cache: OrderedDict[int, None], expert: int, slots: int) -> bool:
    if expert in cache:
        cache.move_to_end(expert)
        return True
    if len(cache) >= slots:
        cache.popitem(last=False)
    cache[expert] = None
    return False


def classifier(prompts: list[Prompt]) -> dict[str, float]:
    """Return the predictions' figures as a 64-label classifier, over all tokens of all prompts."""
    found = sum(int((p.true[:, :, None] == p.predicted[:, None]).sum()) for p in prompts)
    rows = sum(len(p.true) for p in prompts)
    positive, labels = rows * TOP_K, rows * EXPERTS
    wrong = 2 * (positive - found)  # as many missed as predicted in vain
    negative = labels - positive
    figures = {
        "recall_at_6": found / positive,
        "f1_two_class": (found / positive + 2 * (negative - wrong / 2) / (2 * (negative - wrong / 2) + wrong)) / 2,
        "accuracy": 1 - wrong / labels,
        "accuracy_of_naming_none": negative / labels,
    }
    for size in (8, 16):
        batches = [prompts[first : first + size] for first in range(0, len(prompts), size)]
        padded = sum(len(batch) * max(len(p.true) for p in batch) for batch in batches) * EXPERTS
        figures[f"accuracy_with_padding_batch_{size}"] = 1 - wrong / padded
    return figures


def main() -> None:
    """Parse the options, replay and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the three folders of prompts")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--fillings", type=int, default=8, help="number of random fillings (default: 8)")
    args = parser.parse_args()
    try:
        prompts, popular = read_prompts(args.data), popular_rows(args.data)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    published = [(p.true, p.predicted) for p in prompts]
    static = [(p.true, np.tile(popular, (len(p.true) // LAYERS, 1))) for p in prompts]
    figures = {
        name: {str(slots): statistics.mean(hit_rate(rows, slots, s) for s in range(args.fillings)) for slots in SIZES}
        for name, rows in (("moe_beyond", published), ("moe_infinity", static))
    }
    figures["classifier"] = classifier(prompts)
    table = Table(title=f"hit rates in %, by MoE-Beyond's method, {len(prompts)} prompts")
    table.add_column("slots")
    for slots in SIZES:
        table.add_column(str(slots), justify="right")
    for name, row in (("released predictions", "moe_beyond"), ('its "MoE-Infinity"', "moe_infinity")):
        table.add_row(name, *(f"{100 * rate:.2f}" for rate in figures[row].values()))
    console = Console(width=120)
    console.print(table)
    as_classifier = Table(title="the released predictions as a classifier, all tokens")
    as_classifier.add_column("figure")
    as_classifier.add_column("%", justify="right")
    for name, value in figures["classifier"].items():
        as_classifier.add_row(name.replace("_", " "), f"{100 * value:.2f}")
    console.print(as_classifier)
    console.print(
        "What the method leaves out: the predictor reads the router's own input, so its answer arrives with the\n"
        "router's, and it reads later tokens. Predicted experts are inserted for free: neither their bytes nor their\n"
        "time on the interconnect count. A hit is mostly an expert that was inserted just before. Accuracy counts\n"
        "the experts that were rightly not predicted, and in batches the padding too.",
        markup=False,
        highlight=False,
    )
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    main()
