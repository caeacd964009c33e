"""Write the scores of a predictor that knows a share of the answer, to bound the benefit of better scores.

    python tools/oracle_scores.py --traces TRACES --out DIR --lookahead next --share 0.5 [--split SPLIT]
    moe-beyond replay --traces TRACES [--split SPLIT] --scores DIR --policy belief --prefetch none --budget 10%

Each selected expert has a score of 1 with probability S. All other experts of its layer share the difference to K, so
the scores are calibrated and S is the recall of the certain ones. The replay then shows the savings of a predictor of
that quality. With S = 1 it is an upper bound.
"""

import argparse

import numpy as np
import numpy.typing as npt
from rich.progress import track

from moe_beyond.evaluation.score_store import writing_scores
from moe_beyond.lookahead import parse_lookahead
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.schema import expert_ids


def main() -> None:
    """Parse the options and write the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", required=True, help="trace set")
    parser.add_argument("--split", help="split of the trace set (default: all)")
    parser.add_argument("--out", required=True, help="score folder to write")
    parser.add_argument("--lookahead", default="next", help="lookahead of the scores (default: next)")
    parser.add_argument("--share", type=float, default=1.0, help="S, the share of known experts (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    args = parser.parse_args()
    if not 0 <= args.share <= 1:
        parser.error(f"--share: must be within 0..1 (got {args.share:g})")
    traces, rng = TraceSet(args.traces), np.random.default_rng(args.seed)
    _, experts, _ = traces.geometry.shape()
    with writing_scores(
        args.out,
        geometry=traces.geometry,
        lookaheads=[parse_lookahead(args.lookahead)],
        predictor=f"an oracle for {args.share:.0%}",
        traces=traces.manifest.fingerprint,
    ) as writer:
        for trace in track(traces.traces(args.split), "writing"):
            writer.write(trace.sequence_id, partly_known(trace.experts, experts, args.share, rng)[:, None])


def partly_known(
    chosen: npt.NDArray[np.integer], experts: int, share: float, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Return scores ``(T, L, E)`` for selected experts ``(T, L, K)``."""
    named, ids = rng.random(chosen.shape) < share, expert_ids(chosen, experts)
    known = np.zeros((*chosen.shape[:2], experts + 1), bool)
    np.put_along_axis(known, ids, named, -1)
    known = known[..., :experts]  # the last column is padding
    count = known.sum(-1, keepdims=True)
    others = ((ids < experts).sum(-1, keepdims=True) - count) / np.maximum(experts - count, 1)
    return np.where(known, 1.0, others).astype(np.float32)


if __name__ == "__main__":
    main()
