"""The resolved configuration, saved with the run, without the secrets of URLs."""

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from moe_beyond.callbacks.trainer_folder import trainer_folder
from moe_beyond.files import replacing
from moe_beyond.run_folder import RUN_CONFIG_FILE
from moe_beyond.urls import without_secrets


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the folder of a run and passes it to the loggers when a fit starts."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save the configuration before a fit."""
        if stage == "fit":
            self._folder = trainer_folder(trainer)  # all ranks take part
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the file, and pass the configuration to the loggers."""
        parser: LightningArgumentParser = self.parser
        content = without_secrets(parser.dump(self.config, skip_none=False))
        with replacing(self._folder / RUN_CONFIG_FILE) as temporary:
            temporary.write_text(content, encoding="utf-8")
        for logger in trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(content))
