"""Check runs on a GPU: bitwise equality, overhead, and speed at the shape of DeepSeek-V2-Lite.

    python tools/check_gpu.py [--device cuda] [--folder DIR] [--checks exactness overhead speed] [--json FILE]

The tool writes models with random weights into a folder first. The large one takes 32 GB there, in host memory, and on
the GPU.
Every check prints one table; all of them are sized for 10 minutes on an H100. With `--device cpu` the models are tiny.
The exit code is 1 if an output differs.

- `exactness` compares logits and tokens with the unmodified model, for both tiers and all kernels. The smallest budget
  is one event, and the largest has more slots than `grouped_mm` computes in one kernel. The long prompt has more than
  128 rows per expert, and fewer per slot: `grouped_mm` computes these cases with different tiles. A forward that is
  interrupted comes before each comparison.
- `overhead` is the time that slots for all experts add to each layer of a decoded token.
- `speed` decodes with the large model from pinned host memory. A copy between plain tensors is the reference for bytes.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from make_bench_model import write_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DeepseekV2Config

from moe_beyond.cache.counters import Counter
from moe_beyond.collect.devices import one_device
from moe_beyond.collect.load import open_checkpoint
from moe_beyond.files import write_json
from moe_beyond.geometry import load_preset
from moe_beyond.predictors.registry import create
from moe_beyond.runtime import OffloadedRun, load_offloaded
from moe_beyond.runtime.check import compare
from moe_beyond.runtime.experts import IMPLEMENTATIONS
from moe_beyond.runtime.options import TIERS

CONSOLE = Console(width=190)
SHARED = {"n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": None, "max_position_embeddings": 4096}
LARGE = SHARED | {
    "vocab_size": 102_400, "hidden_size": 2048, "intermediate_size": 10_944, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "n_routed_experts": 64, "num_experts_per_tok": 6, "num_attention_heads": 16,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
"""Shape of DeepSeek-V2-Lite."""
SMALL = SHARED | {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256,
    "num_hidden_layers": 10, "n_routed_experts": 128, "num_experts_per_tok": 6, "num_attention_heads": 4,
    "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
}  # fmt: skip
"""Shape with 1,152 experts: a GPU computes fewer than 1,024 groups in one kernel."""
TINY = SMALL | {
    "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 3, "n_routed_experts": 16,
    "num_experts_per_tok": 2,
}  # fmt: skip
"""Shape for the CPU."""


@dataclass(frozen=True)
class Setting:
    """Device, models and lengths of all checks.

    Attributes:
        folder: Folder for the models.
        device: Device, such as ``cuda:0``.
        budgets: Budgets of `speed`.
        small: Shape of the model of `exactness` and `overhead`.
        large: Shape of the model of `speed`.
        short: Tokens of a short prompt.
        long: Tokens of a long prompt.
        tokens: Number of tokens to decode.
        repeats: Number of repeats of `overhead`.
    """

    folder: Path
    device: str
    budgets: list[str]
    small: Mapping[str, Any]
    large: Mapping[str, Any]
    short: int
    long: int
    tokens: int
    repeats: int

    def prompt(self, length: int, vocab: int) -> Tensor:
        """Return random token ids, ``(1, length)`` int64."""
        generator = torch.Generator().manual_seed(length)
        return torch.randint(vocab, (1, length), generator=generator).to(self.device)

    def synchronize(self) -> None:
        """Wait until the device has computed."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)


def main() -> None:
    """Parse the options, run the checks and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="device of the models (default: a GPU if there is one, otherwise the CPU)")
    parser.add_argument("--folder", type=Path, help="folder for the models, with 34 GB (default: a temporary one)")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS), help="checks (default: all)")
    parser.add_argument(
        "--budgets", nargs="+", default=["10%", "20%", "30%", "50%"], help="budgets of speed (default: 10%% to 50%%)"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    device = one_device(args.device)
    scale = (TINY, TINY, 12, 40, 8, 2) if device == "cpu" else (SMALL, LARGE, 40, 3000, 64, 5)
    figures: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="check-gpu-", dir=args.folder) as folder, torch.inference_mode():
        setting = Setting(Path(folder), device, args.budgets, *scale)
        for check in args.checks:
            began = time.perf_counter()
            figures[check] = []
            for row in CHECKS[check](setting):
                print(check, row, file=sys.stderr, flush=True)  # the time on a lent machine can end before the table
                figures[check].append(row)
            show(f"{check}, {time.perf_counter() - began:.0f} s", figures[check])
    if args.json:
        write_json(args.json, figures)
    if any(row.get("output", "identical").startswith("different") for rows in figures.values() for row in rows):
        raise SystemExit(1)


def exactness(setting: Setting) -> Iterator[dict[str, Any]]:
    """Compare runs of the small model with the unmodified one.

    Args:
        setting: Folder, device, shapes and lengths.

    Yields:
        Row of the table.
    """
    model = model_of(setting, "small", setting.small)
    experts, top_k = setting.small["n_routed_experts"], setting.small["num_experts_per_tok"]
    total = experts * (setting.small["num_hidden_layers"] - 1)
    whole = open_checkpoint(str(model)).load(device=setting.device)
    prompts = {length: setting.prompt(length, setting.small["vocab_size"]) for length in (setting.short, setting.long)}
    # `batched_mm` and `eager` are slow for many rows.
    cases = [("grouped_mm", setting.long), *((kernel, setting.short) for kernel in IMPLEMENTATIONS)]
    expected = {case: outputs(whole, prompts[case[1]], case[0], setting.tokens) for case in cases}
    del whole
    predictor = create("history", load_preset(str(model)).geometry, setting.small["vocab_size"])
    runs: list[tuple[str, int, dict[str, Any]]] = [
        (tier, slots, {}) for tier in TIERS for slots in (top_k, total // 5, total)
    ]
    runs += [(tier, total // 5, {"predictor": predictor, "prefetch": f"top{top_k}"}) for tier in TIERS]
    for tier, slots, options in runs:
        with load_offloaded(model, budget=slots, tier=tier, device=setting.device, **options) as run:
            for kernel, length in cases:
                interrupt(run.model, prompts[length])
                before = run.telemetry.transferred
                found = outputs(run.model, prompts[length], kernel, setting.tokens)
                yield {
                    "tier": tier,
                    "slots": slots,
                    "prefetch": options.get("prefetch", "none"),
                    "kernel": kernel,
                    "prompt": length,
                    "transfers": run.telemetry.transferred - before,
                    "output": difference(found, expected[kernel, length]),
                }


def overhead(setting: Setting) -> Iterator[dict[str, Any]]:
    """Decode with the small model in memory and in slots for all experts, in turns.

    Args:
        setting: Folder, device, shapes and lengths.

    Yields:
        Row of the table.
    """
    model = model_of(setting, "small", setting.small)
    layers = setting.small["num_hidden_layers"] - 1
    ids = setting.prompt(setting.short, setting.small["vocab_size"])
    whole = open_checkpoint(str(model)).load(device=setting.device)
    with load_offloaded(model, budget="100%", tier="host", device=setting.device) as run:
        models = {"unmodified": whole, "in slots": run.model}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(setting.repeats + 1):  # the first one fills the slots
            for name, each in models.items():
                times[name].append(token_seconds(setting, each, ids))
    base = times["unmodified"][1:]
    for name, seconds in times.items():
        gap = statistics.median(map(float.__sub__, seconds[1:], base))
        yield {
            "model": name,
            "ms per token": round(1e3 * statistics.median(seconds[1:]), 3),
            "us per MoE layer": round(1e6 * gap / layers, 1),
        }


def speed(setting: Setting) -> Iterator[dict[str, Any]]:
    """Decode with the large model, whole and from pinned host memory.

    Args:
        setting: Folder, device, shapes and budgets.

    Yields:
        Row of the table.
    """
    model = model_of(setting, "large", setting.large)
    ids = setting.prompt(setting.short, setting.large["vocab_size"])
    began = time.perf_counter()
    whole = open_checkpoint(str(model)).load(device=setting.device)
    loaded = time.perf_counter() - began
    expected = outputs(whole, ids, "grouped_mm", setting.tokens)
    ms = 1e3 * token_seconds(setting, whole, ids)
    yield {"budget": "unmodified", "load s": round(loaded, 1), "tokens/s": round(1e3 / ms, 1), "ms p50": round(ms, 2)}
    del whole
    for budget in setting.budgets:
        began = time.perf_counter()
        run = load_offloaded(model, budget=budget, tier="host", device=setting.device)
        loaded = time.perf_counter()
        with run:
            entered = time.perf_counter()
            result = difference(outputs(run.model, ids, "grouped_mm", setting.tokens), expected)
            row = {"budget": budget, "slots": run.pool.slots, "load s": round(loaded - began, 1)}
            yield row | {"pin s": round(entered - loaded, 1), **decoding(setting, run, ids), "output": result}


def decoding(setting: Setting, run: OffloadedRun, ids: Tensor) -> dict[str, Any]:
    """Decode with warm slots, and return figures per token; GB/s are bytes by the time of stalls.

    Args:
        setting: Device and lengths.
        run: Run in its block.
        ids: Prompt, ``(1, T)``.
    """
    prefill, decode = run.telemetry.prefill, run.telemetry.decode
    prefill_s = prefill.seconds
    run.model(ids)
    prefill_s = prefill.seconds - prefill_s
    first, wait_s, cache_s = len(decode.durations), decode.wait_s, decode.cache_s
    transferred, hits = run.telemetry.transferred, counts(run)
    generate(run.model, ids[:, :1], setting.tokens)
    seconds = sorted(decode.durations[first:])
    tokens, stall = len(seconds), decode.wait_s - wait_s
    moved = (run.telemetry.transferred - transferred) * run.pool.stride
    found = counts(run) - hits
    return {
        "prefill/s": round(ids.shape[1] / prefill_s, 1),
        "tokens/s": round(tokens / sum(seconds), 1),
        "ms p50": round(1e3 * seconds[tokens // 2], 2),
        "ms p95": round(1e3 * seconds[int(0.95 * tokens)], 2),
        "stall ms": round(1e3 * stall / tokens, 2),
        "cache ms": round(1e3 * (decode.cache_s - cache_s) / tokens, 2),
        "hit rate": round(float(found[0] / found.sum()), 3),
        "MB/token": round(moved / tokens / 1e6, 1),
        "GB/s": round(moved / stall / 1e9, 2) if stall else None,
        "plain GB/s": plain_copy(setting, run.pool.stride),
        "GB slots": round(run.pool.nbytes / 1e9, 2),
    }


def counts(run: OffloadedRun) -> npt.NDArray[np.int64]:
    """Return the hits, late hits and misses of a run."""
    return run.cache.state.counters.sum(axis=0)[[Counter.HITS, Counter.LATE_HITS, Counter.MISSES]]


def model_of(setting: Setting, name: str, shape: Mapping[str, Any]) -> Path:
    """Write a model with random bfloat16 weights, unless an earlier check has written it.

    Args:
        setting: Folder and device; the device draws the weights.
        name: Name of its folder.
        shape: Fields of its configuration.

    Raises:
        SystemExit: The disk is too small.
    """
    folder = setting.folder / name
    if folder.exists():
        return folder
    folder.mkdir()
    config = DeepseekV2Config(
        architectures=["DeepseekV2ForCausalLM"], dtype="bfloat16", bos_token_id=None, eos_token_id=None, **shape
    )
    experts = config.n_routed_experts * (config.num_hidden_layers - 1)
    size = 7 * experts * config.hidden_size * config.moe_intermediate_size  # 6 bytes are those of experts
    if (free := shutil.disk_usage(folder).free) < size:
        raise SystemExit(f"--folder: lacks {size / 1e9:.1f} GB for a model (got {free / 1e9:.1f} GB); give another")
    began = time.perf_counter()
    write_model(folder, config, torch.Generator(setting.device).manual_seed(0))
    CONSOLE.print(f"{name} model: {experts:,} experts, written in {time.perf_counter() - began:.0f} s")
    return folder


def generate(model: Any, ids: Tensor, tokens: int) -> Any:
    """Generate tokens greedily, with their logits.

    Args:
        model: Causal language model, offloaded or not.
        ids: Prompt, ``(1, T)``.
        tokens: Number of tokens.
    """
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip


def outputs(model: Any, ids: Tensor, kernel: str, tokens: int) -> tuple[list[int], Tensor]:
    """Read a prompt, then generate.

    Args:
        model: Causal language model, offloaded or not.
        ids: Prompt, ``(1, T)``.
        kernel: Name of the experts implementation.
        tokens: Number of tokens to generate.

    Returns:
        Token ids of the prompt and those generated, ``(T + n,)``; the logits of the prompt and of each generated token,
        ``(T + n, V)``.
    """
    model.set_experts_implementation(kernel)
    read = model(ids).logits[0].float().cpu()
    generated = generate(model, ids, tokens)
    return generated.sequences[0].tolist(), torch.cat([read, *(row.cpu() for row in generated.logits)])


def difference(found: tuple[list[int], Tensor], expected: tuple[list[int], Tensor]) -> str:
    """Compare results of `outputs`; return one line."""
    return str(compare([found[0]], [expected[0]], [found[1]], [expected[1]]))


def interrupt(model: nn.Module, ids: Tensor) -> None:
    """Interrupt a forward within the experts of its last layer, as Ctrl-C does.

    Args:
        model: Model of the DeepSeek-V2 architecture.
        ids: Prompt, ``(1, T)``.
    """

    def stop(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    *_, experts = (module for name, module in model.named_modules() if name.endswith(".experts"))
    handle = experts.act_fn.register_forward_pre_hook(stop)
    with suppress(KeyboardInterrupt):
        model(ids)
    handle.remove()


def token_seconds(setting: Setting, model: Any, ids: Tensor) -> float:
    """Return the time of a decoded token in seconds, without its prompt.

    Args:
        setting: Device and lengths.
        model: Causal language model, offloaded or not.
        ids: Prompt, ``(1, T)``.
    """
    times = []
    for tokens in (1, setting.tokens + 1):
        setting.synchronize()
        began = time.perf_counter()
        generate(model, ids, tokens)
        setting.synchronize()
        times.append(time.perf_counter() - began)
    return (times[1] - times[0]) / setting.tokens


def plain_copy(setting: Setting, size: int) -> float | None:
    """Return the speed of copies from pinned memory in GB/s; None on the CPU.

    Args:
        setting: Device of the copies.
        size: Bytes of a copy.
    """
    if setting.device == "cpu":
        return None
    source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device=setting.device)
    began = 0.0
    for number in range(40):
        if number == 8:
            setting.synchronize()
            began = time.perf_counter()
        target.copy_(source, non_blocking=True)
    setting.synchronize()
    return round(32 * size / (time.perf_counter() - began) / 1e9, 2)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table; its columns are the keys of all rows, in their order."""
    columns = list(dict.fromkeys(key for row in reversed(rows) for key in row))
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in ("tier", "kernel", "output") else "right")
    for row in rows:
        table.add_row(*("" if row.get(column) is None else str(row[column]) for column in columns))
    CONSOLE.print(table)


CHECKS: dict[str, Callable[[Setting], Iterator[dict[str, Any]]]] = {
    "exactness": exactness,
    "overhead": overhead,
    "speed": speed,
}
"""Checks by name."""

if __name__ == "__main__":
    main()
