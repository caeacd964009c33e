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
from moe_beyond.callbacks.export import export_folder
from moe_beyond.callbacks.lines import EpochLines
from moe_beyond.callbacks.scores import WriteScores
from moe_beyond.cli.options import ExampleAsWritten, OneLineErrors, Output, add_output, example_text
from moe_beyond.cli.resuming import add_resume, check_names_a_file, saying_how_to_resume, with_resume
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

EXAMPLES = {
    "fit": "moe-beyond fit -c configs/trainer/default.yaml -c configs/model/cross_layer.yaml "
    "-c configs/data/traces.yaml --data.traces traces/puffin",
    "validate": "moe-beyond validate -c runs/predictor/version_0/config.yaml "
    "--ckpt_path runs/predictor/version_0/checkpoints/last.ckpt",
    "test": "moe-beyond test -c runs/predictor/version_0/config.yaml "
    "--ckpt_path runs/predictor/version_0/checkpoints/last.ckpt --data.test_traces traces/webglm",
    "predict": "moe-beyond predict -c runs/predictor/version_0/config.yaml "
    "--ckpt_path runs/predictor/version_0/checkpoints/last.ckpt",
}


class Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser, with our errors."""


class PredictorCLI(LightningCLI):
    """Links the model's sizes to the data, asks for weights where they are needed, and says what came out."""

    output: Output

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link geometry, vocabulary and hidden size."""
        add_output(parser)
        add_resume(parser)
        # As a dictionary, since jsonargparse would want a dataclass's fields one by one.
        parser.link_arguments(
            "data.geometry", "model.init_args.geometry", compute_fn=Geometry.to_json, apply_on="instantiate"
        )
        parser.link_arguments("data.vocab_size", "model.init_args.vocab_size", apply_on="instantiate")
        # Of predictors that read hidden states; jsonargparse passes over it where a class has no such argument.
        parser.link_arguments("data.hidden_size", "model.init_args.hidden_size", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Settle where wandb's runs go before anything logs."""
        trainer = super().instantiate_trainer(**kwargs)
        settle_wandb(trainer, self.subcommand or "", self._get(self.config, "trainer.logger"))
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Keep to the configuration: Lightning would let a checkpoint's own arguments override it, unsaid."""

    def before_instantiate_classes(self) -> None:
        """Settle what is printed: bars on a terminal, lines in a pipe, nothing when quiet."""
        options = self.config[str(self.subcommand)]
        self.output = Output(options)
        options.json, options.quiet, options.resume = (
            None,
            False,
            None,
        )  # of this call alone: they are not for the run's config.yaml
        if self.output.quiet or not self.output.console.is_terminal:
            options.trainer.enable_progress_bar = False
        if self.output.quiet:
            options.trainer.enable_model_summary = False
            if "verbose" in options:
                options.verbose = False

    def before_fit(self) -> None:
        """Look at the checkpoint to resume, if there is one, and whether the model can be fitted so."""
        self._check_checkpoint(needed=False)
        self.model.check_trainer(self.trainer)
        if not self.output.console.is_terminal:
            self.trainer.callbacks.append(EpochLines(self.output.show))  # type: ignore[attr-defined]

    def fit(self, **arguments: Any) -> None:
        """Fit; an interrupted fit says how to go on."""
        with saying_how_to_resume(self.trainer):
            self.trainer.fit(**arguments)

    def after_fit(self) -> None:
        """Say where the run and its predictor lie."""
        predictor = export_folder(self.trainer)  # asks all ranks
        found = {"run": str(predictor.parent), "predictor": str(predictor) if predictor.exists() else None}
        self._say({name: path for name, path in found.items() if path}, found | {"metrics": self._metrics()})

    def before_validate(self) -> None:
        """Refuse to score random weights."""
        self._check_checkpoint()

    def after_validate(self) -> None:
        """Give the figures."""
        self._say({}, {"metrics": self._metrics()})

    def before_test(self) -> None:
        """Refuse to score random weights."""
        self._check_checkpoint()

    def after_test(self) -> None:
        """Give the figures."""
        self._say({}, {"metrics": self._metrics()})

    def before_predict(self) -> None:
        """Refuse to score random weights; scores are written, not returned."""
        self._check_checkpoint()
        self.config_init["predict"]["return_predictions"] = False

    def after_predict(self) -> None:
        """Say where the scores lie."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        written = [str(one.folder) for one in callbacks if isinstance(one, WriteScores) and one.folder]
        self._say({"scores": ", ".join(written)} if written else {}, {"scores": written[0] if written else None})

    def _metrics(self) -> dict[str, float]:
        return {name: float(value) for name, value in sorted(self.trainer.callback_metrics.items())}

    def _say(self, lines: dict[str, str], result: dict[str, Any]) -> None:
        if self.trainer.is_global_zero:
            self.output.show(*(f"{name}: {where}" for name, where in lines.items()))
            self.output.result(result)

    def _check_checkpoint(self, *, needed: bool = True) -> None:
        verb = self.subcommand or ""
        path = self.config_init[verb].get("ckpt_path")
        if path is None:
            if needed:
                raise UserError(f"{verb} needs trained weights; give --ckpt_path FILE")
            return
        check_names_a_file(verb, str(path))
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
                parser_kwargs={
                    "formatter_class": ExampleAsWritten,
                    **{verb: {"epilog": example_text(example)} for verb, example in EXAMPLES.items()},
                },
                args=with_resume(words),
            )
    except ValueError as error:  # jsonargparse wraps what a constructor raises
        cause = error.__cause__
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
