"""Every mixture of experts of the installed transformers: the record equals the input of its experts, and their use."""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from _helpers import moe_architectures as moes
from _helpers.moe_architectures import EXPERTS, VOCAB
from torch import Tensor, nn

from moe_beyond.collect.geometry import measured_geometry
from moe_beyond.collect.recorder import LAYER, ForwardRecord, recording
from moe_beyond.errors import UserError

FOREIGN = ("llama4", "jetmoe")  # their experts never receive the choice: it is read from the output of their routers
COUNTS_PADS_AT_THE_LEFT = ("deepseek_v4",)  # it compresses keys and values four positions at a time, whatever they hold
PARAMETERS = {
    "gpt_oss": 3 * moes.HIDDEN * moes.WIDTH + 2 * moes.WIDTH + moes.HIDDEN,  # with biases
    "nemotron_h": 2 * moes.HIDDEN * moes.WIDTH,  # without a gate
}
PROMPTS = ([5, 9, 30, 7, 11], [40, 3, 3, 17, 60, 8, 21, 4, 33])


@pytest.fixture(scope="module", params=[name for name in moes.architectures() if name not in moes.REFUSED])
def architecture(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """The folder of an architecture, and a tiny model of it."""
    return moes.architectures()[request.param], moes.tiny_model(request.param)


def test_none_is_left_out() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    known = moes.architectures()
    assert len(known.keys() - moes.REFUSED.keys()) >= 55
    for name in NAMES.values():
        for folder in (folder for folder, text in moes.mixtures().items() if f"class {name}(" in text):
            # What reads pictures too is tried as the class of its text model.
            assert name in known or (name.endswith("ForConditionalGeneration") and folder in known.values())


@dataclass
class Seen:
    """The inputs of a layer's experts, ``(N, H)`` and ``(N, K)`` twice, and their output, ``(N, H)``."""

    module: nn.Module
    hidden: Tensor
    experts: Tensor
    weights: Tensor
    output: Tensor


def watch(folder: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> dict[int, Seen]:
    """Return what one forward of the model gives to the experts of each layer; filled while it runs."""
    seen: dict[int, Seen] = {}
    for name, module in model.named_modules():
        if name.endswith(".experts") and "attn" not in name and folder not in FOREIGN:
            watch_experts(int(LAYER.search(name)[1]), module, seen, monkeypatch)
        elif name.endswith(("mlp", "feed_forward")) and folder in FOREIGN:
            {"llama4": watch_llama4, "jetmoe": watch_jetmoe}[folder](
                int(LAYER.search(f"{name}.")[1]), module, seen, monkeypatch
            )
    return seen


def wrap(module: nn.Module, record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Yield the arguments of each forward, by name, and its output."""
    forward, signature = module.forward, inspect.signature(type(module).forward)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        record(list(signature.bind(module, *args, **kwargs).arguments.values())[1:], output)
        return output

    monkeypatch.setattr(module, "forward", wrapper)


def watch_experts(layer: int, module: nn.Module, seen: dict[int, Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    def record(given: list[Tensor], output: Tensor) -> None:
        hidden, experts, weights = given
        rows = (hidden.reshape(-1, moes.HIDDEN), *(t.reshape(-1, t.shape[-1]) for t in (experts, weights)))
        seen[layer] = Seen(module, *rows, output.reshape(-1, moes.HIDDEN))

    wrap(module, record, monkeypatch)


def watch_llama4(layer: int, block: Any, seen: dict[int, Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every expert runs over every token; those that were not chosen over zeros."""
    routed: list[tuple[Tensor, Tensor]] = []

    def told_router(given: list[Tensor], output: tuple[Tensor, Tensor]) -> None:
        routed.append((given[0], output[0]))

    def told_experts(given: list[Tensor], output: Tensor) -> None:
        hidden, scores = routed.pop()
        count = int((scores > 0).sum(-1).unique())
        experts = scores.argsort(-1, descending=True)[:, :count]
        output = output.view(EXPERTS, *hidden.shape).sum(0)
        seen[layer] = Seen(block.experts, hidden, experts, scores.gather(-1, experts), output)

    wrap(block.router, told_router, monkeypatch)
    wrap(block.experts, told_experts, monkeypatch)


def watch_jetmoe(layer: int, block: Any, seen: dict[int, Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are sorted by expert: so many of the first, then of the second."""
    routed: list[tuple[Tensor, Tensor, Tensor]] = []

    def told_router(given: list[Tensor], output: tuple[Any, ...]) -> None:
        _, tokens, gates, sizes, _ = output
        dense = gates.new_zeros(len(given[0]), EXPERTS)
        dense[tokens, torch.arange(EXPERTS).repeat_interleave(torch.tensor(sizes))] = gates
        experts = dense.argsort(-1, descending=True)[:, : len(tokens) // len(given[0])]
        routed.append((given[0], experts, dense.gather(-1, experts)))

    def told_block(given: list[Tensor], output: Tensor) -> None:
        seen[layer] = Seen(block, *routed.pop(), output.view(-1, moes.HIDDEN) - block.bias)

    wrap(block.router, told_router, monkeypatch)
    wrap(block, told_block, monkeypatch)


def of_expert(module: Any, expert: int, hidden: Tensor) -> Tensor:
    """Return what one expert makes of rows, by its own parameters."""

    def linear(name: str, rows: Tensor) -> Tensor:
        weight, bias = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
        rows = rows @ (weight if getattr(module, "is_transposed", False) else weight.T)
        return rows if bias is None else rows + bias[expert]

    if not getattr(module, "has_gate", True):
        return linear("down_proj", module.act_fn(linear("up_proj", hidden)))
    gate_up = linear("gate_up_proj", hidden)
    if hasattr(module, "_apply_gate"):
        return linear("down_proj", module._apply_gate(gate_up))
    gate, up = gate_up.chunk(2, -1)
    return linear("down_proj", module.act_fn(gate) * up)


def of_dbrx_expert(module: Any, expert: int, hidden: Tensor) -> Tensor:
    """The weights of all experts, concatenated."""
    w1, v1, w2 = (w.view(EXPERTS, -1, moes.HIDDEN)[expert] for w in (module.mlp.w1, module.mlp.v1, module.mlp.w2))
    return (module.mlp.activation_fn(hidden @ w1.T) * (hidden @ v1.T)) @ w2


def of_llama4_expert(module: Any, expert: int, hidden: Tensor) -> Tensor:
    gate, up = (hidden @ module.gate_up_proj[expert]).chunk(2, -1)
    return (module.act_fn(gate) * up) @ module.down_proj[expert]


def of_jetmoe_expert(module: Any, expert: int, hidden: Tensor) -> Tensor:
    gate, up = (hidden @ module.input_linear.weight[expert].T).chunk(2, -1)
    return (module.activation(gate) * up) @ module.output_linear.weight[expert].T


LAYOUTS = {"dbrx": of_dbrx_expert, "llama4": of_llama4_expert, "jetmoe": of_jetmoe_expert}
WEIGHS_INPUT = ("llama4",)  # an expert there runs over the token times its weight


def mixture(folder: str, seen: Seen, experts: np.ndarray, weights: np.ndarray) -> Tensor:
    """Return the output of the recorded experts, weighted as recorded, for the input of the layer's experts.

    Identity experts, which a recording lacks, return their input.
    """
    output, of = torch.zeros_like(seen.hidden), LAYOUTS.get(folder, of_expert)
    for token, (chosen, shares) in enumerate(zip(experts.tolist(), weights.tolist(), strict=True)):
        row = seen.hidden[token]
        for expert, share in zip(chosen, shares, strict=True):
            if expert >= 0 and folder in WEIGHS_INPUT:
                output[token] += of(seen.module, expert, row * share)
            elif expert >= 0:
                output[token] += share * of(seen.module, expert, row)
        output[token] += row * seen.weights[token][seen.experts[token] >= EXPERTS].sum()
    return output


def test_it_records_what_the_experts_receive_and_use(architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = architecture
    seen = watch(folder, model, monkeypatch)
    with recording(model) as recorder, torch.inference_mode():
        model(torch.tensor([PROMPTS[1]]))
        experts, weights = recorder.pop_concatenated()
        assert recorder.moe_layers == tuple(sorted(seen))
        assert recorder.num_experts == EXPERTS
        varied = [len(np.unique(of_layer[of_layer >= 0])) for of_layer in experts.swapaxes(0, 1)]
        assert max(varied) > experts.shape[2]  # otherwise, recordings of other tokens or places would pass as well
        for column, layer in enumerate(recorder.moe_layers):
            received, shares = seen[layer].experts.numpy(), seen[layer].weights.float().numpy()
            there = (received < EXPERTS) & (shares != 0)
            assert there.all() or folder in moes.HOLES
            assert np.array_equal(experts[:, column], np.where(there, received, -1))
            assert np.array_equal(weights[:, column], np.where(there, shares, 0))
            found = mixture(folder, seen[layer], experts[:, column], weights[:, column])
            torch.testing.assert_close(found, seen[layer].output.float(), rtol=1e-3, atol=1e-4)


def test_the_geometry_is_that_of_one_expert(architecture) -> None:
    folder, model = architecture
    with recording(model) as recorder, torch.inference_mode():
        model(torch.tensor([PROMPTS[0]]))
        experts, _ = recorder.pop_concatenated()
    found = measured_geometry(model, "tiny", experts.shape[-1])
    assert (found.moe_layers, found.num_experts) == (recorder.moe_layers, EXPERTS)
    # Three maps between the hidden states and the expert's width, in most.
    assert found.params_per_expert == PARAMETERS.get(folder, 3 * moes.HIDDEN * moes.WIDTH)
    assert found.other_params_per_layer > moes.HIDDEN


def dense(experts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return ``(N, L, E)`` weights, 0 for experts that were not selected, in any order of the selection."""
    found = np.zeros((*experts.shape[:2], EXPERTS + 1))
    np.put_along_axis(found, np.where(experts < 0, EXPERTS, experts), weights, -1)
    return found[..., :EXPERTS]


def test_generating_routes_as_reading_what_was_written(architecture) -> None:
    _, model = architecture
    prompt = torch.tensor([PROMPTS[0]])
    with recording(model) as recorder, torch.inference_mode():
        written = generate(model, prompt, torch.ones_like(prompt), 5)
        generated, weights = recorder.pop_concatenated()
        model(written[:, :-1])  # the last token is never read
        read, read_weights = recorder.pop_concatenated()
    assert len(generated) == len(PROMPTS[0]) + 5 - 1
    assert np.array_equal(np.sort(generated), np.sort(read))
    np.testing.assert_allclose(dense(generated, weights), dense(read, read_weights), atol=1e-4)


def generate(model: Any, token_ids: Tensor, mask: Tensor, tokens: int) -> Tensor:
    return model.generate(
        token_ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )


def test_padding_changes_no_token(architecture) -> None:
    """Neither at the right, for what reads, nor at the left, for what goes on writing."""
    folder, model = architecture
    longest = max(map(len, PROMPTS))
    right, left = torch.zeros(2, longest, dtype=torch.int64), torch.zeros(2, longest, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        right[row, : len(prompt)] = left[row, longest - len(prompt) :] = torch.tensor(prompt)
    with recording(model) as recorder, torch.inference_mode():
        model(right, attention_mask=(right != 0).long(), use_cache=False)
        (read,) = recorder.pop()
        generate(model, left, (left != 0).long(), 3)
        written, *later = recorder.pop()
        for row, prompt in enumerate(PROMPTS):
            alone = torch.tensor([prompt])
            generate(model, alone, torch.ones_like(alone), 3)
            first, *steps = recorder.pop()
            begin, beyond = row * longest, (row + 1) * longest
            same(read, slice(begin, begin + len(prompt)), first, slice(None))
            if folder not in COUNTS_PADS_AT_THE_LEFT:
                same(written, slice(beyond - len(prompt), beyond), first, slice(None))
                for together, step in zip(later, steps, strict=True):
                    same(together, slice(row, row + 1), step, slice(None))


def same(one: ForwardRecord, places: slice, other: ForwardRecord, others: slice) -> None:
    found, expected = (
        dense(call.experts[rows], call.gate_weights[rows]) for call, rows in ((one, places), (other, others))
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_hash_routing_is_recorded() -> None:
    model, prompt = moes.tiny_model("DeepseekV4ForCausalLM"), PROMPTS[1]
    tables = [module.tid2eid for module in model.modules() if hasattr(module, "tid2eid")]
    assert len(tables) == 3
    with recording(model) as recorder, torch.inference_mode():
        model(torch.tensor([prompt]))
        experts, _ = recorder.pop_concatenated()
    for column, table in enumerate(tables):  # the first layers; a last one has a router
        assert np.array_equal(experts[:, column], table[prompt].numpy())


@pytest.mark.parametrize(
    ("name", "more"),
    [("DeepseekV2ForCausalLM", {"topk_method": "group_limited_greedy"}), ("DeepseekV3ForCausalLM", {})],
)
def test_groups_that_limit_the_choice_do_so_in_the_recording(name: str, more: dict[str, Any]) -> None:
    model = moes.tiny_model(name, n_group=4, topk_group=1, **more)
    with recording(model) as recorder, torch.inference_mode():
        model(torch.arange(3, VOCAB)[None])
        experts, _ = recorder.pop_concatenated()
    # Groups of two, of which one is chosen: both of its experts, and more than one group over all tokens.
    assert np.array_equal(np.sort(experts) % 2, np.broadcast_to([0, 1], experts.shape))
    assert np.array_equal(experts[..., 0] // 2, experts[..., 1] // 2)
    assert len(np.unique(experts // 2)) > 1


@pytest.mark.parametrize(("name", "bias"), [("LongcatFlashForCausalLM", 12), ("ZayaForCausalLM", 9)])
def test_identity_and_skip_experts_are_none(name: str, bias: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moes.tiny_model(name)
    for key, tensor in model.named_buffers():
        if tensor.shape == (bias,):  # of selection: let what is no expert be chosen about as often as what is
            tensor.copy_(torch.arange(bias) >= EXPERTS).mul_(0.02)
            assert key.endswith(("e_score_correction_bias", "balancing_biases"))
    seen = watch(moes.architectures()[name], model, monkeypatch)
    with recording(model) as recorder, torch.inference_mode():
        model(torch.arange(3, VOCAB)[None])
        experts, weights = recorder.pop_concatenated()
        none = experts < 0
        assert 0.1 < none.mean() < 0.9
        assert not weights[none].any()
        assert weights[~none].all()
        for column, layer in enumerate(recorder.moe_layers):
            found = mixture(moes.architectures()[name], seen[layer], experts[:, column], weights[:, column])
            torch.testing.assert_close(found, seen[layer].output, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", moes.REFUSED)
def test_what_no_module_tells_is_refused(name: str) -> None:
    model = moes.tiny_model(name, is_moe=True)
    says = "DogeCDMoE: its router has 2 logits for 8 experts; such a model cannot be recorded"
    with pytest.raises(UserError, match=says), recording(model):
        model(torch.tensor([PROMPTS[0]]))
