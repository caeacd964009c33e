"""What README and CONTRIBUTING tell people to run, run: on stand-ins for the recordings that are not part of this."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import TINY, release
from _helpers.predictor_variants import Variant
from _helpers.recordings import random_experts
from predictors import test_contracts

from moe_beyond.cli.main import main
from moe_beyond.geometry import load_preset
from moe_beyond.predictors import registry
from moe_beyond.simulator.devices import load_device

ROOT = Path(__file__).parents[1]
SET_UP = ("git clone", "cd ", "make ", "python3 -m venv", ".venv/bin/pip", ". .venv", "eval ")
"""How lines start that make the environment which the tests run in; `make demo` and `make test` are CI's."""


def blocks(document: str, language: str) -> list[str]:
    """The code blocks of a document."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[str]:
    """The commands of a shell block, each on one line, without those that set up."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith(("#", *SET_UP))]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Path]:
    """A working folder as in a clone, with a release whose prompts are many, short and random."""
    for name in ("configs", "tools", "checkpoints"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "prompts.txt").write_text("import numpy as np\nThe arguments of a function\n")
    experts = random_experts(9, geometry=load_preset("deepseek-v2-lite").geometry)
    (tmp_path / "engine").mkdir()
    np.save(tmp_path / "engine" / "first.npy", experts)
    release(tmp_path / "RELEASE", [40, 12, *[3] * 210], missed=1)
    with chdir(tmp_path):
        yield tmp_path


def run(command: str) -> None:
    """Run a command line; what `moe-beyond` does in this process, which has imported everything already."""
    words = [os.path.expandvars(word) for word in shlex.split(command, comments=True)]
    if words[0] == "moe-beyond":
        assert main(words[1:]) == 0, command
    else:
        assert words[0] == "python", f"neither moe-beyond nor python: {command}"
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.slow
def test_everything_in_the_readme_runs_in_its_order(desk: Path) -> None:
    text = (ROOT / "README.md").read_text()
    told = re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert {language for language in re.findall(r"^```(\S+)$", text, re.MULTILINE)} == {"sh", "python"}
    ran = 0
    for language, block in told:
        if language == "python":
            exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
            ran += 1
        else:
            for command in commands(block):
                run(command)
                ran += 1
    assert ran > 20


def module_of(block: str, name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Put a module where the package looks for its kind, as the page tells people to."""
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(block)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_within_a_page_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    known = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= known


@pytest.mark.slow
def test_docstrings_render_without_a_warning(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pdoc", "--docformat", "google", "-o", str(tmp_path), "moe_beyond"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "moe-beyond replay" in (tmp_path / "moe_beyond" / "api.html").read_text()


def test_the_predictor_that_contributing_adds_keeps_the_contract(monkeypatch, tmp_path) -> None:
    block = next(block for block in blocks("CONTRIBUTING.md", "python") if "CountingPredictor" in block)
    module_of(block, "moe_beyond.predictors.repeats", monkeypatch, tmp_path)
    monkeypatch.setitem(registry.ARCHITECTURES, "repeats", "Repeats")
    variant = Variant("repeats", "default", reads=frozenset({"earlier experts"}))
    test_contracts.test_stepping_equals_the_batch(variant, TINY)
    test_contracts.test_nothing_outside_the_information_set_moves_a_score(variant)
    test_contracts.test_scores_move_with_what_is_read_and_nothing_else(variant)
    test_contracts.test_padding_changes_nothing(variant)
    test_contracts.test_arguments_rebuild_the_predictor(variant)


@pytest.mark.slow
def test_the_policy_that_contributing_adds_evicts_what_was_used_last(tmp_path) -> None:
    # In a copy, as compiled code is kept beside the package and would ask for the new module ever after.
    package = shutil.copytree(
        ROOT / "moe_beyond", tmp_path / "moe_beyond", ignore=shutil.ignore_patterns("__pycache__")
    )
    block = next(block for block in blocks("CONTRIBUTING.md", "python") if "HOOKS" in block)
    (package / "cache/policies/most_recent.py").write_text(block)
    names = package / "cache/policies/__init__.py"
    names.write_text(names.read_text().replace("SUMMARIES = {", 'SUMMARIES = {"most_recent": "most recently used",'))
    # Two slots: 0 and 1 come in, 2 drops 1, 0 is there, 1 drops 0, 2 is there.
    replaying = (
        "from cache_cases import replay, small_geometry; from moe_beyond.simulator import ReplaySettings\n"
        "trace = [[[expert]] for expert in (0, 1, 2, 0, 1, 2)]\n"
        "found = replay(small_geometry(1, 3, 1), ReplaySettings(2, policy='most_recent'), trace)\n"
        "print(found.hits, found.misses)"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}"}
    words = [sys.executable, "-c", replaying]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "2 4\n", done.stderr


def test_the_device_that_contributing_adds_is_a_device(tmp_path) -> None:
    (block,) = blocks("CONTRIBUTING.md", "json")
    (tmp_path / "my-box.json").write_text(block)
    device = load_device(str(tmp_path / "my-box.json"))
    assert device.to_json().items() >= json.loads(block).items()
