"""Names of pretrained predictors, and their distinction from folders."""

import shutil
from pathlib import Path

import pytest

from moe_beyond import pretrained
from moe_beyond.errors import UserError
from moe_beyond.predictors.io.folder import read_config, read_predictor
from moe_beyond.pretrained import CHECKPOINTS_VARIABLE as VARIABLE
from moe_beyond.pretrained import (
    CONFIG_FILE,
    LARGE,
    WEIGHTS_FILE,
    NotInstalledError,
    find_predictor,
    list_pretrained,
    pretrained_figures,
    shipped_folder,
)


def test_every_pretrained_predictor_loads_and_names_its_training_data() -> None:
    names = list_pretrained()
    assert names
    for name in names:
        config = read_config(find_predictor(name))
        predictor = read_predictor(find_predictor(name))
        assert name.startswith(f"{predictor.architecture}.")
        assert len(config["training"]["fingerprint"]) == 64
        assert f"# {name}" in (shipped_folder(name) / "README.md").read_text()


def test_a_folder_and_a_name_are_distinguished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = list_pretrained()[0]
    assert find_predictor(name) == shipped_folder(name)
    (tmp_path / "mine").mkdir()
    assert find_predictor("mine") == Path("mine")
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="both a folder here and a pretrained predictor"):
        find_predictor(name)
    assert find_predictor(f"./{name}") == Path(name)


def test_a_name_without_a_predictor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is a file, not a predictor folder"):
        find_predictor("file")
    with pytest.raises(UserError, match="folder not found"):
        find_predictor("some/where")
    with pytest.raises(UserError, match="neither a folder nor a pretrained one"):
        find_predictor("cross_layer.deepsek")


def test_an_installed_package_finds_them_inside_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "moe_beyond"
    (package / "checkpoints" / "a.b").mkdir(parents=True)
    (package / "checkpoints" / "a.b" / "config.json").write_text("{}")
    monkeypatch.setattr(pretrained, "__file__", str(package / "pretrained.py"))
    assert list_pretrained() == ["a.b"]


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed package, with a large predictor's configuration but not its weights."""
    package = tmp_path / "site" / "moe_beyond"
    name = next(iter(LARGE))
    shutil.copytree(
        shipped_folder(name), package / "checkpoints" / name, ignore=shutil.ignore_patterns("*.safetensors")
    )
    monkeypatch.setattr(pretrained, "__file__", str(package / "pretrained.py"))
    return package


def test_the_sizes_of_large_predictors_are_right() -> None:
    assert {name: (shipped_folder(name) / WEIGHTS_FILE).stat().st_size for name in LARGE} == LARGE


def test_weights_that_are_not_installed_are_found_by_the_environment(wheel: Path, tmp_path, monkeypatch) -> None:
    (name,) = list_pretrained()
    with pytest.raises(NotInstalledError, match=rf"^{name}: its weights \(24 MB\) are only in .*; set {VARIABLE} to"):
        find_predictor(name)
    (row,) = pretrained_figures()
    assert (row["installed"], row["bytes"] > LARGE[name], len(row["figures"]) > 0) == (False, True, True)
    clone = tmp_path / "clone" / name
    clone.mkdir(parents=True)
    (clone / CONFIG_FILE).write_bytes((shipped_folder(name) / CONFIG_FILE).read_bytes())
    (clone / WEIGHTS_FILE).write_bytes(b"weights")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "clone"))
    assert find_predictor(name) == clone
    assert pretrained_figures()[0]["installed"]
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=rf"^{VARIABLE}: folder not found \(got .*nowhere\); name checkpoints/"):
        list_pretrained()
