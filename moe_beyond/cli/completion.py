"""``moe-beyond completion``."""

import importlib
from collections.abc import Mapping, Sequence

from jsonargparse import ArgumentParser

from moe_beyond.cache.policies import POLICIES
from moe_beyond.cli.main import VERBS
from moe_beyond.cli.options import Output, parser
from moe_beyond.cli.slips import option_strings
from moe_beyond.errors import unknown
from moe_beyond.evaluation.named_strategies import STRATEGIES
from moe_beyond.geometry import PRESETS
from moe_beyond.pretrained import published_predictors
from moe_beyond.simulator.devices import DEVICES
from moe_beyond.traces.formats import readable_formats, writable_formats

SHELLS = {"bash": "", "zsh": "autoload -U +X bashcompinit && bashcompinit\n"}
"""What each shell needs before the script."""

LIGHTNING = (
    "--help", "--config", "--print_config", "--seed_everything", "--data", "--data.traces", "--data.val_split",
    "--model", "--trainer.max_epochs", "--trainer.precision", "--ckpt_path", "--json", "--quiet",
)  # fmt: skip
"""Of Lightning's verbs, whose options are those of every class in their configuration, the ones that all fits have."""

SCRIPT = """{before}_moe_beyond() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} words=
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
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


def options() -> ArgumentParser:
    """Return the parser of this verb's options."""
    known = parser(
        "completion",
        "Print a script that completes verbs, options and names in a shell; files are completed as ever.",
        'eval "$(moe-beyond completion bash)"',
    )
    known.add_argument("shell", metavar="SHELL", help=" or ".join(SHELLS))
    return known


def run(words: list[str]) -> None:
    """Print the script."""
    args = options().parse_args(words[1:])
    if args.shell not in SHELLS:
        raise unknown("shell", args.shell, SHELLS)
    script = completion_script(args.shell)
    output = Output(args)
    output.show(script.rstrip("\n"))
    output.result({"shell": args.shell, "script": script})


def completion_script(shell: str) -> str:
    """Write the script for a shell, out of the parsers and lists that the verbs themselves use."""
    predictors = published_predictors()
    values = {
        "--policy": list(POLICIES),
        "--strategy": ["all", *STRATEGIES],
        "--device": list(DEVICES),
        "--predictor": predictors,
        "--profile": [name for name in predictors if name.split(".")[0] in ("history", "popularity")],
        "--model": list(PRESETS),
        "--scope": ["global", "per-layer"],
    }
    known = {verb: LIGHTNING if module == "train" else _options(module) for verb, (module, _) in VERBS.items()}
    arguments = {
        "import": list(readable_formats()),
        "export": list(writable_formats()),
        "evaluate": predictors,
        "report": predictors,
        "push": predictors,
        "completion": list(SHELLS),
    }
    return SCRIPT.format(
        before=SHELLS[shell],
        verbs=" ".join(VERBS),
        values=_cases(values, 8),
        options=_cases(known, 12),
        arguments=_cases(arguments, 12),
    )


def _options(module: str) -> list[str]:
    return option_strings(importlib.import_module(f"moe_beyond.cli.{module}").options())


def _cases(words: Mapping[str, Sequence[str]], indent: int) -> str:
    return "\n".join(f'{" " * indent}{name}) words="{" ".join(known)}" ;;' for name, known in words.items())
