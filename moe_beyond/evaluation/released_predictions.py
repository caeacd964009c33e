"""Import of MoE-Beyond's released predictions (arXiv 2508.17137) as scores, so that a replay counts their bytes."""

from pathlib import Path

import numpy as np

from moe_beyond.errors import UserError
from moe_beyond.evaluation.score_store import writing_scores
from moe_beyond.traces.formats.moe_beyond_csv import column_ids, layer_order, prompt_files, read_csv
from moe_beyond.traces.reader import TraceSet

TRAINING_SOURCE = "MoE-Beyond release, puffin"
"""Training text of the paper's predictor, by the source name of `moe-beyond import moe-beyond-csv`."""


def import_released_predictions(source: str | Path, out: str | Path, traces: TraceSet) -> None:
    """Write a scores folder from ``prompt_N_data_predicted.csv`` files: 1 for a predicted expert, 0 for others.

    The predictor reads the router's own input and later tokens, so the scores have lookahead 0 and are not causal, and
    every table marks them as a leak.

    Args:
        source: Folder of the files, with the prompt numbers of the traces.
        out: Scores folder to write.
        traces: Trace set of the same prompts.

    Raises:
        UserError: A prompt has no predictions, or its predictions list other activated experts than the traces.
    """
    files = prompt_files(Path(source))
    geometry = traces.geometry
    layers, num_experts, top_k = geometry.shape()
    with writing_scores(
        out,
        geometry=geometry,
        lookaheads=(0,),
        causal=False,
        predictor="MoE-Beyond as released",
        traces=traces.manifest.fingerprint,
        training={"source": TRAINING_SOURCE},
    ) as writer:
        for trace in traces.traces():
            number = int(trace.sequence_id.rsplit("-", 1)[1])
            if number not in files:
                raise UserError(f"{source}: has no predictions for prompt {number} of {traces.folder}; add its file")
            path = files[number]
            table = read_csv(path, "Predicted Expert IDs")
            order, length, _ = layer_order(path, table, geometry)
            true, predicted = (
                column_ids(path, table[name], geometry)[order].reshape(layers, length, top_k).transpose(1, 0, 2)
                for name in ("Activated Expert IDs", "Predicted Expert IDs")
            )
            if not np.array_equal(np.sort(true), np.sort(trace.experts)):
                raise UserError(
                    f"{path}: its activated experts are not those of prompt {number} of {traces.folder}; "
                    "import both from one release"
                )
            scores = np.zeros((length, 1, layers, num_experts), np.float32)
            np.put_along_axis(scores[:, 0], predicted.astype(np.int64), 1.0, axis=-1)
            writer.write(trace.sequence_id, scores)
