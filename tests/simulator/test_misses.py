"""Missing experts that the host computes: counts and times by hand, and properties of every miss handling.

`test_replay_reference` compares all three with the plain reference.
"""

from dataclasses import replace

import numpy as np
import pytest
from _helpers.cache_cases import TICK, Case, cases, small_geometry, ticking
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_beyond.cache.counters import COUNTERS
from moe_beyond.errors import UserError
from moe_beyond.simulator import Replay, ReplaySettings
from moe_beyond.simulator.computing import host_seconds
from moe_beyond.simulator.devices import DEVICES
from moe_beyond.usage_profile import UsageProfile

NAMES = ("hits", "late_hits", "misses", "on_host", "demand_transfers", "prefetch_transfers")
ONE_LAYER = small_geometry(1, 4, 1)
PROFILE = UsageProfile(np.array([[0.9, 0.5, 0.1, 0.3]]), np.full((8, 8), 0.5))


def replayed(
    trace: list[list[int]],
    misses: str,
    *,
    transfer: int,
    host: float,
    expert: int = 1,
    host_flops: float = 0,
    chunk: int = 0,
    layers: int = 1,
    **changes,
):
    """Replay layers with the same demand; return the counts, and each step's ticks of stall and in all.

    The other computing of a layer takes a tick.
    """
    device = replace(
        ticking(transfer, 1, expert),
        host_gb_per_s=1 / (host * TICK),
        host_tflops=2e9 / (host_flops * TICK) / 1e12 if host_flops else None,
    )
    chosen = {"slots": 4, "policy": "lru", "bits": 8.0, "prefill_chunk": chunk, **changes}
    geometry = small_geometry(layers, 4, len(trace[0]))
    replay = Replay(geometry, ReplaySettings(device=device, misses=misses, **chosen), PROFILE if layers == 1 else None)
    replay.add(np.array([[experts] * layers for experts in trace], np.uint8), decode_start=len(trace) if chunk else 0)
    counts = dict(zip(COUNTERS, replay.counts().sum(0).tolist(), strict=True))
    [spent] = replay.times.stall_compute
    ticks = [(stall / TICK, (stall + computing) / TICK) for stall, computing in spent.tolist()]
    return tuple(counts[name] for name in NAMES), ticks


def test_the_host_computes_until_the_fill_has_arrived():
    # Routed at 1, on the host until 3; the fill crosses from 1 to 9. Routed at 4 and 7: in transit, so on the host.
    # Routed at 10: resident.
    expected = (1, 2, 1, 3, 0, 1), [(0, 3), (0, 3), (0, 3), (0, 2)]
    assert replayed([[0]] * 4, "cpu", transfer=8, host=2) == expected
    # On the device it would have computed at 10 each time.
    assert replayed([[0]] * 4, "best", transfer=8, host=2) == expected
    # On demand: from 1 to 9, and computed at 10.
    assert replayed([[0]] * 4, "move", transfer=8, host=2) == ((3, 0, 1, 0, 1, 0), [(8, 10), *[(0, 2)] * 3])


def test_best_splits_an_event():
    # Routed at 1. Expert 0: on the host at 3, on the device at 4 + 1. Expert 1: on both at 5, so it is moved.
    # Without its transfer the event would end at 3.
    assert replayed([[0, 1]], "best", transfer=3, host=2) == ((0, 0, 2, 1, 1, 1), [(2, 5)])
    assert replayed([[0, 1]], "cpu", transfer=3, host=2) == ((0, 0, 2, 2, 0, 2), [(0, 5)])
    assert replayed([[0, 1]], "move", transfer=3, host=2) == ((0, 0, 2, 0, 2, 0), [(5, 8)])


def test_tokens_of_a_chunk_count():
    # Expert 0 for two tokens, and expert 1 for one. In a tick the host computes a token, and the device an expert.
    # Expert 0 first: on the host at 3, on the device at 3 + 1. Expert 1: on both at 4, so it is moved.
    chunk = {"transfer": 2, "host": 0.5, "host_flops": 1, "chunk": 3}
    assert replayed([[0], [0], [1]], "best", **chunk) == ((0, 0, 2, 1, 1, 1), [(1, 4)])
    assert replayed([[0], [0], [1]], "cpu", **chunk) == ((0, 0, 2, 2, 0, 2), [(0, 4)])


def test_fills_go_in_the_order_of_their_events():
    # Three layers. Token 1: a0 is routed at 1, and its fill crosses from 1 to 7. b0 is routed at 4 and c0 at 7, when
    # the fill of b0 begins, until 13. Token 2: a0 is resident at 10. b0 is routed at 12 and in transit, so it ends at
    # 14. c0 is routed at 15: its fill crosses since 13, until 19, so it ends at 17.
    found, ticks = replayed([[0]] * 2, "cpu", layers=3, transfer=6, host=2)
    assert found == (1, 2, 3, 5, 0, 3)
    assert ticks == [(0, 9), (0, 8)]


@pytest.mark.slow
def test_static_experts_are_not_exchanged():
    # The warm start moves 0 and 1. Expert 2 is less popular and never enters; without the host it does.
    warm = {"transfer": 2, "host": 2, "slots": 2, "policy": "static", "warm_start": True}
    assert replayed([[2], [2], [0]], "cpu", **warm)[0] == (1, 0, 2, 2, 0, 2)
    assert replayed([[2], [2], [0]], "move", **warm)[0] == (2, 0, 1, 0, 1, 2)
    # From a cold start the popular ones replace others.
    cold = warm | {"warm_start": False}
    assert replayed([[2], [3], [0], [1], [2]], "cpu", **cold)[0] == (0, 0, 5, 5, 0, 4)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), host=st.sampled_from([1, 2, 4]), flops=st.sampled_from([0, 1]))
def test_what_holds_for_every_handling(data: st.DataObject, host: int, flops: float):
    case: Case = data.draw(cases(policies=("lru",), timed=True))
    case = case.with_ticks(3, 1, 1)
    cpu = case.with_host("cpu", host, flops)
    counts = np.array(cpu.outcome().counts)
    assert not counts[:, COUNTERS.index("demand_transfers")].any()
    assert not any(stall for stall, _ in cpu.outcome().spent)
    for handled in (cpu, case.with_host("best", host, flops), case):
        counts = dict(zip(COUNTERS, np.array(handled.outcome().counts).T, strict=True))
        assert (counts["hits"] + counts["late_hits"] + counts["misses"] == counts["accesses"]).all()
        assert (counts["on_host"] <= counts["late_hits"] + counts["misses"]).all()
        assert all(stall >= 0 for stall, _ in handled.outcome().spent)


def test_a_host_slower_than_everything_moves():
    case = Case(
        ONE_LAYER, ReplaySettings(2, bits=8.0, device=ticking(1)), [np.array([[[0]], [[1]], [[2]], [[0]]], np.uint8)],
        [np.zeros((4, 0, 1, 4), np.float32)], [0], PROFILE, (0,) * 5,
    ).with_ticks(3, 1, 1)  # fmt: skip
    assert case.with_host("best", 100).outcome() == case.outcome()


def test_seconds_of_the_host():
    # 8.65 MB at 47.5 GB/s; 2 x 8.65 million operations at 0.5e12 a second.
    from moe_beyond.geometry import PRESETS

    found = host_seconds(DEVICES["rtx4060-laptop"], PRESETS["deepseek-v2-lite"].geometry, 8)
    assert [1e6 * each for each in found] == pytest.approx([182.1, 34.6], abs=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"misses": "gpu"}, "unknown miss handling 'gpu'; did you mean 'cpu'"),
        ({"misses": "cpu"}, "--misses cpu: needs the times of a device; give --device"),
        ({"misses": "best", "device": DEVICES["rtx4060"]}, "device rtx4060 has no host_gb_per_s"),
        (
            {"misses": "cpu", "device": replace(DEVICES["rtx4060-laptop-16gb"], host_gb_per_s=40.0)},
            "device rtx4060-laptop-16gb has experts on flash",
        ),
        ({"misses": "cpu", "device": DEVICES["rtx4090"], "policy": "all_resident"}, "a bound moves its experts"),
    ],
)
def test_refusals(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        ReplaySettings(4, **changes)
