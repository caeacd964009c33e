"""Names of built-in configurations, and their distinction from files."""

from pathlib import Path

import pytest
from _helpers.common import error_line
from _helpers.fitting import CONFIGS

from moe_beyond.cli.builtin_configs import find_config, list_configs
from moe_beyond.errors import UserError


def test_every_configuration_has_a_name_except_sweeps() -> None:
    files = {path for path in CONFIGS.glob("*/*.yaml") if path.parent.name != "sweeps"}
    assert {find_config(name) for name in list_configs()} == {path.resolve() for path in files}


def test_a_file_and_a_name_are_distinguished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("trainer/default") == (CONFIGS / "trainer/default.yaml").resolve()
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer/default.yaml").write_text("")
    assert find_config("trainer/default.yaml") == Path("trainer/default.yaml")
    assert find_config("trainer/default") == (CONFIGS / "trainer/default.yaml").resolve()
    (tmp_path / "trainer/default").write_text("")
    with pytest.raises(UserError, match=r"both a file here and a built-in configuration; write \./trainer/default"):
        find_config("trainer/default")
    assert find_config("./trainer/default") == Path("trainer/default")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trainer/defalt", "trainer/defalt: not found; did you mean trainer/default?"),
        ("configs/model/cross_layr.yaml", "configs/model/cross_layr.yaml: not found; did you mean model/cross_layer?"),
        ("nothing-like-it", "nothing-like-it: not found; name a file or a built-in configuration (see fit --help)"),
        ("folder", "folder: is a folder; name a file"),
        (" ", "-c: the name of the file is empty; name a configuration file in YAML"),
    ],
)
def test_a_wrong_name_is_one_line(name: str, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert error_line(capsys, ["fit", "-c", name]) == message
