"""Libraries that evaluations import: none for training unless a predictor computes scores."""

import subprocess
import sys
from pathlib import Path

import pytest
from _helpers.common import tiny_traces

HEAVY = ("torch", "lightning", "transformers", "matplotlib")


@pytest.mark.parametrize(
    "arguments",
    [
        ("replay", "--budget", "25%", "--policy", "lru", "--prefetch", "oracle", "--device", "rtx3060"),
        ("plan", "--target", "30%"),
    ],
)
def test_a_replay_without_a_predictor_imports_no_library_for_training(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    tiny_traces(tmp_path / "traces")
    command = [*arguments, "--traces", str(tmp_path / "traces"), "--quiet"]
    code = (
        f"import sys; from moe_beyond.cli.main import main; assert main({command!r}) == 0; "
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
