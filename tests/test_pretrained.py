"""Names of published predictors, and how they are told from folders."""

from pathlib import Path

import pytest

from moe_beyond import pretrained as published
from moe_beyond.errors import UserError
from moe_beyond.predictors.io.folder import load_predictor, read_config
from moe_beyond.pretrained import find_predictor, list_pretrained, shipped_folder


def test_every_published_predictor_loads_and_says_what_it_was_fitted_on() -> None:
    names = list_pretrained()
    assert names
    for name in names:
        config = read_config(find_predictor(name))
        predictor = load_predictor(find_predictor(name))
        assert name.startswith(f"{predictor.architecture}.")
        assert len(config["training"]["fingerprint"]) == 64
        assert f"# {name}" in (shipped_folder(name) / "README.md").read_text()


def test_a_folder_and_a_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = list_pretrained()[0]
    assert find_predictor(name) == shipped_folder(name)
    (tmp_path / "mine").mkdir()
    assert find_predictor("mine") == Path("mine")
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="both a folder here and a published name"):
        find_predictor(name)
    assert find_predictor(f"./{name}") == Path(name)


def test_what_is_neither_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is a file, not a predictor folder"):
        find_predictor("file")
    with pytest.raises(UserError, match="there is no such folder"):
        find_predictor("some/where")
    with pytest.raises(UserError, match="neither a folder nor a published name"):
        find_predictor("cross_layer.deepsek")


def test_an_installed_package_finds_them_inside_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "moe_beyond"
    (package / "checkpoints" / "a.b").mkdir(parents=True)
    (package / "checkpoints" / "a.b" / "config.json").write_text("{}")
    monkeypatch.setattr(published, "__file__", str(package / "pretrained.py"))
    assert list_pretrained() == ["a.b"]
