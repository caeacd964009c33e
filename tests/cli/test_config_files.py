"""Configuration files: their valid contents, and that errors name the file."""

from pathlib import Path

import pytest
import yaml
from _helpers.common import failure

from moe_beyond.cli.config_files import MAX_VALUES, read_yaml
from moe_beyond.errors import UserError


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
            "c.yaml: class_path no.such.Task: cannot be imported (No module named 'no')",
        ),
        ("a: &a [*a]", f"c.yaml: aliases stand for more than {MAX_VALUES:,} values; write fewer"),
        ("[" * 100_000, "c.yaml: nests values more than 100 deep; flatten them"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, text: str | None, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("c.yaml").write_text(text)
    assert failure(capsys, tmp_path, ["fit", "-c", "c.yaml"]) == line


LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"
RUNS = "{class_path: subprocess.getoutput, init_args: {cmd: 'touch PWNED'}}"


@pytest.mark.parametrize(
    "text",
    [
        f"trainer: {{callbacks: {{class_path: {LAMBDA}, init_args: {{setup: {RUNS}}}}}}}",
        f"trainer: {{callbacks: [{{class_path: LambdaCallback, init_args: {{on_fit_start: {RUNS}}}}}]}}",
        f"trainer: {{callbacks: [{{class_path: WeightAveraging, init_args: {{avg_fn: {RUNS}}}}}]}}",
        "trainer: {logger: {class_path: os.system, init_args: {command: 'touch PWNED'}}}",
        "model: {class_path: subprocess.Popen, init_args: {args: 'touch PWNED', shell: true}}",
    ],
)
@pytest.mark.parametrize("verb", ["fit", "test"])
def test_a_file_runs_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, text: str, verb: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("theirs.yaml").write_text(text)
    said = failure(capsys, tmp_path, [verb, "-c", "theirs.yaml"])
    assert said.startswith("theirs.yaml: class_path ")
    assert said.endswith(": is not a class that a configuration may name")


def test_aliases_of_aliases_are_counted_before_they_are_expanded() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join(f'*a{n - 1}' for _ in range(10))}]" for n in range(1, 9)]  # 10^9 values
    with pytest.raises(UserError, match="aliases stand for more than"):
        read_yaml("\n".join(lines))
    few = "shared: &s {lr: 1e-3}\nmodel: {class_path: CrossLayerTask, init_args: *s}\n"
    assert read_yaml(few)["model"]["init_args"] == {"lr": 0.001}
    assert yaml.safe_load(few)["model"]["init_args"] == {"lr": "1e-3"}  # why it is not plain YAML that reads it
