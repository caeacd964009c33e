"""The wheel: its size, its contents, and commands that run from it in an empty folder."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from moe_beyond.cli.builtin_configs import list_configs
from moe_beyond.pretrained import CARD_FILE, CONFIG_FILE, LARGE, WEIGHTS_FILE, shipped_folder, shipped_folders

ROOT = Path(__file__).parents[1]
MAX_BYTES = 25_000_000

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, next to this environment's packages."""
    folder = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder


def test_it_is_small_and_holds_every_file_except_large_weights(wheel: Path) -> None:
    assert wheel.stat().st_size <= MAX_BYTES
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for name, folder in shipped_folders().items():
        files = {path.name for path in folder.iterdir()}
        packed = {Path(path).name for path in names if path.startswith(f"moe_beyond/checkpoints/{name}/")}
        assert packed == (files if name not in LARGE else {CONFIG_FILE, CARD_FILE}), name
        assert WEIGHTS_FILE in files
    assert {f"moe_beyond/configs/{name}.yaml" for name in list_configs()} <= names
    assert "moe_beyond/configs/sweeps/cross_layer.yaml" in names
    assert not any(name.startswith(("tests/", "tools/")) for name in names)


def test_its_commands_run_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    def run(*arguments: str, code: int = 0, **environment: str) -> str:
        script = (
            f"import sys; sys.path.insert(0, {str(site)!r}); import moe_beyond; "
            f"assert moe_beyond.__file__.startswith({str(site)!r}), moe_beyond.__file__; "
            f"from moe_beyond.cli.main import main; sys.exit(main({list(arguments)!r}))"
        )
        words = [sys.executable, "-c", script]
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", **environment}
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, env=variables)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    modules = ("os", "sys", "json", "ast", "abc", "csv", "ssl", "cmd")
    (tmp_path / "prompts.txt").write_text("".join(f"import {name}\n" for name in modules))
    run("collect", "--model", "small-moe", "--prompts", "prompts.txt", "--out", "traces", "--generate", "4",
        "--val-blocks", "1:4")  # fmt: skip
    run("replay", "--traces", "traces", "--budget", "10%", "--policy", "lru", "--policy", "lfu")
    configs = ("-c", "trainer/counting", "-c", "model/history", "-c", "data/traces")
    run("fit", *configs, "--data.traces=traces", "--data.max_tokens=64")
    assert (tmp_path / "runs/predictor/version_0/predictor" / WEIGHTS_FILE).is_file()
    large = next(iter(LARGE))
    listed = json.loads(run("list", "--json", "-"))["predictors"]
    assert {row["name"] for row in listed if not row["installed"]} == set(LARGE)
    error = run("evaluate", large, "--traces", "traces", code=2)
    assert error.count("\n") == 1
    assert f"{large}: its weights (24 MB) are only in the project's repository; set MOE_BEYOND_CHECKPOINTS" in error
    listed = json.loads(run("list", "--json", "-", MOE_BEYOND_CHECKPOINTS=str(shipped_folder(large).parent)))
    assert all(row["installed"] for row in listed["predictors"])
