"""Failures of a run: interrupts, stores that fail, hang or change, and options that do not fit."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _helpers.moe_architectures import EXPERTS, LAYERS, TOP_K, VOCAB, tiny_model

from moe_beyond.cache.interconnect import Seconds
from moe_beyond.cache.policies import POLICIES, load_policy
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.registry import create
from moe_beyond.runtime import load_offloaded, offload
from moe_beyond.runtime.storage.store import BytesBySource, HostStore

IDS = torch.tensor([[5, 9, 30, 7, 11, 40, 3, 17, 60, 8]])
MODEL = "OlmoeForCausalLM"


@pytest.fixture
def model() -> Any:
    return tiny_model(MODEL)


def no_readers() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("moe-beyond")]


def with_reads(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
    """Call a function before each expert is read from host memory."""
    read = HostStore.read

    def reading(self: HostStore, expert: int, slab: Any) -> BytesBySource:
        before(expert)
        return read(self, expert, slab)

    monkeypatch.setattr(HostStore, "read", reading)


GENERATE_UNTIL_INTERRUPTED = """
    import threading, torch
    from _helpers.moe_architectures import tiny_model
    from moe_beyond.runtime import offload
    ids = torch.tensor([[5, 9, 30, 7]])
    model = tiny_model("OlmoeForCausalLM")
    with torch.inference_mode():
        expected = model(ids).logits
    def generate():
        with offload(model, budget=4) as run:
            steps = iter(range(10**9))
            model.register_forward_hook(lambda *_: print("running", flush=True) if next(steps) == 5 else None)
            while True:
                model.generate(ids, max_new_tokens=100, min_new_tokens=100, do_sample=False)
"""
CAUGHT = """
    try:
        generate()
    except KeyboardInterrupt:
        with torch.inference_mode():
            assert torch.equal(model(ids).logits, expected)
        assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
        print("restored", flush=True)
"""


def interrupted(script: str) -> tuple[int, str, str]:
    """Run a script, interrupt it once it generates, and return its exit status and output."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def test_ctrl_c_ends_the_process() -> None:
    status, _, errors = interrupted(GENERATE_UNTIL_INTERRUPTED + "\n    generate()\n")
    assert status == -signal.SIGINT
    assert errors.splitlines()[-1] == "KeyboardInterrupt"


def test_a_caught_ctrl_c_leaves_the_model_restored() -> None:
    status, output, errors = interrupted(GENERATE_UNTIL_INTERRUPTED + CAUGHT)
    assert (status, output.splitlines()[-1:]) == (0, ["restored"]), errors


@pytest.mark.parametrize("prefetch", ["none", "top2", "adaptive"])
@torch.inference_mode()
def test_a_run_continues_after_an_interrupt(prefetch: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupts at every place of a forward that calls Python: numbers stay exact, and nothing is counted twice."""
    tokens = torch.tensor([[5]])
    expected, decoded = model(IDS).logits, model(tokens).logits
    predictor = None if prefetch == "none" else create("history", geometry(model), VOCAB)
    main, began = threading.main_thread(), time.perf_counter()
    with offload(model, budget=TOP_K + 1, predictor=predictor, prefetch=prefetch, keep_rows=True) as run:
        mover, places = run._controller.mover, {}
        complete = 0
        for owner, name in (
            (mover, "demand"),
            (mover, "wait"),
            (mover, "_begin"),
            (mover, "_finish"),
            (run.store, "read"),
            (run.cache, "next_wave"),
            (run.pool, "give"),
            (run.pool, "end_wave"),
        ):
            original = getattr(owner, name)
            for skipped in range(0, 40, 5):
                for after in (False, True):
                    calls = iter(range(skipped))

                    def stop(*args: Any, calls: Any = calls, original: Any = original, after: bool = after) -> Any:
                        ended = threading.current_thread() is main and next(calls, None) is None
                        if ended and not after:
                            raise KeyboardInterrupt
                        result = original(*args)
                        if ended:
                            raise KeyboardInterrupt
                        return result

                    with monkeypatch.context() as patch:
                        patch.setattr(owner, name, stop)
                        try:
                            model(IDS)
                            complete += 1
                        except KeyboardInterrupt:
                            places[name] = places.get(name, 0) + 1
                    assert torch.equal(model(IDS).logits, expected)
                    assert torch.equal(model(tokens).logits, decoded)
                    complete += 2
        assert len(places) == 8, places
        assert sum(places.values()) > 60, places
        assert run.telemetry.prefill.steps + run.telemetry.decode.steps == complete
        assert [len(sequence.experts) for sequence in run.log.sequences] == [LAYERS] * complete
        assert run.log.unlogged == sum(places.values())
        assert run.cache.state.link.seconds[Seconds.NOW] < time.perf_counter() - began + 1
        if prefetch != "none":
            assert any(row.prefetch for row in run.telemetry.transfers)
    assert no_readers()


@torch.inference_mode()
def test_a_failing_reader_raises_in_the_forward(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, reads = model(IDS).logits, iter(range(9))

    def fail(expert: int) -> None:
        if next(reads, None) is None:
            raise OSError(5, f"no such luck with expert {expert}")

    with_reads(monkeypatch, fail)
    with offload(model, budget=4):
        messages = set()
        for _ in range(3):  # the run stays failed
            with pytest.raises(OSError, match="no such luck with expert") as caught:
                model(IDS)
            messages.add(str(caught.value))
        assert len(messages) == 1
        assert any("of MoE layer" in note for note in caught.value.__notes__)
    assert no_readers()
    assert torch.equal(model(IDS).logits, expected)


@torch.inference_mode()
def test_a_hanging_read_is_named(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_beyond.runtime.storage.disk_store import DiskStore

    model.save_pretrained(tmp_path)
    released = threading.Event()
    read = DiskStore.read

    def hang(self: DiskStore, expert: int, slab: Any) -> BytesBySource:
        released.wait(30)
        return read(self, expert, slab)

    with load_offloaded(tmp_path, budget=4, device="cpu", timeout_s=0.2) as run:
        monkeypatch.setattr(DiskStore, "read", hang)
        for _ in range(2):
            with pytest.raises(
                UserError,
                match=r"expert \d of layer 0 in model.safetensors: was not read within 0.2 s; check the disk",
            ):
                run.model(IDS)
        released.set()
    assert no_readers()


@pytest.mark.parametrize("damage", ["changed", "replaced", "removed", "truncated"])
@torch.inference_mode()
def test_a_checkpoint_that_changes_is_detected(damage: str, tmp_path: Path, model: Any) -> None:
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with load_offloaded(tmp_path, budget=4, device="cpu") as run:
        assert torch.equal(run.model(IDS).logits, model(IDS).logits)
        content = file.read_bytes()
        match damage:
            case "changed":
                with file.open("r+b") as opened:
                    opened.seek(len(content) - 4)
                    opened.write(b"\1\2\3\4")
            case "replaced":
                (tmp_path / "new").write_bytes(content)
                (tmp_path / "new").replace(file)
            case "removed":
                file.unlink()
            case "truncated":
                os.truncate(file, len(content) // 2)
        messages = set()
        for _ in range(2):
            with pytest.raises(UserError, match=r"model.safetensors: .*; load the model again") as caught:
                run.model(IDS)
            messages.add(str(caught.value))
        assert len(messages) == 1
    assert no_readers()


def test_a_run_that_is_never_entered_leaves_nothing(tmp_path: Path, model: Any) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="unknown policy"):
        load_offloaded(tmp_path, budget=4, device="cpu", policy="no such policy")
    with pytest.raises(UserError, match="tier"):
        load_offloaded(tmp_path, budget=4, device="cpu", tier="cloud")
    assert no_readers()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": TOP_K - 1}, "budget of 1 slots is below one event's demand of 2 experts; give at least 2 slots"),
        ({"budget": LAYERS * EXPERTS + 1}, "budget 33 is 33 slots, more than all 32 experts"),
        ({"budget": "0%"}, "budget '0%' is too small for one expert"),
        ({"budget": "1KB"}, "budget '1KB' is too small for one expert"),
        ({"budget": LAYERS * TOP_K - 1, "scope": "per-layer"}, "in each layer; give at least 8 slots"),
        ({"policy": "no such policy"}, "unknown policy 'no such policy'"),
        ({"scope": "no such scope"}, "scope"),
        ({"prefetch": "no such prefetcher"}, "prefetch"),
        ({"prefetch": "top2"}, "prefetch 'top2' needs scores; give a predictor"),
        ({"lookahead": 1}, "lookahead 1: no such scores; there is no predictor"),
        ({"policy": "static"}, "give a profile"),
        ({"policy": "moe_infinity"}, "policy moe_infinity needs scores; give a predictor, such as"),
        ({"profile": "no such profile"}, "no such profile"),
        ({"predictor": "no such predictor"}, "no such predictor"),
        *(({"policy": name}, "needs the future") for name in POLICIES if "future" in load_policy(name).NEEDS),
        ({"prefetch": "oracle"}, "needs the future"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused_in_one_line(options: dict[str, Any], message: str, model: Any) -> None:
    with pytest.raises(UserError) as caught:
        offload(model, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert no_readers()


def test_a_budget_below_one_token_has_a_notice(model: Any) -> None:
    assert offload(model, budget=LAYERS * TOP_K).strategy.notices == ()
    run = offload(model, budget=LAYERS * TOP_K - 1)
    (notice,) = run.strategy.notices
    assert notice.startswith("7 slots hold less than the 8 experts of one token: lru")
    assert "policy belief" in notice
    assert offload(model, budget=LAYERS * TOP_K - 1, policy="belief").strategy.notices == ()


def geometry(model: Any) -> Geometry:
    return offload(model).geometry


def test_predictors_that_do_not_fit_are_refused(model: Any) -> None:
    measured = geometry(model)
    other = replace(measured, num_experts=EXPERTS + 1)
    with pytest.raises(UserError, match="experts"):
        offload(model, predictor=create("history", other, VOCAB))
    with pytest.raises(UserError, match=r"vocabulary|token"):
        offload(model, predictor=create("token_table", measured, VOCAB - 1))
    unread = create("history", measured, VOCAB)
    with pytest.raises(UserError, match=r"neither policy lru nor prefetch none reads scores; leave it out"):
        offload(model, predictor=unread, prefetch="none")
    with pytest.raises(UserError, match=r"lookahead 3: no such scores; choose from"):
        offload(model, predictor=unread, lookahead=3)
