"""Prompts in, a trace set out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_beyond.collect.record import Prompt, record
from moe_beyond.collect.recorder import recording
from moe_beyond.errors import UserError
from moe_beyond.published import checkpoints_folder

SMALL = checkpoints_folder() / "small-moe"


@pytest.fixture(scope="module")
def small() -> tuple:
    return AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.float32), AutoTokenizer.from_pretrained(SMALL)


def test_a_trace_holds_what_the_model_did(small: tuple, tmp_path: Path) -> None:
    model, tokenizer = small
    model.train()
    prompts = ["def main():", Prompt("The list of", "two", "a book", "validation")]
    traces = record(model, tokenizer, prompts, tmp_path / "traces", source="tests")
    assert model.training
    model.eval()
    assert (traces.geometry.model, traces.manifest.tokenizer.name) == ("small-moe", "small-moe")
    assert traces.manifest.quantization_bits == 32
    (first,), (second,) = traces.traces("train"), traces.traces("validation")
    assert (first.sequence_id, first.source) == ("prompt 0", "tests")
    assert (second.sequence_id, second.source) == ("two", "a book")
    for trace, text in ((first, "def main():"), (second, "The list of")):
        token_ids = tokenizer(text, return_tensors="pt").input_ids
        assert trace.token_ids.tolist() == token_ids[0].tolist()
        assert trace.decode_start == len(trace)
        with recording(model) as recorder, torch.inference_mode():
            model(token_ids)
            experts, weights = recorder.take()
        assert np.array_equal(trace.experts, experts)
        assert np.array_equal(trace.gate_weights, weights.astype(np.float16))


def test_an_empty_prompt_is_named_and_nothing_is_left(small: tuple, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prompt 1: is empty"):
        record(*small, ["def", ""], tmp_path / "traces")
    assert not list(tmp_path.iterdir())
