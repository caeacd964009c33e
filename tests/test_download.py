"""Names of the Hub: files that are downloaded, files that never are, and errors."""

import os
from pathlib import Path

import pytest
from _helpers.common import error_line, tiny_traces
from _helpers.fitting import CONFIGS
from _helpers.hub_stand_in import Hub, Repository
from _helpers.publishing import edit_config, predictor_folder
from huggingface_hub import constants

from moe_beyond.callbacks.export import _calibrated_predictor
from moe_beyond.cli.main import main
from moe_beyond.errors import UserError
from moe_beyond.predictors import from_pretrained
from moe_beyond.predictors.io.folder import read_predictor
from moe_beyond.pretrained import find_predictor, find_pretrained, list_pretrained


def put(hub: Hub, folder: Path, name: str = "org/tiny", kind: str = "models", **more: bytes) -> str:
    """Put a folder's files and more into a repository; return the commit."""
    repository = hub.repositories.setdefault((kind, name), Repository())
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return repository.commit("main", files | {name.replace("__", "."): content for name, content in more.items()})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return predictor_folder(tmp_path / "predictor")


def test_only_files_of_a_predictor_are_downloaded(hub: Hub, folder: Path):
    commit = put(hub, folder, pytorch_model__bin=b"a pickle", evil__py=b"import os", weights__pkl=b"a pickle")
    found = find_predictor("hf:org/tiny")
    assert found.name == commit
    assert sorted(path.name for path in found.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert not [asked for asked in hub.asked if asked.endswith((".bin", ".py", ".pkl"))]


@pytest.mark.parametrize(
    "architecture", ["os.system", "moe_beyond.predictors.architectures.cross_layer.CrossLayer", ["cross_layer"]]
)
def test_an_architecture_that_is_not_registered_is_refused(hub: Hub, folder: Path, architecture: object):
    edit_config(folder, architecture=architecture)
    put(hub, folder)
    with pytest.raises(UserError, match=r"config\.json: .*(unknown predictor architecture|architecture must be text)"):
        from_pretrained("org/tiny")


def test_weights_that_are_not_those_of_the_configuration_are_refused(hub: Hub, folder: Path):
    (folder / "model.safetensors").write_bytes(b"others")
    put(hub, folder)
    with pytest.raises(UserError, match=r"model\.safetensors: is damaged"):
        from_pretrained("org/tiny")


def test_what_was_downloaded_serves_without_a_network(hub: Hub, folder: Path, monkeypatch):
    put(hub, folder)
    found = find_predictor("hf:org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_predictor("hf:org/tiny") == found
    with pytest.raises(UserError, match=r"^hf:org/tiny@v2: is not in the local cache, and HF_HUB_OFFLINE"):
        find_predictor("hf:org/tiny@v2")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "hf:org/none",
            "hf:org/none@main: there is no such repository of this kind, or it is private; in that case log",
        ),
        ("hf:org/tiny@v9", "hf:org/tiny@v9: there is no such revision; name a branch, a tag or a commit"),
        ("hf:org/empty", "hf:org/empty@main: has no config.json; is it a repository of this package?"),
        ("hf:tiny", "'hf:tiny': write hf:ORG/REPO or hf:ORG/REPO@REVISION"),
        ("hf:org/tiny@", "'hf:org/tiny@': write hf:ORG/REPO or hf:ORG/REPO@REVISION"),
        ("hf:../tiny", "'hf:../tiny': write hf:ORG/REPO or hf:ORG/REPO@REVISION"),
        ("org/tiny", "org/tiny: folder not found; if it is on the Hub, write hf:org/tiny"),
    ],
)
def test_what_is_not_there_is_one_line(hub: Hub, folder: Path, tmp_path: Path, capsys, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    put(hub, folder)
    hub.repositories["models", "org/empty"] = Repository()
    assert error_line(capsys, ["evaluate", name, "--traces", "traces"]).startswith(said)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "the Hub does not accept the token"),
        (403, "the token does not allow it"),
        (429, "the Hub limits the rate of requests"),
        (503, "the Hub fails (status 503)"),
        (None, "the Hub is unreachable"),
    ],
)
def test_a_hub_that_fails_is_one_line(hub: Hub, folder: Path, status: int | None, said: str, capsys):
    put(hub, folder)
    hub.breaks("GET", "/api/models/", status)
    line = error_line(capsys, ["evaluate", "hf:org/tiny", "--traces", "traces"])
    assert line.startswith(f"hf:org/tiny@main: {said}")


def test_a_file_that_breaks_off_is_not_taken_for_whole(hub: Hub, folder: Path, capsys):
    put(hub, folder)
    hub.breaks("GET", "/resolve/*/model.safetensors", 403)
    assert error_line(capsys, ["evaluate", "hf:org/tiny", "--traces", "t"]).startswith("hf:org/tiny@main: the token")
    hub.broken.clear()
    assert read_predictor(find_predictor("hf:org/tiny")).architecture == "cross_layer"


def test_a_name_that_means_two_is_refused_with_both(hub: Hub, folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predictor_folder(tmp_path / "org" / "tiny", "popularity")
    put(hub, folder)
    with pytest.raises(UserError, match=r"'org/tiny' is a folder here, and .*; write \./org/tiny or hf:org/tiny"):
        find_pretrained("org/tiny")
    assert from_pretrained("./org/tiny").architecture == "popularity"
    assert from_pretrained(Path("org/tiny")).architecture == "popularity"
    for there in (("hf:org/tiny", None), ("org/tiny", "main")):
        assert from_pretrained(*there).architecture == "cross_layer"
    assert find_predictor("org/tiny") == Path("org/tiny")  # on the command line the Hub is always named
    with pytest.raises(UserError, match="give one"):
        find_pretrained("hf:org/tiny@main", revision="main")
    with pytest.raises(UserError, match="has no revisions"):
        find_pretrained("./org/tiny", revision="main")
    assert find_pretrained(list_pretrained()[0]).is_dir()


def test_every_predictor_of_the_command_line_may_be_on_the_hub(hub: Hub, folder: Path, tmp_path: Path, capsys):
    tiny_traces(tmp_path / "traces")
    history = predictor_folder(tmp_path / "history", "history")
    put(hub, folder)
    put(hub, history, "org/history")
    for words, local in (
        (["evaluate", "PREDICTOR", "--budget", "8"], folder),
        (["replay", "--predictor", "PREDICTOR", "--budget", "8"], folder),
        (["replay", "--profile", "PREDICTOR", "--budget", "8", "--warm-start"], history),
    ):
        said = []
        for name in (str(local), f"hf:org/{'history' if local is history else 'tiny'}@main"):
            asked = [name if word == "PREDICTOR" else word for word in words]
            assert main([*asked, "--traces", str(tmp_path / "traces"), "--json", "-"]) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1]
    assert "is on the Hub, not in a folder" in error_line(
        capsys, ["evaluate", "hf:org/tiny", "--traces", tmp_path / "traces", "--record"]
    )


def test_a_lender_and_a_teacher_may_be_on_the_hub(hub: Hub, run, tmp_path: Path, monkeypatch, capsys):
    put(hub, run.folder / "predictor")
    predictor = read_predictor(run.folder / "predictor")
    lender = _calibrated_predictor("hf:org/tiny", predictor)
    assert lender.calibration.to_json() == predictor.calibration.to_json()
    monkeypatch.chdir(tmp_path)
    other = [*("-c", str(CONFIGS / "data/traces.yaml")), f"--data.traces={run.traces}", "--model=TokenCausalTask"]
    assert main(["fit", *other, "--model.teachers=[hf:org/tiny]", "--trainer.max_epochs=1"]) == 2
    assert "teacher hf:org/tiny: has lookaheads 1, 2, 3, next" in capsys.readouterr().err


def test_traces_of_the_hub_are_read_like_any_others(hub: Hub, tmp_path: Path, capsys):
    tiny_traces(tmp_path / "traces")
    commit = put(hub, tmp_path / "traces", "org/traces", "datasets", setup__py=b"import os")
    said = []
    for name in (str(tmp_path / "traces"), "hf:org/traces"):
        assert main(["inspect", name, "--json", "-"]) == 0
        said.append(capsys.readouterr())
    assert said[0].out == said[1].out
    assert said[1].err == f"hf:org/traces@main is {commit}\n"
    assert not [asked for asked in hub.asked if asked.endswith(".py")]
    assert os.listdir(tmp_path / "hub-cache")
    assert error_line(capsys, ["inspect", "hf:org/none"]).startswith("hf:org/none@main: there is no such repository")
