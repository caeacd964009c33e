import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_beyond.predictors.modules.window_attention import WindowBlock


def block(window: int) -> WindowBlock:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = WindowBlock(width=8, heads=2, window=window, dropout=0.5)
        torch.nn.init.normal_(made.bias)
    return made.eval()


def tokens(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, length, 8, generator=torch.Generator().manual_seed(length))


def token_by_token(made: WindowBlock, x: torch.Tensor) -> torch.Tensor:
    """The block's definition, without blocks or masks: a softmax over the window of each token and head."""
    out = torch.zeros_like(x)
    size = x.shape[-1] // made.heads
    for row in range(x.shape[0]):
        queries, keys, values = made.query_key_value(made.before_attention(x[row])).chunk(3, -1)
        for t in range(x.shape[1]):
            window = range(max(0, t - made.window + 1), t + 1)
            heads = []
            for head in range(made.heads):
                part = slice(head * size, (head + 1) * size)
                logits = torch.stack(
                    [queries[t, part] @ keys[u, part] / size**0.5 + made.bias[head, t - u] for u in window]
                )
                heads.append(logits.softmax(0) @ values[list(window), part])
            attended = x[row, t] + made.out(torch.cat(heads))
            out[row, t] = attended + made.mlp(made.before_mlp(attended))
    return out


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("length", [1, 3, 5, 6, 10, 11])
@torch.inference_mode()
def test_a_batch_equals_the_definition(window, length):
    made, x = block(window), tokens(length)
    torch.testing.assert_close(made(x), token_by_token(made, x), rtol=0, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(window=st.integers(1, 7), length=st.integers(1, 18))
@torch.inference_mode()
def test_stepping_equals_a_batch_and_keeps_no_more_than_the_window(window, length):
    made, x = block(window), tokens(length, rows=1)
    whole, cache = made(x), None
    for t in range(length):
        out, cache = made.step(x[:, t : t + 1], cache)
        torch.testing.assert_close(out[:, 0], whole[:, t], rtol=0, atol=1e-5)
        assert cache[0].shape[2] == cache[1].shape[2] == min(t + 1, window - 1)


@torch.inference_mode()
def test_dropout_acts_in_training_only():
    made, x = block(3), tokens(5)
    torch.testing.assert_close(made(x), made(x), rtol=0, atol=0)
    made.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(made(x), made(x))
