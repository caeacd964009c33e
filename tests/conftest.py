"""Fixtures that several test folders share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from helpers import tiny_traces

from moe_beyond.traces.reader import TraceSet


@pytest.fixture
def trace_set(tmp_path: Path) -> TraceSet:
    """A small trace set with a train and a validation split."""
    return tiny_traces(tmp_path / "traces")
