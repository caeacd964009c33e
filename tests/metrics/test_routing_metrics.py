import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multilabel_accuracy,
    multilabel_average_precision,
    multilabel_exact_match,
    multilabel_f1_score,
)

from moe_beyond.metrics import RoutingMetrics

LOOKAHEADS, LAYERS, EXPERTS, TOP_K = 2, 3, 8, 2
SHAPE = (LOOKAHEADS, LAYERS, EXPERTS, TOP_K)
Data = tuple[Tensor, Tensor, Tensor]


def random_data(rows: int, length: int, seed: int = 0, experts: int = EXPERTS, top_k: int = TOP_K) -> Data:
    """Scores that lean on the truth, more for the first lookahead, with a mask that leaves out a fifth."""
    rng = np.random.default_rng(seed)
    order = rng.random((rows, length, LAYERS, experts)).argsort(-1)
    targets = order < top_k
    lean = np.array([2.0, 0.5])[:, None, None]
    logits = rng.normal(size=(rows, length, LOOKAHEADS, LAYERS, experts)) + lean * (3 * targets[:, :, None] - 1.0)
    mask = rng.random((rows, length)) < 0.8
    probabilities = torch.from_numpy(1 / (1 + np.exp(-logits))).float()
    return probabilities, torch.from_numpy(targets & mask[:, :, None, None]), torch.from_numpy(mask)


def figures(metrics: RoutingMetrics) -> dict[str, np.ndarray]:
    return {name: values.numpy() for name, values in metrics.compute().items()}


def measured(*batches: Data, shape: tuple[int, int, int, int] = SHAPE, k: int | None = None) -> dict[str, np.ndarray]:
    metrics = RoutingMetrics(*shape, k=k)
    for batch in batches:
        metrics.update(*batch)
    return figures(metrics)


def f1(hits: float, false: float, missed: float) -> float:
    return 2 * hits / (2 * hits + false + missed) if hits + false + missed else 0.0


def exact_average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    total, found, seen = truth.sum(), 0, 0
    area = 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        here = scores == threshold
        found, seen = found + truth[here].sum(), seen + here.sum()
        area += found / seen * truth[here].sum() / total
    return area


def reference(data: Data, h: int, layer: int, top_k: int, k: int) -> dict[str, float]:
    """All figures of one lookahead and layer, token by token and label by label."""
    probabilities, targets, mask = (x.numpy() for x in data)
    rows = [
        (probabilities[b, t, h, layer].tolist(), targets[b, t, layer].tolist())
        for b, t in zip(*mask.nonzero(), strict=True)
    ]
    experts = range(len(rows[0][0]))
    hits = false = missed = right = exact = 0
    cut = {e: [0, 0, 0] for e in experts}
    for scores, truth in rows:
        best = set(sorted(experts, key=lambda e: (-scores[e], e))[:k])
        chosen = {e for e in experts if truth[e]}
        hits += len(best & chosen)
        false += len(best - chosen)
        missed += len(chosen - best)
        right += sum((e in best) == (e in chosen) for e in experts)
        above = {e for e in experts if scores[e] > 0.5}
        exact += above == chosen
        for e in experts:
            cut[e][0] += e in above and e in chosen
            cut[e][1] += e in above and e not in chosen
            cut[e][2] += e not in above and e in chosen
    labels = len(rows) * len(experts)
    rejected = labels - hits - false - missed
    return {
        "recall_at_k": hits / (len(rows) * top_k),
        "f1": f1(hits, false, missed),
        "f1_two_class": (f1(hits, false, missed) + f1(rejected, missed, false)) / 2,
        "accuracy": right / labels,
        "f1_micro": f1(*np.sum(list(cut.values()), 0)),
        "f1_macro": float(np.mean([f1(*counts) for counts in cut.values()])),
        "average_precision": exact_average_precision(
            np.array([s for s, _ in rows]).ravel(), np.array([t for _, t in rows]).ravel()
        ),
        "exact_match": exact / len(rows),
        "nll": -sum(
            math.log(p if came else 1 - p) for scores, truth in rows for p, came in zip(scores, truth, strict=True)
        )
        / len(rows),
        "calibration_error": sum(
            abs(
                sum(
                    p - came
                    for scores, truth in rows
                    for p, came in zip(scores, truth, strict=True)
                    if int(p * 15) == b
                )
            )
            for b in range(15)
        )
        / labels,
    }


@pytest.mark.parametrize("k", [None, 1, 4, EXPERTS])
@pytest.mark.parametrize("seed", range(2))
def test_figures_equal_a_plain_count(k, seed):
    data = random_data(12, 25, seed)  # enough labels that few of them share a bin of the average precision
    found = measured(data, k=k)
    for h in range(LOOKAHEADS):
        for layer in range(LAYERS):
            expected = reference(data, h, layer, TOP_K, k or TOP_K)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                tolerance = {"average_precision": 2e-3, "nll": 1e-5, "calibration_error": 1e-6}.get(name, 1e-12)
                assert found[name][h, layer] == pytest.approx(value, abs=tolerance), (name, h, layer)


def test_figures_equal_those_of_torchmetrics():
    probabilities, targets, mask = data = random_data(20, 30)
    found = measured(data)
    for h in range(LOOKAHEADS):
        for layer in range(LAYERS):
            scores, truth = probabilities[mask][:, h, layer], targets[mask][:, layer].int()
            best = torch.zeros_like(truth).scatter_(1, scores.topk(TOP_K).indices, 1)
            expected = {
                "f1": multilabel_f1_score(best, truth, EXPERTS, average="micro"),
                "accuracy": multilabel_accuracy(best, truth, EXPERTS, average="micro"),
                "f1_micro": multilabel_f1_score(scores, truth, EXPERTS, average="micro"),
                "f1_macro": multilabel_f1_score(scores, truth, EXPERTS, average="macro"),
                "exact_match": multilabel_exact_match(scores, truth, EXPERTS),
                "average_precision": multilabel_average_precision(scores, truth, EXPERTS, average="micro"),
                "calibration_error": binary_calibration_error(scores.flatten(), truth.flatten(), n_bins=15, norm="l1"),
            }
            for name, value in expected.items():
                tolerance = 2e-3 if name == "average_precision" else 1e-6
                assert found[name][h, layer] == pytest.approx(float(value), abs=tolerance), (name, h, layer)


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 5.0])
def test_average_precision_holds_for_the_scores_of_a_softmax_over_many_experts(sharpness):
    # The sharper, the more of the 64 experts score within the lowest bin; a predictor may well be too sure of itself.
    experts, top_k = 64, 6
    _, targets, mask = random_data(20, 40, experts=experts, top_k=top_k)
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=(20, 40, LOOKAHEADS, LAYERS, experts)))
    logits = sharpness * (targets[:, :, None] + noise)
    probabilities = (logits.softmax(-1) * top_k).clamp(max=1).float()
    found = measured((probabilities, targets, mask), shape=(LOOKAHEADS, LAYERS, experts, top_k))
    for h in range(LOOKAHEADS):
        for layer in range(LAYERS):
            scores, truth = probabilities[mask][:, h, layer], targets[mask][:, layer].int()
            exact = float(multilabel_average_precision(scores, truth, experts, average="micro"))
            assert found["average_precision"][h, layer] == pytest.approx(exact, abs=2e-3)


def test_two_class_f1_by_hand():
    # Experts 0 and 1 are best; of token 0 experts 0 and 2 were chosen, of token 1 experts 0 and 1.
    scores = torch.tensor([0.9, 0.8, 0.7, 0.1, 0.2, 0.0]).view(1, 1, 1, 1, 6).expand(1, 2, -1, -1, -1)
    targets = torch.zeros(1, 2, 1, 6, dtype=torch.bool)
    targets[0, 0, 0, [0, 2]] = targets[0, 1, 0, [0, 1]] = True
    found = measured((scores, targets, torch.ones(1, 2, dtype=torch.bool)), shape=(1, 1, 6, 2))
    # Three of four found, one false, one missed; seven of eight left out rightly.
    assert found["recall_at_k"].item() == 3 / 4
    assert found["f1"].item() == 6 / 8
    assert found["f1_two_class"].item() == (6 / 8 + 14 / 16) / 2
    assert found["accuracy"].item() == 10 / 12
    # Above one half are experts 0, 1 and 2: four hits, two false.
    assert found["f1_micro"].item() == 8 / 10
    assert found["exact_match"].item() == 0
    assert found["f1_macro"].item() == pytest.approx((1 + 2 / 3 + 2 / 3) / 6)


def test_ties_go_to_the_lower_expert():
    scores = torch.full((1, 1, 1, 1, 300), 0.25)
    scores[..., 7] = 0.5  # exactly the threshold, which is not above it
    chosen = torch.zeros(1, 1, 1, 300, dtype=torch.bool)
    mask = torch.ones(1, 1, dtype=torch.bool)
    for pair, recall in (([0, 7], 1.0), ([0, 1], 0.5), ([7, 299], 0.5), ([1, 2], 0.0)):
        targets = chosen.clone()
        targets[..., pair] = True
        found = measured((scores, targets, mask), shape=(1, 1, 300, 2))
        assert found["recall_at_k"].item() == recall, pair
        assert found["f1_micro"].item() == 0


def test_a_token_with_fewer_experts_is_asked_for_those():
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.2], [0.9, 0.8, 0.1, 0.2], [0.9, 0.8, 0.1, 0.2]]).view(1, 3, 1, 1, 4)
    targets = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool().view(1, 3, 1, 4)
    found = measured((scores, targets, torch.ones(1, 3, dtype=torch.bool)), shape=(1, 1, 4, 2))
    assert found["recall_at_k"].item() == 1 / 3  # of 0, 2 and 3 the first
    assert found["f1"].item() == 2 / (6 + 3)  # six were named, three were chosen
    assert found["accuracy"].item() == (12 - 5 - 2) / 12


def test_naming_more_experts_than_the_router_finds_no_fewer():
    data = random_data(5, 12)
    recalls = [measured(data, k=k)["recall_at_k"] for k in range(1, EXPERTS + 1)]
    for fewer, more in itertools.pairwise(recalls):
        assert (fewer <= more).all()
    assert (recalls[-1] == 1).all()
    assert (recalls[0] <= 0.5).all()  # one expert is at most half of two
    # What does not depend on k does not change.
    assert np.array_equal(measured(data, k=5)["f1_macro"], measured(data)["f1_macro"])


def test_perfect_and_worst_scores():
    _, targets, mask = random_data(3, 10)
    right = targets[:, :, None].expand(-1, -1, LOOKAHEADS, -1, -1).float()
    for name, values in measured((right, targets, mask)).items():
        best = 0 if name in ("nll", "calibration_error") else 1
        assert values == pytest.approx(np.full_like(values, best), abs=1e-5 if name == "nll" else 0), name
    wrong = measured((1 - right, targets, mask))
    assert (wrong["calibration_error"] == 1).all()
    assert wrong["nll"] == pytest.approx(np.full((LOOKAHEADS, LAYERS), EXPERTS * -math.log(1e-7)), rel=1e-2)
    for name in ("recall_at_k", "f1", "f1_micro", "f1_macro", "exact_match"):
        assert (wrong[name] == 0).all(), name


def test_what_is_masked_does_not_count():
    probabilities, targets, mask = random_data(4, 10)
    expected = measured((probabilities, targets, mask))
    probabilities, targets = probabilities.clone(), targets.clone()
    probabilities[~mask], targets[~mask] = float("nan"), True
    found = measured((probabilities, targets, mask))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    different = measured((probabilities.nan_to_num(1), targets, torch.ones_like(mask)))
    assert any(not np.array_equal(different[name], expected[name]) for name in expected)


def test_a_batch_without_tokens_adds_nothing():
    data = random_data(4, 10)
    empty = (data[0], data[1], torch.zeros_like(data[2]))
    found, expected = measured(empty, data, empty), measured(data)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def split(data: Data, at: int) -> tuple[Data, Data]:
    probabilities, targets, mask = data
    return (probabilities[:at], targets[:at], mask[:at]), (probabilities[at:], targets[at:], mask[at:])


def test_several_batches_equal_one():
    data = random_data(6, 10)
    first, rest = split(data, 1)
    found, expected = measured(first, *split(rest, 3)), measured(data)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_merging_two_metrics_equals_counting_all():
    data = random_data(6, 10)
    first, second = RoutingMetrics(*SHAPE), RoutingMetrics(*SHAPE)
    for metrics, part in zip((first, second), split(data, 2), strict=True):
        metrics.update(*part)
    first.merge_state(second)
    found, expected = figures(first), measured(data)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_reset_forgets():
    metrics = RoutingMetrics(*SHAPE)
    metrics.update(*random_data(3, 5, seed=1))
    metrics.reset()
    metrics.update(*random_data(3, 5, seed=2))
    found, expected = figures(metrics), measured(random_data(3, 5, seed=2))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_before_any_token_there_is_no_figure():
    for name, values in figures(RoutingMetrics(*SHAPE)).items():
        assert values.shape == (LOOKAHEADS, LAYERS), name
        assert np.isnan(values).all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_counted_as_their_float32_values(dtype):
    probabilities, targets, mask = random_data(3, 10)
    half = probabilities.to(dtype)
    found, expected = measured((half, targets, mask)), measured((half.float(), targets, mask))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_rows_name_lookaheads_and_layers_and_average_over_layers():
    data = random_data(4, 10)
    metrics = RoutingMetrics(*SHAPE, k=3)
    metrics.update(*data)
    rows = metrics.rows(["token", 2])
    expected = measured(data, k=3)
    assert [row.lookahead for row in rows] == ["token", 2]
    for index, row in enumerate(rows):
        assert (row.k, row.tokens) == (3, int(data[2].sum()))
        assert [layer.layer for layer in row.by_layer] == list(range(LAYERS))
        for name, values in expected.items():
            assert [getattr(layer, name) for layer in row.by_layer] == values[index].tolist()
            assert type(getattr(row, name)) is float
            if name != "f1_micro":
                assert math.isclose(getattr(row, name), values[index].mean())
        # Micro F1 is over all labels alike, whichever their layer.
        probabilities, targets, mask = data
        above, truth = (probabilities[mask][:, index] > 0.5).numpy(), targets[mask].numpy()
        assert math.isclose(row.f1_micro, 2 * (above & truth).sum() / (above.sum() + truth.sum()))


def test_reliability_by_hand():
    # 15 bins: 0.02 and 0.05 fall into the first, 0.52 and 0.59 into those from 7/15 and 8/15, 1.0 into the last.
    scores = torch.tensor([0.02, 0.05, 0.59, 1.0]).view(1, 1, 1, 1, 4).repeat(1, 2, 1, 2, 1)
    scores[0, 1, 0, 1, 2] = 0.52
    targets = torch.zeros(1, 2, 2, 4, dtype=torch.bool)
    targets[0, 0, 0, [2, 3]] = targets[0, 0, 1, [1, 3]] = targets[0, 1, :, 2:] = True
    metrics = RoutingMetrics(1, 2, 4, 2)
    metrics.update(scores, targets, torch.ones(1, 2, dtype=torch.bool))
    (row,) = metrics.rows([1])
    bins = row.reliability
    assert [(bin.low, bin.high) for bin in bins] == [(n / 15, (n + 1) / 15) for n in range(15)]
    assert {n: bin.labels for n, bin in enumerate(bins) if bin.labels} == {0: 8, 7: 1, 8: 3, 14: 4}
    assert (bins[1].mean_probability, bins[1].selected_share) == (None, None)
    for number, probability, share in ((0, 0.035, 1 / 8), (7, 0.52, 1), (8, 0.59, 2 / 3), (14, 1.0, 1)):
        assert bins[number].mean_probability == pytest.approx(probability)
        assert bins[number].selected_share == share


def test_reliability_of_one_layer_is_its_calibration_error():
    metrics = RoutingMetrics(LOOKAHEADS, 1, EXPERTS, TOP_K)
    probabilities, targets, mask = random_data(6, 20)
    metrics.update(probabilities[:, :, :, :1], targets[:, :, :1], mask)
    for row in metrics.rows([1, 2]):
        bins = [bin for bin in row.reliability if bin.labels]
        labels = sum(bin.labels for bin in bins)
        assert labels == int(mask.sum()) * EXPERTS
        gaps = sum(bin.labels * abs(bin.mean_probability - bin.selected_share) for bin in bins)
        assert row.calibration_error == pytest.approx(gaps / labels)


def test_gate_mass_by_hand():
    metrics = RoutingMetrics(1, 1, 4, 2)
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.0, 0.1, 0.9, 0.8], [0.5, 0.4, 0.3, 0.2]]).view(1, 3, 1, 1, 4)
    targets = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 1], [1, 1, 0, 0]], dtype=torch.bool).view(1, 3, 1, 4)
    # The first token has 3/4 of its weights among them, the second has all; the third has no weights.
    shares = torch.tensor([[0.75, 0, 0, 0.25], [0, 0, 0.9, 0.1], [0, 0, 0, 0]]).view(1, 3, 1, 4)
    mask = torch.ones(1, 3, dtype=torch.bool)
    metrics.update(scores, targets, mask)
    assert "gate_mass_at_k" not in metrics.compute()
    metrics.reset()
    metrics.update(scores, targets, mask, shares)
    assert metrics.compute()["gate_mass_at_k"].item() == pytest.approx(0.875)
    (row,) = metrics.rows([1])
    assert (row.gate_mass_at_k, row.by_layer[0].gate_mass_at_k) == (pytest.approx(0.875),) * 2
