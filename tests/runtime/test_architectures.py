"""Offloaded models of every architecture compute the same numbers as the unmodified ones, to the last bit."""

import pytest
import torch
from _helpers.moe_architectures import EXPERTS, REFUSED, TOP_K, architectures, tiny_model

from moe_beyond.cache.counters import Counter
from moe_beyond.errors import UserError
from moe_beyond.runtime import offload
from moe_beyond.runtime.experts import experts_per_token, find_offloadable

UNDECORATED = {"DbrxForCausalLM", "JetMoeForCausalLM", "Llama4ForCausalLM", "LongcatFlashForCausalLM"}
MODELS = sorted(set(architectures()) - set(REFUSED))
NO_BFLOAT16 = {"Inkling2ForCausalLM"}  # the unmodified model computes with two types
PROMPT = torch.tensor([[5, 9, 30, 7, 11, 40, 3, 3, 17, 60, 8, 21, 4, 33]])  # demands more experts than some pools hold
# Budgets: all experts, fewer than the prompt demands, and those of one token's event.
CASES = {
    torch.float32: (("grouped_mm", ("100%", TOP_K + 1)), ("batched_mm", ("event",))),
    torch.bfloat16: (("grouped_mm", ("event",)), ("eager", ("event",))),
}


def offloadable_top_k(model) -> int:
    return experts_per_token(model, find_offloadable(model))


def outputs(model) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        tokens = model.generate(PROMPT, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        return model(PROMPT).logits, tokens


@pytest.mark.parametrize("name", [name for name in MODELS if name not in UNDECORATED])
def test_logits_and_tokens_are_equal(name):
    model = tiny_model(name)
    for dtype, cases in CASES.items():
        model.to(torch.float32 if name in NO_BFLOAT16 else dtype)
        for kernel, budgets in cases:
            model.set_experts_implementation(kernel)
            expected = outputs(model)
            for budget in budgets:
                slots = offloadable_top_k(model) if budget == "event" else budget
                with offload(model, budget=slots) as run:
                    got = outputs(model)
                assert torch.equal(got[0], expected[0]), (dtype, kernel, budget)
                assert torch.equal(got[1], expected[1]), (dtype, kernel, budget)
                if budget == "100%":  # every expert is transferred at most once
                    transfers = run.cache.state.counters[:, Counter.DEMAND_TRANSFERS]
                    assert transfers.max() <= EXPERTS
                    assert transfers.sum() == run.telemetry.transferred > 0
        with torch.inference_mode():
            assert torch.equal(model(PROMPT).logits, expected[0])  # the model is restored


@pytest.mark.parametrize("name", sorted(UNDECORATED))
def test_experts_outside_the_registry_are_refused(name):
    with pytest.raises(UserError, match="outside transformers' experts registry"):
        offload(tiny_model(name), budget="50%")
