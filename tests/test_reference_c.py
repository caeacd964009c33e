"""The C stepper gives the scores of the Python stepper, and refuses damaged folders and wrong input in one line."""

import json
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _helpers.common import TINY, VOCAB, with_holes
from _helpers.predictor_variants import LONG, VARIANTS, WIDE, Variant, fitted_once, random_trace
from safetensors.numpy import load_file, save_file

from moe_beyond.predictors.calibration import Calibration
from moe_beyond.predictors.io.auto import from_pretrained
from moe_beyond.predictors.io.folder import save_predictor
from moe_beyond.predictors.stepper import Stepper
from moe_beyond.testing.predictors import STEP_TOLERANCE
from moe_beyond.traces.schema import padding_id
from moe_beyond.traces.trace import Trace

SOURCES = Path(__file__).parents[1] / "tools/reference_c"
COMPILER = shutil.which("cc")
WARNINGS = ("-std=c11", "-Wall", "-Wextra", "-Werror")
CHECKS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
"""Flags with which a read outside of memory, or an overflow, ends the program with another code than 0 and 2."""
SUPPORTED = ("cross_layer", "history", "naive_bayes", "popularity", "token_causal", "token_table")
STEPPED = [variant for variant in VARIANTS if variant.architecture in SUPPORTED]
SMALL = "cross_layer.deepseek-v2-lite-puffin-small"

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler, cc")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The compiled program, with checks of the memory if the compiler has them."""
    out = str(tmp_path_factory.mktemp("bin") / "score")
    command = [str(COMPILER), *WARNINGS, *map(str, sorted(SOURCES.glob("*.c"))), "-o", out, "-lm"]
    checked = subprocess.run([*command, *CHECKS], capture_output=True, text=True, check=False)
    if checked.returncode:
        plain = subprocess.run([*command, "-O1"], capture_output=True, text=True, check=False)
        assert plain.returncode == 0, plain.stderr
    return out


def lines(*traces: Trace) -> str:
    """Traces as the program reads them."""
    blocks = []
    for trace in traces:
        experts = np.where(trace.experts == padding_id(trace.experts.dtype), -1, trace.experts.astype(np.int64))
        rows = zip(trace.token_ids.tolist(), experts.reshape(len(trace), -1).tolist(), strict=True)
        blocks.append("".join(f"{token_id} {' '.join(map(str, row))}\n" for token_id, row in rows))
    return "\n".join(blocks)


def run(program: str, *words: str, tokens: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *words], input=tokens, capture_output=True, text=True, check=False)


def scores_in_c(program: str, folder: Path, *traces: Trace) -> np.ndarray:
    """Scores ``(T, 1 + L, L, E)`` after every call."""
    out = folder.parent / "scores.bin"
    done = run(program, str(folder), "--scores", str(out), tokens=lines(*traces))
    assert (done.returncode, done.stderr) == (0, "")
    layers = traces[0].experts.shape[1]
    tokens = sum(map(len, traces))
    return np.fromfile(out, "<f4").reshape(tokens, 1 + layers, layers, -1)


def scores_in_python(stepper: Stepper, *traces: Trace) -> np.ndarray:
    scores = []
    for trace in traces:
        stepper.reset()
        for token_id, routed in zip(trace.token_ids, trace.experts, strict=True):
            stepper.observe_token(int(token_id))
            after = [stepper.scores()]
            for layer, experts in enumerate(routed):
                stepper.observe_layer(layer, experts[experts != padding_id(experts.dtype)])
                after.append(stepper.scores())
            scores.append(after)
    return np.array(scores)


def assert_equal(ours: np.ndarray, python: np.ndarray) -> None:
    assert np.array_equal(np.isnan(ours), np.isnan(python))
    np.testing.assert_allclose(ours, python, rtol=0, atol=STEP_TOLERANCE)


@pytest.mark.parametrize("geometry", [TINY, WIDE], ids=lambda geometry: geometry.model)
@pytest.mark.parametrize("variant", STEPPED, ids=str)
def test_scores_are_those_of_the_python_stepper(variant, geometry, program, tmp_path):
    predictor = fitted_once(variant, geometry)
    save_predictor(predictor, tmp_path / "predictor", {})
    first, second = random_trace("a", LONG, 0, geometry), random_trace("b", 9, 1, geometry)
    second = replace(second, experts=with_holes(second.experts, np.random.default_rng(0), 0.4))
    ours = scores_in_c(program, tmp_path / "predictor", first, second)
    assert_equal(ours, scores_in_python(predictor.stepper(), first, second))


def saved(folder: Path, name: str = "everything", dtype: torch.dtype = torch.float32) -> Path:
    """Write a small `cross_layer` with a calibration."""
    (variant,) = (each for each in STEPPED if str(each) == f"cross_layer-{name}")
    predictor = fitted_once(variant)
    shape = len(predictor.information.lookaheads), TINY.num_layers
    scales = torch.linspace(0.5, 2, shape[0] * shape[1]).view(shape)
    predictor.calibration = Calibration(scales, scales - 1)
    try:
        save_predictor(predictor, folder, {}, dtype=dtype)
    finally:
        predictor.calibration = None
    return folder


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_calibration_and_every_type_of_weights_are_read(dtype, program, tmp_path):
    folder = saved(tmp_path / "predictor", dtype=dtype)
    trace = random_trace("a", LONG, 0)
    assert_equal(scores_in_c(program, folder, trace), scores_in_python(from_pretrained(folder).stepper(), trace))


@pytest.mark.parametrize("name", [SMALL, "naive_bayes.deepseek-v2-lite-puffin", "history.deepseek-v2-lite-puffin"])
def test_a_bundled_predictor_has_the_same_scores(name, program, tmp_path):
    predictor = from_pretrained(name)
    trace = random_trace("a", 12, 0, predictor.geometry, predictor.vocab_size)
    folder = tmp_path / "predictor"
    folder.symlink_to(Path(__file__).parents[1] / "checkpoints" / name)
    ours, python = scores_in_c(program, folder, trace), scores_in_python(predictor.stepper(), trace)
    assert_equal(ours, python)
    assert np.nanmax(ours) > 0.5 or name.startswith("history")


def test_the_program_prints_the_experts_that_it_expects_and_its_times(program, tmp_path):
    folder, trace = saved(tmp_path / "predictor"), random_trace("a", 3, 0)
    scores = scores_in_python(from_pretrained(folder).stepper(), trace)
    printed = run(program, str(folder), tokens=lines(trace)).stdout.splitlines()
    assert len(printed) == len(trace) * TINY.num_layers
    for line, (token, layer) in zip(printed, np.ndindex(len(trace), TINY.num_layers), strict=True):
        name, _, experts = line.partition(":")
        assert name == f"{trace.token_ids[token]} {layer}"
        assert set(map(int, experts.split())) == set(np.argsort(-scores[token, layer, layer])[: TINY.top_k].tolist())
    times = run(program, str(folder), "--time", tokens=lines(trace)).stdout.splitlines()
    assert [row.split()[0] for row in times] == ["start", "layer", "whole"]
    assert all(float(number) > 0 for row in times for number in row.split()[1:])


def refused(program: str, *words: str, tokens: str = "") -> str:
    """Return the one line with which the program refuses its input."""
    done = run(program, *words, tokens=tokens)
    assert done.returncode == 2, done
    assert (done.stderr.count("\n"), done.stderr[-1:]) == (1, "\n"), done.stderr
    return done.stderr.rstrip("\n")


TOKEN = f"3{' 0 1' * TINY.num_layers}\n"


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (TOKEN.replace("3", str(VOCAB), 1), "a token id is not in the vocabulary"),
        (TOKEN.replace("3", "-1", 1), "a token id is not in the vocabulary"),
        (TOKEN.replace("0 1", "0 8", 1), "an expert id is out of range"),
        (TOKEN.replace("0 1", "1 1", 1), "an expert is repeated"),
        (TOKEN[:-3] + "\n", "a line is not a token id and its experts"),
        (TOKEN[:-1] + " 1\n", "a line is not a token id and its experts"),
        (TOKEN.replace("3", "three", 1), "a line is not a token id and its experts"),
        (TOKEN.replace("3", "9" * 30, 1), "a line is not a token id and its experts"),
    ],
)
def test_wrong_tokens_are_refused(tokens, says, program, tmp_path):
    folder = saved(tmp_path / "predictor")
    assert run(program, str(folder), tokens=TOKEN).returncode == 0
    assert refused(program, str(folder), tokens=tokens) == f"score: {says}"


def edited(**changes: Any) -> Callable[[Path], None]:
    """Change fields of the configuration; a name with a dot is a field of an object."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            place = config
            *outer, last = name.split("__")
            for part in outer:
                place = place[part]
            place[last] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def weighted(**changes: Callable[[np.ndarray], np.ndarray] | None) -> Callable[[Path], None]:
    """Change or remove tensors."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        for name, function in changes.items():
            tensor = weights.pop(name.replace("__", "."))
            if function is not None:
                weights[name.replace("__", ".")] = np.ascontiguousarray(function(tensor))
        save_file(weights, folder / "model.safetensors")

    return change


def header(content: bytes | str, length: int | None = None, data: bytes = b"") -> Callable[[Path], None]:
    """Replace the weights by a file with this header."""
    text = content.encode() if isinstance(content, str) else content

    def change(folder: Path) -> None:
        size = len(text) if length is None else length
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + text + data)

    return change


def described(name: str, **fields: Any) -> Callable[[Path], None]:
    """Change a tensor's entry in the header of the weights."""

    def change(folder: Path) -> None:
        content = (folder / "model.safetensors").read_bytes()
        stop = 8 + struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8:stop])
        entries[name] |= fields
        header(json.dumps(entries), data=content[stop:])(folder)

    return change


DAMAGE = {
    "config.json cannot be opened": lambda folder: (folder / "config.json").unlink(),
    "model.safetensors cannot be opened": lambda folder: (folder / "model.safetensors").unlink(),
    "config.json is not valid JSON": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "config.json has another format version than 1": edited(format_version=2),
    "config.json has no number format_version": edited(format_version="1"),
    "the architecture eamc is not supported": edited(architecture="eamc"),
    "config.json has the unknown activation relu": edited(activation="relu"),
    "config.json has no layers": edited(geometry__moe_layers=[]),
    "config.json: top_k is not a whole number of 1 to 8": edited(geometry__top_k=9),
    "config.json: width is not a whole number of 1 to 16777216": edited(arguments__width=8.5),
    "config.json: heads do not divide width, or window is too small": edited(arguments__heads=3),
    "config.json: calibration has another shape than (lookaheads, layers)": edited(calibration__scale=[[1.0] * 4] * 9),
    "config.json: calibration is not finite": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"scale": [', '"scale": [[1e999, 1, 1, 1],', 1)
    ),
    "tokens.known.weight has another shape than config.json implies": edited(arguments__width=16),
    "blocks.0.bias has another shape than config.json implies": edited(arguments__window=60000),
    "blocks.2.before_attention.weight": edited(arguments__depth=3),
    "model.safetensors has no tensor norm.weight": weighted(norm__weight=None),
    "norm.weight is not finite": weighted(norm__weight=lambda w: np.where(np.arange(len(w)) == 1, np.nan, w)),
    "norm.weight has another kind of numbers than expected": weighted(norm__weight=lambda w: w.astype(np.int32)),
    "tokens.rows has numbers out of range": weighted(tokens__rows=lambda rows: rows + 100),
    "memory.rows has numbers out of range": weighted(memory__rows=lambda rows: np.int32(rows) - 100),
    "tokens.ngrams has numbers out of range": weighted(tokens__ngrams=lambda rows: np.int32(rows) + 1000),
    "prefixes.keys has numbers out of range": weighted(prefixes__keys=lambda keys: np.int64(keys) * 0 - 1),
    "prefixes.keys are not those of a trie": weighted(prefixes__keys=lambda keys: keys[::-1].copy()),
    "prefixes.experts has numbers out of range": weighted(prefixes__experts=lambda ids: np.int32(ids) + 100),
    "from_expert has another shape than config.json implies": weighted(from_expert=lambda maps: maps[1:]),
    "model.safetensors has no header": header("{}", 2**63),
    "the header of model.safetensors is not valid JSON": header('{"a":'),
    "norm.weight is damaged": described("norm.weight", data_offsets=[0, 2**40]),
    "norm.bias is damaged": described("norm.bias", data_offsets=[8, 4]),
    "norm.bias has a shape that is not that of its data": described("norm.bias", data_offsets=[0, 4]),
    "norm.bias has too large a shape": described("norm.bias", shape=[2**39, 2**39]),
    "norm.bias has an unknown type": described("norm.bias", dtype="F4"),
}


@pytest.mark.parametrize("says", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(says, program, tmp_path):
    folder = saved(tmp_path / "predictor")
    DAMAGE[says](folder)
    assert says in refused(program, str(folder), tokens=TOKEN)


@pytest.mark.parametrize("variant", ["cross_layer-everything", "naive_bayes-default", "token_table-default"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_random_damage_never_ends_the_program_otherwise(name, variant, program, tmp_path):
    (chosen,) = (each for each in STEPPED if str(each) == variant)
    save_predictor(fitted_once(chosen), tmp_path / "predictor", {})
    path, rng = tmp_path / "predictor" / name, np.random.default_rng(0)
    good = path.read_bytes()
    for _ in range(60):
        content = bytearray(good)
        # The header of the weights is what most changes must reach.
        stop = len(content) if rng.random() < 0.3 else min(len(content), 4000)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(0, stop))
            content[at] = rng.choice([content[at] ^ 1 << int(rng.integers(8)), *b'0129"-[]{},:e.\\\0'])
        path.write_bytes(content[: int(rng.integers(0, stop))] if rng.random() < 0.2 else content)
        done = run(program, str(tmp_path / "predictor"), tokens=TOKEN)
        assert done.returncode in (0, 2), done.stderr
        assert done.stderr.count("\n") == (done.returncode == 2), done.stderr


def test_the_sources_and_the_page_name_every_architecture():
    page, source = ((SOURCES / name).read_text() for name in ("README.md", "stepper.c"))
    assert all(f'{{"{name}", load_{name}}}' in source and f"`{name}`" in page for name in SUPPORTED)
    assert {variant.architecture for variant in STEPPED} == set(SUPPORTED)
    assert isinstance(STEPPED[0], Variant)
