"""Published decode speeds next to the clock's forecasts.

    python tools/compare_published.py [--traces DIR]... [--json FILE]

A forecast is one of three. With a published hit rate, every miss waits for its transfer and nothing overlaps. With
a budget and traces of the model, LRU is replayed; the generated tokens count, or in sets without them, all but the
first ten of a sequence. With all experts resident, only computing counts, and prompts are taken to be short. Devices
without a preset are presets with other bandwidths.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moe_beyond.api import replay
from moe_beyond.files import write_json
from moe_beyond.geometry import PRESETS
from moe_beyond.simulator.computing import resident_seconds
from moe_beyond.simulator.devices import Device, load_device, transfer_seconds
from moe_beyond.traces.reader import TraceSet

RTX5090 = "pcie5-desktop,link_gb_per_s=51,memory_gb_per_s=1792,name=rtx5090"
PHONE = "phone-ufs4,link_gb_per_s=2.58,name=phone"
LAPTOP = "phone-ufs4,link_gb_per_s=3.3,memory_gb_per_s=51.2,name=laptop-nvme"
A5000 = "rtx4090,link_gb_per_s=24,memory_gb_per_s=768,name=a5000"
A6000 = "rtx4090,memory_gb=48,memory_gb_per_s=768,name=a6000"
A100 = "rtx4090,memory_gb=80,memory_gb_per_s=2039,name=a100"
RTX4090 = "rtx4090,link_gb_per_s=23.9,name=rtx4090"
RTX2000 = "rtx4060-laptop,link_gb_per_s=25,memory_gb_per_s=384,name=rtx-pro-2000-laptop"


@dataclass(frozen=True)
class Row:
    """A published run.

    Attributes:
        engine: Name of the engine.
        model: Key of `moe_beyond.geometry.PRESETS`.
        bits: Bits per parameter.
        device: Device, as `load_device` reads it.
        cached: Hit rate in %, a budget for the replay (a text), or None if all experts are resident.
        published: Published tokens per second.
        reason: Probable reason of the difference.
        source: Source of the published speed.
        top_k: Experts per token and layer, if the engine changes it (default: None).
    """

    engine: str
    model: str
    bits: float
    device: str
    cached: float | str | None
    published: float
    reason: str
    source: str
    top_k: int | None = None


QWEN, DEEPSEEK, GPT_OSS, GPT_OSS_LARGE = "qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-20b", "gpt-oss-120b"
IMP, EDGE = "kekzl/imp", "Helldez/BigMoeOnEdge"
PAGEABLE = "time per miss is that of pageable copies, 8 GB/s"
"""By regression of the published token times on misses; the engine measured 9.6 GB/s for them (#1409)."""
SLOW_MEMORY = "the phone computes at about 10 GB/s, not 61"
ROWS = (
    Row(IMP, QWEN, 4.5, RTX5090, None, 311, "fused kernels: 20 us a layer, not 55", "#1365"),
    Row(IMP, QWEN, 4.5, RTX5090, 96.2, 51.86, PAGEABLE, "#1374"),
    Row(IMP, QWEN, 4.5, RTX5090, 89.4, 30.51, PAGEABLE, "#1374"),
    Row(IMP, QWEN, 4.5, RTX5090, 74.1, 20.99, PAGEABLE, "#1374"),
    Row(IMP, QWEN, 4.5, RTX5090, 36.6, 10.51, PAGEABLE, "#1374"),
    Row(IMP, QWEN, 4.5, RTX5090, 0, 6.63, PAGEABLE, "#1365"),
    Row(EDGE, QWEN, 4.87, PHONE, 0, 1.7, SLOW_MEMORY, "its README"),
    Row(EDGE, QWEN, 4.87, PHONE, 53, 2.4, SLOW_MEMORY, "its README"),
    Row(EDGE, QWEN, 4.87, PHONE, 76, 4.0, SLOW_MEMORY, "its README"),
    Row(EDGE, QWEN, 4.87, PHONE, "4000MiB", 5.657, SLOW_MEMORY, "its recording", top_k=6),
    Row(EDGE, GPT_OSS_LARGE, 4.25, PHONE, "3000MiB", 0.503, "6,000 page faults per token", "its recording", top_k=2),
    Row(
        EDGE,
        QWEN,
        4.87,
        LAPTOP,
        83.5,
        4.72,
        "115 ms of computing and 88 ms of reading per token",
        "its README",
    ),
    Row("tinyserve", GPT_OSS, 4.25, RTX2000, 87.8, 10.7, "generate() takes 38 of 90 ms per token", "its README"),
    Row("tinyserve", GPT_OSS, 4.25, RTX2000, 76.4, 5.5, "generate() takes 38 of 90 ms per token", "its README"),
    Row("AdapMoE", DEEPSEEK, 16, A6000, 47.7, 7.59, "overhead of its framework; hit rate: LRU's", "HybriMoE's paper"),
    Row("HybriMoE", DEEPSEEK, 16, A6000, 47.7, 14.49, "the host computes misses, instead of moving them", "its paper"),
    Row("MoE-Infinity", DEEPSEEK, 16, A5000, "19GB", 6.45, "overhead of its framework; budget assumed", "its README"),
    Row("MoE-Infinity", DEEPSEEK, 16, A100, "7GB", 2.56, "overhead of its framework; budget assumed", "SP-MoE's paper"),
    Row(
        "ProMoE's LRU",
        DEEPSEEK,
        16,
        RTX4090,
        "19GB",
        46.2,
        "budget assumed: what fits in 24 GB",
        "ProMoE's paper",
    ),
)
"""Published runs."""


def main() -> None:
    """Parse the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--traces", action="append", default=[], help="trace set of one of the models; repeatable (default: none)"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    print(
        "| engine | model, bits | device | cached | published tok/s | clock tok/s | ratio | probable reason | source |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    figures, sets = [], [TraceSet(folder) for folder in args.traces]
    for row in ROWS:
        device = load_device(row.device)
        speed = forecast(row, device, sets)
        figures.append({**asdict(row), "clock": speed})
        cells = (
            row.engine,
            f"{row.model}, {row.bits:g}" + ("" if row.top_k is None else f", top-{row.top_k}"),
            device.name,
            "all" if row.cached is None else row.cached if isinstance(row.cached, str) else f"{row.cached:g} % hits",
            f"{row.published:g}",
            "-" if speed is None else f"{speed:.3g}",
            "-" if speed is None else f"{speed / row.published:.2f}",
            row.reason,
            row.source,
        )
        print(f"| {' | '.join(cells)} |")
    if args.json:
        write_json(args.json, figures)


def forecast(row: Row, device: Device, sets: Sequence[TraceSet]) -> float | None:
    """Return the clock's tokens per second for a published run; None without the traces that it needs.

    Args:
        row: Run with its published speed.
        device: Device of the run.
        sets: Trace sets of some of the models.
    """
    geometry = PRESETS[row.model].geometry
    geometry = geometry if row.top_k is None else replace(geometry, top_k=row.top_k)
    if isinstance(row.cached, str):
        return next((replayed(row, traces) for traces in sets if traces.geometry.shape() == geometry.shape()), None)
    misses = 0.0 if row.cached is None else geometry.demand_per_token * (1 - row.cached / 100)
    moving = misses * transfer_seconds(device, geometry.params_per_expert * row.bits / 8)
    return 1 / (resident_seconds(device, geometry, row.bits) + moving)


def replayed(row: Row, traces: TraceSet) -> float | None:
    """Return the tokens per second of LRU with a row's budget and device, on traces of its model."""
    generated = [trace.decode_start for trace in traces.traces() if trace.decode_start < len(trace)]
    bits = row.bits if traces.geometry.expert_bytes is None else None  # it has the stored bytes
    report = replay(
        traces, budget=str(row.cached), policy="lru", device=row.device, quantization=bits,
        prefill_chunk=max(generated, default=0), warmup_tokens=max(generated, default=10),
    )  # fmt: skip
    return next(result for result in report.results if result.policy == "lru").tokens_per_second


if __name__ == "__main__":
    main()
