"""The log of another engine: read as it was written, or one line that names the file."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _helpers.common import TINY

from moe_beyond.errors import UserError
from moe_beyond.traces.engine_log import EngineLog, engine_table, load_engine_logs

SHAPE = (3, TINY.num_layers, TINY.top_k)
LOG = EngineLog("a", np.ones(SHAPE, np.uint8), {"wall_ms": np.array([1.0, np.nan, 2.0])}, {"prefill_s": 0.5})


def stored(log: EngineLog, **columns: pa.Array) -> bytes:
    """The file of a log, with other columns in place of its own."""
    table = engine_table([log])
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def test_a_log_is_read_as_it_was_written():
    (log,) = load_engine_logs(stored(LOG), TINY, "log")
    assert (log.sequence_id, log.summary) == ("a", {"prefill_s": 0.5})
    assert np.array_equal(log.residency, LOG.residency)
    assert np.array_equal(log.metrics["wall_ms"], LOG.metrics["wall_ms"], equal_nan=True)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PAR1", "is no log of an engine"),
        (stored(EngineLog("a", np.full(SHAPE, 7, np.uint8))), "sequence 'a': has an unknown residency (got 7)"),
        (
            stored(EngineLog("a", np.ones(SHAPE, np.uint8), {"wall_ms": np.zeros(2)})),
            "sequence 'a': 'wall_ms' has another number of tokens",
        ),
        (stored(LOG, residency=pa.array([[1]], pa.list_(pa.uint8()))), "is no log of an engine"),
        (stored(LOG, residency=pa.array([None], pa.list_(pa.uint8()))), "is no log of an engine"),
        (stored(LOG, summary=pa.array(["[" * 100_000])), "is no log of an engine"),
        (stored(LOG, summary=pa.array([json.dumps({"prefill_s": "soon"})])), "its summary must hold numbers"),
        (stored(LOG, summary=pa.array(["[]"])), "its summary must hold numbers"),
        (stored(LOG, summary=pa.array([None], pa.string())), "is no log of an engine"),
    ],
)
def test_a_damaged_log_is_named(content: bytes, says: str):
    with pytest.raises(UserError) as caught:
        load_engine_logs(content, TINY, "engine.log.parquet")
    assert str(caught.value).startswith("engine.log.parquet: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
