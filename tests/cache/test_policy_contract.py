"""Policies keep the contract of the cache core, and other packages can add theirs."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from _helpers.cache_cases import replay, small_geometry

from moe_beyond.cache import POLICIES, PolicyHooks, jit, policy_summaries
from moe_beyond.cache.policies import SUMMARIES, lru
from moe_beyond.errors import UserError
from moe_beyond.registry import Registry
from moe_beyond.simulator import ReplaySettings
from moe_beyond.testing.policies import check_policy

EXAMPLE = Path(__file__).parents[1] / "example_package"
QUICK = ("lru", "belief", "belady_bypass")
SOME_NOW = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SUMMARIES]
"""All policies; most run with the slow tests, because each hook is compiled once more."""


@pytest.fixture
def mru(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The policy of the example package."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("moe_beyond_example.policy")


@pytest.mark.parametrize("policy", SOME_NOW)
def test_every_policy_keeps_the_contract(policy: str) -> None:
    check_policy(policy)


@pytest.mark.slow
def test_a_policy_of_another_package_keeps_the_contract(mru: ModuleType) -> None:
    check_policy(mru)


def test_a_registered_policy_is_replayed(mru: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLICIES, "_registered", {})
    POLICIES.register("mru", mru)
    # One layer, K=1, two slots: 2 replaces 1, the most recent; 0 stays and 1 is missing.
    result = replay(small_geometry(1, 4, 1), ReplaySettings(2, policy="mru"), [[[0]], [[1]], [[2]], [[0]], [[1]]])
    assert (result.policy, result.hits, result.misses) == ("mru", 1, 4)
    assert policy_summaries()["mru"] == "a policy of package moe_beyond_example"


@jit
def pinned_victim(policy: int, cache: object, pool: int) -> int:
    """Return the resident at the first place, pinned or not."""
    return cache.residents[pool, 0]


@jit
def no_victim(policy: int, cache: object, pool: int) -> int:
    """Return an id that is never an expert."""
    return -1


@jit
def writing_hit(policy: int, cache: object, expert: int) -> None:
    """Change the scores, which are not the policy's."""
    cache.scores[expert] = 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"HOOKS": lru.HOOKS._replace(victim=pinned_victim)}, r"victim returns \d+, which is pinned$"),
        ({"HOOKS": lru.HOOKS._replace(victim=no_victim)}, "victim returns -1, which is not an expert$"),
        ({"HOOKS": lru.HOOKS._replace(on_hit=writing_hit)}, r"hook on_hit changes cache\.scores$"),
        ({"HOOKS": lru.HOOKS._replace(on_hit=print)}, "hook on_hit is not compiled"),
        ({"HOOKS": None}, r"HOOKS must be a PolicyHooks \(got None\)$"),
        ({"NEEDS": ("scores",)}, "NEEDS names scores, but there is no hook on_scores$"),
        ({"NEEDS": ("time",)}, "NEEDS must be a tuple of some of future, profile, scores"),
        ({"OFFERS_SCORES": 1}, "OFFERS_SCORES must be a bool$"),
        ({"init": lambda inputs: inputs.future.ids}, "init fails with(out future and)? profile"),
    ],
)
def test_a_policy_that_breaks_the_contract_is_named(change: dict, message: str) -> None:
    policy = SimpleNamespace(init=lru.init, HOOKS=lru.HOOKS, NEEDS=(), OFFERS_SCORES=False, __name__="own")
    vars(policy).update(change)
    with pytest.raises(AssertionError, match=rf"^policy own.*{message}") as caught:
        check_policy(policy)
    assert "\n" not in str(caught.value)


def test_a_policy_without_an_attribute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLICIES, "_registered", {})
    POLICIES.register("bare", SimpleNamespace(init=lru.init, HOOKS=lru.HOOKS, NEEDS=(), __name__="own"))
    with pytest.raises(UserError, match="policy bare: has no OFFERS_SCORES"):
        ReplaySettings(8, policy="bare")


def test_summaries_need_no_import() -> None:
    script = "import sys, moe_beyond.cache as cache; cache.policy_summaries(); print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert isinstance(POLICIES, Registry)
    assert isinstance(lru.HOOKS, PolicyHooks)


SCRIPT = """
import json
import numpy as np
from moe_beyond.cache import engine
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import Replay, ReplaySettings

replay = Replay(Geometry("small", (0,), 4, 1, 1, 1), ReplaySettings(2, policy="own"))
replay.add(np.array([0, 1, 2, 0, 1], np.uint8).reshape(5, 1, 1))
stats = engine.run_events.stats
print(json.dumps([sum(stats.cache_hits.values()), sum(stats.cache_misses.values()), replay.result().hits]))
"""


@pytest.mark.slow
def test_an_installed_policy_is_compiled_once_and_again_after_a_change(tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "theirs-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moe_beyond.policies]\nown = theirs\n")
    source = (EXAMPLE / "moe_beyond_example/policy.py").read_text()
    policy = site / "theirs.py"
    policy.write_text(source)
    paths = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "NUMBA_CACHE_DIR": str(tmp_path / "compiled")}

    def replayed() -> list[int]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    assert replayed() == [0, 1, 1]
    assert replayed() == [1, 0, 1]
    policy.write_text(source.replace("return -float", "return float"))  # the least recently used instead
    assert replayed() == [0, 1, 0]
