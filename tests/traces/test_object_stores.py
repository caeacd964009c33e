"""Trace sets in an object store: cached, retried, read ahead, and each file downloaded once."""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import error_line, tiny_traces
from _helpers.object_store import KEY, SECRET, ObjectStore, object_store

from moe_beyond.cli.main import main
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.errors import UserError
from moe_beyond.traces import storage
from moe_beyond.traces.file_cache import FileCache
from moe_beyond.traces.reader import TraceSet

URL = "s3://sets/traces"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_traces(tmp_path_factory.mktemp("store") / "traces", sequences=40).folder)


@pytest.fixture(scope="module")
def server(folder: Path):
    pytest.importorskip("s3fs")
    with object_store(folder) as store:
        yield store


@pytest.fixture
def store(server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    import fsspec
    import s3fs

    server.faults.clear()
    server.bodies.clear()
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "MOE_BEYOND_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server.endpoint})  # read from FSSPEC_S3 at import
    monkeypatch.setenv("FSSPEC_S3", json.dumps({"endpoint_url": server.endpoint}))
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.01)
    s3fs.S3FileSystem.clear_instance_cache()
    return server


def shards(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.parquet")]


def test_every_shard_is_downloaded_once(store: ObjectStore, folder: Path) -> None:
    for _ in range(2):  # the second time from the cache
        for here, there in zip(TraceSet(str(folder)), TraceSet(URL), strict=True):
            assert here.sequence_id == there.sequence_id
            np.testing.assert_array_equal(here.experts, there.experts)
    assert [store.bodies[name] for name in shards(folder)] == [1] * len(shards(folder))


@pytest.mark.parametrize("fault", ["refuse", "drop", "cut"])
def test_a_broken_download_is_repeated(store: ObjectStore, folder: Path, fault: str) -> None:
    store.faults = {name: [fault] for name in (*shards(folder), "manifest.json")}
    assert len(list(TraceSet(URL))) == 40
    assert not any(store.faults.values())
    assert [store.bodies[name] for name in shards(folder)] == [1] * len(shards(folder))


@pytest.mark.slow
def test_a_store_that_stays_broken_is_one_line_without_secrets(store: ObjectStore, capsys) -> None:
    store.faults = {"manifest.json": ["refuse"] * 200}
    line = error_line(capsys, ["inspect", URL])
    assert line.startswith(f"{URL}/manifest.json: cannot be read 5 times (")
    assert KEY not in line
    assert SECRET not in line


def test_a_damaged_shard_of_the_store_is_named(store: ObjectStore, folder: Path, monkeypatch) -> None:
    traces = TraceSet(URL)
    [first, *_] = traces.manifest.shards
    monkeypatch.setattr(traces._storage._files, "cat_file", lambda path: b"x" * first.bytes)
    with pytest.raises(UserError, match=rf"^{URL}/{first.file}: shard is damaged"):
        traces.read(first)
    assert not list(Path(os.environ["MOE_BEYOND_CACHE"]).glob(first.sha256))


def test_commands_read_urls_and_write_what_they_write_for_a_folder(
    store: ObjectStore, folder: Path, tmp_path: Path
) -> None:
    for place in (str(folder), URL):
        words = ["replay", "--traces", place, "--budget", "8", "--json", str(tmp_path / place.replace("/", "_"))]
        assert main([*words, "--quiet"]) == 0
    assert (tmp_path / str(folder).replace("/", "_")).read_bytes() == (tmp_path / URL.replace("/", "_")).read_bytes()
    batches = [list(TraceDataModule(place).train_dataloader()) for place in (str(folder), URL)]
    assert [batch.sequence_ids for batch in batches[0]] == [batch.sequence_ids for batch in batches[1]]
    assert max(store.bodies[name] for name in shards(folder)) == 1


@pytest.mark.slow
def test_two_workers_download_every_shard_once(store: ObjectStore, folder: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        path = tmp_path / f"{workers}.json"
        assert main(["inspect", URL, "--workers", str(workers), "--json", str(path), "--quiet"]) == 0
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    assert max(store.bodies[name] for name in shards(folder)) == 1


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from fsspec.registry import _registry

    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    line = error_line(capsys, ["inspect", URL])
    assert line == f"{URL}: s3:// is read by another package; install s3fs, as 'moe-beyond[s3]' does"


def test_the_cache_keeps_its_limit_and_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    cache, fetched = FileCache(tmp_path / "cache", limit=250), []

    def get(number: int) -> bytes:
        content = bytes([number]) * 100
        sha256 = storage._sha256(content)

        def fetch() -> bytes:
            fetched.append(number)
            return content

        return cache.get(sha256, fetch)

    for number in (1, 2, 1, 3, 1, 2):  # 3 replaces 2, the last one replaces 3
        assert get(number) == bytes([number]) * 100
    assert fetched == [1, 2, 3, 2]
    kept = [path for path in cache.folder.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in kept) <= 250
    kept[0].write_bytes(b"damaged")
    fetched.clear()
    assert [get(number) for number in (1, 2)] == [bytes([number]) * 100 for number in (1, 2)]
    assert len(fetched) == 1


def test_processes_share_a_cache(tmp_path: Path) -> None:
    content = b"shard" * 1000
    (tmp_path / "origin").write_bytes(content)
    context = multiprocessing.get_context("spawn")
    source = (
        "from pathlib import Path; from moe_beyond.traces.file_cache import FileCache; import os, time\n"
        f"def fetch():\n open('{tmp_path}/log', 'a').write('x'); time.sleep(0.2)\n"
        f" return Path('{tmp_path}/origin').read_bytes()\n"
        f"assert FileCache(Path('{tmp_path}/cache')).get('{storage._sha256(content)}', fetch) == b'shard' * 1000"
    )
    processes = [context.Process(target=exec, args=(source, {})) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    assert (tmp_path / "log").read_text() == "x"


def test_a_cache_that_cannot_be_written_is_a_note(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("x")
    cache = FileCache(tmp_path / "file" / "cache", limit=100)
    assert cache.get(storage._sha256(b"a"), lambda: b"a") == b"a"
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["many", "-1", "inf"])
def test_a_limit_that_is_no_size(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_BEYOND_CACHE_GB", text)
    with pytest.raises(UserError, match=r"^MOE_BEYOND_CACHE_GB: must be a size in gigabytes"):
        FileCache()
