"""Part of `damage.py`: undamaged trace sets and predictors, and functions that read them."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from _helpers.common import TINY, VOCAB, plain_routers, plain_states, tiny_trace, word_tokenizer
from _helpers.predictor_variants import HIDDEN, VARIANTS, fitted
from _helpers.publishing import FIGURES

from moe_beyond.cli.main import main
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.predictors.io.card import record_figures
from moe_beyond.predictors.io.folder import save_predictor
from moe_beyond.traces.hidden_states import StateFormat, to_int8
from moe_beyond.traces.manifest import Manifest
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.tokenizers import load_vocabulary
from moe_beyond.traces.writer import open_writer


@dataclass(frozen=True)
class Original:
    """An undamaged file or folder.

    Attributes:
        source: Path of the undamaged file or folder.
        path: Place of its copies in the working folder, which an error must name.
        readers: Name -> words of a command line, or function of the working folder.
        has_hashes: Whether its writer hashes it, so that any other output is a fault.
        also: Words of which one may be in an error in place of the path, such as the name of an option.
    """

    source: Path
    path: str
    readers: dict[str, tuple[str, ...] | Callable[[Path], Any]]
    has_hashes: bool = True
    also: tuple[str, ...] = ()


def command(*words: str | Path) -> None:
    """Run a command line that must succeed, without output."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([str(word) for word in words])
    if code:
        raise SystemExit(f"{words}: {err.getvalue()}")


def traces_of(work: Path) -> Path:
    """Write a trace set with everything: gate weights, hidden states, routers and a tokenizer."""
    folder = work / "traces"
    if folder.exists():
        return folder
    work.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    words = word_tokenizer(work / "words.json", [f"w{number}" for number in range(VOCAB)])
    tokenizer = load_vocabulary(str(words)).describe()
    manifest = Manifest(
        TINY, tokenizer, "tiny", 16.0, "dataset", "tools", "0", hidden_size=TINY.num_experts,
        states=StateFormat("int8", TINY.moe_layers), revision="main", generation={"tokens": 4, "temperature": 0.0},
    )  # fmt: skip
    with open_writer(folder, manifest, shard_tokens=64, vocabulary=words, routers=plain_routers(TINY)) as writer:
        for number in range(16):
            trace = tiny_trace(f"s{number}", int(rng.integers(4, 20)), rng)
            gates = rng.random(trace.experts.shape).astype(np.float16)
            states = to_int8(plain_states(trace.experts, TINY.num_experts))
            trace = replace(trace, gate_weights=gates, hidden_states=states, decode_start=len(trace.token_ids) // 2)
            writer.write(trace, "validation" if number % 4 == 3 else "train")
    return folder


def predictor_of(work: Path, architecture: str) -> Path:
    """Save a fitted predictor with figures, which fits the trace set."""
    folder = work / "predictors" / architecture
    if folder.exists():
        return folder
    variant = next(variant for variant in VARIANTS if variant.architecture == architecture)
    if "hidden_size" in variant.arguments:
        variant = replace(variant, arguments=variant.arguments | {"hidden_size": TINY.num_experts})
        predictor = fitted_with_states(variant)
    else:
        predictor = fitted(variant)
    manifest = TraceSet(str(traces_of(work))).manifest
    training = {
        "fingerprint": "f" * 64, "split": "train", "model_id": "tiny", "quantization_bits": 16.0, "source": "tools",
        "tokenizer": asdict(manifest.tokenizer), "sequences": 4, "tokens": 160, "recipe": {"epochs": 1},
        "texts": "0123456789ab", "seen": [{"use": "calibrated", "split": "x"}],
    }  # fmt: skip
    save_predictor(predictor, folder, training)
    record_figures(folder, {**FIGURES, "relation": "held-out"})
    return folder


def fitted_with_states(variant: Any) -> Any:
    """Fit a predictor that reads hidden states of the width of the trace set."""
    import _helpers.predictor_variants as variants

    width, variants.HIDDEN = HIDDEN, TINY.num_experts
    try:
        return fitted(variant)
    finally:
        variants.HIDDEN = width


def read_batches(folder: Path) -> int:
    """Read all batches of a data module, and return a number that depends on all token ids and experts."""
    data = TraceDataModule(str(folder))
    batches = [batch for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader]
    return sum(int(batch.token_ids.sum()) + int(batch.targets(TINY.num_experts).sum()) for batch in batches)


def read_traces(folder: Path) -> float:
    """Read a trace set by sequence, with hidden states, router weights and token strings."""
    import moe_beyond as mb

    traces = mb.load_traces(folder)
    total = sum(
        float(trace.hidden_states.router_inputs.sum()) + len(trace) for trace in traces.traces(hidden_states=True)
    )
    if traces.routers is not None:
        total += float(traces.routers.weight.sum())
    return total + len("".join(traces.token_strings or [])) + len(traces[3])


def step(folder: Path) -> list[float]:
    """Step a predictor through a sequence, and return the sums of its scores."""
    import moe_beyond as mb

    predictor = mb.load_predictor(folder)
    rng = np.random.default_rng(0)
    stepper, sums = predictor.stepper(), []
    for token in range(5):
        stepper.observe_token(token)
        for layer in range(TINY.num_layers):
            states = (
                () if predictor.hidden_size is None else (rng.normal(size=predictor.hidden_size).astype(np.float32),)
            )
            stepper.observe_layer(layer, np.array([token % 8, (token + 3) % 8]), *states)
            if layer + 1 < TINY.num_layers:
                stepper.observe_computed(layer, *states)
            sums.append(float(np.nansum(stepper.scores())))
    return sums
