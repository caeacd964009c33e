"""Architectures and tasks of other packages: registered once, and known wherever this package's are known."""

from pathlib import Path

import pytest
from _helpers.common import TINY, VOCAB, error_line, tiny_traces

from moe_beyond.cli.main import main
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.architectures.popularity import Popularity
from moe_beyond.predictors.registry import ARCHITECTURES, create, register
from moe_beyond.tasks import TASKS, CountingTask
from moe_beyond.tasks.registry import import_tasks


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> type[Popularity]:
    """A predictor and a task that exist for one test."""
    for registry in (ARCHITECTURES, TASKS):
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))

    @register
    class Unpopularity(Popularity):
        """Counts, and does the opposite."""

        architecture = "unpopularity"

    return Unpopularity


class UnpopularityTask(CountingTask):
    """Fits the predictor of `added`."""

    def __init__(self, geometry: Geometry | dict[str, object], vocab_size: int) -> None:
        super().__init__(create("unpopularity", Geometry.of(geometry), vocab_size, package="tests"))  # type: ignore[arg-type]


def test_a_registered_predictor_is_created_by_name(added: type[Popularity]) -> None:
    package = ARCHITECTURES.package("unpopularity")
    assert type(create("unpopularity", TINY, VOCAB, package=package)) is added
    with pytest.raises(UserError, match=r"unpopularity is a predictor of package other \(got "):
        create("unpopularity", TINY, VOCAB, package="other")


def test_a_name_is_taken_once(added: type[Popularity]) -> None:
    assert register(added) is added
    with pytest.raises(UserError, match="already a predictor architecture 'unpopularity'"):
        register(type("Other", (Popularity,), {"architecture": "unpopularity"}))


def test_a_missing_package_is_named() -> None:
    with pytest.raises(UserError, match=r"^f: new is a predictor of package their_package, which is not installed"):
        create("new", TINY, VOCAB, source="f", package="their_package")
    with pytest.raises(UserError, match="unknown predictor architecture 'poplarity'; did you mean 'popularity'"):
        create("poplarity", TINY, VOCAB)


def test_a_package_that_cannot_be_imported_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib.metadata import EntryPoint

    broken = EntryPoint("broken", "no_such_package.task:Task", "moe_beyond.tasks")
    monkeypatch.setattr(TASKS, "_installed", {"broken": broken})
    import_tasks()
    assert capsys.readouterr().err.startswith("moe-beyond: warning: task broken: package no_such_package cannot be")


def test_fit_knows_every_registered_task(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    traces = tiny_traces(tmp_path / "traces").folder
    said = error_line(
        capsys, ["fit", "--model", "UnpopularTask", "--data", "TraceDataModule", f"--data.traces={traces}"]
    )
    assert said == "--model: unknown class 'UnpopularTask'; did you mean 'UnpopularityTask'?"
    assert main(["fit", "--help"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert [name for name, task in TASKS.items() if task.__name__ not in shown and name != "unpopularity"] == []
