"""Check the main figures on the MoE-Beyond recordings against their expected values.

    python tools/check_figures.py --data DIR [--json FILE]

DIR contains ``puffin/`` and ``webglm/``, folders of ``prompt_N_*.csv`` files. The tool imports both into a temporary
folder, replays the WebGLM prompts through caches, fits token_table on the Puffin prompts, and evaluates it and the
pretrained cross_layer. It takes about a minute; the exit code is 1 if a figure misses.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import lightning as L
from rich.console import Console
from rich.table import Table

from moe_beyond.datamodules import TraceDataModule
from moe_beyond.evaluation.engine import evaluate
from moe_beyond.evaluation.sources import ScoreSource, from_predictor, from_predictor_folder
from moe_beyond.evaluation.strategies import grid
from moe_beyond.geometry import load_preset
from moe_beyond.pretrained import find_predictor
from moe_beyond.simulator import ReplaySettings
from moe_beyond.tasks import TokenTableTask
from moe_beyond.traces.formats.moe_beyond_csv import import_moe_beyond_csv
from moe_beyond.traces.reader import TraceSet

PRETRAINED = "cross_layer.deepseek-v2-lite-puffin"
# Hit rates in percent: two independent measurements agree within half a point.
CACHES = {("lru", 166): 28.3, ("belady", 166): 49.1, ("lru", 332): 38.9, ("belady", 332): 67.1}
WITHIN = 0.5
MIN_RECALL = 71.0
TABLE_RECALL, TABLE_WITHIN = 54.0, 1.5
MAX_BYTES_PER_ENTRY = 5.0


def first_recall(traces: TraceSet, source: ScoreSource) -> float:
    """Return recall@k in percent at the source's first lookahead, over all tokens."""
    return 100 * evaluate(traces, [], sources=[source], measure=source).metrics[0].recall_at_k


def main() -> None:
    """Parse the options, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with puffin/ and webglm/")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    rows: list[tuple[str, float, str, bool]] = []
    with tempfile.TemporaryDirectory() as folder:
        preset = load_preset("deepseek-v2-lite")
        puffin = import_moe_beyond_csv(args.data / "puffin", f"{folder}/puffin", preset)
        webglm = import_moe_beyond_csv(args.data / "webglm", f"{folder}/webglm", preset)
        for traces in (puffin, webglm):
            manifest = traces.manifest
            size = sum(s.bytes for s in manifest.shards) / (manifest.tokens * preset.geometry.num_layers)
            rows.append((f"{manifest.source}: bytes per entry", size, f"at most {MAX_BYTES_PER_ENTRY}", size <= 5))
        common = ReplaySettings(preset.geometry.total_experts, warmup_tokens=10)
        asked = grid(common, [166, 332], ("lru", "belady"))
        for result in evaluate(webglm, asked).results:
            target, found = CACHES[result.policy, result.budget_slots], 100 * result.hit_rate
            name = f"{result.policy}, {result.budget_slots} slots: hit rate % @ {result.bytes_ratio:.2f} bytes"
            rows.append((name, found, f"{target} within {WITHIN}", abs(found - target) <= WITHIN))
        recall = first_recall(webglm, from_predictor_folder(find_predictor(PRETRAINED)))
        rows.append((f"{PRETRAINED}: recall@6 %, lookahead 1", recall, f"at least {MIN_RECALL}", recall >= MIN_RECALL))
        data = TraceDataModule(puffin.folder, val_split=None)
        task = TokenTableTask(data.geometry, data.vocab_size)
        L.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(task, data)  # fmt: skip
        recall = first_recall(webglm, from_predictor(task.predictor.eval(), "token_table"))
        near = abs(recall - TABLE_RECALL) <= TABLE_WITHIN
        rows.append(("token_table: recall@6 %, whole token", recall, f"about {TABLE_RECALL:.0f}", near))
    table = Table(
        title="figures on the MoE-Beyond recordings (WebGLM: hit rates exclude the first 10 tokens of a prompt)"
    )
    for name in ("figure", "value", "expected", ""):
        table.add_column(name)
    for name, found, target, holds in rows:
        table.add_row(name, f"{found:.2f}", target, "ok" if holds else "MISSES")
    Console(width=120).print(table)
    if args.json:
        args.json.write_text(
            json.dumps([dict(zip(("figure", "found", "target", "holds"), r, strict=True)) for r in rows])
        )
    sys.exit(0 if all(holds for *_, holds in rows) else 1)


if __name__ == "__main__":
    main()
