"""Compare forms of hidden states: their bytes, and the recall of predictors that read them.

    python tools/compare_states.py --sizes [MODEL]
    python tools/compare_states.py --out DIR [--text LIB] [--tokens N] [--epochs N] [--forms FORM ...]
        [--only NAME ...] [--json FILE]

With ``--sizes``, the tool computes the bytes for the shape of a model preset. Otherwise it records small-moe as
`compare_predictors.py` does, and makes one trace set per form from that recording, as `moe-beyond collect` stores it.
Every predictor is fitted on every set, and measured on its validation split. A finished fit is not repeated.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from compare_predictors import FARTHEST, PREDICTORS, add_text, add_tokens, fit, record
from rich.console import Console
from rich.table import Table

from moe_beyond.collect.state_projection import make_projection
from moe_beyond.evaluation.engine import evaluate
from moe_beyond.evaluation.sources import from_predictor_folder
from moe_beyond.files import write_json
from moe_beyond.geometry import load_preset
from moe_beyond.traces.hidden_states import HiddenStates, StateFormat, to_int8
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.state_projection import Half, StateProjection
from moe_beyond.traces.writer import open_writer

MODEL = "deepseek-v2-lite"
SIZES = (
    ("float16", 1, 1),
    ("int8", 1, 1),
    ("int8", 8, 1),
    ("int8", 8, 2),
    ("int8", 8, 4),
    ("int8", 16, 1),
    ("int8", 16, 2),
    ("int8", 32, 1),
)
"""Rows of the table of bytes: data type, and divisors of the width and of the number of layers."""
READERS = ("layer_mlp, stride 1", "layer_mlp, stride 2", "layer_mlp, stride 3", "pre_attention")
"""Predictors of `compare_predictors.py` that read hidden states of any width."""
REGRESSED_ROUTERS = 3
"""Number of routers whose logits the basis ``regression`` holds, as many as the largest lookahead."""


@dataclass(frozen=True)
class Form:
    """A form of hidden states whose recall is measured.

    Attributes:
        dtype: Data type of the stored states.
        width: Stored width; None for the model's, without a projection (default: None).
        basis: Name of the projection (default: routers). ``"routers"`` is that of `moe-beyond collect`, and ``"pca"``
            the principal components of each layer's training states. ``"regression"`` has the directions from which the
            logits of the next three routers are regressed best. ``"random"`` has random directions.
    """

    dtype: str
    width: int | None = None
    basis: str = "routers"

    def __str__(self) -> str:
        """Return the name of the form's folder."""
        return self.dtype if self.width is None else f"{self.dtype}-{self.width}-{self.basis}"


FORMS = (
    Form("float16"),
    Form("int8"),
    Form("int8", 64),
    Form("int8", 48),
    Form("int8", 32),
    Form("int8", 24),
    Form("int8", 24, "regression"),
    Form("int8", 16),
    Form("int8", 16, "regression"),
    Form("int8", 16, "pca"),
    Form("int8", 16, "random"),
)
"""Rows of the table of recall, for a model whose hidden states have width 128."""


def size_table(model: str) -> Table:
    """Return the bytes of hidden states for a preset."""
    preset = load_preset(model)
    geometry, full = preset.geometry, preset.hidden_size
    if full is None:
        raise SystemExit(f"{model}: the width of its hidden states is unknown; give a preset")
    layers = geometry.num_layers
    entries = geometry.demand_per_token * (1 if geometry.num_experts <= 255 else 2)
    table = Table(title=f"{model}: {geometry.describe_shape()}, hidden states of width {full}, {entries} bytes of ids")
    for name in ("dtype", "width", "layers", "bytes per token", "times the ids", "GB per million tokens"):
        table.add_column(name, justify="left" if name == "dtype" else "right")
    for dtype, narrower, fewer in SIZES:
        width, some = full // narrower, layers // fewer
        form = StateFormat(dtype, geometry.moe_layers[:some])
        size = form.token_bytes(width)
        row = (f"{width:,}", f"{some} of {layers}", f"{size:,}", f"{size / entries:,.1f}", f"{size / 1e3:,.1f}")
        table.add_row(dtype, *row)
    return table


def derived(full: TraceSet, folder: Path, form: Form) -> TraceSet:
    """Write a recording in full width in another form, or open it if it exists."""
    if form == Form("float16"):
        return full
    if not folder.exists():
        width, manifest = full.manifest.hidden_size, full.manifest
        assert width is not None
        states = StateFormat(form.dtype, manifest.geometry.moe_layers)
        projection = None if form.width is None else projection_of(full, form.width, form.basis)
        if projection is not None:
            states = replace(states, projected_from=width, projection_sha256=projection.sha256)
            width = len(projection.router_inputs[0])
        manifest = replace(manifest, hidden_size=width, states=states, shards=(), routers_sha256=None)
        content, routers = full.tokenizer_content(), full.routers
        with open_writer(
            folder, manifest, vocabulary=content, routers=routers, projection=projection, shard_tokens=8192
        ) as writer:
            for split in full.manifest.splits:
                for trace in full.traces(split, hidden_states=True):
                    assert trace.hidden_states is not None
                    values = trace.hidden_states if projection is None else projected(trace.hidden_states, projection)
                    coded = to_int8(values) if form.dtype == "int8" else values
                    writer.write(replace(trace, hidden_states=coded), split)
    return TraceSet(str(folder))


def projection_of(full: TraceSet, width: int, basis: str) -> StateProjection:
    """Return the projection of a basis."""
    size, routers = full.manifest.hidden_size, full.routers
    assert size is not None
    assert routers is not None
    if basis in ("pca", "regression"):
        parts = [trace.hidden_states for trace in full.traces("train", hidden_states=True)]
        states = [part for part in parts if part is not None]
        router_inputs = np.concatenate([part.router_inputs for part in states])
        layer_inputs = np.concatenate([part.layer_inputs for part in states])
        if basis == "pca":
            return StateProjection(principal(router_inputs, width), principal(layer_inputs, width))
        logits = np.einsum("nld,led->nle", router_inputs.astype(np.float32), routers.weight, optimize=True)
        return StateProjection(regressed(router_inputs, logits, 1, width), regressed(layer_inputs, logits, 0, width))
    weight = routers.weight if basis == "routers" else None
    return make_projection(weight, range(full.geometry.num_layers), size, width)


def principal(states: Half, width: int) -> Half:
    """Return the leading principal components ``(L, W, D)`` of states ``(N, L, D)``, layer by layer."""
    components = []
    for layer in range(states.shape[1]):
        columns = states[:, layer].astype(np.float64)
        _, vectors = np.linalg.eigh(np.cov(columns, rowvar=False))
        components.append(vectors[:, ::-1][:, :width].T)
    return np.stack(components).astype(np.float16)


def regressed(states: Half, logits: npt.NDArray[np.float32], ahead: int, width: int) -> Half:
    """Return orthonormal rows ``(L, W, D)`` of a reduced-rank regression of the next routers' logits, layer by layer.

    As in the projection of `moe-beyond collect`, the weight of a router is half that of the router before it, and after
    the last router come those of the layers before.

    Args:
        states: Training states ``(N, L, D)``.
        logits: Logits of the routers ``(N, L, E)``.
        ahead: Distance in layers from a state to the next router.
        width: Number of rows, W.
    """
    layers = states.shape[1]
    bases = []
    for layer in range(layers):
        start = layer + ahead
        order = [*range(start, layers), *range(min(start, layers) - 1, -1, -1)][:REGRESSED_ROUTERS]
        targets = np.concatenate([logits[:, other] * 0.5**rank for rank, other in enumerate(order)], axis=1)
        columns = states[:, layer].astype(np.float64)
        columns, targets = columns - columns.mean(0), targets - targets.mean(0, dtype=np.float64)
        maps = np.linalg.lstsq(columns.T @ columns, columns.T @ targets)[0]
        _, vectors = np.linalg.eigh(maps.T @ columns.T @ columns @ maps)
        bases.append(np.linalg.qr(maps @ vectors[:, ::-1][:, :width])[0].T)
    return np.stack(bases).astype(np.float16)


def projected(states: HiddenStates, projection: StateProjection) -> HiddenStates:
    """Return float16 states as a projection in float32 makes them."""
    pairs = ((states.router_inputs, projection.router_inputs), (states.layer_inputs, projection.layer_inputs))
    products = (
        np.einsum("tld,lwd->tlw", full.astype(np.float32), matrices.astype(np.float32), optimize=True)
        for full, matrices in pairs
    )
    return HiddenStates(*(product.astype(np.float16) for product in products))


def router_agreement(full: TraceSet, traces: TraceSet, ahead: int) -> float:
    """Return the share of the top K that later routers select alike from states in full width and in another form."""
    routers, projection, layers = full.routers, traces.projection, full.geometry.num_layers
    assert routers is not None
    weight, top_k = routers.weight, full.geometry.top_k
    equal, total = 0, 0
    pairs = (each.traces("validation", hidden_states=True) for each in (full, traces))
    for whole, other in zip(*pairs, strict=True):
        assert whole.hidden_states is not None
        assert other.hidden_states is not None
        for layer in range(layers - ahead):
            later = weight[layer + ahead].T
            stored = later if projection is None else projection.router_inputs[layer].astype(np.float32) @ later
            logits = (
                whole.hidden_states.router_inputs[:, layer].astype(np.float32) @ later,
                other.hidden_states.router_inputs[:, layer].astype(np.float32) @ stored,
            )
            expected, found = (np.argsort(-each, axis=-1)[:, :top_k] for each in logits)
            equal += int((expected[:, :, None] == found[:, None, :]).sum())
            total += expected.size
    return equal / total


def measured_recall(traces: TraceSet, predictor: Path) -> tuple[float, int]:
    """Return the recall of a predictor of one lookahead in the later layers, and the number of measured tokens."""
    source = from_predictor_folder(predictor)
    (row,) = evaluate(traces, [], "validation", [source], measure=source).metrics
    later = row.by_layer[FARTHEST:]
    return sum(layer.recall_at_k for layer in later) / len(later), row.tokens


def recall_table(found: Sequence[dict[str, Any]], traces: TraceSet, tokens: int) -> Table:
    """Return a table with one row per form and one column per predictor."""
    top_k = traces.geometry.top_k
    table = Table(title=f"{tokens:,} held-out tokens, {traces.geometry.describe_shape()}, recall@{top_k} in %")
    for name in ("dtype", "width", "basis", "states / ids", "router 1", "router 3"):
        table.add_column(name, justify="left" if name in ("dtype", "basis") else "right")
    for name in found[0]["recall"]:
        table.add_column(name.replace(", ", ",\n"), justify="right")
    for row in found:
        recalls = (f"{100 * value:.1f}" for value in row["recall"].values())
        agreements = (f"{100 * row[f'router_{ahead}']:.1f}" for ahead in (1, 3))
        table.add_row(row["dtype"], str(row["width"]), row["basis"], f"{row['times_ids']:.1f}", *agreements, *recalls)
    table.caption = (
        "router 1, router 3: share of the experts that the router 1 or 3 layers later selects alike from a stored and "
        f"from a full router input; recall of layers from {FARTHEST + 1} on"
    )
    return table


def main() -> None:
    """Parse the options, and print the table of bytes, or record, fit, measure and print the table of recall."""
    names = [str(form) for form in FORMS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="?", const=MODEL, metavar="MODEL", help=f"print bytes for a model preset (default: {MODEL})"
    )
    parser.add_argument("--out", type=Path, help="folder of traces and fits; finished ones in it are reused")
    add_text(parser)
    add_tokens(parser)
    parser.add_argument("--epochs", type=int, default=20, help="epochs of the fits (default: 20)")
    parser.add_argument(
        "--only", nargs="+", choices=READERS, default=list(READERS), metavar="NAME", help="predictors to fit"
    )
    parser.add_argument(
        "--forms", nargs="+", choices=names, default=names, metavar="FORM", help=f"forms, out of {', '.join(names)}"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    if args.sizes is not None:
        Console(width=130).print(size_table(args.sizes))
        return
    if args.out is None:
        parser.error("give --out DIR, or --sizes")
    made = args.out / "traces"
    full = TraceSet(str(made)) if made.exists() else record(made, args.text, args.tokens)
    found, tokens = [], 0
    for form in (form for form in FORMS if str(form) in args.forms):
        traces = derived(full, args.out / str(form) / "traces", form)
        recall = {}
        for name in args.only:
            folder = args.out / str(form) / name.replace(", ", "-").replace(" ", "-")
            recall[name], tokens = measured_recall(traces, fit(traces, folder, args.epochs, *PREDICTORS[name]))
        size = sum(shard.states_bytes for shard in traces.manifest.shards)
        ids = traces.manifest.tokens * traces.geometry.demand_per_token
        width, basis = traces.manifest.hidden_size, "-" if form.width is None else form.basis
        agreement = {f"router_{ahead}": router_agreement(full, traces, ahead) for ahead in (1, 3)}
        row = {"dtype": form.dtype, "width": width, "basis": basis, "times_ids": size / ids, **agreement}
        found.append({**row, "recall": recall})
    Console(width=130).print(recall_table(found, full, tokens))
    if args.json:
        write_json(args.json, {"traces": full.describe(), "forms": found})


if __name__ == "__main__":
    main()
