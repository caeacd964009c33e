"""Sizing: the smallest budget, the bottleneck if there is none, and the experts to pin."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from _helpers.common import TINY, tiny_traces
from _helpers.scoring import seer

from moe_beyond.errors import UserError
from moe_beyond.evaluation.engine import evaluate
from moe_beyond.evaluation.sizing import SizingResult, parse_target, size_budgets
from moe_beyond.evaluation.strategies import CLAIRVOYANT, strategy
from moe_beyond.simulator import ReplaySettings, Result
from moe_beyond.simulator.devices import Device, device_slots, load_device
from moe_beyond.traces.reader import TraceSet

COMMON = ReplaySettings(TINY.total_experts)
SLOW = load_device("rtx3060,link_gb_per_s=0.003,memory_gb_per_s=0.02,efficiency=1,layer_us=0")
SOURCE = seer("seer", (1,))


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> TraceSet:
    return tiny_traces(tmp_path_factory.mktemp("planning") / "traces", sequences=8)


class Planned:
    """A plan for some strategies, and every replay that it made."""

    def __init__(self, traces: TraceSet, target: str, lines: list[tuple[str, str]], device: Device | None = None):
        self.traces, self.common = traces, replace(COMMON, device=device)
        self.tried: list[ReplaySettings] = []
        self.lines = [replace(strategy(self.common, 32, policy, prefetch, SOURCE)) for policy, prefetch in lines]
        ladders = [partial(self.at, line) for line in self.lines]
        self.target = parse_target(target)
        most = None if device is None else device_slots(device, TINY, 16)
        self.sizings: list[SizingResult] = size_budgets(
            TINY, self.target, ladders, self.replayed, TINY.top_k, self.bounds, most
        )

    def at(self, line: ReplaySettings, slots: int) -> ReplaySettings:
        return replace(line, slots=slots)

    def replayed(self, settings: list[ReplaySettings]) -> list[Result]:
        self.tried += settings
        return evaluate(self.traces, settings, sources=[SOURCE]).results

    def bounds(self) -> dict[str, Result]:
        found = {"lru": strategy(self.common, 32, "lru")}
        if self.common.device is not None:
            found["all_resident"] = strategy(self.common, 32, "all_resident")
            found["clairvoyant"] = strategy(self.common, 32, "belady", "oracle", name=CLAIRVOYANT)
        return dict(zip(found, evaluate(self.traces, list(found.values())).results, strict=True))


def every_budget(traces: TraceSet, policy: str, device: Device | None = None) -> dict[int, Result]:
    common = replace(COMMON, device=device)
    results = evaluate(traces, [strategy(common, slots, policy) for slots in range(2, 33)]).results
    return {result.budget_slots: result for result in results}


@pytest.mark.parametrize("device", [None, SLOW])
def test_the_smallest_budget_is_exact(traces: TraceSet, device: Device | None) -> None:
    found = {policy: every_budget(traces, policy, device) for policy in ("lru", "belady")}

    def figure(result: Result) -> float:
        return 100 * result.hit_rate if device is None else result.tokens_per_second

    for results in found.values():  # else halving would not be exact
        assert np.all(np.diff([figure(result) for result in results.values()]) >= 0)
    all_figures = sorted({figure(result) for results in found.values() for result in results.values()})
    for wanted in (max(all_figures[0], 0.01) / 2, *all_figures[3::8], all_figures[-1] - 1e-3):
        target = f"{math.floor(wanted * 1000) / 1000}{'%' if device is None else 'tok/s'}"
        planned = Planned(traces, target, [("lru", "none"), ("belady", "none")], device)
        for answer, policy in zip(planned.sizings, ("lru", "belady"), strict=True):
            reached = [slots for slots, result in found[policy].items() if planned.target.reached(result)]
            if reached:
                assert (answer.bottleneck, answer.result) == (None, found[policy][min(reached)])
            else:
                assert answer.bottleneck is not None
        assert len(planned.tried) == len(set(planned.tried))  # nothing is replayed twice
        assert len(planned.tried) <= 2 * (21 + math.ceil(math.log2(32 / 20)) + 1)


def only(traces: TraceSet, target: str, line: tuple[str, str], device: Device | None = None) -> SizingResult:
    [answer] = Planned(traces, target, [line], device).sizings
    return answer


def test_computing_is_the_bottleneck(traces: TraceSet) -> None:
    # Resident, a token takes 4 layers * (10 kB + 2 * 2 kB) / 0.02 GB/s = 2.8 ms.
    answer = only(traces, "358tok/s", ("lru", "none"), SLOW)
    assert answer.bottleneck == "computing: 357.14 tok/s with all experts resident"


def test_the_interconnect_is_the_bottleneck_of_time(traces: TraceSet) -> None:
    answer = only(traces, "357tok/s", ("lru", "none"), SLOW)
    speed = evaluate(traces, [strategy(replace(COMMON, device=SLOW), 32, "belady", "oracle")]).results[0]
    assert answer.bottleneck == (
        f"interconnect: {speed.tokens_per_second:.2f} tok/s even with clairvoyant prefetch and all slots"
    )


def test_the_policy_is_the_bottleneck_of_time(traces: TraceSet) -> None:
    common = replace(COMMON, device=SLOW)
    asked = [strategy(common, 32, "lru"), strategy(common, 32, "belady", "oracle")]
    lru, clairvoyant = (r.tokens_per_second for r in evaluate(traces, asked).results)
    answer = only(traces, f"{(lru + clairvoyant) / 2:.3f}tok/s", ("lru", "none"), SLOW)
    assert answer.bottleneck == "policy: clairvoyant prefetch over the same interconnect would reach it"
    assert answer.result.tokens_per_second == lru  # the best there is, and no more slots than for that
    assert answer.to_json(2000)["budget_slots"] is None


@pytest.mark.parametrize("room", [12, 20])
def test_sizing_stays_within_the_devices_memory(traces: TraceSet, room: int) -> None:
    # An eighth of so many kB is kept, 4 layers take 10,000 bytes, and an expert 2,000.
    device = replace(SLOW, memory_gb=(room * 2000 + 40_000) / 7 * 8 * 1e-9)
    assert device_slots(device, TINY, 16) == room
    speeds = {slots: result.tokens_per_second for slots, result in every_budget(traces, "lru", device).items()}
    within = only(traces, f"{speeds[room] - 1e-3:.4f}tok/s", ("lru", "none"), device)
    assert (within.bottleneck, within.result.budget_slots) == (None, room)
    beyond = only(traces, f"{speeds[room + 4] - 1e-3:.4f}tok/s", ("lru", "none"), device)
    assert beyond.bottleneck == f"memory: room for {room} experts; all 32 would reach {speeds[32]:.2f} tok/s"
    assert beyond.result.budget_slots == room  # the best that there is room for
    assert beyond.result.tokens_per_second == speeds[room]
    planned = Planned(traces, f"{speeds[room + 4] - 1e-3:.4f}tok/s", [("lru", "none"), ("belady", "none")], device)
    assert {settings.slots for settings in planned.tried if settings.slots > room} == {32}
    # A bottleneck that no memory removes is still named first.
    assert only(traces, "357tok/s", ("lru", "none"), device).bottleneck.startswith("interconnect: ")


def test_a_device_that_holds_no_event_has_no_plan(traces: TraceSet) -> None:
    device = replace(SLOW, memory_gb=42_000 / 7 * 8 * 1e-9)
    with pytest.raises(UserError, match="room for 1 experts, fewer than the 2 that an event may demand"):
        only(traces, "10tok/s", ("lru", "none"), device)


def test_the_working_set_is_the_bottleneck_of_hits(traces: TraceSet) -> None:
    first_uses = sum(len(np.unique(t.experts[:, layer])) for t in traces.traces() for layer in range(4))
    share = first_uses / (traces.manifest.tokens * TINY.demand_per_token)
    answer = only(traces, f"{100 * (1 - share) + 0.1:.2f}%", ("lru", "none"))
    assert (
        answer.bottleneck
        == f"working set: {share:.1%} of accesses are first uses, which only prefetching turns into hits"
    )
    assert answer.result.hit_rate == pytest.approx(1 - share)
    assert answer.to_json(2000)["budget_bytes"] is None


def test_the_interconnect_is_the_bottleneck_of_late_hits(traces: TraceSet) -> None:
    device = replace(SLOW, link_gb_per_s=0.0002)
    answer = only(traces, "95%", ("belady", "oracle"), device)
    late = answer.result.late_hits / answer.result.accesses
    assert answer.result.hit_rate < 0.95 <= answer.result.hit_rate + late
    assert answer.bottleneck == f"interconnect: {late:.1%} of accesses are late hits"


def test_the_policy_is_the_bottleneck_of_hits(traces: TraceSet) -> None:
    """A stand-in: a policy that is worse than LRU with all slots is none of ours."""
    lru = evaluate(traces, [strategy(COMMON, 32, "lru")]).results[0]

    def worse(settings: list[ReplaySettings]) -> list[Result]:
        return [replace(lru, hit_rate=0.1, budget_slots=s.slots) for s in settings]

    [answer] = size_budgets(
        TINY, parse_target("50%"), [lambda n: strategy(COMMON, n, "lru")], worse, 2, lambda: {"lru": lru}
    )  # fmt: skip
    assert answer.bottleneck == "policy: LRU with all slots would reach it"
    assert answer.result.budget_slots == 2  # of equals the smallest


def test_a_sizing_result_has_its_bytes(traces: TraceSet) -> None:
    answer = only(traces, "30%", ("lru", "none"))
    record = answer.to_json(2000.5)
    assert record["budget_slots"] == answer.result.budget_slots == record["result"]["budget_slots"]
    assert record["budget_bytes"] == math.ceil(2000.5 * answer.result.budget_slots)
    assert (record["strategy"], record["bottleneck"]) == ("lru", None)


@pytest.mark.parametrize(
    "text", ["", "90", "0%", "100.5%", "-5%", "ninety%", "nan%", "10 t/s", "tok/s", "0tok/s", "1e3tok/s", "90%%"]
)
def test_targets_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"--target: cannot be read .* write 90%"):
        parse_target(text)


def test_targets() -> None:
    assert parse_target(" 62.5 % ").hit_rate == 0.625
    assert parse_target("100%").hit_rate == 1
    assert parse_target("10.5tok/s").tokens_per_second == 10.5
