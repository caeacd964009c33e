"""Memory of a run: the parameters that stay, the slots, and the experts in host memory; nothing else of that size."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

MIB = 2**20
MARGIN = 6 * MIB
"""Activations, the cache of keys and values, stacks of threads, and free memory that allocators keep: 0.1 MiB here."""
EXPERTS = 24 * 4 * 3 * 512 * 384 * 4
"""Bytes of all experts: 216 MiB."""

# Sampled, because the kernel records the peak since the start of the process, with the imports.
SCRIPT = """
    import json, sys, threading, time, torch
    from pathlib import Path
    from _helpers.moe_architectures import tiny_model
    from moe_beyond.runtime import load_offloaded

    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

    def generate(folder, tier):
        with torch.inference_mode(), load_offloaded(folder, budget="10%", tier=tier, device="cpu") as run:
            run.model.generate(torch.arange(3, 19)[None], max_new_tokens=6, min_new_tokens=6, do_sample=False)
            return run.memory()

    folder, tier = sys.argv[1:]
    tiny_model("OlmoeForCausalLM").save_pretrained("tiny")
    generate("tiny", tier)  # imports, compiled functions, and allocators
    peak = before = resident()
    done = threading.Event()

    def sample():
        global peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    sampler = threading.Thread(target=sample)
    sampler.start()
    memory = generate(folder, tier)
    done.set()
    sampler.join()
    print(json.dumps({"peak": peak - before, **vars(memory)}))
"""
SAVE = """
    import sys, torch
    from _helpers.moe_architectures import tiny_model
    tiny_model(
        "OlmoeForCausalLM", hidden_size=512, intermediate_size=384, num_experts=24, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=2048,
    ).save_pretrained(sys.argv[1])
"""


def run(script: str, folder: Path, *words: str) -> str:
    path = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *words], check=True, cwd=folder, stdout=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": path},
    ).stdout  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    run(SAVE, folder, "model")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("tier", ["disk", "host"])
def test_the_peak_is_what_the_run_reports(tier: str, folder: Path) -> None:
    found = json.loads(run(SCRIPT, folder, "model", tier).splitlines()[-1])
    assert abs(found["slots_bytes"] - EXPERTS // 10) <= EXPERTS // 96
    assert found["staging_bytes"] == 0  # reads go straight into the slots
    assert found["host_bytes"] == (EXPERTS if tier == "host" else 0)
    held = sum(found[name] for name in ("resident_bytes", "slots_bytes", "staging_bytes", "host_bytes"))
    assert found["resident_bytes"] < EXPERTS // 8
    assert 0.8 * held <= found["peak"] <= held + MARGIN
