"""An uploaded predictor is downloaded unchanged; a failed push uploads nothing and gives the reason in one line."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import error_line, tiny_traces
from _helpers.hub_stand_in import TOKEN, Hub, Repository
from _helpers.predictor_variants import LONG, probabilities, random_trace
from _helpers.publishing import FIGURES, TRAINING, edit_config, predictor_folder
from huggingface_hub import ModelCard, constants

from moe_beyond.cli.main import main
from moe_beyond.errors import UserError
from moe_beyond.predictors import from_pretrained
from moe_beyond.predictors.architectures.popularity import Popularity
from moe_beyond.predictors.batch import collate
from moe_beyond.predictors.io.folder import read_predictor

FILES = ["README.md", "config.json", "model.safetensors", "replay.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return predictor_folder(tmp_path / "predictor")


def pushed(folder: Path, *words: str) -> None:
    assert main(["push", str(folder), "org/tiny", *words]) == 0


def test_what_is_pulled_scores_to_the_bit_as_what_was_pushed(hub: Hub, folder: Path, capsys):
    (folder / "last.ckpt").write_bytes(b"no part of it")
    pushed(folder)
    repository = hub.model("org/tiny")
    commit = repository.branches["main"]
    assert f"{hub.url}/org/tiny\ncommit {commit}: " in capsys.readouterr().out
    assert sorted(repository.files) == [".gitattributes", *FILES]
    assert len(repository.commits) == 2  # the empty one that every repository starts with, and all of this
    batch = collate([random_trace("a", LONG, 0), random_trace("b", 7, 1)])
    expected = probabilities(read_predictor(folder), batch)
    sha256 = json.loads((folder / "config.json").read_text())["sha256"]
    for name, revision in (("org/tiny", None), ("hf:org/tiny", "main"), (f"hf:org/tiny@{commit}", None)):
        pulled = from_pretrained(name, revision=revision)
        assert np.array_equal(probabilities(pulled, batch), expected)
        said = capsys.readouterr().err
        assert said.startswith("hf:org/tiny@")
        assert said.endswith(f" is {commit}, model.safetensors has sha256 {sha256}\n")
    with pytest.raises(UserError, match="org/tiny: is a cross_layer, not a Popularity"):
        from_pretrained("org/tiny", expected=Popularity)


def test_the_card_keeps_its_prose_and_has_the_figures_as_metadata(hub: Hub, folder: Path):
    pushed(folder)
    files = hub.model("org/tiny").files
    assert files["replay.png"].startswith(b"\x89PNG")
    local, card = (folder / "README.md").read_text(), ModelCard(files["README.md"].decode())
    assert card.text.startswith(local.split("---\n", 2)[2].rstrip())
    assert "![Hit rate and bytes of recorded replays](replay.png)" in card.text
    assert 'from_pretrained("org/tiny")' in card.text
    data = card.data
    assert (data.library_name, data.license, data.base_model) == ("moe-beyond", "mit", "org/tiny-moe")
    assert (data.model_name, data.pipeline_tag, data.datasets) == ("tiny", None, None)
    assert {"moe", "expert-prediction", "cross_layer"} <= set(data.tags)
    assert {(one.dataset_name, one.dataset_revision) for one in data.eval_results} == {
        ("Tests, set 1, 1,234 tokens", FIGURES["fingerprint"])
    }
    assert {one.metric_name: one.metric_value for one in data.eval_results} == {
        "recall@2, lookahead 1": 0.7654,
        "recall@2, lookahead 2": 0.7,
        "hit rate, 8 slots (25%), lru + top2, lookahead 1": 0.8,
        "bytes transferred / demanded, 8 slots (25%), lru + top2, lookahead 1": 1.1,
        "hit rate, 8 slots (25%), LRU": 0.3,
        "bytes transferred / demanded, 8 slots (25%), LRU": 0.7,
        "hit rate, 8 slots (25%), Belady (optimum without prefetching)": 0.5,
        "bytes transferred / demanded, 8 slots (25%), Belady (optimum without prefetching)": 0.5,
    }


def test_a_card_that_was_published_is_published_again_as_it_was(hub: Hub, folder: Path):
    pushed(folder)
    once = hub.model("org/tiny").files["README.md"]
    (folder / "README.md").write_bytes(once)
    commit = hub.model("org/tiny").branches["main"]
    pushed(folder)
    assert hub.model("org/tiny").files["README.md"] == once
    assert hub.model("org/tiny").branches["main"] == commit  # nothing is new: no commit


def test_results_of_other_data_on_a_card_stay(hub: Hub, folder: Path):
    pushed(folder)
    (folder / "README.md").write_bytes(hub.model("org/tiny").files["README.md"])
    few = {"fingerprint": "b" * 64, "metrics": FIGURES["metrics"][:1], "replay": FIGURES["replay"][:1]}
    edit_config(folder, figures=[FIGURES | few])
    pushed(folder)
    results = ModelCard(hub.model("org/tiny").files["README.md"].decode()).data.eval_results
    assert sum(one.dataset_revision == "b" * 64 for one in results) == 3
    assert sum(one.dataset_revision == "a" * 64 for one in results) == 8


def test_a_push_into_a_repository_that_is_there_is_a_further_commit(hub: Hub, folder: Path, tmp_path: Path):
    pushed(folder)
    first = hub.model("org/tiny").branches["main"]
    other = predictor_folder(tmp_path / "other", "popularity", figures=False)
    pushed(other)
    repository = hub.model("org/tiny")
    assert len(repository.commits) == 3
    assert sorted(repository.files) == [".gitattributes", *FILES[:3]]  # an old picture would show what is not there
    assert repository.files["model.safetensors"] == (other / "model.safetensors").read_bytes()
    assert from_pretrained("org/tiny", revision=first).architecture == "cross_layer"
    assert from_pretrained("org/tiny").architecture == "popularity"


def test_a_branch_leaves_the_main_one_alone(hub: Hub, folder: Path):
    pushed(folder, "--revision", "next/try")
    assert sorted(hub.model("org/tiny").files) == [".gitattributes"]
    assert from_pretrained("hf:org/tiny@next/try").architecture == "cross_layer"


def test_private_is_private_or_refused(hub: Hub, folder: Path, capsys):
    hub.repositories["models", "org/open"] = Repository()
    said = error_line(capsys, ["push", folder, "org/open", "--private"])
    assert said == "hf:org/open: is already public; make it private in its settings, or push without --private"
    assert len(hub.model("org/open").commits) == 1
    pushed(folder, "--private")
    assert hub.model("org/tiny").private


@pytest.mark.parametrize(
    ("method", "path", "status", "reason"),
    [
        ("PUT", "/lfs/", 403, "the token does not allow it"),
        ("POST", "/commit/", 500, "the Hub fails (status 500); try again later"),
        ("POST", "/commit/", None, "the Hub is unreachable"),
        ("POST", "/preupload/", 403, "the token does not allow it (no right to write)"),
    ],
)
def test_an_upload_that_breaks_publishes_nothing_and_can_be_repeated(
    hub: Hub, folder: Path, capsys, method: str, path: str, status: int | None, reason: str
):
    hub.breaks(method, path, status)
    assert error_line(capsys, ["push", folder, "org/tiny"]).startswith(f"hf:org/tiny@main: {reason}")
    assert len(hub.model("org/tiny").commits) == 1
    hub.broken.clear()
    pushed(folder)
    assert sorted(hub.model("org/tiny").files) == [".gitattributes", *FILES]


def test_a_connection_that_drops_once_is_tried_again(hub: Hub, folder: Path):
    hub.breaks("PUT", "/lfs/", None, once=True)
    pushed(folder)
    assert hub.model("org/tiny").files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")


def wrong_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongOne")


def forbidden(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["models", "org/tiny"] = Repository(forbidden=True)


def too_often(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.breaks("POST", "/repos/create", 429)


def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (no_token, "the Hub requires a token; log in with `hf auth login`, or set HF_TOKEN"),
        (wrong_token, "the Hub does not accept the token; log in with `hf auth login`, or set HF_TOKEN"),
        (forbidden, "the token does not allow it (no right to write); use a token that does"),
        (too_often, "the Hub limits the rate of requests; try again later"),
        (offline, "HF_HUB_OFFLINE forbids requests to the Hub; unset it"),
        (unreachable, "the Hub is unreachable at http://127.0.0.1:1"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_who_may_not_push_is_told_why(hub: Hub, folder: Path, capsys, monkeypatch, trouble, said: str):
    trouble(hub, monkeypatch)
    line = error_line(capsys, ["push", folder, "org/tiny"])
    assert line.startswith("hf:org/tiny: ")
    assert said in line
    assert TOKEN not in line
    assert "hf_wrongOne" not in line
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())


def test_another_organisation_is_not_this_users(hub: Hub, folder: Path, capsys):
    said = error_line(capsys, ["push", folder, "others/tiny"])
    assert said.startswith("hf:others/tiny: the token does not allow it (You don't have the rights to create")
    assert hub.repositories == {}


@pytest.mark.parametrize(
    "name", ["tiny", "org/tiny/more", "org/-tiny", "org/ti--ny", "org/tiny@main", "hf:org/tiny", ""]
)
def test_a_name_that_is_no_repository_is_refused_before_anything_is_asked(hub: Hub, folder: Path, capsys, name: str):
    assert repr(name)[1:-1] in error_line(capsys, ["push", folder, name])
    assert hub.asked == []


def test_damaged_weights_are_not_published(hub: Hub, folder: Path, capsys):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors: is damaged" in error_line(capsys, ["push", folder, "org/tiny"])
    assert hub.asked == []


@pytest.mark.parametrize(
    ("card", "reason"),
    [("---\ntags: [\n---\nText\n", "cannot be read"), ("---\n- a list\n---\nText\n", "cannot be read")],
)
def test_a_card_whose_metadata_are_damaged_is_named(folder: Path, capsys, card: str, reason: str):
    (folder / "README.md").write_text(card)
    said = error_line(capsys, ["push", folder, "org/tiny", "--dry-run"])
    assert said.startswith(f"{folder / 'README.md'}: the metadata")
    assert reason in said


def test_damaged_figures_are_named(folder: Path, capsys):
    edit_config(folder, figures=[{"source": "tests"}])
    assert "config.json: figures: field 'fingerprint' is missing" in error_line(
        capsys, ["push", folder, "org/tiny", "--dry-run"]
    )


def test_a_folder_that_is_neither_a_predictor_nor_traces_is_refused(folder: Path, tmp_path: Path, capsys):
    said = error_line(capsys, ["push", tmp_path, "org/tiny", "--dry-run"])
    assert f"{tmp_path}: has neither config.json (a predictor) nor manifest.json (a trace set); push {folder}" == said
    (folder / "manifest.json").write_text("{}")
    assert "push two folders" in error_line(capsys, ["push", folder, "org/tiny", "--dry-run"])


def test_a_dry_run_shows_everything_and_asks_nobody(folder: Path, capsys, monkeypatch):
    def connect(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", connect)
    words = ["push", str(folder), "org/tiny", "--dry-run", "--traces", "hf:org/traces"]
    assert main(words) == 0
    said = capsys.readouterr().out
    for name in FILES[1:3]:
        assert f"{(folder / name).stat().st_size:,} bytes  {name}" in said
    assert " bytes  replay.png" in said
    data = ModelCard(said.split("README.md:\n\n")[1]).data
    assert data.datasets == ["org/traces"]
    assert len(data.eval_results) == 8


def test_the_traces_that_a_card_names_are_those_it_was_fitted_on(hub: Hub, folder: Path, tmp_path: Path, capsys):
    fingerprint = tiny_traces(tmp_path / "traces").manifest.fingerprint
    assert main(["push", str(tmp_path / "traces"), "org/traces"]) == 0
    capsys.readouterr()
    words = ["push", folder, "org/tiny", "--traces", "hf:org/traces"]
    assert "was fitted on other traces (got fingerprint fff" in error_line(capsys, words)
    assert "is not on the Hub; push the trace set" in error_line(capsys, [*words[:-1], tmp_path / "traces"])
    assert ("models", "org/tiny") not in hub.repositories
    edit_config(folder, training=TRAINING | {"fingerprint": fingerprint})
    pushed(folder, "--traces", "hf:org/traces")
    assert ModelCard(hub.model("org/tiny").files["README.md"].decode()).data.datasets == ["org/traces"]
