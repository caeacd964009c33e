"""``moe-beyond fit``, ``validate``, ``test`` and ``predict``: their short help, without importing Lightning."""

import textwrap
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points

from moe_beyond.cli.builtin_configs import list_configs
from moe_beyond.cli.options import example_text
from moe_beyond.predictors.registry import CLASSES

DESCRIPTIONS = {
    "fit": "Fit a predictor to a trace set, from configuration files and options.",
    "validate": "Validate a checkpoint on the validation split of a trace set.",
    "test": "Test a checkpoint on --data.test_traces, or on the validation split without it.",
    "predict": "Write a checkpoint's scores for --data.test_traces, or for the validation split without it.",
}
EXAMPLES = {
    "fit": "moe-beyond fit -c trainer/default -c model/cross_layer -c data/traces --data.traces traces/puffin",
    "validate": "moe-beyond validate -c runs/predictor/version_0/config.yaml "
    "--ckpt_path runs/predictor/version_0/checkpoints/last.ckpt",
    "test": "moe-beyond test -c runs/predictor/version_0/config.yaml "
    "--ckpt_path runs/predictor/version_0/checkpoints/last.ckpt --data.test_traces traces/webglm",
    "predict": "moe-beyond predict -c runs/predictor/version_0/config.yaml "
    "--ckpt_path runs/predictor/version_0/checkpoints/last.ckpt",
}
OPTIONS = {
    "--help": ("", "print this help; --help=all also lists every trainer option"),
    "--config": ("FILE", "configuration file in YAML, or the name of a built-in one (below); repeat for more"),
    "--print_config": ("", "print the resulting configuration and exit"),
    "--seed_everything": ("SEED", "random seed (default: 0)"),
    "--data": ("CLASS", "data module, such as TraceDataModule; --data.help CLASS lists its arguments"),
    "--data.traces": ("DIR", "trace set: a folder, hf:ORG/REPO, or a URL that fsspec reads"),
    "--data.val_split": ("SPLIT", "validation split of the trace set (default: validation)"),
    "--data.test_traces": ("DIR", "trace set for test and predict (default: the validation split)"),
    "--model": ("CLASS", "task, such as CrossLayerTask; --model.help CLASS lists its arguments"),
    "--trainer.max_epochs": ("N", "number of epochs (default: 1000; trainer/default sets 8)"),
    "--trainer.precision": ("NAME", "32-true, 16-mixed or bf16-mixed (default: 32-true)"),
    "--ckpt_path": ("FILE", "checkpoint to load"),
    "--resume": ("RUN", "run to resume, as a folder or one of its checkpoints"),
    "--trust-config": ("", "let the configuration import and run any code"),
    "--json": ("FILE", "file for the result as JSON; - prints only the JSON (default: no JSON)"),
    "--quiet": ("", "print only errors"),
}
"""Options that users need most -> metavar and help. The remaining ones depend on the classes in a configuration."""
COMMANDS_OF = {
    "--data.test_traces": ("test", "predict"),
    "--trainer.max_epochs": ("fit",),
    "--resume": ("fit",),
}
"""Option -> the commands that it serves, for options of `OPTIONS` that do not serve all."""
ALL_OPTIONS = "--help=all"


def command_options(command: str) -> dict[str, tuple[str, str]]:
    """Return the options of a command that users need most, as `OPTIONS`.

    Args:
        command: One of ``fit``, ``validate``, ``test`` and ``predict``.
    """
    return {option: entry for option, entry in OPTIONS.items() if command in COMMANDS_OF.get(option, (command,))}


def short_help(command: str) -> str:
    """Return the help of a command with the options that users need most, its classes and the built-in configurations.

    Args:
        command: One of ``fit``, ``validate``, ``test`` and ``predict``.
    """
    lines = [f"usage: moe-beyond {command} [-c FILE ...] [OPTIONS]", "", DESCRIPTIONS[command], "", "options:"]
    for option, (metavar, text) in command_options(command).items():
        names = "-c, --config" if option == "--config" else option
        lines.append(f"  {f'{names} {metavar}'.rstrip():<26} {text}")
    tasks = [f"{name}Task" for name in CLASSES.values()]
    tasks += [entry.attr for entry in entry_points(group="moe_beyond.tasks")]
    lines += ["", "tasks:", *_wrapped(tasks), "", "built-in configurations:", *_wrapped(list_configs())]
    lines += ["", example_text(EXAMPLES[command])]
    return "\n".join(lines)


def _wrapped(names: Iterable[str]) -> list[str]:
    return textwrap.wrap(", ".join(names), 112, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def main(argv: Sequence[str]) -> None:
    """Print the short help, or run a Lightning command.

    Args:
        argv: The command and its options.
    """
    if "-h" in argv or "--help" in argv:
        print(short_help(argv[0]))
        return
    from moe_beyond.cli.train import main as train

    train(["--help" if argument == ALL_OPTIONS else argument for argument in argv])
