"""Compare predictors that read hidden states with predictors that read only ids, on the same traces.

    python tools/compare_predictors.py --out DIR [--text LIB] [--tokens N] [--epochs N] [--generate] [--json FILE]
    python tools/compare_predictors.py --out DIR --traces TRACES [--epochs N] [--json FILE]

Without a trace set, the tool records small-moe on files of Python's library that the model never saw: one in twenty,
by the hash of its name. The default library is that of the running Python. Every fourth file is held out. Your own
trace set needs hidden states and a validation split. Every predictor is fitted on the training split with the shipped
configuration, and measured on the validation split, which also selects its best epoch and its calibration. A finished
fit is not repeated.

With ``--generate``, a second table measures the same predictors on text that small-moe generates at temperature 1. The
first tokens of each held-out text are its prompts.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from train_small_moe import is_held_out

from moe_beyond.collect.collection import collect
from moe_beyond.collect.config import CollectConfig, ProcessRank
from moe_beyond.collect.load import load_model
from moe_beyond.collect.prompts import Prompt
from moe_beyond.evaluation.engine import evaluate
from moe_beyond.evaluation.sources import from_predictor_folder
from moe_beyond.evaluation.strategies import grid, with_baselines
from moe_beyond.files import read_json, write_json
from moe_beyond.geometry import budget_slots
from moe_beyond.metrics import LookaheadMetrics
from moe_beyond.predictors.base import CountingPredictor
from moe_beyond.predictors.io.folder import read_predictor
from moe_beyond.predictors.registry import ARCHITECTURES
from moe_beyond.pretrained import shipped_folder
from moe_beyond.simulator import ReplaySettings
from moe_beyond.traces.reader import TraceSet

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = shipped_folder("small-moe")
CONTEXT = 128  # tokens per training row of the small model
ONE_IN = 4  # one file in four is held out
BUDGET = "25%"
PROMPT_TOKENS = 16
"""Tokens of a held-out text that the model reads before it generates the others."""
FARTHEST = 3
"""Largest lookahead of predictors that read hidden states."""
SETTINGS_FILE = "settings.json"
# The rows are cut from files, so the first tokens of most rows are not the start of a text.
NO_PREFIXES = "--model.memory_prefixes=0"
NARROW = (
    *("--model.width=128", "--model.depth=2", "--model.heads=4", "--model.dropout=0.2"),
    *("--model.optimizer.lr=3e-3", NO_PREFIXES),
)
SMALL_SIZE = (
    *("--model.width=48", "--model.depth=1", "--model.heads=4", "--model.copy_heads=2", "--model.layer_width=48"),
    *("--model.optimizer.lr=3e-3", NO_PREFIXES),
)
PREDICTORS: dict[str, tuple[str, ...]] = {
    "popularity": ("popularity",),
    "history": ("history",),
    "naive_bayes": ("naive_bayes",),
    "token_causal": ("token_causal", *NARROW),
    "cross_layer": ("cross_layer", *NARROW, "--model.layer_width=128"),
    "hybrid": ("hybrid", *NARROW, "--model.layer_width=128", "--model.state_width=256"),
    "cross_layer, taught": ("cross_layer", *NARROW, "--model.layer_width=128"),
    "cross_layer, small": ("cross_layer", *SMALL_SIZE),
    "hybrid, small": ("hybrid", *SMALL_SIZE, "--model.state_width=48"),
    "next_gate": ("next_gate",),
    "layer_mlp, stride 1": ("layer_mlp", "--model.optimizer.lr=3e-3"),
    "layer_mlp, stride 2": ("layer_mlp", "--model.optimizer.lr=3e-3", "--model.stride=2"),
    "layer_mlp, stride 3": ("layer_mlp", "--model.optimizer.lr=3e-3", "--model.stride=3"),
    "pre_attention": ("pre_attention", "--model.optimizer.lr=3e-3"),
}
"""Name -> architecture and options of its fit."""
TEACHERS = {"cross_layer, taught": "hybrid"}
"""Name -> name of the predictor from which it learns in addition to the data."""


def add_text(parser: argparse.ArgumentParser) -> None:
    """Add ``--text``, the library whose unseen files are read."""
    parser.add_argument(
        "--text",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="folder of a Python library (default: that of this Python)",
    )


def add_tokens(parser: argparse.ArgumentParser) -> None:
    """Add ``--tokens``, the size of a recording."""
    parser.add_argument(
        "--tokens", type=int, default=100_000, help="maximum number of recorded tokens (default: 100000)"
    )


def excerpts(library: Path, tokenizer: Any, most: int) -> Iterator[Prompt]:
    """Yield texts of one context each, at most ``most`` tokens, evenly from files that the small model never saw."""
    files = {f"Lib/{path.relative_to(library)}": path for path in sorted(library.rglob("*.py"))}
    apart = ("site-packages", "dist-packages", "test", "tests")
    names = [name for name in files if is_held_out(name) and not set(Path(name).parts) & set(apart)]
    if not names:
        raise SystemExit(f"{library}: contains no library file that the small model never saw; give --text")
    share = most // len(names)
    for number, name in enumerate(names):
        text = files[name].read_text(encoding="utf-8", errors="replace")
        ids = tokenizer(text, add_special_tokens=False).input_ids
        pieces = [ids[begin : begin + CONTEXT - 1] for begin in range(0, min(len(ids), share), CONTEXT - 1)]
        for place, piece in enumerate(pieces):
            if len(piece) > 8:
                split = "validation" if number % ONE_IN == 0 else "train"
                yield Prompt(tokenizer.decode(piece), f"{name}:{place}", name, split)


def record(folder: Path, library: Path, tokens: int) -> TraceSet:
    """Record the small model and its hidden states on the excerpts."""
    model, tokenizer, _ = load_model(str(SMALL), dtype="float32")
    prompts = list(excerpts(library, tokenizer, tokens))
    asked = CollectConfig(batch_size=8, max_tokens=CONTEXT, shard_tokens=8192, hidden_states=True)
    source = "Python's library, files that the model never saw"
    traces = collect(model, tokenizer, prompts, folder, asked, name="small-moe", source=source, rank=ProcessRank(0, 1))
    assert traces is not None
    return traces


def generate(folder: Path, library: Path, tokens: int) -> TraceSet:
    """Record the small model and its hidden states while it continues the beginnings of the held-out excerpts."""
    model, tokenizer, _ = load_model(str(SMALL), dtype="float32")
    prompts = [prompt for prompt in excerpts(library, tokenizer, tokens) if prompt.split == "validation"]
    # The model does not read the last token that it generates.
    asked = CollectConfig(
        generate=CONTEXT - PROMPT_TOKENS + 1,
        temperature=1.0,
        batch_size=8,
        max_tokens=PROMPT_TOKENS,
        shard_tokens=8192,
        hidden_states=True,
    )
    source = f"text of small-moe at temperature 1, after {PROMPT_TOKENS} tokens of Python's library"
    traces = collect(model, tokenizer, prompts, folder, asked, name="small-moe", source=source, rank=ProcessRank(0, 1))
    assert traces is not None
    return traces


def fit_named(traces: TraceSet, out: Path, epochs: int, name: str) -> Path:
    """Fit a predictor of `PREDICTORS`, after its teacher, unless they are fitted already; return its folder."""
    taught = []
    if name in TEACHERS:
        taught = [f"--model.teachers=[{fit_named(traces, out, epochs, TEACHERS[name]).absolute()}]"]
    folder = out / name.replace(", ", "-").replace(" ", "-")
    return fit(traces, folder, epochs, *PREDICTORS[name], *taught)


def fit(traces: TraceSet, folder: Path, epochs: int, architecture: str, *extra: str) -> Path:
    """Fit a predictor unless it is fitted already; return its folder."""
    counts = issubclass(ARCHITECTURES[architecture], CountingPredictor)
    command = [sys.executable, "-m", "moe_beyond", "fit", "--seed_everything", "0"]
    for config in (f"trainer/{'counting' if counts else 'default'}", f"model/{architecture}", "data/traces"):
        command += ["-c", str(CONFIGS / f"{config}.yaml")]
    command += [f"--data.traces={Path(traces.folder).absolute()}", "--data.token_budget=1024", *extra]
    if not counts:
        command.append(f"--trainer.max_epochs={epochs}")
    settings = {"fingerprint": traces.manifest.fingerprint, "options": command[3:]}
    if (folder / SETTINGS_FILE).exists() and read_json(folder / SETTINGS_FILE) != settings:
        raise SystemExit(f"{folder}: contains a fit with other data or settings; delete it or choose another --out")
    found = list(folder.glob("runs/*/*/predictor"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS_FILE, settings)
        with (folder / "log").open("w") as log:
            quietly = {**os.environ, "WANDB_MODE": "disabled"}
            done = subprocess.run(command, cwd=folder, stdout=log, stderr=log, env=quietly, check=False)
        found = list(folder.glob("runs/*/*/predictor"))
        if done.returncode or not found:
            raise SystemExit(f"the fit failed; see {folder / 'log'}")
    return found[0]


def measure(traces: TraceSet, predictor: Path) -> dict[str, Any]:
    """Return the inputs of a predictor, its figures by lookahead, and the replay of LRU with top-K prefetch."""
    source, geometry = from_predictor_folder(predictor), traces.geometry
    slots = budget_slots(BUDGET, geometry)
    common = ReplaySettings(geometry.total_experts, bits=traces.manifest.bits)
    prefetch = (f"top{geometry.top_k}",)
    asked = grid(common, [slots], ("lru",), prefetch, source, [h for h in source.lookaheads if h != "next"])
    found = evaluate(traces, with_baselines(asked, common, geometry), "validation", [source], measure=source)
    information = read_predictor(predictor).information
    ids = ("ids",) if information.token_ids or not information.hidden_states else ()
    return {
        "reads": ", ".join(ids + information.hidden_states).replace("_", " "),
        "metrics": {str(row.lookahead): _figures(row) for row in found.metrics},
        "tokens": found.metrics[0].tokens,
        "replay": {
            result.strategy if result.lookahead is None else str(result.lookahead): {
                "hit_rate": result.hit_rate,
                "bytes_ratio": result.bytes_ratio,
            }
            for result in found.results
        },
    }


def _figures(row: LookaheadMetrics) -> dict[str, float | None]:
    """Return the figures of a lookahead, over all layers and over layers with an earlier state at every lookahead."""
    reached = [layer.recall_at_k for layer in row.by_layer[FARTHEST:]]
    found = {name: getattr(row, name) for name in ("recall_at_k", "gate_mass_at_k", "nll")}
    return found | {"recall_of_later_layers": sum(reached) / len(reached) if reached else None}


def main() -> None:
    """Parse the options, record, fit, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", required=True, type=Path, help="folder of traces and fits; finished ones in it are reused"
    )
    parser.add_argument("--traces", help="trace set with hidden states and a validation split")
    add_text(parser)
    add_tokens(parser)
    parser.add_argument("--epochs", type=int, default=20, help="epochs of gradient fits (default: 20)")
    parser.add_argument(
        "--only", nargs="+", choices=PREDICTORS, default=list(PREDICTORS), metavar="NAME", help="predictors to fit"
    )
    parser.add_argument(
        "--generate", action="store_true", help="measure on text that small-moe generates, too (default: no)"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    made = args.out / "traces"
    if args.traces is None and not made.exists():
        record(made, args.text, args.tokens)
    measured = {"held-out": TraceSet(args.traces or str(made))}
    if args.generate:
        written = args.out / "generated"
        if not written.exists():
            generate(written, args.text, args.tokens)
        measured["generated"] = TraceSet(str(written))
    found: dict[str, dict[str, Any]] = {title: {} for title in measured}
    for name in args.only:
        predictor = fit_named(measured["held-out"], args.out, args.epochs, name)
        for title, traces in measured.items():
            found[title][name] = measure(traces, predictor)
    for title, traces in measured.items():
        Console(width=130).print(table(found[title], traces, title))
    if args.json:
        described = {
            title: {"traces": traces.describe(), "predictors": found[title]} for title, traces in measured.items()
        }
        write_json(args.json, {"budget": BUDGET, "measured": described})


def table(found: dict[str, dict[str, Any]], traces: TraceSet, title: str) -> Table:
    """Return a table with one row per predictor and lookahead, and the policies without prefetching last."""
    first, top_k = next(iter(found.values())), traces.geometry.top_k
    shown = Table(title=f"{first['tokens']:,} {title} tokens, {traces.geometry.describe_shape()}, cache of {BUDGET}")
    for name in ("predictor", "reads", "lookahead"):
        shown.add_column(name)
    later = f"recall@{top_k},\nlayers from {FARTHEST + 1} on"
    for name in (f"recall@{top_k}", later, f"gate mass@{top_k}", "NLL", f"lru + top{top_k}\nhit rate @ bytes"):
        shown.add_column(name, justify="right")
    for name, row in found.items():
        for lookahead, figures in row["metrics"].items():
            cached = row["replay"].get(lookahead)
            shown.add_row(
                *(name, row["reads"], lookahead),
                *(_percent(figures[n]) for n in ("recall_at_k", "recall_of_later_layers", "gate_mass_at_k")),
                f"{figures['nll']:.2f}",
                "-" if cached is None else f"{cached['hit_rate']:.1%} @ {cached['bytes_ratio']:.2f}",
            )
        shown.add_section()
    for policy in ("lru", "belady"):
        cached = first["replay"][policy]
        shown.add_row(policy, "", "-", "", "", "", "", f"{cached['hit_rate']:.1%} @ {cached['bytes_ratio']:.2f}")
    shown.caption = (
        "lookahead 1: once the previous layer has routed the token; computed: once it is computed. The first "
        "layers have no earlier state, so predictors that read states use popularity there"
    )
    return shown


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    main()
