"""Fixtures that several test folders share."""

import os
from collections.abc import Iterator
from pathlib import Path

# One process per core runs the tests (pytest -n auto): more threads, also of their subprocesses, would compete.
# Torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning  # noqa: F401  (its log handler keeps the standard error that is current at its import)
import pytest
from _helpers.common import QUICK_POLICIES, tiny_traces
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER, Run, fit
from _helpers.hub_stand_in import TOKEN, Hub, running_hub
from hypothesis import settings

from moe_beyond.cache.policies import POLICIES
from moe_beyond.traces.reader import TraceSet

# Machines that run this are slow at times; and CI tries the same examples each time: its verdict is the commit's.
settings.register_profile("here", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("here")

# Collecting its doctests would import its task here, where the CLI would list it among the tasks it offers.
collect_ignore = ["example_package"]

# The shipped configs log to wandb too, which takes seconds a fit: only the tests of that turn it on.
os.environ["WANDB_MODE"] = "disabled"


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of further policies as slow, and begin with the slow ones.

    At the end they would keep one core busy and leave the others idle.
    """
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if parameters.get("policy", "lru") in set(POLICIES) - set(QUICK_POLICIES):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def few_policies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tuning try the policies of the quick tests only, except in slow tests."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr("moe_beyond.evaluation.search.POLICIES", QUICK_POLICIES)


@pytest.fixture
def trace_set(tmp_path: Path) -> TraceSet:
    """A small trace set with a train and a validation split."""
    return tiny_traces(tmp_path / "traces")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine, a token for it, and an empty cache; as HF_ENDPOINT and its like say before an import."""
    from huggingface_hub import constants

    with running_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny cross_layer, fitted for three epochs with a checkpoint each and one between validations."""
    folder = tmp_path_factory.mktemp("run")
    traces = folder / "traces"
    tiny_traces(traces, sequences=24)
    configs = ("-c", str(CONFIGS / "trainer/default.yaml"), "-c", str(CONFIGS / "model/cross_layer.yaml"))
    more = folder / "every_step.yaml"
    more.write_text(
        "trainer:\n  callbacks:\n"
        "    - class_path: CacheReplay\n      init_args: {budget: '50%'}\n"
        "    - class_path: ModelCheckpoint\n      init_args: {monitor: val_budget_50pct/hit_rate, mode: max}\n"
        "    - class_path: ModelCheckpoint\n      init_args: {filename: last, enable_version_counter: false}\n"
        "    - class_path: ModelCheckpoint\n"
        "      init_args: {every_n_train_steps: 2, save_top_k: -1, filename: 'between-{step}'}\n"
        "    - class_path: ExportBest\n    - class_path: WriteScores\n"
    )
    words = ("--data.token_budget=64", "--data.max_tokens=16", "--trainer.max_epochs=3", *TINY_CROSS_LAYER)
    return Run(fit(folder, traces, *configs, "-c", str(more), *words), traces)
