"""Sweep files are what wandb reads, and start what this package can run."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from _helpers.common import tiny_traces
from _helpers.fitting import CONFIGS

from moe_beyond.cli.main import main

SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))


def bounds(parameter: dict[str, Any]) -> list[Any]:
    """The ends of the range of a parameter."""
    return parameter.get("values") or [parameter["min"], parameter["max"]]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_starts_fits_that_know_its_parameters(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wandb.apis.public.sweeps import _validate_config_and_fill_distribution
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

    loaded = load_sweep_config(str(path))
    assert loaded is not None
    sweep = _validate_config_and_fill_distribution(loaded)
    assert sweep["metric"] == {"name": "val/recall_at_k", "goal": "maximize"}
    assert sweep["early_terminate"]["type"] == "hyperband"
    monkeypatch.chdir(CONFIGS.parent)
    monkeypatch.setenv("TRACES", tiny_traces(tmp_path / "traces").folder)
    for end in (0, -1):
        chosen = {name: bounds(parameter)[end] for name, parameter in sweep["parameters"].items()}
        words = agent_command(
            create_sweep_command(list(sweep["command"])),
            sweep["program"],
            create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})["args"],
        )
        assert words[:3] == ["/usr/bin/env", "moe-beyond", "fit"]
        assert main([*words[2:], "--print_config"]) == 0
        config = yaml.safe_load(capsys.readouterr().out)
        for name, value in chosen.items():
            group, *options = name.split(".")
            parsed = config[group]["init_args"]
            for option in options:
                parsed = parsed[option]
            assert parsed == value
        assert config["data"]["init_args"]["traces"] == str(tmp_path / "traces")
        assert main([*words[2:], "--trainer.fast_dev_run=true", f"--trainer.default_root_dir={tmp_path}"]) == 0
        capsys.readouterr()


def agent_command(command: list[str], program: str, arguments: list[str]) -> list[str]:
    """Fill in what `wandb agent` fills in."""
    known = {"${env}": ["/usr/bin/env"], "${program}": [program], "${args}": arguments}
    return [word for part in command for word in known.get(part, [part])]
