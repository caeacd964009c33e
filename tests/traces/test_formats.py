"""The registry of formats: what another package adds is read, written, described and completed like the others."""

import importlib.util
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from _helpers.common import error_line
from _helpers.recordings import SMALL, model_file, random_experts

from moe_beyond.cli.main import main
from moe_beyond.traces import TraceSet
from moe_beyond.traces.formats import FORMATS, format_reader, readable_formats, writable_formats

PACKAGE = Path(__file__).parents[1] / "example_package"


@pytest.fixture
def example(monkeypatch):
    """Registry with ``example-lines``, as if its package were installed."""
    monkeypatch.syspath_prepend(str(PACKAGE))
    entry = EntryPoint("example-lines", "moe_beyond_example.format:FORMAT", "moe_beyond.formats")
    monkeypatch.setattr(FORMATS, "_installed", {"example-lines": entry})
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "moe_beyond_example"]:
        del sys.modules[name]


def recording(folder: Path) -> np.ndarray:
    experts = random_experts(5)
    folder.mkdir()
    np.savetxt(folder / "a.txt", experts.reshape(-1, SMALL.top_k), "%d")
    return experts


def test_a_format_of_another_package_is_imported_and_exported(example, tmp_path, capsys):
    experts = recording(tmp_path / "src")
    command = ["import", "example-lines", str(tmp_path / "src"), "--out", str(tmp_path / "set")]
    command += ["--model", str(model_file(tmp_path))]
    assert main([*command, "--prompt-tokens", "2"]) == 0
    (trace,) = TraceSet(str(tmp_path / "set"))
    np.testing.assert_array_equal(trace.experts, experts)
    assert (trace.sequence_id, trace.decode_start) == ("a", 2)
    assert main(["export", "example-lines", str(tmp_path / "set"), str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/a.txt").read_bytes() == (tmp_path / "src/a.txt").read_bytes()
    capsys.readouterr()
    assert "only for example-lines (got vllm)" in error_line(
        capsys, ["import", "vllm", *command[2:], "--prompt-tokens", "2"]
    )


def test_help_completion_and_errors_list_it(example, capsys):
    for command in ("import", "export"):
        assert main([command, "--help"]) == 0
        assert "example-lines: one line of expert ids per token" in capsys.readouterr().out
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out.count("example-lines") == 2
    line = error_line(capsys, ["import", "example-line", "x", "--out", "y", "--model", "z"])
    assert line == "unknown format 'example-line'; did you mean 'example-lines'?"


def test_a_registered_format_needs_no_entry_point(monkeypatch):
    monkeypatch.setattr(FORMATS, "_registered", {})
    spec = importlib.util.spec_from_file_location("another_format", PACKAGE / "moe_beyond_example/format.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    FORMATS.register("another", module.FORMAT)
    assert format_reader("another") is module.FORMAT.reader
    assert "another" in readable_formats()
    assert "another" in writable_formats()


def test_every_format_is_read_or_written():
    assert set(FORMATS) == readable_formats().keys() | writable_formats().keys()
    assert "libcachesim" not in readable_formats()
    assert {"vllm", "llama-cpp", "libcachesim"} <= writable_formats().keys()


def test_names_of_formats_are_listed_without_reading_libraries():
    code = "import sys; from moe_beyond.traces.formats import FORMATS; list(FORMATS); print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"pyarrow", "numpy", "tokenizers", "torch"} & set(output.split())
