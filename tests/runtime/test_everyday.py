"""Offloaded models in everyday use: generation modes, several models and runs, compilation, gradients, restoration."""

import copy
import gc
import pickle
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _helpers.moe_architectures import EXPERTS, LAYERS, TOP_K, tiny_model
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_beyond.cache.counters import Counter
from moe_beyond.errors import UserError
from moe_beyond.runtime import load_offloaded, offload

IDS = torch.tensor([[5, 9, 30, 7, 11, 40, 3, 17, 60, 8]])
REPEATED = torch.tensor([[5, 9, 30, 7, 11, 5, 9, 30, 7, 11, 5, 9, 30]])
SHORT, LONG = [5, 9, 30, 7], [11, 40, 3, 3, 17, 60, 8]
LEFT, RIGHT = torch.tensor([[0, 0, 0, *SHORT], LONG]), torch.tensor([[*SHORT, 0, 0, 0], LONG])
LENGTH = {"max_new_tokens": 6, "min_new_tokens": 6}
BUDGETS = (LAYERS * EXPERTS // 4, TOP_K + 1)  # the second holds less than a prompt's event


def generate(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    torch.manual_seed(3)
    scored = model.generate(ids, **LENGTH, output_logits=True, return_dict_in_generate=True, **options)
    return torch.cat([scored.sequences.flatten(), *(logits.flatten() for logits in scored.logits)])


def draft() -> Any:
    return tiny_model("MixtralForCausalLM")


def in_training(model: Any) -> torch.Tensor:
    model.train()
    torch.manual_seed(3)
    try:
        return model(IDS, labels=IDS).loss
    finally:
        model.eval()


MODES = {
    "greedy": lambda model: generate(model, do_sample=False),
    "sampling": lambda model: generate(model, do_sample=True, temperature=0.7, top_k=20),
    "beams": lambda model: generate(model, num_beams=3, num_return_sequences=2),
    "sampled beams": lambda model: generate(model, num_beams=3, do_sample=True),
    "padded left": lambda model: generate(model, LEFT, attention_mask=(LEFT > 0).long(), do_sample=False),
    "padded right": lambda model: model(RIGHT, attention_mask=(RIGHT > 0).long()).logits,
    "static cache": lambda model: generate(model, cache_implementation="static", do_sample=False),
    "no cache": lambda model: generate(model, use_cache=False, do_sample=False),
    "chunked prefill": lambda model: generate(model, prefill_chunk_size=4, do_sample=False),
    "prompt lookup": lambda model: generate(model, REPEATED, prompt_lookup_num_tokens=3, do_sample=False),
    "draft model": lambda model: generate(model, assistant_model=draft(), do_sample=False),
    "sampled drafts": lambda model: generate(model, assistant_model=draft(), do_sample=True),
    "early exit": lambda model: generate(model, assistant_early_exit=2, do_sample=False),
    "embeddings": lambda model: model(inputs_embeds=model.get_input_embeddings()(IDS)).logits,
    "router logits": lambda model: torch.cat(model(IDS, output_router_logits=True).router_logits),
    "hidden states": lambda model: torch.stack(model(IDS, output_hidden_states=True).hidden_states),
    "training mode": in_training,
}
CASES = [("OlmoeForCausalLM", mode) for mode in MODES] + [
    (name, mode)
    for name in ("DeepseekV2ForCausalLM", "GptOssForCausalLM", "Qwen3NextForCausalLM")
    for mode in ("sampling", "beams", "padded left", "padded right")
]


@pytest.mark.parametrize(("name", "mode"), CASES)
@torch.no_grad()
def test_modes_are_exact(name: str, mode: str) -> None:
    model = tiny_model(name)
    expected = MODES[mode](model)
    for slots in BUDGETS:
        with offload(model, budget=slots) as run:
            got = MODES[mode](model)
            assert torch.equal(got, expected), slots
            assert run.telemetry.transferred > 0
    assert torch.equal(MODES[mode](model), expected)


@torch.no_grad()
def test_the_cache_stays_warm_across_prompts() -> None:
    model = tiny_model("OlmoeForCausalLM")
    with offload(model, budget="100%") as run:
        generate(model, do_sample=False)
        first = run.cache.state.counters.sum(0)
        generate(model, do_sample=False)
        second = run.cache.state.counters.sum(0) - first
    assert first[Counter.MISSES] == run.telemetry.transferred > 0
    assert second[Counter.MISSES] == 0
    assert second[Counter.HITS] == second[Counter.ACCESSES] == first[Counter.ACCESSES]
    assert [sequence.steps for sequence in run.log.sequences] == [[10, 1, 1, 1, 1, 1]] * 2


class Before:
    """State of a model and of the process, to be found again after a run."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.state = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in model.state_dict().items()}
        self.rest = self.found()

    def found(self) -> tuple[Any, ...]:
        modules = list(self.model.modules())
        hooks = [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in modules]
        names = [(set(vars(module)), list(module._parameters)) for module in modules]
        hooked = list(self.model._state_dict_pre_hooks), list(self.model._forward_hooks_always_called)
        return hooks, names, hooked, dict(ALL_EXPERTS_FUNCTIONS.items())

    def check(self) -> None:
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("moe-beyond")]
        assert self.found() == self.rest
        now = self.model.state_dict()
        assert list(now) == list(self.state)
        for key, (address, values) in self.state.items():
            assert now[key].data_ptr() == address
            assert torch.equal(now[key], values)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@torch.inference_mode()
def test_leaving_restores_the_model() -> None:
    model = tiny_model("OlmoeForCausalLM")
    before, expected = Before(model), model(IDS).logits
    with offload(model, budget=3):
        assert all(module.gate_up_proj is None for module in model.modules() if hasattr(module, "gate_up_proj"))
        assert torch.equal(model(IDS).logits, expected)
    before.check()
    handle = model.model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), offload(model, budget=3):
        model(IDS)
    handle.remove()
    before.check()
    run, other = offload(model, budget=3), offload(model, budget=3)
    run._layers[LAYERS - 1].module.__dict__["_moe_beyond_slots"] = None  # the last layer cannot be taken
    with pytest.raises(UserError, match="is offloaded already"):
        run.__enter__()
    del other._layers[LAYERS - 1].module.__dict__["_moe_beyond_slots"]
    before.check()
    with other:
        assert torch.equal(model(IDS).logits, expected)
    before.check()
    with pytest.raises(UserError, match="a run is entered once; create another one"):
        other.__enter__()


@torch.inference_mode()
def test_leaving_frees_the_slots() -> None:
    model = tiny_model("OlmoeForCausalLM")
    for kernel in ("grouped_mm", "eager"):
        model.set_experts_implementation(kernel)
        with offload(model, budget=3) as run:
            model(IDS)
            address, size = run.pool.memory.untyped_storage().data_ptr(), run.pool.nbytes
        held = [each for each in gc.get_objects() if type(each) is torch.Tensor]
        assert address not in [each.untyped_storage().data_ptr() for each in held if each.layout is torch.strided]
        assert run.pool.nbytes == run.memory().slots_bytes == size > 0
        assert run.result().tokens == IDS.numel()


@torch.inference_mode()
def test_a_kernel_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tiny_model("OlmoeForCausalLM"), tiny_model("MixtralForCausalLM")
    native, calls = ALL_EXPERTS_FUNCTIONS["grouped_mm"], []

    def own(*args: Any) -> torch.Tensor:
        calls.append(1)
        return native(*args)

    for model in (one, two):
        model.set_experts_implementation("grouped_mm")
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", own)
    with offload(one, budget=3):
        one(IDS)
        assert not calls
        two(IDS)
        assert len(calls) == LAYERS
    assert ALL_EXPERTS_FUNCTIONS["grouped_mm"] is own


@torch.inference_mode()
def test_two_models_and_nested_runs() -> None:
    one, two = tiny_model("OlmoeForCausalLM"), tiny_model("MixtralForCausalLM")
    before = [Before(one), Before(two)]
    expected = [model(IDS).logits for model in (one, two)]
    with offload(one, budget=3) as run:
        with offload(two, budget=5, policy="lfu") as other:
            for _ in range(2):
                assert torch.equal(one(IDS).logits, expected[0])
                assert torch.equal(two(IDS).logits, expected[1])
            assert run.pool.memory.data_ptr() != other.pool.memory.data_ptr()
            with pytest.raises(UserError, match="OlmoeForCausalLM: is offloaded already; end that run first"):
                offload(one, budget=3)
        before[1].model.state_dict()
        assert torch.equal(two(IDS).logits, expected[1])
        assert torch.equal(one(IDS).logits, expected[0])
    for each in before:
        each.check()


@torch.inference_mode()
def test_the_inner_run_may_outlive_the_outer_one() -> None:
    one, two = tiny_model("OlmoeForCausalLM"), tiny_model("MixtralForCausalLM")
    before = [Before(one), Before(two)]
    expected = two(IDS).logits
    first, second = offload(one, budget=3), offload(two, budget=3)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(two(IDS).logits, expected)
    second.__exit__(None, None, None)
    for each in before:
        each.check()


def test_gradients_are_refused() -> None:
    model = tiny_model("OlmoeForCausalLM")
    with torch.no_grad():
        expected = model(IDS).logits
    with offload(model, budget=4):
        for _ in range(2):
            with pytest.raises(UserError, match=r"computes no gradients.*; call it under torch.inference_mode\(\)$"):
                model(IDS)
        model.requires_grad_(False)
        assert torch.equal(model(IDS).logits, expected)
        model.requires_grad_(True)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, expected)


@torch.inference_mode()
def test_parts_of_a_model_and_its_state_are_refused(tmp_path: Path) -> None:
    model = tiny_model("OlmoeForCausalLM")
    expected = model(IDS).logits
    with offload(model, budget=4):
        with pytest.raises(UserError, match="its experts ran outside of its own call; call the model itself"):
            model.model(IDS)
        assert torch.equal(model.forward(IDS).logits, expected)
        with pytest.raises(UserError, match="its state has no experts while it is offloaded; save it after the run"):
            model.save_pretrained(tmp_path)
        assert torch.equal(model(IDS).logits, expected)


@torch.inference_mode()
def test_a_model_that_was_loaded_without_experts_runs_in_its_run_alone(tmp_path: Path) -> None:
    model = tiny_model("OlmoeForCausalLM")
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    run = load_offloaded(tmp_path, budget=5, device="cpu")
    with pytest.raises(UserError, match="OlmoeForCausalLM: was loaded without its experts; call it within its run"):
        run.model(IDS)
    with run:
        assert torch.equal(run.model(IDS).logits, expected)
    with pytest.raises(UserError, match="was loaded without its experts"):
        run.model(IDS)


@pytest.mark.parametrize("whole", [False, True], ids=["graph breaks", "one graph"])
@torch.inference_mode()
def test_compilation_is_refused(whole: bool) -> None:
    model = tiny_model("OlmoeForCausalLM")
    expected = model(IDS).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=whole)
    if not whole:
        assert torch.equal(compiled(IDS).logits, expected)  # compiled before the run
    model.model.layers[1].mlp.experts.compile(backend="eager", fullgraph=whole)
    refusal = (Exception, UserError)[not whole]
    with offload(model, budget=4) as run:
        for call in (compiled, model, torch.compile(model.__call__, backend="eager", fullgraph=whole)):
            with pytest.raises(refusal, match=r"an offloaded model cannot be compiled, .* disable_compile=True"):
                call(IDS)
        model.model.layers[1].mlp.experts._compiled_call_impl = None
        assert torch.equal(run.model(IDS).logits, expected)
    if not whole:
        assert torch.equal(compiled(IDS).logits, expected)


@torch.inference_mode()
def test_multimodal_models_run_by_their_own_call() -> None:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {
        "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "num_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 64, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
              "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision)).eval()
    expected = generate(model, do_sample=False)
    with offload(model, budget=5) as run:
        assert torch.equal(generate(model, do_sample=False), expected)
    assert [sequence.steps for sequence in run.log.sequences] == [[10, 1, 1, 1, 1, 1]]
    assert run.geometry.num_experts == 8


@pytest.mark.parametrize("scope", ["global", "per-layer"])
@torch.inference_mode()
def test_scopes_and_types(scope: str) -> None:
    model = tiny_model("GptOssForCausalLM").to(torch.bfloat16)
    expected = generate(model, do_sample=False)
    with offload(model, budget=LAYERS * (TOP_K + 1), scope=scope) as run:
        assert torch.equal(generate(model, do_sample=False), expected)
        assert run.memory().slots_bytes == LAYERS * (TOP_K + 1) * run.pool.stride
    assert run.strategy.settings.bits == 16


@torch.inference_mode()
def test_a_model_of_two_types() -> None:
    model = tiny_model("OlmoeForCausalLM")
    for module in model.modules():
        if type(module).__name__ == "OlmoeExperts":
            module.to(torch.bfloat16)
            module.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(), args[1], args[2].bfloat16()))
            module.register_forward_hook(lambda _, args, output: output.float())
    expected = generate(model, do_sample=False)
    for slots in BUDGETS:
        with offload(model, budget=slots) as run:
            assert torch.equal(generate(model, do_sample=False), expected)
            resident = run.memory().resident_bytes
    layers = run._layers.values()
    experts = sum(getattr(each.module, field.name).nbytes for each in layers for field in each.layout.fields)
    whole = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert resident == whole - experts


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """Results of calls in a thread each, which begin at once."""
    together, results = threading.Barrier(len(calls)), [None] * len(calls)

    def work(number: int) -> None:
        together.wait()
        results[number] = calls[number]()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_four_threads_generate_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = tiny_model("OlmoeForCausalLM")
    prompts = [IDS.roll(number, 1) for number in range(4)]  # of the same length: only their turns tell them apart
    calls = [partial(model.generate, ids, max_new_tokens=8, do_sample=False) for ids in prompts]
    expected = [call() for call in calls]
    with offload(model, budget="50%") as run:
        found = in_threads(*(partial(run.model.generate, *call.args, **call.keywords) for call in calls))
    assert all(map(torch.equal, found, expected))
    assert run.log.unlogged == 0
    read = [np.concatenate(sequence.token_ids).tolist() for sequence in run.log.sequences]
    assert sorted(read) == sorted(each[0, :-1].tolist() for each in expected)
    assert "generate" not in vars(model)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("moe-beyond")]
    assert not list(tmp_path.iterdir())


@torch.inference_mode()
def test_forwards_of_several_threads_are_not_one_sequence() -> None:
    model = tiny_model("OlmoeForCausalLM")
    others = IDS.roll(1, 1)
    expected = model(others).logits
    with offload(model, budget="50%") as run:
        cache = model(IDS).past_key_values
        [logits] = in_threads(torch.inference_mode()(lambda: model(others).logits))
        model(IDS[:, :1], past_key_values=cache)  # as long as the other thread's
        assert torch.equal(logits, expected)
        assert run.log.unlogged == 1
        cache = model(IDS).past_key_values
        in_threads(torch.inference_mode()(lambda: model(IDS[:, :1], past_key_values=cache)))  # handed over
    assert [sequence.steps for sequence in run.log.sequences] == [[10], [10], [10, 1]]


def test_a_run_ends_between_two_forwards_of_another_thread(tmp_path: Path) -> None:
    tiny_model("OlmoeForCausalLM").save_pretrained(tmp_path)
    began, errors = threading.Event(), []

    def generate() -> None:
        try:
            run.model.generate(IDS, max_new_tokens=10_000, min_new_tokens=10_000, do_sample=False)
        except UserError as error:
            errors.append(str(error))

    with load_offloaded(tmp_path, budget=5, device="cpu") as run:
        run.model.register_forward_hook(lambda *_: began.set())
        thread = threading.Thread(target=generate)
        thread.start()
        assert began.wait(10)
    thread.join(10)
    assert errors == ["OlmoeForCausalLM: was loaded without its experts; call it within its run"]
    assert not [each for each in threading.enumerate() if each.name.startswith("moe-beyond")]


def test_an_interrupted_forward_leaves_the_model_to_other_threads() -> None:
    model = tiny_model("OlmoeForCausalLM")
    with torch.inference_mode():
        expected = model(IDS).logits
    results: list[Any] = []

    def forward() -> None:
        try:
            with torch.inference_mode():
                results.append(model(IDS).logits)
        except UserError as error:
            results.append(error)

    with offload(model, budget="50%") as run:
        for layer in (0, LAYERS - 1):
            handle = model.model.layers[layer].register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt), torch.inference_mode():
                model(IDS)
            handle.remove()
            thread = threading.Thread(target=forward)
            thread.start()
            thread.join()
            assert torch.equal(results.pop(), expected)
        assert run.log.unlogged == 1  # the second one had computed its last layer


def test_a_model_is_not_converted_copied_or_saved_in_part_during_a_run(tmp_path):
    model = tiny_model("OlmoeForCausalLM")
    with offload(model, budget="50%"), torch.inference_mode():
        for change in (copy.deepcopy, pickle.dumps):
            with pytest.raises(UserError, match="cannot be copied or pickled"):
                change(model)
        with pytest.raises(UserError, match="its state has no experts while it is offloaded"):
            model.model.save_pretrained(tmp_path)
        model.to(torch.bfloat16)
        with pytest.raises(UserError, match=r"was converted during the run \(got torch.bfloat16 on cpu\)"):
            model(IDS)
        model.to(torch.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": None}, "budget must be text such as"),
        ({"policy": None}, "policy must be the name of a policy"),
        ({"predictor": 3}, "predictor must be a predictor, its folder or its name"),
        ({"readers": 0}, "readers must be a whole number of at least 1"),
        ({"timeout_s": 0}, "timeout_s must be a number of seconds above 0"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    model = tiny_model("OlmoeForCausalLM")
    with pytest.raises(UserError, match=message):
        offload(model, **arguments)
    with pytest.raises(UserError, match=r"model must be a loaded transformers model \(got 'small-moe'\)"):
        offload("small-moe")
