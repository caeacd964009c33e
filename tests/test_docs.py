"""Every code block of every README runs, on stand-ins for recordings that are not part of this repository."""

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
from types import ModuleType

import numpy as np
import pytest
from _helpers.cache_cases import replay, small_geometry
from _helpers.common import release
from _helpers.recordings import random_experts
from _helpers.tools import run as run_tool

from moe_beyond.cli.main import main
from moe_beyond.geometry import load_preset
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.devices import DEVICES, load_device

ROOT = Path(__file__).parents[1]
SET_UP = ("git clone", "cd ", "make ", "python3 -m venv", "pip install", ".venv/bin/pip", ". .venv", "eval ")
"""Starts of lines that make the environment in which the tests run; `make demo` and `make test` are CI's."""
LANGUAGES = {"", "bibtex", "c", "json", "python", "sh", "text"}
COMPILER = shutil.which("cc")

PACKAGES = (
    "collect",
    "traces",
    "predictors",
    "cache",
    "simulator",
    "evaluation",
    "report",
    "hub",
    "runtime",
    "validation",
)
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "checkpoints/README.md",
    "configs/README.md",
    "tools/README.md",
    "tools/reference_c/README.md",
    "tests/README.md",
    *(f"moe_beyond/{package}/README.md" for package in PACKAGES),
)
CARDS = tuple(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("checkpoints/*/README.md")))
LINKED = (*PAGES, *CARDS, "CHANGELOG.md", "moe_beyond/GLOSSARY.md", "tools/experiments.md")
IMPORT = "moe-beyond import moe-beyond-csv RELEASE/"
STAND_INS = {
    "TRACES": f"{IMPORT}webglm --out TRACES --model deepseek-v2-lite",
    "traces/webglm": f"{IMPORT}webglm --out traces/webglm --model deepseek-v2-lite",
    "traces/puffin-blocks": f"{IMPORT}puffin --out traces/puffin-blocks --model deepseek-v2-lite --val-blocks 20:10",
    "traces/released": f"{IMPORT}webglm --out traces/released --model deepseek-v2-lite"
    " --predictions RELEASE/webglm_moe_beyond_predictions --scores scores/released",
}
"""Folder -> the command that makes it, for pages that use a folder without making it."""


def code_blocks(page: str) -> list[tuple[str, str]]:
    """Return (language, code) of a page's blocks."""
    return re.findall(r"^```(\S*)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[str]:
    """Return the commands of a shell block, each on one line, without those that set up."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith(("#", *SET_UP))]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a release of many short random prompts, in which stand-ins are made when a page needs them."""
    folder = tmp_path_factory.mktemp("shelf")
    # Ten blocks of 80 tokens; block 0, numbers 1 to 19, becomes the validation split. Its texts are in no other block.
    release(folder / "RELEASE", [40, 12, *[2] * 11, *[1] * 6, *[4] * 180], missed=1)
    return folder


@pytest.fixture
def desk(tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder as in a clone, with prompts and recordings."""
    for name in ("configs", "tools", "checkpoints"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "RELEASE").symlink_to(shelf / "RELEASE")
    (tmp_path / "prompts.txt").write_text("import numpy as np\nThe arguments of a function\n")
    experts = random_experts(9, geometry=load_preset("deepseek-v2-lite").geometry)
    (tmp_path / "engine").mkdir()
    np.save(tmp_path / "engine" / "first.npy", experts)
    monkeypatch.setattr("moe_beyond.quickstart.EPOCHS", 1)
    with chdir(tmp_path):
        yield tmp_path


def add_stand_in(folder: str, shelf: Path, desk: Path) -> None:
    """Link a trace set into the working folder; the first page that needs it makes it."""
    if not (shelf / folder).exists():
        with chdir(shelf):
            run_command(STAND_INS[folder])
    for name in (folder, *(("scores/released",) if "--scores" in STAND_INS[folder] else ())):
        (desk / name).parent.mkdir(exist_ok=True)
        (desk / name).symlink_to(shelf / name)


def run_command(command: str) -> None:
    """Run a command line; `moe-beyond` runs in this process, which has imported everything already."""
    arguments = [os.path.expandvars(argument) for argument in shlex.split(command, comments=True)]
    if arguments[0] == "moe-beyond":
        assert main(arguments[1:]) == 0, command
    else:
        programs = {"python": sys.executable, "cc": str(COMPILER)}
        assert arguments[0] in programs, f"neither moe-beyond, python nor cc: {command}"
        files = [path for word in arguments[1:] for path in (sorted(map(str, Path().glob(word))) or [word])]
        run_program(programs[arguments[0]], *files)


def run_program(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stderr}"


def run_c(block: str) -> None:
    """Compile a program with the C stepper, and run it."""
    Path("block.c").write_text(block)
    sources = [str(path) for path in sorted(Path("tools/reference_c").glob("*.c")) if path.name != "score.c"]
    run_program(str(COMPILER), "-std=c11", "-Wall", "-Werror", "-Itools/reference_c", "block.c", *sources, "-lm")
    run_program("./a.out")


def import_block(block: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Save a block as a module and import it."""
    path = folder / f"{name}.py"
    path.write_text(block)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in (*PAGES, *CARDS) if code_blocks(page)])
@pytest.mark.filterwarnings("ignore:.*was fitted on:UserWarning")
def test_every_code_block_of_a_page_runs(page: str, desk: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = code_blocks(page)
    assert {language for language, _ in blocks} <= LANGUAGES
    if COMPILER is None and any(language == "c" for language, _ in blocks):
        pytest.skip("needs a C compiler, cc")
    text = "\n".join(code for _, code in blocks)
    for folder in STAND_INS:
        if re.search(rf"{folder}(?![\w-])", text) and f"--out {folder} " not in text:
            add_stand_in(folder, shelf, desk)
    for number, (language, block) in enumerate(blocks):
        if language == "python":
            import_block(block, f"block_{number}", desk, monkeypatch)
        elif language == "c":
            run_c(block)
        elif language == "json":
            json.loads(block)
        elif language == "sh":
            for command in commands(block):
                run_command(command)


def test_pages_are_all_there() -> None:
    found = {str(path.relative_to(ROOT)) for path in ROOT.glob("[a-z]*/README.md")}
    found |= {
        str(path.relative_to(ROOT)) for folder in ("moe_beyond", "tools") for path in ROOT.glob(f"{folder}/*/README.md")
    }
    assert found | {"README.md", "CONTRIBUTING.md"} == set(PAGES)


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert len(text.encode()) <= 13_000
    assert not re.search("[\u2500-\u257f]", text)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)\s]*)\)", text):
        if link.startswith(("http:", "https:")):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def listed(start: str) -> list[str]:
    """Return the names in backticks of a list item of README that begins so."""
    (item,) = re.findall(rf"^- \*\*{start}.*?(?=^- |^$)", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`]+)`", item)


def test_readme_lists_what_is_registered() -> None:
    from moe_beyond.cache.policies import POLICIES
    from moe_beyond.cache.prefetchers import PREFETCHERS, parse_prefetch
    from moe_beyond.evaluation.named_strategies import STRATEGIES
    from moe_beyond.predictors.registry import ARCHITECTURES
    from moe_beyond.pretrained import LARGE
    from moe_beyond.traces.formats import readable_formats, writable_formats

    text = (ROOT / "README.md").read_text()
    assert listed("Policies") == list(POLICIES)
    assert listed("Predictors") == list(ARCHITECTURES)
    assert listed("Strategies") == list(STRATEGIES)
    for kind, names in (("Policies", POLICIES), ("Predictors", ARCHITECTURES)):
        assert f"**{kind}** ({len(list(names))})" in text
    written = [{"topN": "top6", "p>T": "p>0.5"}.get(name, name) for name in listed("Prefetchers")]
    assert {parse_prefetch(name).prefetcher.id for name in written} == {entry.id for entry in PREFETCHERS.values()}
    formats = listed("Trace formats")
    assert sorted(formats) == sorted((*readable_formats(), *writable_formats()))
    assert f"{len(DEVICES)} device" in text
    for page in ("README.md", "checkpoints/README.md"):
        rows = re.findall(r"^\| `([\w.-]+)`(?: \((clone)\))? \|", (ROOT / page).read_text(), re.MULTILINE)
        assert sorted(name for name, _ in rows) == sorted(name for card in CARDS if "." in (name := card.split("/")[1]))
        assert {name for name, clone in rows if clone} == set(LARGE)
    for page, names in (("cache", POLICIES), ("predictors", ARCHITECTURES)):
        page_text = (ROOT / f"moe_beyond/{page}/README.md").read_text()
        assert set(names) <= set(re.findall(r"^\| `(\w+)` \|", page_text, re.MULTILINE))
    tools = re.findall(r"^\| `(\w+\.py)` \|", (ROOT / "tools/README.md").read_text(), re.MULTILINE)
    assert tools == sorted(path.name for path in (ROOT / "tools").glob("*.py"))


def test_the_zoo_table_is_that_of_its_tool(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    for folder in (ROOT / "checkpoints").glob("*.*/"):
        (tmp_path / folder.name).symlink_to(folder)
    written = (ROOT / "checkpoints/README.md").read_text()
    page.write_text(re.sub(r"^\| `.*\n", "", written, flags=re.MULTILINE))
    run_tool("write_zoo_table.py", "--checkpoints", str(tmp_path))
    assert page.read_text() == written, "run python tools/write_zoo_table.py"
    hits = re.findall(r"\| (\S+% @ \S+) \| (\S+% @ \S+) \| (\S+% @ \S+) \|$", written, re.MULTILINE)
    assert len(hits) == len(list((ROOT / "checkpoints").glob("*.*/config.json")))  # bytes, LRU and Belady in every row
    page.write_text("no marks")
    with pytest.raises(AssertionError, match=r"README\.md: has no table; add the lines"):
        run_tool("write_zoo_table.py", "--checkpoints", str(tmp_path))
    assert page.read_text() == "no marks"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_file_table_of_a_package_is_complete(package: str) -> None:
    folder = ROOT / "moe_beyond" / package
    text = (folder / "README.md").read_text()
    (table,) = re.findall(r"^\| (?:file|file or folder|folder or file) \|.*\n(?:\|.*\n)+", text, re.MULTILINE)
    cells = re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE)
    listed_names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert all((folder / name).exists() for name in listed_names)
    names = {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}
    names |= {path.name for path in folder.glob("*.py") if not path.name.startswith("_")}
    assert {name for name in listed_names if not re.search("/.", name)} == names


def test_contributing_lists_every_module() -> None:
    layout = (ROOT / "CONTRIBUTING.md").read_text().partition("## Layout")[2].partition("\n## ")[0]
    modules = {path.stem for path in (ROOT / "moe_beyond").glob("*.py") if not path.stem.startswith("_")}
    modules |= {path.parent.name for path in (ROOT / "moe_beyond").glob("*/__init__.py")}
    assert modules <= set(re.findall(r"\w+", layout))
    assert {line.count("|") for line in layout.splitlines() if line.startswith("|")} == {4}


def test_replay_tables_have_the_headings_of_the_program() -> None:
    from moe_beyond.report.tables import results_table

    geometry = small_geometry(1, 3, 1)
    programs = []
    device = load_device("rtx4060-laptop")
    for settings in (
        ReplaySettings(2),
        ReplaySettings(2, device=device),
        ReplaySettings(2, device=device, misses="cpu"),
    ):
        table = results_table([replay(geometry, settings, [[[0]], [[1]]])], geometry)
        programs.append([str(column.header).replace("-\n", "").replace("\n", " ") for column in table.columns])
    tables = [
        line for page in PAGES for line in re.findall(r"^\| slots \(share\) \|.*$", (ROOT / page).read_text(), re.M)
    ]
    assert tables
    for heading in tables:
        assert heading.strip("| ").split(" | ") in programs


def test_readme_counts_the_architectures_that_are_recorded() -> None:
    from _helpers.moe_architectures import REFUSED, architectures

    recorded = len(architectures().keys() - REFUSED.keys())
    for page in ("README.md", "moe_beyond/collect/README.md"):
        counts = re.findall(r"\ball (\d+)\s+(?:mixture-of-experts )?architectures", (ROOT / page).read_text())
        assert [int(count) for count in counts] == [recorded]


@pytest.mark.slow
def test_docstrings_render_without_a_warning(tmp_path: Path) -> None:
    arguments = [sys.executable, str(ROOT / "tools/build_docs.py"), "--out", str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "moe-beyond replay" in (tmp_path / "moe_beyond" / "api.html").read_text()
    assert "How to read the tables" in (tmp_path / "moe_beyond" / "evaluation.html").read_text()


def test_the_predictor_of_the_recipe_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (code for _, code in code_blocks("moe_beyond/predictors/README.md") if "CountingPredictor" in code)
    from moe_beyond.testing import check_predictor

    check_predictor(import_block(block, "repeats", tmp_path, monkeypatch).Repeats)


@pytest.mark.slow
def test_the_policy_of_the_recipe_evicts_the_most_recently_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = (code for _, code in code_blocks("moe_beyond/cache/README.md") if "MostRecent" in code)
    from moe_beyond.cache.policies import POLICIES
    from moe_beyond.testing import check_policy

    module = import_block(block, "most_recent", tmp_path, monkeypatch)
    check_policy(module, examples=4)
    monkeypatch.setitem(POLICIES._registered, "most_recent", module)
    # Two slots: 0 and 1 are admitted, 2 evicts 1, 0 hits, 1 evicts 0, 2 hits.
    trace = [[[expert]] for expert in (0, 1, 2, 0, 1, 2)]
    result = replay(small_geometry(1, 3, 1), ReplaySettings(2, policy="most_recent"), trace)
    assert (result.hits, result.misses) == (2, 4)


def test_the_device_of_the_recipe_is_a_device(tmp_path: Path) -> None:
    (block,) = (code for language, code in code_blocks("moe_beyond/simulator/README.md") if language == "json")
    (tmp_path / "my-box.json").write_text(block)
    device = load_device(str(tmp_path / "my-box.json"))
    assert device.to_json().items() >= json.loads(block).items()
