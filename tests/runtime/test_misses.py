"""Runs whose host computes missing experts: equal up to rounding, and counted; `test_as_run` repeats them."""

import pytest
import torch
from _helpers.moe_architectures import TOP_K, tiny_model

from moe_beyond.cli.main import main
from moe_beyond.errors import UserError
from moe_beyond.runtime import load_offloaded, offload

# Packed and separate projections, biases, sigmoid gates, shared experts, sums in other types.
NAMES = (
    "DeepseekV2ForCausalLM", "GptOssForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM", "Qwen3MoeForCausalLM",
    "Glm4MoeForCausalLM",
)  # fmt: skip
PROMPT = torch.tensor([[5, 9, 30, 7, 11, 40, 3, 3, 17, 60, 8, 21, 4, 33]])


def logits(model) -> torch.Tensor:
    """Return the logits of a prompt, and of a token after it."""
    with torch.inference_mode():
        output = model(PROMPT, use_cache=True)
        following = model(PROMPT[:, :1], past_key_values=output.past_key_values)
        return torch.cat([output.logits, following.logits], 1)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_equal_up_to_rounding(name: str):
    model = tiny_model(name)
    for kernel in ("grouped_mm", "batched_mm", "eager"):
        model.set_experts_implementation(kernel)
        expected = logits(model)
        for misses in ("cpu", "best"):
            with offload(model, budget=TOP_K + 2, misses=misses) as run:
                got = logits(model)
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5), (kernel, misses)
            result = run.result()
            assert result.on_host > 0
            assert result.demand_transfers == result.misses - result.on_host or misses == "best"
            assert run.telemetry.prefill.host_s > 0


def test_nothing_is_copied_on_demand_and_the_cache_follows():
    with load_offloaded("small-moe", budget="50%", tier="host", misses="cpu", keep_rows=True) as run:
        inputs = run.tokenizer("def read(path):", return_tensors="pt")
        run.model.generate(**inputs, max_new_tokens=24)
    rows, result = run.telemetry.events, run.result()
    assert result.demand_transfers == 0 == sum(row.transfers for row in rows)
    assert (
        result.on_host
        == sum(row.on_host for row in rows)
        == result.misses + sum(row.on_host - row.misses for row in rows)
    )
    assert result.hits > 0  # fills have arrived
    assert 0 < result.prefetch_transfers
    assert all((row.host_s > 0) == (row.on_host > 0) for row in rows)


def test_refusals(capsys):
    with pytest.raises(UserError, match=r"misses cpu: .*\(got tier disk\); choose tier host"):
        load_offloaded("small-moe", misses="cpu")
    with pytest.raises(UserError, match="unknown miss handling 'gpu'"):
        load_offloaded("small-moe", misses="gpu", tier="host")
    with pytest.raises(UserError, match="misses must be 'move', 'cpu' or 'best'"):
        load_offloaded("small-moe", misses=None, tier="host")
    run = ("run", "--model", "small-moe", "--prompt", "a", "--misses", "best")
    assert main([*run]) == 2
    assert "--misses best: the host computes experts from its memory (got --tier disk)" in capsys.readouterr().err
    assert main([*run, "--tier", "host", "--check"]) == 2
    assert "--check: compares bit by bit, and --misses best rounds differently" in capsys.readouterr().err
