"""What was compiled is found again by later processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json
import numpy as np
from moe_beyond.cache import steps
from moe_beyond.geometry import Geometry
from moe_beyond.simulator import Replay, ReplaySettings

geometry = Geometry("small", (0, 1), 4, 2, 1, 1)
rng = np.random.default_rng(0)
experts = np.argsort(rng.random((5, 2, 4)))[..., :2].astype(np.uint8)
replay = Replay(geometry, ReplaySettings(4, policy="lfu", prefetch="top2", lookahead="token", lookaheads=("token",)))
replay.add(experts, rng.random((5, 1, 2, 4), np.float32))
stats = steps.run.stats
print(json.dumps([sum(stats.cache_hits.values()), sum(stats.cache_misses.values())]))
print(json.dumps(replay.result().to_json()))
"""


def replay_in_a_process(cache: Path) -> tuple[list[int], str]:
    """Return how often the compiled loop was found and not found on disk, and the result's bytes."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    found, result = done.stdout.splitlines()
    return json.loads(found), result


def test_a_second_process_compiles_nothing(tmp_path: Path):
    first, result = replay_in_a_process(tmp_path)
    assert first == [0, 1]
    stored = {path: path.read_bytes() for path in tmp_path.rglob("*.nb*")}
    assert stored
    second, again = replay_in_a_process(tmp_path)
    assert second == [1, 0]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.nb*")} == stored  # nothing else was compiled either
    assert again == result  # the same JSON, byte for byte, from another process
