"""Reading experts from files: any segments, short reads, direct I/O, bytes by source, and files that fail."""

import errno
import itertools
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_beyond.errors import UserError
from moe_beyond.runtime.slab import PAGE, SlabLayout
from moe_beyond.runtime.storage import disk_store
from moe_beyond.runtime.storage.disk_store import DiskStore
from moe_beyond.runtime.storage.expert_index import Entry, ExpertIndex, Piece, Segment
from moe_beyond.runtime.storage.store import BytesBySource, HostStore

RNG = np.random.default_rng(0)


def kinds_of_io() -> list[bool]:
    """Whether direct I/O is used: without it, and with it if the file system of temporary files has it."""
    with tempfile.NamedTemporaryFile() as file:
        try:
            os.close(os.open(file.name, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            return [False]
    return [False, True]


DIRECT_IO = kinds_of_io()


def index_of(path: Path, *entries: tuple[Segment, ...], stride: int) -> ExpertIndex:
    layout = SlabLayout.of({"w": ((stride,), torch.uint8)})
    return ExpertIndex((path,), {0: layout}, (3,), [Entry(segments, ()) for segments in entries])


def written(path: Path, size: int) -> bytes:
    content = RNG.integers(0, 256, size, np.uint8).tobytes()
    path.write_bytes(content)
    return content


def aligned(size: int, shift: int = 0) -> np.ndarray:
    whole = np.full(size + 2 * PAGE, 255, np.uint8)
    begin = -whole.ctypes.data % PAGE + shift
    return whole[begin : begin + size]


def scattered(content: bytes, segments: tuple[Segment, ...], slab: np.ndarray) -> np.ndarray:
    """The plain reference: each piece is copied on its own."""
    expected = slab.copy()
    for segment in segments:
        position = segment.offset
        for offset, length in segment.pieces:
            expected[offset : offset + length] = np.frombuffer(content[position : position + length], np.uint8)
            position += length
    return expected


@st.composite
def segments(draw: Any) -> tuple[Segment, ...]:
    """Disjoint pieces of a slab of four pages, in any order, at any place of a file of six pages."""
    cuts = draw(
        st.lists(st.sampled_from([0, 1, 63, 64, 100, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE, 4 * PAGE]), min_size=2)
    )
    places = sorted(set(cuts))
    pieces = draw(st.permutations([Piece(a, b - a) for a, b in itertools.pairwise(places)]))
    groups = []
    while pieces:
        count = draw(st.integers(1, len(pieces)))
        group, pieces = tuple(pieces[:count]), pieces[count:]
        length = sum(piece.length for piece in group)
        offset = draw(st.sampled_from([0, 1, 512, PAGE, 6 * PAGE + 5 - length]))
        groups.append(Segment(0, offset, length, group))
    return tuple(groups)


@given(
    segments=segments(),
    direct_io=st.sampled_from(DIRECT_IO),
    most=st.sampled_from([0, 1, 3]),
    short=st.sampled_from([None, 1000, PAGE]),
    shift=st.sampled_from([0, 64]),
)
@settings(max_examples=200, deadline=None)
def test_any_segments_are_read(
    segments: tuple[Segment, ...],
    direct_io: bool,
    most: int,
    short: int | None,
    shift: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("f") / "m.safetensors"
    content = written(path, 6 * PAGE + 5)
    real = os.preadv

    def preadv(handle: int, buffers: Any, offset: int, flags: int = 0) -> int:
        """Return fewer bytes than requested; under direct I/O, whole pages."""
        assert len(buffers) <= (most or disk_store.MOST_BUFFERS)
        if short is not None and not direct_io:
            return real(handle, [memoryview(buffers[0])[:short]], offset, flags)
        if short is not None:
            return real(handle, [memoryview(buffers[0])[:PAGE]], offset, flags)
        return real(handle, buffers, offset, flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        if most:
            patch.setattr(disk_store, "MOST_BUFFERS", most)
        store = DiskStore(index_of(path, segments, stride=4 * PAGE), direct_io=direct_io)
        slab = aligned(4 * PAGE, shift)
        expected = scattered(content, segments, slab)
        source = store.read(0, slab)
        store.close()
    assert np.array_equal(slab, expected)
    assert sum(source) == sum(segment.length for segment in segments)
    assert source.host == 0
    assert source.page_cache == 0 or not direct_io
    path.unlink()


def whole(length: int) -> tuple[Segment, ...]:
    return (Segment(0, 0, length, (Piece(0, length),)),)


def test_bytes_are_counted_by_source(tmp_path: Path) -> None:
    path, size = tmp_path / "m", 64 * PAGE
    written(path, size)
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    store = DiskStore(index_of(path, whole(size), stride=size))
    slab = aligned(size)
    store.read(0, slab)
    assert store.read(0, slab) == BytesBySource(page_cache=size)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    evicted = store.read(0, slab)
    assert sum(evicted) == size
    if evicted.page_cache:
        pytest.skip("the file system keeps the pages, or reads ahead before it answers")
    assert evicted == BytesBySource(disk=size)
    os.close(handle)


@pytest.mark.skipif(True not in DIRECT_IO, reason="the file system has no direct I/O")
def test_whole_pages_need_no_staging(tmp_path: Path) -> None:
    written(tmp_path / "m", 2 * PAGE)
    store = DiskStore(index_of(tmp_path / "m", whole(2 * PAGE), stride=2 * PAGE), direct_io=True)
    assert store.read(0, aligned(2 * PAGE)) == BytesBySource(disk=2 * PAGE)
    assert store.nbytes == 0
    store.read(0, aligned(2 * PAGE, shift=64))
    assert store.nbytes == 2 * PAGE


def test_a_file_system_without_the_flag_counts_as_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    written(path, PAGE)
    real, flagged = os.preadv, []

    def preadv(handle: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags:
            flagged.append(flags)
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return real(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    store = DiskStore(index_of(path, whole(PAGE), stride=PAGE))
    for _ in range(3):
        assert store.read(0, aligned(PAGE)) == BytesBySource(disk=PAGE)
    assert len(flagged) == 1


@pytest.mark.skipif(True not in DIRECT_IO, reason="the file system has no direct I/O")
def test_staging_is_one_buffer_per_thread(tmp_path: Path) -> None:
    path = tmp_path / "m"
    content = written(path, 4 * PAGE)
    segments = (Segment(0, 100, PAGE, (Piece(0, PAGE),)),)
    store = DiskStore(index_of(path, segments, stride=PAGE), direct_io=True)
    barrier, slabs = threading.Barrier(3), [aligned(PAGE) for _ in range(3)]

    def work(slab: np.ndarray) -> None:
        barrier.wait()
        for _ in range(20):
            slab[:] = 0
            store.read(0, slab)

    threads = [threading.Thread(target=work, args=(slab,)) for slab in slabs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(slab.tobytes() == content[100 : 100 + PAGE] for slab in slabs)
    assert store.nbytes == 3 * 2 * PAGE
    filled = HostStore.filled(store, 1)
    assert filled.memory[0].tobytes() == content[100 : 100 + PAGE]


def refusal(store: DiskStore) -> str:
    with pytest.raises(UserError) as error:
        store.read(0, aligned(2 * PAGE))
    return str(error.value)


@pytest.mark.parametrize("change", ["rewritten", "replaced", "truncated", "removed"])
@pytest.mark.parametrize("direct_io", DIRECT_IO)
def test_a_file_that_changes_is_detected(change: str, tmp_path: Path, *, direct_io: bool) -> None:
    path = tmp_path / "m"
    written(path, 2 * PAGE)
    os.utime(path, ns=(0, 10**9))
    store = DiskStore(index_of(path, whole(2 * PAGE), stride=2 * PAGE), direct_io=direct_io)
    store.read(0, aligned(2 * PAGE))
    match change:
        case "rewritten":
            with path.open("r+b") as file:
                file.write(b"x")
        case "replaced":
            written(tmp_path / "n", 2 * PAGE)
            os.utime(tmp_path / "n", ns=(0, 10**9))
            (tmp_path / "n").replace(path)
        case "truncated":
            os.truncate(path, PAGE)
        case "removed":
            path.unlink()
    assert refusal(store) == f"{path}: has changed since the model was loaded; load the model again"
    store.close()
    store.close()


@pytest.mark.parametrize("direct_io", DIRECT_IO)
def test_failing_reads_name_expert_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, direct_io: bool
) -> None:
    path = tmp_path / "m"
    written(path, PAGE)
    store = DiskStore(index_of(path, whole(2 * PAGE), stride=2 * PAGE), direct_io=direct_io)
    assert refusal(store) == (
        f"{path}: expert 0 of layer 3 in m cannot be read (it is truncated); check the disk and the file"
    )

    def preadv(*args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    assert "expert 0 of layer 3 in m cannot be read (Input/output error)" in refusal(store)


def test_files_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    with pytest.raises(UserError, match=r"cannot be opened \(got No such file"):
        DiskStore(index_of(path, whole(1), stride=64))
    written(path, PAGE)

    def no_direct(*args: Any) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "open", no_direct)
    with pytest.raises(UserError, match="its file system does not support direct I/O; leave direct I/O out"):
        DiskStore(index_of(path, whole(1), stride=64), direct_io=True)
