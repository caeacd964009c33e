"""Figures of runs that end early or generate several sequences, memory by place, and the lines for a user."""

from typing import Any

import pytest
import torch
from _helpers.moe_architectures import EXPERTS, LAYERS, TOP_K, tiny_model

from moe_beyond.errors import UserError
from moe_beyond.runtime import load_offloaded, offload
from moe_beyond.runtime.memory import Memory
from moe_beyond.runtime.records import summary
from moe_beyond.runtime.records.summary import replayed_baselines, summary_json, summary_lines

IDS = torch.tensor([[5, 9, 30, 7, 11]])
NEW = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture
def model() -> Any:
    return tiny_model("OlmoeForCausalLM")


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("forwards", [0, 2])
@torch.inference_mode()
def test_an_interrupted_run_is_no_replay(forwards: int, model: Any) -> None:
    """The events of an interrupted forward moved experts, but its tokens belong to no sequence."""
    with offload(model, budget=6) as run:
        calls = []
        handle = model.model.layers[2].register_forward_pre_hook(
            lambda *_: interrupt() if len(calls) == forwards else calls.append(None)
        )
        with pytest.raises(KeyboardInterrupt):
            model.generate(IDS, **NEW)
        handle.remove()
    with pytest.raises(UserError, match=r"run: 1 forwards were interrupted, read several sequences"):
        replayed_baselines(run)


@torch.inference_mode()
def test_beams_have_a_result_without_times_of_prompts(model: Any) -> None:
    with offload(model, budget=LAYERS * EXPERTS) as run:
        model.generate(IDS, num_beams=3, **NEW)
    result = run.result()
    assert run.log.unlogged == 4
    assert result.tokens == 5 + 3  # of one sequence
    assert result.demanded == 3 * (5 + 3) * LAYERS * TOP_K
    assert result.prefill_ms is None
    assert result.tokens_per_second > 0
    with pytest.raises(UserError, match="run: 4 forwards were interrupted, read several sequences"):
        replayed_baselines(run)
    with offload(model, budget=LAYERS * EXPERTS) as run:
        model.generate(IDS, **NEW)
    assert run.result().prefill_ms == pytest.approx(1e3 * run.telemetry.prefill.seconds)


@torch.inference_mode()
def test_a_gpu_has_a_sum_of_its_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with offload(model, budget=6) as run:
        model.generate(IDS, **NEW)
        memory = run.memory()
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert run.memory().resident_bytes == memory.resident_bytes == weights - memory.host_bytes
    assert memory.totals == {"host": weights + memory.slots_bytes}
    assert "experts " in summary_lines(run, memory)[1]
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda place: {"cuda:1": 5_000_000}[place])
    on_gpu = Memory("cuda:1", 1_000_000, 2_000_000, 30_000, 4_000)
    assert on_gpu.totals == {"cuda:1": 3_000_000, "host": 34_000}
    _, times, _, line = summary_lines(run, on_gpu)
    assert "experts " not in times  # the end of a call is not the end of its kernel
    assert "; 3 MB in cuda:1 (peak 5 MB), 34 kB in host (peak " in line
    assert summary_json(run, on_gpu)["memory"]["peak_bytes"]["cuda:1"] == 5_000_000


@torch.inference_mode()
def test_the_line_of_bytes_says_how_they_count(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {}
    for dtype in ("float16", "float32"):
        with load_offloaded("small-moe", budget=48, dtype=dtype) as run:
            run.model(IDS)
            lines[dtype] = summary_lines(run, run.memory())[-2]
    assert "bytes as stored" not in lines["float16"]
    assert lines["float32"].endswith("these are bytes as stored, and the table's bytes count experts in slots")
    assert "from the page cache" in lines["float16"]
    monkeypatch.setattr(summary, "NO_WAIT", 0)
    assert "from the disk or its page cache (indistinct here)" in summary_lines(run, run.memory())[-2]


def test_the_notice_of_few_slots_is_about_the_policy(model: Any) -> None:
    demand = LAYERS * TOP_K
    few = f"{demand - 1} slots hold less than the {demand} experts of one token"
    (notice,) = offload(model, budget=demand - 1, policy="lru").strategy.notices
    lru = "lru evicts each expert before its next use and has hardly any hits"
    assert notice == f"{few}: {lru}; policy belief usually has more hits"
    (notice,) = offload(model, budget=demand - 1, policy="lfu").strategy.notices
    assert notice == f"{few}; policy belief usually has more hits"
    assert offload(model, budget=demand - 1, policy="belief").strategy.notices == ()
    assert offload(model, budget=demand, policy="lru").strategy.notices == ()
