"""``moe-beyond completion``."""

import importlib
from collections.abc import Mapping, Sequence

from jsonargparse import ArgumentParser

from moe_beyond.cache.policies import POLICIES
from moe_beyond.cli.builtin_configs import list_configs
from moe_beyond.cli.lightning_commands import command_options
from moe_beyond.cli.main import COMMANDS
from moe_beyond.cli.options import Output, command_parser
from moe_beyond.cli.parser import option_strings
from moe_beyond.errors import unknown
from moe_beyond.evaluation.named_strategies import STRATEGIES
from moe_beyond.evaluation.pin_formats import PIN_FORMATS
from moe_beyond.geometry import PRESETS
from moe_beyond.pretrained import list_pretrained
from moe_beyond.simulator.devices import DEVICES
from moe_beyond.traces.formats import readable_formats, writable_formats

SHELLS = {"bash": "", "zsh": "autoload -U +X bashcompinit && bashcompinit\n"}
"""Shell -> lines before the script."""

SCRIPT = """{preamble}_moe_beyond() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} words=
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    case $before in
{values}
    esac
    if [[ -z $words && $word == -* ]]; then
        case ${{COMP_WORDS[1]}} in
{options}
        esac
    elif [[ -z $words ]]; then
        case ${{COMP_WORDS[1]}} in
{arguments}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _moe_beyond moe-beyond
"""


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "completion",
        "Print a script that completes commands, options and names in a shell. File names are still completed.",
        'eval "$(moe-beyond completion bash)"',
    )
    parser.add_argument("shell", metavar="SHELL", help=f"shell: {' or '.join(SHELLS)}")
    return parser


def main(argv: list[str]) -> None:
    """Print the script.

    Args:
        argv: The command and its options.
    """
    args = build_parser().parse_args(argv[1:])
    if args.shell not in SHELLS:
        raise unknown("shell", args.shell, SHELLS)
    script = completion_script(args.shell)
    output = Output(args)
    output.show(script.rstrip("\n"))
    output.result({"shell": args.shell, "script": script})


def completion_script(shell: str) -> str:
    """Return the script for a shell, from the parsers and registries that the commands use.

    Args:
        shell: A key of `SHELLS`.
    """
    predictors = list_pretrained()
    values = {
        "--policy": list(POLICIES),
        "--strategy": ["all", *STRATEGIES],
        "--device": list(DEVICES),
        "--predictor": predictors,
        "--profile": [name for name in predictors if name.split(".")[0] in ("history", "popularity")],
        "--model": list(PRESETS),
        "--scope": ["global", "per-layer"],
        "--to": list(PIN_FORMATS),
        "-c": list_configs(),
        "--config": list_configs(),
    }
    options = {command: _options(command, module) for command, (module, _) in COMMANDS.items()}
    arguments = {
        "import": list(readable_formats()),
        "export": [*writable_formats(), "pins"],
        "evaluate": predictors,
        "report": predictors,
        "push": predictors,
        "completion": list(SHELLS),
    }
    return SCRIPT.format(
        preamble=SHELLS[shell],
        commands=" ".join(COMMANDS),
        values=_cases(values, 8),
        options=_cases(options, 12),
        arguments=_cases(arguments, 12),
    )


def _options(command: str, module: str) -> list[str]:
    """Return the long options of a command; for Lightning commands, the options that users need most."""
    if module == "lightning_commands":
        return list(command_options(command))
    return option_strings(importlib.import_module(f"moe_beyond.cli.{module}").build_parser())


def _cases(choices: Mapping[str, Sequence[str]], indent: int) -> str:
    """Return the branches of a ``case`` statement that assign the choices of each pattern."""
    return "\n".join(f'{" " * indent}{pattern}) words="{" ".join(values)}" ;;' for pattern, values in choices.items())
