"""What was compiled is found again by later processes."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numba
import pytest

from moe_beyond import compiling

SCRIPT = """
import json
import numpy as np
from moe_beyond.cache import engine
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import Replay, ReplaySettings

geometry = Geometry("small", (0, 1), 4, 2, 1, 1)
rng = np.random.default_rng(0)
experts = np.argsort(rng.random((5, 2, 4)))[..., :2].astype(np.uint8)
replay = Replay(geometry, ReplaySettings(4, policy="lfu", prefetch="top2", lookahead="token", lookaheads=("token",)))
replay.add(experts, rng.random((5, 1, 2, 4), np.float32))
stats = engine.run_events.stats
print(json.dumps([sum(stats.cache_hits.values()), sum(stats.cache_misses.values())]))
print(json.dumps(replay.result().to_json()))
"""


def replay_in_a_process(cache: Path) -> tuple[list[int], str, str]:
    """Return how often the compiled loop was found and not found on disk, the result's bytes, and standard error."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    found, result = done.stdout.splitlines()
    return json.loads(found), result, done.stderr


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path):
    first, result, _ = replay_in_a_process(tmp_path)
    assert first == [0, 1]
    stored = {path: path.read_bytes() for path in tmp_path.rglob("*.nb*")}
    assert stored
    second, again, _ = replay_in_a_process(tmp_path)
    assert second == [1, 0]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.nb*")} == stored  # nothing else was compiled either
    assert again == result  # the same JSON, byte for byte, from another process


ANNOUNCEMENT = "moe-beyond: compiling the cache simulator once: this takes about half a minute\n"


@pytest.mark.slow
def test_compiling_is_said_once_and_a_damaged_store_is_a_miss(tmp_path: Path):
    _, result, said = replay_in_a_process(tmp_path)
    assert said == ANNOUNCEMENT
    _, _, said = replay_in_a_process(tmp_path)
    assert said == ""
    [index] = tmp_path.rglob("engine.run_events-*.nbi")
    [data] = tmp_path.rglob("engine.run_events-*.nbc")
    index.write_bytes(index.read_bytes()[:40])
    data.write_bytes(b"")
    for expected, line in (([0, 1], ANNOUNCEMENT), ([1, 0], "")):
        assert replay_in_a_process(tmp_path) == (expected, result, line)


def doubled(number: int) -> int:
    return 2 * number


def test_code_is_kept_under_tmpdir_or_nowhere_where_nothing_else_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As with a package that is installed read-only, for a user without a home folder."""
    monkeypatch.setattr(compiling._CacheFiles, "_locator_classes", (compiling._PrivateFolder,))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    compiling._note_once.cache_clear()
    assert compiling.compiled(doubled)(21) == 42
    [stored] = tmp_path.rglob("*doubled*.nbc")
    folder = compiling.private_folder()
    assert stored.is_relative_to(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    again = compiling.compiled(doubled)
    assert again(21) == 42
    assert sum(again.stats.cache_hits.values()) == 1
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert compiling.compiled(doubled)(21) == 42
    assert [record.message.split(":")[1] for record in caplog.records] == [
        f" compiled code is stored in {folder}",
        " no folder is writable for compiled code (set NUMBA_CACHE_DIR)",
    ]


def test_a_private_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stored code is unpickled and run, so nobody else may write it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / f"moe-beyond-{os.getuid()}"
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="belongs to another user"):
        compiling.private_folder()
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="can be written by other users"):
        compiling.private_folder()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    (tmp_path / "moe-beyond-12345").mkdir()
    with pytest.raises(PermissionError, match="belongs to another user"):
        compiling.private_folder()


class Evil:
    """An object whose pickle makes a folder when it is loaded."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("loaded",)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "cut in the hash": lambda content: content[:20],
    "a flipped bit": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "zeros": lambda content: bytes(len(content)),
    "another pickle": lambda content: pickle.dumps(numba.__version__) + pickle.dumps(Evil()),
    "another pickle behind the hash": lambda content: content[:32] + pickle.dumps(Evil()),
}


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_stored_file_that_is_damaged_or_foreign_is_a_miss(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def hits() -> int:
        function = compiling.compiled(doubled)
        assert function(21) == 42
        return sum(function.stats.cache_hits.values())

    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert [hits(), hits()] == [0, 1]
    [stored] = tmp_path.rglob(f"*doubled*.{suffix}")
    content = stored.read_bytes()
    for change in DAMAGE.values():
        stored.write_bytes(change(content))
        assert [hits(), hits()] == [0, 1]
    assert not Path("loaded").exists()


def test_code_that_an_earlier_source_stored_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A kill between the writing of an index and of its code leaves the code of the source before."""
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    files = compiling.compiled(doubled)._cache._cache_file  # type: ignore[attr-defined]
    files.save("signature", "earlier")
    assert files.load("signature") == "earlier"
    files._source_stamp = "later"
    assert files.load("signature") is None
    monkeypatch.setattr(files, "_save_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.save("signature", "later")
    assert files.load("signature") is None


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
READS_ALL = ("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search")
"""The interpreter of these tests may be in a home folder that others cannot read."""


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="becomes another user")
def test_a_user_without_a_home_runs_a_package_of_another_user():
    """As with ``docker run --user`` and a package that is installed read-only."""
    script = """if True:
        import numpy as np
        from moe_beyond.predictors.numba_activation import apply_activation_numba as apply
        ones, zeros = np.ones((1, 2), np.float32), np.zeros((1, 2), np.float32)
        print(apply(zeros, ones, zeros, np.zeros(1, np.int64), np.zeros(1, np.int64), 0, 1).tolist())
        print(sum(apply.stats.cache_hits.values()))
    """
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chown(folder, 65534, 65534)
        for hits, said in ((0, f"moe-beyond: compiled code is stored in {folder}/moe-beyond-65534: neither"), (1, "")):
            done = subprocess.run(
                [*NOBODY, *READS_ALL, sys.executable, "-c", script], capture_output=True, text=True, check=False,
                env={"TMPDIR": folder, "HOME": "/nonexistent", "PYTHONPATH": os.pathsep.join(sys.path)},
            )  # fmt: skip
            assert done.stdout == f"[[0.5, 0.5]]\n{hits}\n", done.stderr
            assert done.stderr.startswith(said)
            assert done.stderr.count("\n") == (said != "")


def test_what_cannot_be_stored_is_computed_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(compiling._CacheFiles, "_locator_classes", (compiling._PrivateFolder,))
    monkeypatch.setattr(compiling._SealedFiles, "save", full)
    assert compiling.compiled(doubled)(21) == 42
    assert not list(tmp_path.rglob("*.nbc"))
