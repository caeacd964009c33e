"""Refused collections: one line, exit code 2, and nothing half-written; finished parts stay."""

import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from _helpers.common import error_line, failure, tiny_traces
from transformers import LlamaConfig, LlamaForCausalLM

from moe_beyond.cli.main import main
from moe_beyond.pretrained import shipped_folder
from moe_beyond.traces.reader import TraceSet

SMALL = shipped_folder("small-moe")
LINES = ["def main():", "import os", "x = 1", "The list of arguments. " * 100]


@pytest.fixture
def words(tmp_path: Path) -> list[object]:
    """A collection of four prompts, a batch each."""
    (tmp_path / "prompts.txt").write_text("\n".join(LINES))
    command = ["collect", "--model", SMALL, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "traces"]
    return [*command, "--batch-size", 1, "--quiet"]


def replaced(words: list[object], option: str, value: object) -> list[object]:
    place = words.index(option) + 1
    return [*words[:place], value, *words[place + 1 :]]


@contextmanager
def no_file_larger(most: int) -> Iterator[None]:
    """What a full disk is: a write that the system refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_is_whole_and_the_same_command_goes_on(words, tmp_path, capsys) -> None:
    pieces = tmp_path / ".traces.collecting"
    names = [f"{number:06d}.parquet" for number in range(4)]
    says = "cannot be written (File too large); free some space, then run the same command again"
    with no_file_larger(16_000):  # the fourth prompt's piece is larger
        assert error_line(capsys, words) == f"{pieces / names[3]}: {says}"
    assert sorted(os.listdir(pieces)) == [*names[:3], "key.json", "rank-0.lock"]
    before = {name: (pieces / name).stat().st_mtime_ns for name in names[:3]}
    with no_file_larger(100_000):  # the pieces fit, the tokenizer in the set does not
        assert error_line(capsys, words) == f"{pieces / 'set'}: {says}"
    assert sorted(os.listdir(pieces)) == [*names, "key.json", "rank-0.lock"]
    assert before == {name: (pieces / name).stat().st_mtime_ns for name in names[:3]}
    assert main([str(word) for word in words]) == 0
    assert main([str(word) for word in replaced(words, "--out", tmp_path / "other")]) == 0
    assert sorted(os.listdir(tmp_path)) == ["other", "prompts.txt", "traces"]
    for name in os.listdir(tmp_path / "other"):
        assert (tmp_path / "traces" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_pieces_that_are_not_whole_or_not_its_own_are_named(words, tmp_path, capsys) -> None:
    pieces = tmp_path / ".traces.collecting"
    with no_file_larger(100_000):
        error_line(capsys, words)
    content = (pieces / "000001.parquet").read_bytes()
    again = "remove 000001.parquet, then run the same command again: it collects this part"
    (pieces / "000001.parquet").write_bytes(content[: len(content) // 2])
    assert error_line(capsys, words) == f"{pieces}/000001.parquet: is damaged; {again}"
    shutil.copyfile(pieces / "000000.parquet", pieces / "000001.parquet")
    assert error_line(capsys, words) == f"{pieces}/000001.parquet: belongs to other prompts; {again}"
    assert not (tmp_path / "traces").exists()
    (pieces / "000001.parquet").unlink()
    (pieces / ".000001.parquet.half.parquet").write_bytes(content[:100])  # as a kill leaves it
    assert main([str(word) for word in words]) == 0
    assert [trace.sequence_id for trace in TraceSet(str(tmp_path / "traces")).traces()] == [
        f"prompts-{number}" for number in (1, 2, 3, 4)
    ]
    assert sorted(os.listdir(tmp_path)) == ["prompts.txt", "traces"]


def test_a_kill_between_the_last_steps_is_gone_on_from(words, tmp_path, capsys) -> None:
    pieces, out = tmp_path / ".traces.collecting", tmp_path / "traces"
    with no_file_larger(100_000):
        error_line(capsys, words)
    request = (pieces / "key.json").read_bytes()
    assert main([str(word) for word in words]) == 0
    expected = {path.name: path.read_bytes() for path in out.iterdir()}

    def same() -> bool:
        return sorted(os.listdir(tmp_path)) == ["prompts.txt", "traces"] and expected == {
            path.name: path.read_bytes() for path in out.iterdir()
        }

    pieces.mkdir()  # killed when the set was whole, and not all pieces were removed
    out.rename(pieces / "set")
    (pieces / "key.json").write_bytes(request)
    assert main([str(word) for word in words]) == 0
    assert same()
    for left in (request, None):  # killed when the set had been moved out
        pieces.mkdir()
        if left:
            (pieces / "key.json").write_bytes(left)
        assert main([str(word) for word in words]) == 0
        assert same()
    pieces.mkdir()  # somebody else's set, and a collection that was only begun
    (pieces / "key.json").write_bytes(request)
    shutil.rmtree(out)
    tiny_traces(out)
    assert failure(capsys, tmp_path, words) == f"{out} already exists; choose another folder or remove it"


def test_folders_of_another_model(words, tmp_path, capsys) -> None:
    pieces, out = tmp_path / ".traces.collecting", tmp_path / "traces"
    with no_file_larger(16_000):
        error_line(capsys, words)
    request = json.loads((pieces / "key.json").read_text())
    (pieces / "key.json").write_text(json.dumps({**request, "model_id": "other/model", "quantization_bits": 4}))
    assert failure(capsys, tmp_path, words) == (
        f"{pieces}: contains an unfinished collection with different model_id and quantization_bits; rerun with the "
        "original settings, or delete the folder"
    )
    (pieces / "key.json").write_text("[]")
    assert "unfinished collection with different contents" in failure(capsys, tmp_path, words)
    (pieces / "key.json").write_text("{")
    assert "key.json: is not JSON" in failure(capsys, tmp_path, words)
    shutil.rmtree(pieces)
    tiny_traces(out)
    assert failure(capsys, tmp_path, words) == f"{out} already exists; choose another folder or remove it"


def test_prompts_that_cannot_be_read(words, tmp_path, capsys) -> None:
    text, records = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("")
    assert failure(capsys, tmp_path, words) == f"{text}: has no prompts; give a file or data set with at least one"
    text.write_bytes("naïve".encode("latin-1"))
    assert failure(capsys, tmp_path, words) == f"{text}: is not UTF-8 text (after line 0); save it as UTF-8"
    text.write_text("long " * 3000)
    line = failure(capsys, tmp_path, words)
    assert line.startswith("prompts-1: exceeds ")
    assert line.endswith(" tokens); truncate it (--max-tokens N)")
    words = replaced(words, "--prompts", records)
    for content, says in (
        ('{"text": "x"}\n{"text": " "}\n', f"{records}: line 2: text is empty"),
        (b"\xff", f"{records}: is not UTF-8 text (after line 0); save it as UTF-8"),
        (
            '{"messages": [{"role": "user", "content": "x"}], "id": "c"}\n',
            "c: is a chat, and the tokenizer has no chat template; give plain text, or the instruction-tuned model",
        ),
        (
            '{"text": "x", "id": "c"}\n{"text": "y", "id": "c"}\n',
            f"{records}: 2 prompts have the id 'c'; give every prompt its own id, or none",
        ),
    ):
        records.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert failure(capsys, tmp_path, words) == says


def test_a_dense_model_is_refused(words, tmp_path, capsys) -> None:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=2048, **size)).save_pretrained(tmp_path / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SMALL / name, tmp_path / "dense" / name)
    capsys.readouterr()
    line = failure(capsys, tmp_path, replaced(words, "--model", tmp_path / "dense"))
    assert line == "LlamaForCausalLM: has no experts module; give a mixture-of-experts model"


def test_a_folder_that_cannot_be_made(words, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "is or contains the working folder" in failure(capsys, tmp_path, replaced(words, "--out", "."))
    line = failure(capsys, tmp_path, replaced(words, "--out", tmp_path / "prompts.txt" / "traces"))
    assert str(tmp_path / "prompts.txt") in line
    assert line.endswith(("Not a directory", "File exists"))


def test_a_half_written_shard_is_not_read(tmp_path, capsys) -> None:
    traces = tiny_traces(tmp_path / "traces")
    shard = tmp_path / "traces" / traces.manifest.shards[0].file
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    for words in (["inspect", tmp_path / "traces"], ["replay", "--traces", tmp_path / "traces", "--budget", "50%"]):
        line = failure(capsys, tmp_path, words)
        assert line == f"{shard}: shard is damaged (its sha256 is not the one in manifest.json)"
