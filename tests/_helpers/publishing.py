"""Predictor folders to upload, and the arguments of an upload."""

import json
from pathlib import Path

from _helpers.predictor_variants import VARIANTS, fitted_once
from moe_beyond.files import sealed
from moe_beyond.predictors.io.card import record_figures
from moe_beyond.predictors.io.folder import save_predictor

TRAINING = {
    **{"fingerprint": "f" * 64, "split": "train", "source": "tests", "model_id": "org/tiny-moe"},
    "tokenizer": {"name": "tests", "sha256": None},
}
MEASURED = {"k": 2, "nll": 3.0, "calibration_error": 0.01, "accuracy": 0.9, "f1_two_class": 0.8, "causal": True}
REPLAYED = {"leaks": False, "causal": True, "budget_slots": 8, "budget_share": 0.25}
FIGURES = {
    "source": "Tests, set 1",
    "fingerprint": "a" * 64,
    "split": None,
    "command": "moe-beyond evaluate tiny --traces DIR",
    "metrics": [
        {"lookahead": 1, "recall_at_k": 0.76543, "tokens": 1234, **MEASURED},
        {"lookahead": 2, "recall_at_k": 0.7, "tokens": 1234, **MEASURED},
    ],
    "replay": [
        {
            "strategy": "lru + top2",
            "predictor": "tiny",
            "lookahead": 1,
            "hit_rate": 0.8,
            "bytes_ratio": 1.1,
            **REPLAYED,
        },
        {"strategy": "lru", "predictor": None, "lookahead": None, "hit_rate": 0.3, "bytes_ratio": 0.7, **REPLAYED},
        {"strategy": "belady", "predictor": None, "lookahead": None, "hit_rate": 0.5, "bytes_ratio": 0.5, **REPLAYED},
    ],
}


def predictor_folder(folder: Path, architecture: str = "cross_layer", *, figures: bool = True) -> Path:
    """Save a tiny predictor, with recorded figures and a card whose head and foot were written by hand."""
    save_predictor(fitted_once(next(v for v in VARIANTS if v.architecture == architecture)), folder, TRAINING)
    card = folder / "README.md"
    text = card.read_text().replace("library_name: moe-beyond\n", "library_name: moe-beyond\nlicense: mit\n")
    card.write_text(text + "\nMine, below.\n")
    if figures:
        record_figures(folder, FIGURES)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    """Change fields of a predictor folder's configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | changes)))
