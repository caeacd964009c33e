"""``moe-beyond fit``, ``validate``, ``test`` and ``predict``: Lightning's own command line."""

import logging
import os
import warnings
from typing import Any

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning 2.6 calls what jsonargparse 5 drops

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import moe_beyond.callbacks
import moe_beyond.datamodules
import moe_beyond.tasks  # noqa: F401  (configs name these classes without their module)
from moe_beyond.callbacks import TrackWandb
from moe_beyond.callbacks.config import KeepConfig
from moe_beyond.cli.options import OneLineErrors
from moe_beyond.cli.tracking import finishing_wandb, settle_wandb
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.checkpoint import load_checkpoint
from moe_beyond.tasks import PredictorTask

# Harmless on the machines this runs on, and not for the user to act on.
QUIET = (
    ".*does not have many workers.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*args parameter is intended to run from within Python.*",
    ".*Couldn't infer the batch indices.*",  # scores carry the names of their sequences
    ".*returned `None`, this fit will run with no optimizer.*",  # counting
    ".*Total length of `list` across ranks is zero.*",  # a fit without validation
    ".*smaller than the logging interval.*",
    ".*your dataloader is not resumable.*",  # the data module is
)
SELF_PRAISE = "litlogger"


class Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser, with our errors."""


class PredictorCLI(LightningCLI):
    """Links the model's sizes to the data, and asks for weights where they are needed."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link geometry and vocabulary."""
        # As a dictionary, since jsonargparse would want a dataclass's fields one by one.
        parser.link_arguments(
            "data.geometry", "model.init_args.geometry", compute_fn=Geometry.to_json, apply_on="instantiate"
        )
        parser.link_arguments("data.vocab_size", "model.init_args.vocab_size", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Settle where wandb's runs go before anything logs."""
        trainer = super().instantiate_trainer(**kwargs)
        settle_wandb(trainer, self.subcommand or "", self._get(self.config, "trainer.logger"))
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Keep to the configuration: Lightning would let a checkpoint's own arguments override it, unsaid."""

    def before_fit(self) -> None:
        """Look at the checkpoint to resume, if there is one, and whether the model can be fitted so."""
        self._check_checkpoint(needed=False)
        self.model.check_trainer(self.trainer)

    def before_validate(self) -> None:
        """Refuse to score random weights."""
        self._check_checkpoint()

    def before_test(self) -> None:
        """Refuse to score random weights."""
        self._check_checkpoint()

    def before_predict(self) -> None:
        """Refuse to score random weights; scores are written, not returned."""
        self._check_checkpoint()
        self.config_init["predict"]["return_predictions"] = False

    def _check_checkpoint(self, *, needed: bool = True) -> None:
        verb = self.subcommand or ""
        path = self.config_init[verb].get("ckpt_path")
        if path is None:
            if needed:
                raise UserError(f"{verb} needs trained weights; give --ckpt_path FILE")
            return
        checkpoint = load_checkpoint(path)
        found, asked = checkpoint.predictor, self.model.predictor
        if (found.architecture, found.arguments()) != (asked.architecture, asked.arguments()):
            raise UserError(
                f"{path}: holds a {found.architecture} with {found.arguments()}, but the configuration asks for "
                f"a {asked.architecture} with {asked.arguments()}; give the config.yaml of its run"
            )
        if found.geometry.shape() != asked.geometry.shape() or found.vocab_size != asked.vocab_size:
            raise UserError(
                f"{path}: was fitted for {found.geometry.describe_shape()} and {found.vocab_size} token ids, but the "
                f"traces have {asked.geometry.describe_shape()} and {asked.vocab_size}"
            )
        theirs, ours = checkpoint.training.get("tokenizer", {}).get("sha256"), self.datamodule.manifest.tokenizer.sha256
        if None not in (theirs, ours) and theirs != ours:
            raise UserError(f"{path}: was fitted with another tokenizer than that of {self.datamodule.traces.folder}")


def run(words: list[str]) -> None:
    """Run a Lightning verb.

    Args:
        words: The verb and its options.
    """
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: SELF_PRAISE not in record.getMessage()
    )
    try:
        with finishing_wandb():
            PredictorCLI(
                PredictorTask,
                TraceDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=KeepConfig,
                save_config_kwargs={"overwrite": True},
                trainer_defaults={"callbacks": TrackWandb()},
                seed_everything_default=0,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                parser_class=Parser,
                args=words,
            )
    except ValueError as error:  # jsonargparse wraps what a constructor raises
        cause = error.__cause__
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
