"""``moe-beyond devices``."""

import math

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, parser
from moe_beyond.errors import UserError
from moe_beyond.geometry import load_preset
from moe_beyond.report.tables.devices import device_rows, devices_tables
from moe_beyond.simulator.devices import DEVICES, load_device


def options() -> ArgumentParser:
    """Return the parser of this verb's options."""
    known = parser(
        "devices",
        "List the device presets: links, memories, where the numbers come from, and what they mean for a model.",
        "moe-beyond devices --model qwen3-30b-a3b --quantization 4.5",
    )
    known.add_argument(
        "--device",
        action="append",
        metavar="D",
        help="a preset or a .json file of a device's fields, then ,FIELD=VALUE ...; repeat for more (all presets)",
    )
    known.add_argument(
        "--model",
        default="deepseek-v2-lite",
        metavar="M",
        help="model preset, a folder with a config.json, that file, or a geometry file; default: deepseek-v2-lite",
    )
    known.add_argument("--quantization", type=float, default=16.0, metavar="BITS", help="bits per parameter (16)")
    return known


def run(words: list[str]) -> None:
    """List the devices."""
    args = options().parse_args(words[1:])
    bits = args.quantization
    if not (math.isfinite(bits) and bits > 0):
        raise UserError(f"--quantization {bits:g}: bits per parameter must be more than 0")
    geometry = load_preset(args.model).geometry
    devices = [load_device(text) for text in args.device or DEVICES]
    rows = device_rows(devices, geometry, bits)
    output = Output(args)
    output.show(*devices_tables(rows, geometry, bits))
    output.result({"model": geometry.model, "quantization_bits": bits, "devices": rows})
