"""Nobody finds a half-written file or folder."""

import errno
import json
import os

import pytest

from moe_beyond.errors import UserError
from moe_beyond.files import (
    check_seal,
    file_in,
    is_earlier_result,
    parse_json,
    read_json,
    replacing,
    replacing_folder,
    sealed,
    write_json,
)


class Interrupted(Exception):
    """What goes wrong in the middle of writing."""


def interrupt(writing, name):
    """Write a file into what ``writing`` opens (or that itself, without a name), and fail."""
    with writing as temporary:
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_text("new")
        raise Interrupted


def test_replacing_puts_the_whole_file_in_place_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "file.bin"
    with replacing(path) as temporary:
        assert temporary.suffix == ".bin"  # some writers look at the suffix
        temporary.write_bytes(b"half")
        assert not path.exists()
    assert path.read_bytes() == b"half"
    assert os.listdir(path.parent) == ["file.bin"]


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    path, done = tmp_path / "file.txt", []
    monkeypatch.setattr(os, "fsync", lambda handle: done.append((os.fstat(handle).st_ino, path.exists())))
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert done == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_an_error_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(Interrupted):
        interrupt(replacing(path), "")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_follow_the_umask_and_not_the_temporary(umask, tmp_path):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("x")
        with replacing_folder(tmp_path / "folder"):
            pass
        assert os.umask(umask) == umask  # looking at the mask has not changed it
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


def write_while_another_process_writes(path, theirs):
    with replacing_folder(path) as temporary:
        (temporary / "ours").touch()
        theirs.parent.mkdir(exist_ok=True)
        theirs.touch()


def test_the_result_of_another_process_stays(tmp_path):
    for name, theirs in (("folder", "folder/theirs"), ("file", "file")):
        with pytest.raises(UserError, match=f"{name}: another process has written there meanwhile"):
            write_while_another_process_writes(tmp_path / name, tmp_path / theirs)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "folder", "theirs"]


def test_replacing_folder_appears_whole(tmp_path):
    path = tmp_path / "deep" / "folder"
    with replacing_folder(path) as temporary:
        (temporary / "a").write_text("1")
        assert not path.exists()
    assert os.listdir(path) == ["a"]
    assert os.listdir(path.parent) == ["folder"]


def test_an_error_leaves_no_folder(tmp_path):
    with pytest.raises(Interrupted):
        interrupt(replacing_folder(tmp_path / "folder"), "inner/new")
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_refused_before_anything_is_done(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "precious").write_text("1")
    entered = False
    with pytest.raises(UserError, match="folder already exists"), replacing_folder(path):
        entered = True
    assert not entered
    assert os.listdir(path) == ["precious"]
    assert os.listdir(tmp_path) == ["folder"]


def test_an_existing_file_is_refused_and_an_empty_folder_is_used(tmp_path):
    (tmp_path / "file").write_text("1")
    with pytest.raises(UserError, match="file already exists"), replacing_folder(tmp_path / "file"):
        pass
    (tmp_path / "empty").mkdir()
    with replacing_folder(tmp_path / "empty") as temporary:
        (temporary / "a").write_text("1")
    assert os.listdir(tmp_path / "empty") == ["a"]


def test_overwriting_replaces_the_whole_folder_or_nothing(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("1")
    with pytest.raises(Interrupted):
        interrupt(replacing_folder(path, overwrite=True), "new")
    assert os.listdir(path) == ["old"]
    with replacing_folder(path, overwrite=True) as temporary:
        (temporary / "new").write_text("1")
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["folder"]


def test_a_folder_that_somebody_else_finished_meanwhile_is_not_deleted(tmp_path):
    path = tmp_path / "folder"
    with pytest.raises((UserError, OSError)), replacing_folder(path):
        (path / "theirs").mkdir(parents=True)
    assert os.listdir(path) == ["theirs"]
    assert os.listdir(tmp_path) == ["folder"]


def test_json_is_the_same_bytes_every_time(tmp_path):
    content = {"b": [1, 2.5, None], "a": "é"}
    write_json(tmp_path / "one.json", content)
    write_json(tmp_path / "one.json", content)
    expected = '{\n  "b": [\n    1,\n    2.5,\n    null\n  ],\n  "a": "\\u00e9"\n}\n'
    assert (tmp_path / "one.json").read_text() == expected
    assert read_json(tmp_path / "one.json") == content


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_json_cannot_hold_writes_nothing(value, tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "a.json", {"x": value})
    assert read_json(tmp_path / "a.json") == 1
    assert os.listdir(tmp_path) == ["a.json"]


def test_unreadable_json_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)
    for damaged in (b"{", b"", b"\xff\xfe\x00"):
        (tmp_path / "bad.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"bad\.json: is not JSON"):
            read_json(tmp_path / "bad.json")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    for path in (tmp_path / "config.json", tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match=r": cannot be read \(not a regular file\)\Z"):
            read_json(path)
    with pytest.raises(UserError, match="is not a file name"):
        read_json("a\0b")


@pytest.mark.parametrize(
    "content", ['{"a": 1, "b": {"c": 1, "c": 2}}', '[{"c": 1, "c": 1}]', '{"\\u0063": 1, "c": null}']
)
def test_a_key_that_is_there_twice_is_named(content):
    with pytest.raises(UserError, match=r"^here\.json: an object has key 'c' twice; remove one of them\Z"):
        parse_json(content.encode(), "here.json")
    assert parse_json(b'{"a": {"c": 1}, "c": 1}', "here.json") == {"a": {"c": 1}, "c": 1}


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "\u00e9"}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"a": "\u00e9"}


def test_an_earlier_result_is_known_by_its_marker_and_by_holding_nothing_else(tmp_path):
    folder = tmp_path / "made"
    assert not is_earlier_result(folder, "index.json", "part-*.bin")
    folder.mkdir()
    (folder / "part-0.bin").touch()
    assert not is_earlier_result(folder, "index.json", "part-*.bin")
    (folder / "index.json").touch()
    assert is_earlier_result(folder, "index.json", "part-*.bin")
    (folder / "thesis.txt").touch()
    assert not is_earlier_result(folder, "index.json", "part-*.bin")


def test_what_has_no_room_is_named(tmp_path):
    """A library may raise it as an OSError without a file, or with the text of a Rust error."""
    told = "cannot be written (No space left on device); free some space, then run the same command again"
    for error in (OSError(errno.ENOSPC, "Error writing bytes to file"), ValueError("I/O error: full (os error 28)")):
        for making in (replacing, replacing_folder):
            with pytest.raises(UserError) as raised, making(tmp_path / "made"):
                raise error
            assert str(raised.value) == f"{tmp_path / 'made'}: {told}"
    for other in (OSError(errno.EACCES, "Permission denied"), ValueError("mine (os error 13)")):
        with pytest.raises(type(other)) as raised, replacing(tmp_path / "made"):
            raise other
        assert raised.value is other
    assert os.listdir(tmp_path) == []


def test_a_file_in_a_folder_is_found_and_nothing_outside(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside.txt"
    folder.mkdir()
    outside.write_text("x")
    (folder / "inside.txt").write_text("x")
    (folder / "alias.txt").symlink_to("inside.txt")
    (folder / "out.txt").symlink_to(outside)
    (folder / "round.txt").symlink_to("round.txt")
    (folder / "deeper").mkdir()
    for name in ("inside.txt", "alias.txt", "not there"):
        assert file_in(folder, name) == folder / name
    for name in ("../outside.txt", str(outside), "", ".", "..", "a/b", "a\\b", "a\0b", "a\nb"):
        with pytest.raises(UserError, match="is not a file name"):
            file_in(folder, name)
    for name, says in (("out.txt", "outside the folder"), ("deeper", "not a regular file"), ("round.txt", "link")):
        with pytest.raises(UserError, match=f"{name}: .*{says}"):
            file_in(folder, name)


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs_alone(tmp_path):
    for name in ("snapshots/commit", "blobs", "others"):
        (tmp_path / name).mkdir(parents=True)
    snapshot = tmp_path / "snapshots/commit"
    for place in ("blobs", "others"):
        (tmp_path / place / "hash").write_text("x")
        (snapshot / place).symlink_to(f"../../{place}/hash")
    assert file_in(snapshot, "blobs") == snapshot / "blobs"
    with pytest.raises(UserError, match="others: is a link to a file outside the folder"):
        file_in(snapshot, "others")


def test_a_seal_notices_any_change():
    content = sealed({"a": 1, "b": [1.5, None], "c": "ü"})
    check_seal(json.loads(json.dumps(content)), "here", "restore it")
    for change in ({"a": 2}, {"b": [1.5]}, {"d": 0}, {"content_sha256": None}):
        with pytest.raises(UserError, match=r"^here: content_sha256 does not match the other fields, .*; restore it$"):
            check_seal({**content, **change}, "here", "restore it")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 200_000, b'{"a":' * 200_000], ids=len)
def test_bytes_that_are_no_json_are_one_line(content):
    with pytest.raises(UserError, match=r"^here\.json: is not JSON \(.*\)\Z"):
        parse_json(content, "here.json")
