"""The best predictor of a fit, uploaded to the Hugging Face Hub."""

import lightning as L

from moe_beyond.callbacks.export import ExportBest, export_folder
from moe_beyond.download import is_hub_name
from moe_beyond.errors import UserError
from moe_beyond.hub.push import check_repository, open_repository, prepare_upload, push_upload
from moe_beyond.messages import notify
from moe_beyond.tasks.base import PredictorTask


class PushBest(L.Callback):
    """Uploads the folder that `ExportBest` wrote to the Hugging Face Hub at the end of a fit.

    `ExportBest` must precede it in the list of callbacks. The repository is created when the fit starts, so that a
    missing permission shows early. If the upload fails, the fit still succeeds and prints the command that repeats it.

    Args:
        repository: Repository of the Hub, ``ORG/REPO``.
        private: Whether a new repository is private (default: False).
        revision: Branch to commit to, created if missing (default: the main branch).
    """

    def __init__(self, repository: str, private: bool = False, revision: str | None = None) -> None:
        check_repository(repository)
        self.repository, self.private, self.revision = repository, private, revision

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Create the repository, before the fit.

        Raises:
            UserError: The user may not write to it, or no `ExportBest` precedes this callback.
        """
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, ExportBest) for callback in callbacks[: callbacks.index(self)]):
            raise UserError("PushBest: uploads the folder that ExportBest writes; put ExportBest before it")
        open_repository(self.repository, "model", private=self.private)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Upload the folder."""
        folder = export_folder(trainer)  # all ranks take part
        if not trainer.global_step or not trainer.is_global_zero or trainer.fast_dev_run or trainer.interrupted:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, PredictorTask)
        traces = pl_module.data.traces.folder
        try:
            upload = prepare_upload(folder, self.repository, traces if is_hub_name(traces) else None)
            result = push_upload(upload, private=self.private, revision=self.revision)
        except (UserError, OSError) as error:
            options = f"{' --private' * self.private}{f' --revision {self.revision}' if self.revision else ''}"
            command = f"moe-beyond push {folder} {self.repository}{options}"
            notify(f"moe-beyond: warning: not uploaded: {error}; {folder} is complete: {command}")
        else:
            notify(f"uploaded: {result.url}, commit {result.commit}")
