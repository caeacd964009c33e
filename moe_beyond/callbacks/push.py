"""The best predictor of a fit, published."""

import sys

import lightning as L

from moe_beyond.callbacks.export import ExportBest, export_folder
from moe_beyond.download import is_hub_name
from moe_beyond.errors import UserError
from moe_beyond.hub.push import check_repository, open_repository, prepare_upload, push_upload
from moe_beyond.tasks.base import PredictorTask


class PushBest(L.Callback):
    """At the end of a fit, publishes on the Hugging Face Hub what `ExportBest` wrote, which must stand before it.

    The repository is made when the fit starts, as whatever forbids that is better known then. Where publishing fails at
    the end, the fit does not: one line says how to do it by hand.

    Args:
        repository: ``ORG/REPO``.
        private: Whether a repository that is made is to be private.
        revision: Branch to commit to, made if it is not there; the main one by default.
    """

    def __init__(self, repository: str, private: bool = False, revision: str | None = None) -> None:
        check_repository(repository)
        self.repository, self.private, self.revision = repository, private, revision

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out before hours are spent whether this user may publish there.

        Raises:
            UserError: The user may not, or nothing would be there to publish.
        """
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(one, ExportBest) for one in callbacks[: callbacks.index(self)]):
            raise UserError("PushBest publishes what ExportBest writes; put ExportBest before it")
        open_repository(self.repository, "model", private=self.private)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Publish."""
        folder = export_folder(trainer)  # asks all ranks
        if not trainer.global_step or not trainer.is_global_zero or trainer.fast_dev_run or trainer.interrupted:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, PredictorTask)
        traces = pl_module.data.traces.folder
        try:
            upload = prepare_upload(folder, self.repository, traces if is_hub_name(traces) else None)
            published = push_upload(upload, private=self.private, revision=self.revision)
        except (UserError, OSError) as error:
            options = f"{' --private' * self.private}{f' --revision {self.revision}' if self.revision else ''}"
            by_hand = f"moe-beyond push {folder} {self.repository}{options}"
            print(f"moe-beyond: warning: not published: {error}; {folder} is whole: {by_hand}", file=sys.stderr)
        else:
            print(f"published: {published.url}, commit {published.commit}", file=sys.stderr)
