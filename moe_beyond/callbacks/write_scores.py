"""The scores of `moe-beyond predict`, as a folder."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from moe_beyond.callbacks.trainer_folder import trainer_folder
from moe_beyond.evaluation.score_store import ScoresWriter, writing_scores
from moe_beyond.predictors.batch import Batch
from moe_beyond.run_folder import SCORES_FOLDER
from moe_beyond.tasks.base import PredictorTask


class WriteScores(BasePredictionWriter):
    """Writes the scores of `predict`, sequence by sequence, as a folder for `moe-beyond replay --scores`.

    Args:
        out: Path of the folder (default: ``scores/`` in the folder of the run).

    Attributes:
        folder: Path of the folder; None before it is opened.
    """

    def __init__(self, out: str | None = None) -> None:
        super().__init__("batch")
        self.out = out
        self._open = ExitStack()
        self._writer: ScoresWriter | None = None
        self.folder: Path | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the folder."""
        assert isinstance(pl_module, PredictorTask)
        folder = Path(self.out or trainer_folder(trainer) / SCORES_FOLDER)
        if not trainer.is_global_zero:  # every rank has all scores
            return
        data, predictor = pl_module.data, pl_module.predictor
        self._writer = self._open.enter_context(
            writing_scores(
                folder,
                geometry=predictor.geometry,
                lookaheads=predictor.information.lookaheads,
                causal=predictor.information.causal,
                predictor=predictor.architecture,
                traces=(data.test_traces or data.val_traces).manifest.fingerprint,
                training=pl_module.trained_on or None,
            )
        )
        self.folder = folder

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the sequences of a batch."""
        if self._writer is None:
            return
        for row, sequence_id in enumerate(batch.sequence_ids):
            self._writer.write(sequence_id, prediction[row, : batch.lengths[row]].float().cpu().numpy())

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the folder."""
        self._open.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the incomplete folder."""
        self._open.__exit__(type(exception), exception, exception.__traceback__)
