"""``moe-beyond devices``."""

import math

from moe_beyond.cli.options import add_json, console_for, parser, write_result
from moe_beyond.errors import UserError
from moe_beyond.geometry import load_preset
from moe_beyond.replay.devices import DEVICES, load_device
from moe_beyond.report.devices import device_rows, devices_tables


def run(words: list[str]) -> None:
    """Parse the options, list the devices."""
    options = parser(
        "devices",
        "List the device presets: links, memories, where the numbers come from, and what they mean for a model.",
        "moe-beyond devices --model qwen3-30b-a3b --quantization 4.5",
    )
    options.add_argument(
        "--device",
        action="append",
        metavar="D",
        help="a preset or a .json file of a device's fields, then ,FIELD=VALUE ...; repeat for more (all presets)",
    )
    options.add_argument(
        "--model",
        default="deepseek-v2-lite",
        metavar="M",
        help="model preset, its config.json, or a geometry (default: deepseek-v2-lite)",
    )
    options.add_argument("--quantization", type=float, default=16.0, metavar="BITS", help="bits per parameter (16)")
    add_json(options)
    args = options.parse_args(words[1:])
    bits = args.quantization
    if not (math.isfinite(bits) and bits > 0):
        raise UserError(f"--quantization {bits:g}: bits per parameter must be more than 0")
    geometry = load_preset(args.model).geometry
    devices = [load_device(text) for text in args.device or DEVICES]
    rows = device_rows(devices, geometry, bits)
    if args.json != "-":
        console = console_for(args.json)
        for table in devices_tables(rows, geometry, bits):
            console.print(table)
    write_result({"model": geometry.model, "quantization_bits": bits, "devices": rows}, args.json)
