"""Part of `damage.py`: the cases of each kind of file."""

import contextlib
import io
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from _helpers.fitting import CONFIGS, TINY_CROSS_LAYER, fit
from _helpers.recordings import SMALL, flame_moe, json_lines, random_experts
from _helpers.scoring import scores_folder

from moe_beyond.evaluation.score_store import ScoresFolder
from moe_beyond.evaluation.strategy_file import StrategyChoice, write_strategy
from moe_beyond.predictors.registry import ARCHITECTURES
from moe_beyond.simulator.devices import DEVICES
from moe_beyond.traces.reader import TraceSet
from parts.damage_edits import (
    Edit,
    accidents,
    checkpoint_edit,
    json_edit,
    seal_in,
    seal_manifest,
    shard_edit,
    text_edit,
    weights_edit,
    write_plain,
)  # fmt: skip
from parts.damage_originals import Original, command, predictor_of, read_batches, read_traces, step, traces_of

PROMPTS = "def read(path):\n\nThe list of all exceptions that the module raises is short:\n\nA\n"
OPTIONS = ("budget", "policy", "prefetch", "lookahead", "scope", "predictor", "profile", "misses")
"""Fields of a strategy file, which are options too."""


class Case(NamedTuple):
    """A damaged copy of an original: its description, and the function that damages the copy."""

    original: Original
    name: str
    damage: Callable[[Path], None]


class Kind(NamedTuple):
    """A kind of file: its share of the cases, and the function of a folder, chance and number that makes them."""

    weight: int
    cases: Callable[[Path, random.Random, int], Iterator[Case]]


def trace_cases(work: Path, chance: random.Random, count: int) -> Iterator[Case]:
    """Yield damaged trace sets."""
    source, popularity = traces_of(work), predictor_of(work, "popularity")
    gate = predictor_of(work, "next_gate")
    original = Original(
        source, "traces",
        {
            "inspect": ("inspect", "traces", "--json", "-"),
            "replay": ("replay", "--traces", "traces", "--budget", "50%", "--policy", "lru", "--json", "-"),
            "evaluate": ("evaluate", str(popularity), "--traces", "traces", "--json", "-"),
            "evaluate, hidden states": ("evaluate", str(gate), "--traces", "traces", "--json", "-"),
            "push": ("push", "traces", "org/set", "--dry-run"),
            "export": ("export", "libcachesim", "traces", "exported"),
            "data module": lambda here: read_batches(here / "traces"),
            "load_traces": lambda here: read_traces(here / "traces"),
        },
    )  # fmt: skip
    for number in range(count):
        edit = (accidents(source, chance) if number % 2 else
                json_edit(source / "manifest.json", chance, seal_manifest) if number % 4 else
                shard_edit(source, chance))  # fmt: skip
        yield Case(original, *edit)


def predictor_cases(work: Path, chance: random.Random, count: int) -> Iterator[Case]:
    """Yield damaged predictor folders of every architecture."""
    traces = str(traces_of(work))
    originals = []
    for name in ARCHITECTURES:
        path = f"predictors/{name}"
        readers: dict[str, Any] = {
            "evaluate": ("evaluate", path, "--traces", traces, "--json", "-"),
            "push": ("push", path, "org/p", "--dry-run"),
            "stepper": lambda here, path=path: step(here / path),
        }
        originals.append(Original(predictor_of(work, name), path, readers))
    edits = (accidents, weights_edit, config_edit, partial(config_edit, within="arguments"))
    for number in range(count):
        original = originals[number % len(originals)]
        yield Case(original, *edits[number // len(originals) % len(edits)](original.source, chance))


def config_edit(folder: Path, chance: random.Random, within: str | None = None) -> Edit:
    """Return an edit of the configuration of a predictor folder, or of one of its fields."""
    return json_edit(folder / "config.json", chance, seal_in("config.json"), within)


def score_cases(work: Path, chance: random.Random, count: int) -> Iterator[Case]:
    """Yield damaged scores folders."""
    traces = traces_of(work)
    source = work / "scores"
    if not source.exists():
        scores_folder(source, TraceSet(str(traces)), (1, "token"))
    words = ("replay", "--traces", str(traces), "--scores", "scores", "--budget", "50%", "--json", "-")
    total = lambda here: float(ScoresFolder(here / "scores").scores("s3", tokens_of(traces, "s3")).sum())  # noqa: E731
    original = Original(source, "scores", {"replay": words, "ScoresFolder": total})
    for number in range(count):
        edit = (
            accidents(source, chance)
            if number % 2
            else json_edit(source / "scores.json", chance, seal_in("scores.json"))
        )
        yield Case(original, *edit)


def tokens_of(traces: Path, name: str) -> int:
    """Return the number of tokens of a sequence."""
    return len(TraceSet(str(traces))[name])


def recording_cases(work: Path, chance: random.Random, count: int) -> Iterator[Case]:
    """Yield damaged recordings of runs."""
    source = work / "recorded"
    if not source.exists():
        work.mkdir(parents=True, exist_ok=True)
        (work / "prompts.txt").write_text(PROMPTS)
        command("run", "--model", "small-moe", "--prompts", work / "prompts.txt", "--budget", "30", "--trace", source,
                "--max-new-tokens", "24", "--quiet")  # fmt: skip
    original = Original(
        source, "recorded",
        {
            "validate": ("validate", "recorded", "--json", "-"),
            "replay as run": ("replay", "--traces", "recorded", "--as-run", "--json", "-"),
            "inspect": ("inspect", "recorded", "--json", "-"),
        },
    )  # fmt: skip
    for number in range(count):
        edit = accidents(source, chance) if number % 2 else json_edit(source / "run.json", chance, seal_in("run.json"))
        yield Case(original, *edit)


def checkpoint_cases(work: Path, chance: random.Random, count: int) -> Iterator[Case]:
    """Yield damaged checkpoints of a fit."""
    traces, folder = traces_of(work), work / "fit"
    if not folder.exists():
        folder.mkdir()
        configs = ("-c", str(CONFIGS / "trainer/default.yaml"), "-c", str(CONFIGS / "model/cross_layer.yaml"))
        words = ("--data.token_budget=64", "--trainer.max_epochs=1", "--quiet", *TINY_CROSS_LAYER)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            fit(folder, traces, *configs, *words)
    file = next(folder.glob("runs/*/version_0/checkpoints/last.ckpt"))
    original = Original(
        file, "last.ckpt",
        {
            "package": ("package", "last.ckpt", "--out", "packaged", "--json", "-"),
            "evaluate": ("test", "-c", str(file.parents[1] / "config.yaml"), "--ckpt_path", "last.ckpt", "--quiet"),
        },
    )  # fmt: skip
    for number in range(count):
        yield Case(original, *(accidents(file, chance) if number % 2 else checkpoint_edit(file, chance)))


def pack_cases(work: Path, chance: random.Random, count: int) -> Iterator[Case]:
    """Yield damaged packed models; the weights themselves have no hashes, as in any model's files."""
    source = work / "packed"
    if not source.exists():
        command("pack", "small-moe", source, "--quiet")
    words = ("run", "--model", "packed", "--prompt", "def", "--budget", "30", "--max-new-tokens", "3", "--quiet")
    original = Original(source, "packed", {"run": words}, has_hashes=False, also=("config.json",))
    for number in range(count):
        edit = accidents(source, chance) if number % 2 else json_edit(
            source / "config.json", chance, lambda folder, content: write_plain(folder / "config.json", content)
        )  # fmt: skip
        yield Case(original, *edit)


def device_cases(work: Path, chance: random.Random, count: int) -> Iterator[Case]:
    """Yield damaged device files."""
    traces, file = traces_of(work), work / "mine.json"
    file.write_text(json.dumps(DEVICES["rtx4060"].to_json()))
    words = (
        "replay",
        "--traces",
        str(traces),
        "--budget",
        "50%",
        "--policy",
        "lru",
        "--device",
        "mine.json",
        "--json",
        "-",
    )
    original = Original(file, "mine.json", {"replay": words}, has_hashes=False)
    for number in range(count):
        yield Case(
            original,
            *(
                (accidents, text_edit)[number % 2](file, chance)
                if number % 4 < 2
                else json_edit(file, chance, write_plain)
            ),
        )


def strategy_cases(work: Path, chance: random.Random, count: int) -> Iterator[Case]:
    """Yield damaged strategy files."""
    traces, file = traces_of(work), work / "chosen.yaml"
    write_strategy(file, StrategyChoice("50%", "lru", predictor=str(predictor_of(work, "popularity")), prefetch="top2"))
    words = ("replay", "--traces", str(traces), "--config", "chosen.yaml", "--json", "-")
    original = Original(file, "chosen.yaml", {"replay": words}, has_hashes=False, also=OPTIONS)
    as_json = work / "chosen.json"  # JSON is YAML, so values of wrong types are written as JSON
    as_json.write_text(json.dumps(yaml.safe_load(file.read_text())))
    for number in range(count):
        yield Case(
            original,
            *(
                (accidents, text_edit)[number % 2](file, chance)
                if number % 4 < 2
                else json_edit(as_json, chance, write_plain)
            ),
        )


def budget_cases(work: Path, chance: random.Random, count: int) -> Iterator[Case]:
    """Yield budgets that cannot be read, as the budget of a strategy file."""
    traces, file = traces_of(work), work / "budget.yaml"
    write_strategy(file, StrategyChoice("50%"))
    words = ("replay", "--traces", str(traces), "--config", "budget.yaml", "--json", "-")
    original = Original(file, "budget.yaml", {"replay": words}, has_hashes=False, also=("budget ",))
    parts = (
        "",
        "-",
        "+",
        "0",
        "5",
        "9" * 5000,
        "1e",
        "nan",
        "inf",
        ".",
        "1_0",
        "٣",
        "½",
        "%",
        "%%",
        "GB",
        "gib",
        " ",
        "\n",
        "0x10",
    )
    for _ in range(count):
        text = "".join(chance.choice(parts) for _ in range(chance.randrange(1, 4)))

        def damage(path: Path, text: str = text) -> None:
            path.write_text(json.dumps({"budget": text, "policy": "lru"}))

        yield Case(original, f"budget {text[:20]!r}", damage)


def import_cases(work: Path, chance: random.Random, count: int) -> Iterator[Case]:
    """Yield damaged recordings of other tools."""
    experts = random_experts(6)
    folder = work / "imports"
    if not folder.exists():
        folder.mkdir(parents=True)
        (work / "small.json").write_text(json.dumps(SMALL.to_json()))
        np.save(folder / "one.npy", experts)
        np.savez_compressed(folder / "many.npz", a=experts, b=experts)
        (folder / "lines.jsonl").write_text("\n".join(json_lines(experts)))
        flame_moe(folder, experts, np.full(experts.shape, 0.5))
    originals = []
    for form, path in (
        ("vllm", "one.npy"),
        ("vllm", "many.npz"),
        ("jsonl", "lines.jsonl"),
        ("flame-moe", "flame/actives/iter_540"),
    ):
        words = ("import", form, path, "--out", "out", "--model", str(work / "small.json"))
        originals.append(Original(folder / path, path, {"import": words}, has_hashes=False))
    for number in range(count):
        original = originals[number % len(originals)]
        edit = text_edit if original.path.endswith("jsonl") and number % 8 < 4 else accidents
        yield Case(original, *edit(original.source, chance))


def model_cases(work: Path, chance: random.Random, count: int) -> Iterator[Case]:
    """Yield damaged geometries and configurations of models, as an import reads them."""
    folder = work / "models"
    if not folder.exists():
        folder.mkdir(parents=True)
        np.save(work / "q.npy", random_experts(4))
        (folder / "geometry.json").write_text(json.dumps(SMALL.to_json()))
        config = {"model_type": "qwen3_moe", "num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 2,
                  "hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 128, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100, "decoder_sparse_step": 1,
                  "mlp_only_layers": [], "tie_word_embeddings": False}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
    originals = []
    for file in (folder / "geometry.json", folder / "config.json"):
        words = ("import", "vllm", str(work / "q.npy"), "--out", "out", "--model", file.name)
        originals.append(Original(file, file.name, {"import": words}, has_hashes=False, also=("q.npy",)))
    for number in range(count):
        original = originals[number % 2]
        yield Case(original, *json_edit(original.source, chance, write_plain))


KINDS = {
    "trace sets": Kind(320, trace_cases),
    "predictors": Kind(352, predictor_cases),
    "scores": Kind(100, score_cases),
    "recorded runs": Kind(100, recording_cases),
    "checkpoints": Kind(60, checkpoint_cases),
    "packed models": Kind(30, pack_cases),
    "devices": Kind(60, device_cases),
    "strategies": Kind(50, strategy_cases),
    "budgets": Kind(40, budget_cases),
    "imports": Kind(80, import_cases),
    "models": Kind(60, model_cases),
}
"""Name -> kind of file."""
