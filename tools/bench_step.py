"""Time of a predictor's step while decoding, to compare with the time of a layer.

    python tools/bench_step.py PREDICTOR --traces TRACES [--sequences N] [--online] [--program PROGRAM] [--json FILE]

Steps sequences of a trace set as a runtime would, on one core. A token's start is followed by the routed experts of
each layer; after each, the best K experts of the next layer are selected, with calibrated scores if the predictor has
them. Predictors that read hidden states receive random ones of the model's width. Prints microseconds per layer over
tokens, (the token's start + all layers' steps) / L, and those of both parts. `--online` adds online updates of the
scores. With `--program`, the compiled C stepper of `tools/reference_c` takes the same steps.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is loaded

import argparse
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from moe_beyond.files import write_json
from moe_beyond.predictors.io.folder import read_predictor
from moe_beyond.predictors.online import OnlineUpdates
from moe_beyond.pretrained import find_predictor
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import padding_id

MICRO = 1e6


def main() -> None:
    """Parse the options, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictor", help="predictor folder or pretrained name")
    parser.add_argument("--traces", required=True, help="trace set")
    parser.add_argument("--sequences", type=int, default=20, help="number of sequences (default: 20)")
    parser.add_argument("--online", action="store_true", help="correct the scores by online updates")
    parser.add_argument("--program", type=Path, help="compiled program of tools/reference_c (default: only Python)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = find_predictor(args.predictor)
    predictor = read_predictor(folder)
    layers, _, top_k = predictor.geometry.shape()
    width = predictor.projected_from or predictor.hidden_size
    states = None if width is None else np.random.default_rng(0).normal(size=(layers, width)).astype(np.float16)
    stepper = OnlineUpdates(predictor).stepper() if args.online else predictor.stepper()
    starts, steps, wholes, lines = [], [], [], []
    for number, trace in zip(range(args.sequences + 1), TraceSet(args.traces).traces(), strict=False):
        stepper.reset()
        lines.append("")
        for token_id, routed in zip(trace.token_ids, trace.experts, strict=True):
            padding = padding_id(routed.dtype)
            experts = [chosen[chosen != padding] for chosen in routed]
            lines.append(f"{token_id} {' '.join(str(-1 if each == padding else each) for each in routed.ravel())}")
            began = now = time.perf_counter()
            stepper.observe_token(int(token_id))
            best(stepper.scores()[0], top_k)
            took = [time.perf_counter() - now]
            for layer in range(layers):
                now = time.perf_counter()
                stepper.observe_layer(layer, experts[layer], None if states is None else states[layer])
                if layer + 1 < layers:
                    best(stepper.scores()[layer + 1], top_k)
                    if states is not None:
                        stepper.observe_computed(layer, states[layer])
                        best(stepper.scores()[layer + 1], top_k)
                took.append(time.perf_counter() - now)
            if number:  # the first warms up
                starts.append(took[0])
                steps += took[1:]
                wholes.append((time.perf_counter() - began) / layers)
    if not wholes:
        raise SystemExit(f"{args.traces}: has fewer than two sequences; one is needed for the warm-up")
    table = Table(title=f"{args.predictor}: microseconds on one core, {len(wholes):,} tokens")
    for name in ("step", "median", "p99"):
        table.add_column(name, justify="left" if name == "step" else "right")
    found = {"token start": starts, "layer": steps, "(token + layers) / L": wholes}
    figures = {
        name: {q: float(np.percentile(t, p)) * MICRO for q, p in (("median", 50), ("p99", 99))}
        for name, t in found.items()
    }
    if args.program:
        figures |= program_figures(args.program, folder, "\n".join(lines))
    for name, row in figures.items():
        table.add_row(name, f"{row['median']:.0f}", f"{row['p99']:.0f}")
    Console().print(table)
    if args.json:
        write_json(args.json, {"predictor": args.predictor, "tokens": len(wholes), "microseconds": figures})


def program_figures(program: Path, folder: Path, tokens: str) -> dict[str, dict[str, float]]:
    """Return the microseconds of the C stepper, by step.

    Args:
        program: Path of the compiled program.
        folder: Path of the predictor folder.
        tokens: Token ids and experts, as the program reads them.
    """
    done = subprocess.run(
        [program.resolve(), folder, "--time"], input=tokens, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    rows = [row.split() for row in done.stdout.splitlines()]
    names = {"start": "token start, in C", "layer": "layer, in C", "whole": "(token + layers) / L, in C"}
    return {names[name]: {"median": float(median), "p99": float(p99)} for name, median, p99 in rows}


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the best experts of a layer, unordered."""
    return np.argpartition(scores, -count)[-count:]


if __name__ == "__main__":
    main()
