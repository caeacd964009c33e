"""Comparison of generated tokens and logits, counted by hand, and the available memory."""

import pytest
import torch

from moe_beyond.errors import UserError
from moe_beyond.runtime import check
from moe_beyond.runtime.check import available_memory, check_fits_memory, compare
from moe_beyond.runtime.memory import Memory

LOGITS = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, -torch.inf]])


def test_equal_outputs_are_identical():
    same = compare([[1, 2, 3], [4]], [[1, 2, 3], [4]], [LOGITS, LOGITS[:1]], [LOGITS.clone(), LOGITS[:1].clone()])
    assert same.identical
    assert str(same) == "identical: 4 of 4 tokens, logits bitwise"
    assert same.largest_difference == 0
    assert same.to_json()["identical"] is True


def test_the_last_bit_counts():
    other = LOGITS.clone()
    other[1, 0] = torch.nextafter(other[1, 0], torch.tensor(9.0))
    found = compare([[1, 2, 3]], [[1, 2, 3]], [other], [LOGITS])
    assert not found.identical
    assert (found.equal_tokens, found.equal_logits, found.position) == (3, 1, 1)
    assert str(found) == (
        "different: 3 of 3 tokens equal, logits differ from sequence 1, generated token 2 on; largest difference of "
        "logits 2.38e-07"
    )
    zero = torch.tensor([[-0.0, 1.0]])
    assert not compare([[1]], [[1]], [zero], [LOGITS[:1]]).identical


def test_the_first_other_token_is_named():
    other = LOGITS.clone()
    other[1] += 0.5
    found = compare([[9], [1, 7, 3]], [[9], [1, 2, 3]], [LOGITS[:1], other], [LOGITS[:1], LOGITS])
    assert (found.sequence, found.position, found.token_ids) == (1, 1, (7, 2))
    assert (found.tokens, found.equal_tokens, found.equal_logits, found.largest_difference) == (4, 2, 2, 0.5)
    assert str(found) == (
        "different: 2 of 4 tokens equal; sequence 2, generated token 2 is id 7, unmodified 2; largest difference of "
        "logits 0.5"
    )
    shorter = compare([[1, 2]], [[1, 2, 3]], [LOGITS[:2]], [LOGITS])
    assert (shorter.position, shorter.token_ids, shorter.largest_difference) == (2, (-1, 3), 0)


def test_a_model_must_fit_host_memory(tmp_path, monkeypatch):
    for name, text in (
        ("memory.max", "4000"),
        ("memory.current", "3000"),
        ("memory.stat", "anon 1\ninactive_file 500"),
    ):
        (tmp_path / name).write_text(f"{text}\n")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 20 kB\nMemAvailable: 10 kB\n")
    monkeypatch.setattr(check, "CGROUP", tmp_path)
    monkeypatch.setattr(check, "MEMINFO", meminfo)
    assert available_memory() == 1500
    on_cpu = Memory("host", 10, 2000, 0, 0)
    check_fits_memory(1500, on_cpu)
    with pytest.raises(UserError, match="loads the whole model"):
        check_fits_memory(1501, on_cpu)
    # A GPU gets the slots back, and the model is read into host memory first.
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda place: (400, 10**6))
    for slots, message in ((1100, None), (1000, "got 0.0 GB available in the memory of cuda:1"), (2000, None)):
        on_gpu = Memory("cuda:1", 10, slots, 0, 0)
        if message is None:
            check_fits_memory(1500, on_gpu)
        else:
            with pytest.raises(UserError, match=message):
                check_fits_memory(1500, on_gpu)
    with pytest.raises(UserError, match="in the memory of host"):
        check_fits_memory(1501, Memory("cuda:1", 10, 2000, 0, 0))
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() == 10 * 1024
    meminfo.unlink()
    assert available_memory() is None
    check_fits_memory(2**60, on_cpu)
