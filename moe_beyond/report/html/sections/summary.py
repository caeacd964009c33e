"""The figures that a page begins with."""

from collections.abc import Sequence

from moe_beyond.evaluation.strategies import CLAIRVOYANT
from moe_beyond.geometry import Geometry
from moe_beyond.metrics import LookaheadMetrics
from moe_beyond.report.html.model import Key
from moe_beyond.report.html.sections.replay import speed
from moe_beyond.report.html.strategies import at_headline
from moe_beyond.report.tables.results import lookahead_words, scores_words
from moe_beyond.simulator import Result


def keys(
    metrics: Sequence[LookaheadMetrics],
    results: Sequence[Result],
    fixed: float,
    geometry: Geometry,
    devices: Sequence[str],
) -> list[Key]:
    """Choose the figures of the summary.

    Args:
        metrics: A row a lookahead.
        results: Of all replays.
        fixed: Recall of the best fixed choice.
        geometry: The model.
        devices: Names of the devices; the first one's time is shown.
    """
    row, k = metrics[0], metrics[0].k
    plain = {result.strategy: result for result in at_headline([r for r in results if r.device is None])}
    ours, lru, belady = next(iter(plain.values())), plain["lru"], plain["belady"]
    budget = f"{ours.budget_slots:,} slots, {ours.budget_share:.1%} of all experts"
    found = [
        Key(
            f"recall@{k}, lookahead {lookahead_words(row.lookahead, row.causal)}",
            f"{row.recall_at_k:.1%}",
            f"over {row.tokens:,} tokens; the best fixed {k} experts a layer: {fixed:.1%}; "
            f"by chance: {geometry.top_k / geometry.num_experts:.1%}",
        ),
        Key(
            f"hits, {ours.strategy}, lookahead {scores_words(ours)}",
            f"{ours.hit_rate:.1%}",
            f"with {budget}; LRU {lru.hit_rate:.1%}, Belady {belady.hit_rate:.1%}",
        ),
        Key(
            "bytes moved / demanded, same replay",
            f"{ours.bytes_ratio:.2f}",
            f"LRU {lru.bytes_ratio:.2f}, Belady {belady.bytes_ratio:.2f}; 1.00 moves one expert for every access",
        ),
    ]
    for device in devices[:1]:
        timed = [result for result in results if result.device == device]
        speeds = {result.strategy: speed(result) for result in at_headline(timed)}
        resident = next(result for result in timed if result.policy == "all_resident")
        found.append(
            Key(
                f"tokens/s on {device}, same budget",
                speeds[ours.strategy],
                f"LRU {speeds['lru']}, clairvoyant prefetch {speeds[CLAIRVOYANT]}, all resident {speed(resident)}; "
                "MoE layers alone, by the replay's clock",
            )
        )
    error = f"{row.calibration_error:.2%}"
    beside = f"lookahead {row.lookahead}: how far probabilities are off on average; NLL {row.nll:.2f} nats a token "
    return [*found, Key("calibration error", error, f"{beside}and layer")]
