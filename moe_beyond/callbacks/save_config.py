"""The resolved configuration, kept with the run."""

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from moe_beyond.callbacks.run import run_folder
from moe_beyond.evaluation.checkpoints import CONFIG_FILE


class KeepConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder, and gives it to the loggers, when a fit starts (and only then)."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save, before the fit."""
        if stage == "fit":
            self._folder = run_folder(trainer)  # all ranks take part
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the file, and give it to the loggers."""
        self._folder.mkdir(parents=True, exist_ok=True)
        parser: LightningArgumentParser = self.parser
        parser.save(self.config, str(self._folder / CONFIG_FILE), skip_none=False, overwrite=True, multifile=False)
        config = yaml.safe_load(parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            logger.log_hyperparams(config)
