"""The completion script in a real bash."""

import shutil
import subprocess

import pytest

from moe_beyond.cli.completion import completion_script
from moe_beyond.cli.lightning_commands import ALL_OPTIONS, command_options
from moe_beyond.cli.main import COMMANDS, main
from moe_beyond.pretrained import list_pretrained


@pytest.fixture(scope="module")
def script() -> str:
    return completion_script("bash")


def offered(script: str, *words: str) -> list[str]:
    """What bash would offer for the last word of a command line."""
    line = " ".join(f"'{word}'" for word in ("moe-beyond", *words))
    asking = f'{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; _moe_beyond; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", asking], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_offers_commands_options_and_names(script: str) -> None:
    assert offered(script, "") == list(COMMANDS)
    assert offered(script, "re") == [command for command in COMMANDS if command.startswith("re")]
    assert offered(script, "replay", "--pre") == ["--prefetch", "--predictor", "--prefill-chunk"]
    assert offered(script, "fit", "--c") == ["--config", "--ckpt_path"]
    assert offered(script, "replay", "--predictor", "naive") == [
        name for name in list_pretrained() if name.startswith("naive")
    ]
    assert offered(script, "evaluate", "token_c") == [n for n in list_pretrained() if n.startswith("token_c")]
    assert offered(script, "plan", "--policy", "bel") == ["belief", "belady", "belady_bypass"]
    assert offered(script, "fit", "-c", "trainer/d") == ["trainer/default"]
    assert offered(script, "replay", "--traces", "") == []  # files, by the shell's default


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_every_option_of_the_short_help_is_an_option_of_lightnings_parser(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, ALL_OPTIONS]) == 0
    shown = capsys.readouterr().out.replace(",", " ").replace("]", " ")
    for option in command_options(command):
        assert f"{option} " in shown or option.startswith("--data."), option  # a class's options need the class
    assert "--trainer.gradient_clip_val" in shown


def test_zsh_has_the_same_after_a_line_of_its_own(script: str) -> None:
    assert completion_script("zsh") == f"autoload -U +X bashcompinit && bashcompinit\n{script}"


def test_a_shell_that_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "powershell"]) == 2
    assert "unknown shell 'powershell'; known: bash, zsh" in capsys.readouterr().err
