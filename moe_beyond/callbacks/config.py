"""The resolved configuration, kept with the run."""

import lightning as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback


class KeepConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder, and tells it to the loggers, when a fit starts (and only then)."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Tell the loggers."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            logger.log_hyperparams(config)
