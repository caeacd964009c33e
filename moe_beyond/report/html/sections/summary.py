"""The numbers at the top of a page."""

from collections.abc import Sequence

from moe_beyond.evaluation.strategies import CLAIRVOYANT
from moe_beyond.geometry import Geometry
from moe_beyond.metrics import LookaheadMetrics
from moe_beyond.report.html.page import KeyFigure
from moe_beyond.report.html.sections.replay import format_speed
from moe_beyond.report.html.strategies import at_summary_budget
from moe_beyond.report.labels import BYTES_AXIS, metric_lookahead, score_lookahead
from moe_beyond.simulator import Result


def key_figures(
    metrics: Sequence[LookaheadMetrics],
    results: Sequence[Result],
    static: float,
    geometry: Geometry,
    devices: Sequence[str],
) -> list[KeyFigure]:
    """Return the numbers of the summary, each with its baselines.

    Args:
        metrics: Rows of metrics, one per lookahead.
        results: Results of all replays.
        static: Recall of the best static prediction.
        geometry: Geometry of the model.
        devices: Names of the devices; the summary shows the first.
    """
    row, k = metrics[0], metrics[0].k
    plain = {result.strategy: result for result in at_summary_budget([r for r in results if r.device is None])}
    own, lru, belady = next(iter(plain.values())), plain["lru"], plain["belady"]
    figures = [
        KeyFigure(
            f"recall@{k}, lookahead {metric_lookahead(row.lookahead, row.causal)}",
            f"{row.recall_at_k:.1%}",
            f"over {row.tokens:,} tokens; best static {k} experts per layer {static:.1%}; "
            f"chance {geometry.top_k / geometry.num_experts:.1%}",
        ),
        KeyFigure(
            f"hit rate, {own.strategy}, lookahead {score_lookahead(own)}",
            f"{own.hit_rate:.1%}",
            f"with {own.budget_slots:,} slots ({own.budget_share:.1%} of all experts); "
            f"LRU {lru.hit_rate:.1%}, Belady {belady.hit_rate:.1%}",
        ),
        KeyFigure(
            BYTES_AXIS,
            f"{own.bytes_ratio:.2f}",
            f"same replay; LRU {lru.bytes_ratio:.2f}, Belady {belady.bytes_ratio:.2f}; 1.00 = one transfer per access",
        ),
    ]
    for device in devices[:1]:
        on_device = [result for result in results if result.device == device]
        speeds = {result.strategy: format_speed(result) for result in at_summary_budget(on_device)}
        resident = next(result for result in on_device if result.policy == "all_resident")
        figures.append(
            KeyFigure(
                f"tokens/s on {device}, same budget",
                speeds[own.strategy],
                f"LRU {speeds['lru']}, clairvoyant prefetch {speeds[CLAIRVOYANT]}, all resident "
                f"{format_speed(resident)}; timing model, MoE layers only",
            )
        )
    calibration = KeyFigure(
        f"calibration error, lookahead {row.lookahead}",
        f"{row.calibration_error:.2%}",
        f"mean distance of predicted probability and observed frequency; NLL {row.nll:.2f} nats per token and layer",
    )
    return [*figures, calibration]
