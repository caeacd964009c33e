"""Differences of selection rates, computed by hand, and separated from noise if tokens come in bursts."""

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.traces.analysis.contrast import contrast_traces, most_different_experts
from moe_beyond.traces.analysis.summary import Contrast, LayerContrast, Significance
from moe_beyond.traces.manifest import Manifest, Tokenizer
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.steering import Steering
from moe_beyond.traces.trace import Trace
from moe_beyond.traces.writer import open_writer

GEOMETRY = Geometry("g", (3,), num_experts=3, top_k=1, params_per_expert=1000, other_params_per_layer=0)


def write(folder, sequences, geometry=GEOMETRY, **manifest):
    """A set of sequences whose tokens use an expert each, the same in every layer."""
    about = Manifest(geometry, Tokenizer("t", 9), "g", 16.0, "dataset", "tests", "0")
    with open_writer(folder, replace(about, **manifest)) as writer:
        for i, experts in enumerate(sequences):
            ids = np.zeros(len(experts), np.int32)
            chosen = np.tile(np.array(experts)[:, None, None], (1, geometry.num_layers, geometry.top_k))
            writer.write(Trace(f"s{i}", "tests", ids, chosen, len(experts)), "train" if i == 0 else "validation")
    return TraceSet(str(folder))


def test_by_hand(tmp_path):
    one = write(tmp_path / "one", [[0, 0, 0, 1], [0, 1, 1, 1]])
    other = write(tmp_path / "other", [[0, 1, 1, 1], [1, 1, 0, 1]])
    found = contrast_traces(one, other).to_json()
    assert found["other"]["traces"] == str(tmp_path / "other")
    assert (found["other"]["tokens"], found["other"]["sequences"]) == (8, 2)
    (row,) = found["by_layer"]
    # Expert 0 has 4 of 8 tokens here, 2 of 8 there, 6 of 16 in both; 2 has none anywhere.
    error = math.sqrt(0.375 * 0.625 / 4)
    assert row["layer"] == 3
    assert row["rate"] == [0.5, 0.5, 0]
    assert row["other_rate"] == [0.25, 0.75, 0]
    assert row["difference"] == [0.25, -0.25, 0]
    assert row["standard_error"] == [round(error, 6), round(error, 6), 0]
    assert row["z"] == [round(0.25 / error, 6), round(-0.25 / error, 6), None]
    # Its sequences have 3 and 1 where 2 are expected: 2/1 * (1 + 1) / 8^2 = 1/16. There both are as expected.
    assert row["z_clustered"] == [1, -1, None]
    assert found["significant"] == {
        "threshold": round(NormalDist().inv_cdf(1 - 0.05 / 6), 6),
        "z": 0,
        "z_clustered": 0,
    }
    # The spread between sequences is unknown for a single sequence.
    (row,) = contrast_traces(one, other, "train").to_json()["by_layer"]
    assert (row["rate"], row["z_clustered"]) == ([0.75, 0.25, 0], [None] * 3)


def test_bursts_are_not_taken_for_a_difference(tmp_path):
    # 40 sequences a set, whose 50 tokens all use one expert of three, drawn alike for both sets.
    rng = np.random.default_rng(0)
    one, other = (write(tmp_path / name, [[int(rng.integers(3))] * 50 for _ in range(40)]) for name in ("a", "b"))
    result = contrast_traces(one, other).significant
    assert (result.z > 0, result.z_clustered) == (True, 0)
    # And a difference that is there is found: expert 2 instead of 0 in every other sequence.
    changed = write(tmp_path / "c", [[0, 1, 2 * (i % 2), 1] for i in range(40)])
    plain = write(tmp_path / "d", [[0, 1, 2 * (i % 8 == 0), 1] for i in range(40)])
    assert contrast_traces(changed, plain).significant.z_clustered == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_id": "h"}, r"its model is not that of \S+ \(got h and g\)"),
        ({"revision": "2"}, r"its revision is not that of \S+ \(got 2 and 1\)"),
        (
            {"geometry": replace(GEOMETRY, num_experts=4)},
            r"its geometry is not that of \S+ \(got 1 MoE layers x 4 experts, top-1 in layers 3 and ",
        ),
        (
            {"geometry": replace(GEOMETRY, moe_layers=(4,))},
            r"its geometry is not that of \S+ \(got .* in layers 4 and .* in layers 3\);",
        ),
    ],
    ids=["model", "revision", "experts", "layers"],
)
def test_experts_of_another_model_are_refused(changes, says, tmp_path):
    one, other = write(tmp_path / "one", [[0]], revision="1"), write(tmp_path / "other", [[0]], **changes)
    with pytest.raises(UserError, match=f"--contrast {tmp_path}/other: {says}"):
        contrast_traces(one, other)
    contrast_traces(one, write(tmp_path / "unknown", [[0]]))  # whose revision nobody wrote down


def test_a_split_that_the_other_lacks_is_named(tmp_path):
    one, other = write(tmp_path / "one", [[0], [0]]), write(tmp_path / "other", [[0]])
    with pytest.raises(UserError, match=r"other"):
        contrast_traces(one, other, "validation")


def test_slots_without_an_expert_activate_none(tmp_path):
    one, other = write(tmp_path / "one", [[0, -1, 2, 2]]), write(tmp_path / "other", [[0, 1, 2, 2]])
    (row,) = contrast_traces(one, other).to_json()["by_layer"]
    assert (row["rate"], row["other_rate"]) == ([0.25, 0, 0.5], [0.25, 0.25, 0.5])


def test_most_different_experts_by_hand():
    geometry = Geometry("g", (3, 5), num_experts=4, top_k=2, params_per_expert=10, other_params_per_layer=0)
    layers = {3: [0.5, 0.4, 0.3, -0.6], 5: [0.1, -0.2, 0.0, -0.3]}
    unused = [0.0] * 4
    rows = (LayerContrast(n, unused, unused, values, unused, unused, unused) for n, values in layers.items())
    result = Contrast({}, Significance(3.0, 0, 0), tuple(rows))
    # Layer 3 has room for two that are on; what does not differ is not chosen.
    assert most_different_experts(result, geometry, 3, 2) == Steering(((3, 0), (3, 1), (5, 0)), ((3, 3), (5, 3)))
    for on, off, said in ((4, 0, "--on: only 3 experts"), (0, 4, "--off: only 3 experts")):
        with pytest.raises(UserError, match=said):
            most_different_experts(result, geometry, on, off)
