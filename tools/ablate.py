"""Fit variants of cross_layer on the same data and compare their validation figures.

    python tools/ablate.py --traces TRACES --out DIR [--epochs N] [--only NAME ...] [--seeds N] [--shares S ...]
        [-- OPTION ...]

TRACES needs a validation split (`moe-beyond import ... --val-blocks 20:10`). The test set is not used. Each variant
differs from the first by the options in `VARIANTS`. `--shares 0.25 0.5` also fits the flagship on parts of the
training text for the same number of steps, which estimates the benefit of more text. A finished fit is not repeated;
an interrupted fit resumes from its last checkpoint.

Figures are those of the last epoch: recall@K by lookahead; likelihood and calibration error of the first lookahead,
not calibrated; hit rate and bytes of `lru` with top<K> prefetch at a tenth of the experts. If a C++ compiler is
installed, `-- --model.compiled=true` is faster.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_beyond.files import read_json, write_json
from moe_beyond.metrics.names import of_lookahead
from moe_beyond.traces.manifest import MANIFEST_FILE
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.writer import open_writer

CONFIGS = Path(__file__).parents[1] / "configs"
SETTINGS_FILE = "settings.json"
QUIETLY = {**os.environ, "WANDB_MODE": "disabled"}
FIRST = (
    "--model.copy_heads=0", "--model.layer_copy_heads=0", "--model.objective=softmax", "--model.next_token_head=false",
    "--model.memory_tokens=0", "--model.known_tokens=16384", "--model.ngram_buckets=8192",
)  # fmt: skip
# Options of each variant in place of the architecture's defaults; the others are compared with the first.
VARIANTS: dict[str, tuple[str, ...]] = {
    "flagship": (),
    "softmax objective": ("--model.objective=softmax",),
    "sigmoid objective": ("--model.objective=sigmoid",),
    "ranking objective": ("--model.objective=ranking",),
    "no copies": ("--model.copy_heads=0",),
    "no copies by layer": ("--model.layer_copy_heads=0",),
    "no memory of routing, own vectors": ("--model.memory_tokens=0", "--model.known_tokens=16384"),
    "no memory of routing, own vectors and n-grams": (
        "--model.memory_tokens=0", "--model.known_tokens=16384", "--model.ngram_buckets=8192",
    ),
    "own vectors as well": ("--model.known_tokens=16384",),
    "n-grams as well": ("--model.ngram_buckets=8192",),
    "first recipe": FIRST,
    "no next run": ("--model.next_token_head=false",),
    "eight epochs": ("--trainer.max_epochs=8",),
    "steps of 1,024 tokens": ("--data.token_budget=1024",),
    "steps of 2,048 tokens": ("--data.token_budget=2048",),
    "eight copies": ("--model.copy_heads=8",),
    "two copies by layer": ("--model.layer_copy_heads=2",),
    "no dropped tokens": ("--model.token_dropout=0",),
    "more dropped tokens": ("--model.token_dropout=0.25",),
    "dropout 0.25": ("--model.dropout=0.25",),
    "weight decay 0.1": ("--model.optimizer.weight_decay=0.1",),
    "one block": ("--model.depth=1",),
    "narrow": ("--model.width=128", "--model.layer_width=128"),
    "pieces of 128 tokens": ("--data.max_tokens=128",),
    "float32": ("--trainer.precision=32-true",),
}  # fmt: skip


def fit(traces: str, folder: Path, epochs: int, seed: int, extra: tuple[str, ...]) -> dict[str, float]:
    """Fit one variant, or resume its fit; return its figures."""
    command = [sys.executable, "-m", "moe_beyond", "fit", "--seed_everything", str(seed)]
    for config in ("trainer/default", "model/cross_layer", "data/traces"):
        command += ["-c", str(CONFIGS / f"{config}.yaml")]
    options = [f"--data.traces={Path(traces).absolute()}", f"--data.seed={seed}", f"--trainer.max_epochs={epochs}"]
    options += ["--trainer.precision=bf16-mixed", "--trainer.enable_progress_bar=false", *extra]
    command += {option.partition("=")[0]: option for option in options}.values()  # the last of equal options
    settings = {"fingerprint": TraceSet(traces).manifest.fingerprint, "options": command[3:]}
    if (folder / SETTINGS_FILE).exists() and read_json(folder / SETTINGS_FILE) != settings:
        raise SystemExit(f"{folder}: contains a fit with other data or settings; delete it or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS_FILE, settings)
    if not _runs(folder, "predictor"):
        if resumable := _runs(folder, "checkpoints/last.ckpt"):
            command += ["--ckpt_path", str(resumable[-1].absolute())]
        with (folder / "log").open("a") as log:
            done = subprocess.run(command, cwd=folder, stdout=log, stderr=log, env=QUIETLY, check=False)
        if done.returncode or not _runs(folder, "predictor"):
            raise SystemExit(f"the fit failed; see {folder / 'log'}")
    by_run = [last_figures(metrics) for metrics in _runs(folder, "metrics.csv")]
    return next(figures for figures in reversed(by_run) if figures)


def part_of(traces: str, folder: Path, share: float) -> str:
    """Write a trace set with an evenly spread share of the training sequences, and the same validation split."""
    if not (folder / MANIFEST_FILE).exists():
        source = TraceSet(traces)
        manifest = replace(source.manifest, source=f"{source.manifest.source}, {share:.0%} of its training sequences")
        with open_writer(folder, manifest) as writer:
            for number, trace in enumerate(source.traces("train")):
                if int((number + 1) * share) > int(number * share):
                    writer.write(trace, "train")
            for trace in source.traces("validation"):
                writer.write(trace, "validation")
    return str(folder)


def _runs(folder: Path, part: str) -> list[Path]:
    """Return the paths of a file or folder in all runs that have it, in the order of the runs."""
    paths = folder.glob(f"runs/predictor/version_*/{part}")
    return sorted(paths, key=lambda path: int(path.relative_to(folder).parts[2].split("_")[1]))


def last_figures(metrics: Path) -> dict[str, float]:
    """Return the last value of every validation figure."""
    figures: dict[str, float] = {}
    with metrics.open() as lines:
        for row in csv.DictReader(lines):
            figures.update({name: float(value) for name, value in row.items() if name.startswith("val") and value})
    return figures


def columns(figures: dict[str, float]) -> dict[str, str]:
    """Return the figures in the table: name -> heading."""
    sections = sorted(name.partition("/")[0] for name in figures if name.endswith("/nll"))
    lookaheads = [section.rsplit("_", 1)[1] for section in sections]
    shown = {of_lookahead("val", h, "recall_at_k", first=h == lookaheads[0]): f"recall, {h}" for h in lookaheads}
    shown |= {f"{sections[0]}/nll": "NLL", f"{sections[0]}/calibration_error": "cal. error"}
    budget = next(name.partition("/")[0] for name in figures if name.endswith("/hit_rate"))
    return shown | {f"{budget}/hit_rate": "hit rate", f"{budget}/bytes_ratio": "bytes"}


def main() -> None:
    """Parse the options, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", required=True, help="trace set with a validation split")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs; finished runs in it are reused")
    parser.add_argument("--epochs", type=int, default=4, help="epochs per fit (default: 4)")
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="fits per variant (default: 1); figures are means, and spread is that of the first figure",
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[],
        help="shares of the training text on which the flagship is also fitted (default: none)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help="variants to fit (default: all)",
    )
    parser.add_argument("options", nargs="*", metavar="OPTION", help="options of every fit, after --")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {}
    console = Console(width=130)
    planned = [(name, args.traces, VARIANTS[name], args.epochs) for name in args.only]
    for share in args.shares:
        part = part_of(args.traces, args.out / f"traces-{share:g}", share)
        planned.append((f"{share:.0%} of the text", part, (), round(args.epochs / share)))
    for name, traces, variant, epochs in planned:
        for seed in range(args.seeds):
            folder = args.out / f"{name.replace(' ', '-').replace('%', '').replace(',', '')}-{seed}"
            figures = fit(traces, folder, epochs, seed, (*variant, *args.options))
            rows.setdefault(name, []).append(figures)
            console.print(_table(rows, args.epochs))
    if args.json:
        write_json(args.json, {"epochs": args.epochs, "variants": rows})


def _table(rows: dict[str, list[dict[str, float]]], epochs: int) -> Table:
    shown = columns(next(iter(rows.values()))[0])
    table = Table(title=f"validation, after the number of steps in {epochs} epochs of all text")
    table.add_column("variant")
    for heading in (*shown.values(), "spread"):
        table.add_column(heading, justify="right")
    for name, fits in rows.items():
        first = [fit[next(iter(shown))] for fit in fits]
        table.add_row(
            name,
            *(_format(heading, [fit[key] for fit in fits if key in fit]) for key, heading in shown.items()),
            f"{100 * (max(first) - min(first)):.2f}" if len(first) > 1 else "-",
        )
    return table


def _format(heading: str, values: Sequence[float]) -> str:
    """Format a mean; a variant may lack a lookahead of the first."""
    if not values:
        return "-"
    return format(statistics.mean(values), ".2f" if heading in ("NLL", "bytes") else ".2%")


if __name__ == "__main__":
    main()
