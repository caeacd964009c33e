"""``moe-beyond probe``."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from moe_beyond.cli.options import Output, check_file, command_parser, progress_bar
from moe_beyond.errors import UserError
from moe_beyond.files import write_json
from moe_beyond.geometry import Preset, load_preset

if TYPE_CHECKING:
    from rich.table import Table

    from moe_beyond.runtime.probe import Probe

BITS = 16


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "probe",
        "Measure this machine before any run: the interconnect and the disk at the size of an expert, the memory, and "
        "computing at the sizes of a model (random weights, 16 bits). Figures are medians of 7 repeats. The result is "
        "a device file for `replay --device FILE.json`.",
        "moe-beyond probe --model deepseek-v2-lite --out machine.json",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="model preset, folder with a config.json, config.json, or geometry file (default: deepseek-v2-lite)",
    )
    parser.add_argument(
        "--quantization",
        type=float,
        metavar="BITS",
        help="bits per parameter of --model; with others than 16, computing is not measured (default: 16)",
    )
    parser.add_argument(
        "--expert-bytes", type=int, metavar="N", help="size of an expert in bytes, without a model and its computing"
    )
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="device that computes: cpu, cuda or cuda:1 (default: a GPU if there is one, otherwise cpu)",
    )
    parser.add_argument(
        "--folder",
        metavar="DIR",
        help="folder on the disk to measure; without large safetensors files, a temporary file of 0.5 GB is written "
        "there (default: the folder of --model, or that of temporary files)",
    )
    parser.add_argument("--out", metavar="FILE.json", help="device file to write (default: none)")
    return parser


def main(argv: list[str]) -> None:
    """Measure this machine.

    Args:
        argv: The command and its options.
    """
    args = build_parser().parse_args(argv[1:])
    if args.out is not None and not args.out.endswith(".json"):
        raise UserError(f"--out {args.out}: a device file ends in .json; rename it")
    check_file("--out", args.out)
    size, preset = _sizes(args)
    output = Output(args)
    from moe_beyond.collect.devices import one_device
    from moe_beyond.runtime.probe import probe

    folder = args.folder or (args.model if args.model and Path(args.model).is_dir() else None)
    with progress_bar("measuring", quiet=args.quiet) as bar:
        found = probe(one_device(args.device), size, preset, Path(folder) if folder else None, bar)
    device = found.device(Path(args.out).stem if args.out else "this machine")
    output.show(_table(found))
    if args.out:
        write_json(args.out, device.to_json())
        output.show(f"--device {args.out} uses these figures")
    output.result(device.to_json())


def _sizes(args: Namespace) -> tuple[int, Preset | None]:
    """Return the bytes of an expert, and the model if its computing can be measured."""
    if args.expert_bytes is not None:
        if args.model is not None or args.quantization is not None:
            raise UserError("--expert-bytes: contradicts --model and --quantization; give one of them")
        if args.expert_bytes < 1:
            raise UserError(f"--expert-bytes {args.expert_bytes}: must be at least 1")
        return args.expert_bytes, None
    bits = BITS if args.quantization is None else args.quantization
    if not (math.isfinite(bits) and bits > 0):
        raise UserError(f"--quantization {bits:g}: bits per parameter must be more than 0")
    preset = load_preset(args.model or "deepseek-v2-lite")
    size = max(1, int(preset.geometry.params_per_expert * bits / 8))
    return size, preset if bits == BITS and preset.hidden_size else None


def _table(found: "Probe") -> "Table":
    """Return the table of medians and ranges."""
    from rich.table import Table

    table = Table(title=f"{found.processor}, experts of {found.expert_bytes / 1e6:,.3g} MB")
    table.add_column("measured")
    for heading in ("median, us", "range, us", "GB/s"):
        table.add_column(heading, justify="right")
    for row in found.measurements():
        low, high = 1e6 * min(row.seconds), 1e6 * max(row.seconds)
        speed = "-" if row.gb_per_s is None else f"{row.gb_per_s:,.2f}"
        table.add_row(row.name, f"{1e6 * row.median:,.1f}", f"{low:,.1f} to {high:,.1f}", speed)
    return table
