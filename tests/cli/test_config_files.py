"""Configuration files: their valid contents, and that errors name the file."""

from pathlib import Path

import pytest
import yaml
from _helpers.common import failure

from moe_beyond.cli.config_files import read_yaml


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (None, "c.yaml: not found; name a file or a built-in configuration (see fit --help)"),
        ("trainer:\n  max_epochs: [1\n", "c.yaml, line 3: is not YAML (did not find expected ',' or ']')"),
        ("- 1\n- 2\n", "c.yaml: is not a mapping of options to values"),
        ("", "c.yaml: is not a mapping of options to values"),
        ("trainer: {max_epoch: 1}", "c.yaml: unknown option 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?"),
        ("modle: {class_path: CrossLayerTask}", "c.yaml: unknown option 'modle'; did you mean 'model'?"),
        ("trainer: {max_epochs: x}", "c.yaml: trainer.max_epochs: expects a whole number or null (got 'x')"),
        (
            "model: {class_path: CrossLayrTask}",
            "c.yaml: model: unknown class 'CrossLayrTask'; did you mean 'CrossLayerTask'?",
        ),
        (
            "model: {class_path: CrossLayerTask, init_args: {widht: 3}}",
            "c.yaml: model: CrossLayerTask has no argument 'widht'; did you mean 'width'?",
        ),
        (
            "model: {class_path: no.such.Task}",
            "c.yaml: class_path no.such.Task: is not a class that a configuration may name; if you trust its author, "
            "add --trust-config",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, text: str | None, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("c.yaml").write_text(text)
    assert failure(capsys, tmp_path, ["fit", "-c", "c.yaml"]) == line


def test_yaml_is_read_as_lightning_reads_it_with_aliases() -> None:
    few = "shared: &s {lr: 1e-3}\nmodel: {class_path: CrossLayerTask, init_args: *s}\n"
    assert read_yaml(few)["model"]["init_args"] == {"lr": 0.001}
    assert yaml.safe_load(few)["model"]["init_args"] == {"lr": "1e-3"}  # why it is not plain YAML that reads it
