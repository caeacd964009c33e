"""``moe-beyond validate``: a recording next to its replay, or a checkpoint on its validation split."""

from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser

from moe_beyond.cache.policies import POLICIES
from moe_beyond.cli import lightning_commands
from moe_beyond.cli.options import Output, check_json, command_parser
from moe_beyond.cli.replay_options import PREDICTOR_HELP, choices
from moe_beyond.errors import UserError
from moe_beyond.files import write_json

CHECKPOINT_OPTIONS = ("-c", "--config", "--print_config", "--seed_everything", "--data", "--model", "--trainer",
                      "--ckpt_path", lightning_commands.ALL_OPTIONS)  # fmt: skip
"""Options of Lightning; with one of them the command validates a checkpoint."""


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "validate",
        "Compare a recording with its replay: hits and bytes, then time per token and tokens/s with the parts of the "
        "error. A device is fitted to the first half of the generated tokens and judged on the second half. With "
        "options of fit, such as --ckpt_path, the command validates a checkpoint instead; moe-beyond test --help lists "
        "these options.",
        "moe-beyond validate recorded --fit-device my-box.json",
    )
    parser.add_argument(
        "recording",
        metavar="RECORDING",
        help="folder of moe-beyond run --trace, or of moe-beyond import route-trace with --metrics",
    )
    parser.add_argument(
        "--policy", metavar="POLICY", help=f"policy of another engine: {choices(POLICIES)} (default: lru)"
    )
    parser.add_argument(
        "--budget",
        metavar="BUDGET",
        help="budget of another engine: 10%%, 166 (slots), 2.9GB (default: the recorded one)",
    )
    parser.add_argument("--predictor", metavar="PREDICTOR", help=f"{PREDICTOR_HELP} (default: that of the run)")
    parser.add_argument("--profile", metavar="PREDICTOR", help="usage profile (default: that of the run)")
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="device to judge: a preset or JSON file, with optional changes DEVICE,FIELD=VALUE,... (default: a fit)",
    )
    parser.add_argument(
        "--fit-device", metavar="FILE", help="JSON file for the fitted device, which --device reads (default: none)"
    )
    return parser


def main(argv: list[str]) -> None:
    """Compare a recording with its replay, or validate a checkpoint."""
    if any(word.partition("=")[0].split(".")[0] in CHECKPOINT_OPTIONS or word in CHECKPOINT_OPTIONS for word in argv):
        lightning_commands.main(argv)
        return
    args = build_parser().parse_args(argv[1:])
    output = Output(args)
    if args.fit_device is not None:
        check_json(args.fit_device)
        if args.device is not None:
            raise UserError("--fit-device: --device judges a given device, and fits none; leave one of them out")
    # Imported here, so that help and completion do not wait for it.
    from moe_beyond.simulator.devices import load_device
    from moe_beyond.validation.tables import validation_lines, validation_tables
    from moe_beyond.validation.validate import ValidationOptions, validate

    device = None if args.device is None else load_device(args.device)
    named: dict[str, Any] = {field.name: args[field.name] for field in fields(ValidationOptions)}
    validation = validate(args.recording, ValidationOptions(**{**named, "device": device}))
    output.show(*validation_tables(validation), *validation_lines(validation))
    if args.fit_device is not None:
        write_json(args.fit_device, validation.device.to_json())
        output.show(f"device: {args.fit_device}")
    output.result(validation.to_json())
