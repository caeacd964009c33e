"""``moe-beyond devices``."""

import math

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, command_parser
from moe_beyond.errors import UserError
from moe_beyond.geometry import load_preset
from moe_beyond.report.tables.devices import device_rows, devices_tables
from moe_beyond.simulator.devices import DEVICES, load_device


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "devices",
        "List the device presets: bandwidths, memory sizes, sources of the numbers, and the times that "
        "follow for a model.",
        "moe-beyond devices --model qwen3-30b-a3b --quantization 4.5",
    )
    parser.add_argument(
        "--device",
        action="append",
        metavar="DEVICE",
        help="preset or JSON file, with optional changes DEVICE,FIELD=VALUE,...; repeatable (default: all presets)",
    )
    parser.add_argument(
        "--model",
        default="deepseek-v2-lite",
        metavar="MODEL",
        help="model preset, folder with a config.json, config.json, or geometry file (default: deepseek-v2-lite)",
    )
    parser.add_argument(
        "--quantization", type=float, default=16.0, metavar="BITS", help="bits per parameter (default: 16)"
    )
    return parser


def main(argv: list[str]) -> None:
    """List the devices.

    Args:
        argv: The command and its options.
    """
    args = build_parser().parse_args(argv[1:])
    bits = args.quantization
    if not (math.isfinite(bits) and bits > 0):
        raise UserError(f"--quantization {bits:g}: bits per parameter must be more than 0")
    geometry = load_preset(args.model).geometry
    devices = [load_device(text) for text in args.device or DEVICES]
    rows = device_rows(devices, geometry, bits)
    output = Output(args)
    output.show(*devices_tables(rows, geometry, bits))
    output.result({"model": geometry.model, "quantization_bits": bits, "devices": rows})
