"""CopyAttention, token by token and expert by expert."""

import math

import pytest
import torch
from _helpers.common import TINY
from _helpers.predictor_variants import LONG, VARIANTS, fitted_once, random_trace

from moe_beyond.errors import UserError
from moe_beyond.predictors.batch import collate
from moe_beyond.predictors.modules import copy_attention as copying
from moe_beyond.predictors.modules.copy_attention import CopyAttention, LayerCopyAttention
from moe_beyond.predictors.registry import create

COPYING = [v for v in VARIANTS if v.arguments.get("copy_heads") or v.arguments.get("layer_copy_heads")]
WINDOW, TOTAL = 4, 6


@torch.inference_mode()
def test_a_head_adds_what_earlier_tokens_used():
    torch.manual_seed(0)
    heads = CopyAttention(5, 2, WINDOW, TOTAL)
    for parameter in heads.parameters():
        parameter.copy_(torch.randn_like(parameter))
    ids = [3, 7, 3, 7, 3, 3]
    x, used = torch.randn(1, len(ids), 5), (torch.rand(1, len(ids), TOTAL) < 0.4).float()
    found = heads(x, used, torch.tensor([ids]))[0]
    queries, keys = (part(x)[0].view(len(ids), 2, -1) for part in (heads.query, heads.key))
    gate = heads.gate(x)[0].sigmoid()
    for t in range(len(ids)):
        expected = torch.zeros(TOTAL)
        for head in range(2):
            odds = {}
            for s in range(max(0, t - WINDOW + 1), t):
                match = float(queries[t, head] @ keys[s, head]) / math.sqrt(copying.FEATURES) + float(
                    heads.bias[head, t - s]
                )
                if ids[s] == ids[t]:
                    match += float(heads.same[head, 0])
                    if (ids[s - 1] if s else None) == ids[t - 1]:
                        match += float(heads.same[head, 1])
                odds[s] = math.exp(match)
            for s, odd in odds.items():
                expected += float(gate[t, head]) * odd / sum(odds.values()) * used[0, s] * heads.weight[head]
        torch.testing.assert_close(found[t], expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_after_each_layer_earlier_tokens_are_picked_anew():
    torch.manual_seed(0)
    layers, experts, width, lookaheads, length = 3, 4, 5, 2, 5
    heads = LayerCopyAttention(layers, experts, width, lookaheads, 2, WINDOW)
    for parameter in heads.parameters():
        parameter.copy_(torch.randn_like(parameter))
    states, used = torch.randn(layers, length, width), (torch.rand(1, length, layers, experts) < 0.4).float()
    found = heads(states, used, torch.ones(1, length, dtype=torch.bool))
    for t in range(length):
        for h in range(1, lookaheads + 1):
            for layer in range(layers):
                j, slot = (layer - h + 1, h - 1) if layer >= h - 1 else (0, layer)
                expected = torch.zeros(experts)
                for head in range(2):
                    part = slice(head * copying.FEATURES, (head + 1) * copying.FEATURES)
                    query = states[j, t] @ heads.query[j, :, part]
                    gate = float((states[j, t] @ heads.gate[j, :, head] + heads.gate_bias[j, head]).sigmoid())
                    earlier = range(max(0, t - WINDOW + 1), t)
                    match = [
                        float(query @ (states[j, s] @ heads.key[j, :, part])) / math.sqrt(copying.FEATURES)
                        + float(heads.bias[head, t - s])
                        for s in earlier
                    ]
                    shares = torch.tensor(match).softmax(0) if match else []
                    for s, share in zip(earlier, shares, strict=True):
                        expected += gate * share * used[0, s, layer] * heads.weight[slot, head, layer]
                torch.testing.assert_close(found[t, h - 1, layer], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", COPYING, ids=str)
def test_parts_make_no_difference(variant, monkeypatch):
    predictor = fitted_once(variant)
    batch = collate([random_trace("a", LONG, 0, TINY), random_trace("b", 11, 1, TINY)])
    with torch.inference_mode():
        whole = predictor(batch)
        monkeypatch.setattr(copying, "TOKENS_PER_CHUNK", 7)
        torch.testing.assert_close(predictor(batch), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("token_causal", {"copy_heads": 1, "window": 1}),
        ("cross_layer", {"layer_copy_heads": 1, "window": 1}),
        ("token_causal", {"copy_heads": -1}),
        ("token_causal", {"objective": "subsets"}),
    ],
)
def test_bad_arguments(architecture, arguments):
    with pytest.raises(UserError, match=architecture):
        create(architecture, TINY, 32, **arguments)
