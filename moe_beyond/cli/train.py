"""``moe-beyond fit``, ``validate``, ``test`` and ``predict``: LightningCLI with checks and one-line errors."""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

# lightning 2.6 calls functions that jsonargparse 5 drops
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from moe_beyond.callbacks import TrackWandb
from moe_beyond.callbacks.epoch_summary import EpochSummary
from moe_beyond.callbacks.export import export_folder
from moe_beyond.callbacks.monitors import check_monitors
from moe_beyond.callbacks.save_config import SaveConfig
from moe_beyond.callbacks.trainer_folder import trainer_folder
from moe_beyond.callbacks.write_scores import WriteScores
from moe_beyond.cli.config_files import ConfigFile, check_options, guard_configurations
from moe_beyond.cli.library_errors import as_user_error
from moe_beyond.cli.lightning_commands import EXAMPLES
from moe_beyond.cli.options import ExampleAsWritten, Output, add_output, example_text
from moe_beyond.cli.parser import TRUST, CommandParser
from moe_beyond.cli.resuming import (
    add_resume,
    check_names_a_file,
    check_unfinished,
    printing_how_to_resume,
    printing_last_lines,
    with_resume,
)
from moe_beyond.cli.wandb_mode import discard_offline_run, finishing_wandb, set_wandb_mode
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.errors import UserError
from moe_beyond.files import naming_full_disk
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.io.checkpoint import load_checkpoint
from moe_beyond.predictors.io.folder import check_projection
from moe_beyond.safe_text import brief
from moe_beyond.tasks import PredictorTask
from moe_beyond.tasks.gradient import GradientTask
from moe_beyond.tasks.registry import import_tasks

HARMLESS_WARNINGS = (
    ".*does not have many workers.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*args parameter is intended to run from within Python.*",
    ".*Couldn't infer the batch indices.*",  # scores carry the names of their sequences
    ".*returned `None`, this fit will run with no optimizer.*",  # counting predictors have none
    ".*Total length of `list` across ranks is zero.*",  # a fit without validation
    ".*smaller than the logging interval.*",
    ".*your dataloader is not resumable.*",  # the data module resumes
)
"""Warnings of Lightning and torch that are wrong or useless here; they are not shown."""
LITLOGGER_HINT = "litlogger"
"""Word in the log message with which Lightning recommends another logger; it is not shown."""
NOTHING_FITTED = (
    "nothing was fitted: no training step was made; "
    "raise trainer.max_epochs, max_steps, max_time or limit_train_batches"
)
LINKED = "geometry", "vocab_size", "hidden_size", "projected_from"
"""Arguments of a task that the data module sets."""
LIGHTNING_LOGGERS = ("lightning.pytorch", "lightning.fabric")
"""Loggers of Lightning that write to the terminal."""
NODE_VARIABLES = "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"
"""Environment variables with which a node finds the others if no launcher sets them."""
RUNS = "runs", "predictor"
"""Folder and name of a run whose configuration has no logger, as in the built-in configurations."""


class Parser(CommandParser, LightningArgumentParser):
    """Parser of LightningCLI with one-line errors and without abbreviations of options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)


class PredictorCLI(LightningCLI):
    """LightningCLI that sets the task's sizes from the data, requires weights except to fit, and shows the result."""

    output: Output

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with ExitStack() as self.settings:  # undoes the changes of --quiet at the end
            super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Create a command's parser with ``-c FILE``."""
        parser = self.parser_class(dump_header=[f"lightning.pytorch=={L.__version__}"], **kwargs)
        parser.add_argument(
            "-c",
            "--config",
            metavar="FILE",
            action=ConfigFile,
            help="configuration file in YAML, or the name of a built-in one, such as trainer/default; repeat for more: "
            "a later one overrides an earlier one",
        )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; choose progress bars on a terminal, lines in a pipe, nothing with ``--quiet``."""
        super().parse_arguments(parser, args)
        options = self.config[str(self.config.subcommand)]
        self.output = Output(options)
        # Options of this call; they are left out of the run's config.yaml.
        options.json, options.quiet, options.resume = None, False, None
        check_linked(options)
        if self.output.quiet or not self.output.console.is_terminal:
            options.trainer.enable_progress_bar = False
        if self.output.quiet:
            self.settings.enter_context(silenced())
            options.trainer.enable_model_summary = False
            if "verbose" in options:
                options.verbose = False

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of all commands; set geometry, vocabulary and hidden size of the task from the data."""
        add_output(parser)
        add_resume(parser)
        parser.add_argument(
            TRUST,
            action="store_true",
            help="let the configuration import and run any code; without it, only classes of this package and parts of "
            "Lightning's trainer",
        )
        # As a dictionary: jsonargparse would require each field of a dataclass.
        parser.link_arguments(
            "data.geometry", "model.init_args.geometry", compute_fn=Geometry.to_json, apply_on="instantiate"
        )
        parser.link_arguments("data.vocab_size", "model.init_args.vocab_size", apply_on="instantiate")
        # For predictors that read hidden states; jsonargparse ignores it if a class has no such argument.
        for name in ("hidden_size", "projected_from"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def instantiate_classes(self) -> None:
        """Construct the classes that the configuration names."""
        check_trainer_options(self._get(self.config, "trainer"))
        with as_user_error(constructing=True):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Construct the trainer, choose the run's folder and the mode of Weights & Biases, before anything logs."""
        folder = self._get(self.config_init, "trainer").default_root_dir or CSVLogger(*RUNS).log_dir
        trainer = super().instantiate_trainer(default_root_dir=folder, **kwargs)
        configured = self._get(self.config, "trainer.logger")
        check_trainer(trainer)
        set_wandb_mode(trainer, self.subcommand or "", configured, self.model, self.datamodule)
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Do nothing: in Lightning, the arguments in a checkpoint would silently override the configuration."""

    def _set_seed(self) -> None:
        with as_user_error("--seed_everything", constructing=True):
            super()._set_seed()

    def _run_subcommand(self, subcommand: str) -> None:
        with as_user_error(), removing_empty_run(self.trainer), naming_full_disk(trainer_folder(self.trainer)):
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        """Check the checkpoint to resume, if any, and the combination of options."""
        self._check_checkpoint(needed=False)
        trainer: Any = self.trainer
        if 0 in (trainer.max_epochs, trainer.max_steps, trainer.limit_train_batches):
            raise UserError(NOTHING_FITTED)
        if trainer.max_epochs == trainer.max_steps == -1 and isinstance(self.model, GradientTask):
            raise UserError("the learning rate falls to zero at the fit's end; set trainer.max_epochs or max_steps")
        self.datamodule.setup("fit")
        self.model.check_trainer(self.trainer)
        if path := self.config_init["fit"].get("ckpt_path"):
            check_unfinished(Path(path), trainer)
        check_monitors(self.trainer.callbacks, self.model, self.datamodule)  # type: ignore[attr-defined]
        if not self.output.console.is_terminal:
            self.trainer.callbacks.append(EpochSummary(self.output.show))  # type: ignore[attr-defined]

    def fit(self, **arguments: Any) -> None:
        """Fit; an interrupted fit prints how to resume it."""
        with printing_how_to_resume(self.trainer):
            self.trainer.fit(**arguments)

    def after_fit(self) -> None:
        """Print the folders of the run and of its predictor.

        Raises:
            UserError: No training step was made.
        """
        if not self.trainer.global_step:
            raise UserError(NOTHING_FITTED)
        predictor = export_folder(self.trainer)  # on all ranks
        paths = {"run": str(predictor.parent), "predictor": str(predictor) if predictor.exists() else None}
        self._show({name: path for name, path in paths.items() if path}, paths | {"metrics": self._metrics()})

    def before_validate(self) -> None:
        """Refuse to score random weights."""
        self._check_checkpoint()

    def after_validate(self) -> None:
        """Write the metrics."""
        self._show({}, {"metrics": self._metrics()})

    def before_test(self) -> None:
        """Refuse to score random weights."""
        self._check_checkpoint()

    def after_test(self) -> None:
        """Write the metrics."""
        self._show({}, {"metrics": self._metrics()})

    def before_predict(self) -> None:
        """Refuse to score random weights; scores are written, not returned."""
        self._check_checkpoint()
        self.config_init["predict"]["return_predictions"] = False

    def after_predict(self) -> None:
        """Print the folder of the scores."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        folders = [str(writer.folder) for writer in callbacks if isinstance(writer, WriteScores) and writer.folder]
        self._show({"scores": ", ".join(folders)} if folders else {}, {"scores": folders[0] if folders else None})

    def _metrics(self) -> dict[str, float]:
        return {name: float(value) for name, value in sorted(self.trainer.callback_metrics.items())}

    def _show(self, lines: dict[str, str], result: dict[str, Any]) -> None:
        if self.trainer.is_global_zero:
            self.output.show(*(f"{name}: {folder}" for name, folder in lines.items()))
            self.output.result(result)

    def _check_checkpoint(self, *, needed: bool = True) -> None:
        command = self.subcommand or ""
        path = self.config_init[command].get("ckpt_path")
        if path is None:
            if needed:
                raise UserError(f"{command} needs trained weights; give --ckpt_path FILE")
            return
        check_names_a_file(command, str(path))
        checkpoint = load_checkpoint(path)
        stored, configured = checkpoint.predictor, self.model.predictor
        if (stored.architecture, stored.arguments()) != (configured.architecture, configured.arguments()):
            raise UserError(
                f"{path}: holds a {stored.architecture} with {stored.arguments()}, but the configuration has "
                f"a {configured.architecture} with {configured.arguments()}; give the config.yaml of its run"
            )
        if (stored.geometry.shape(), stored.vocab_size) != (configured.geometry.shape(), configured.vocab_size):
            raise UserError(
                f"{path}: was fitted for {stored.geometry.describe_shape()} and {stored.vocab_size} token ids, but the "
                f"traces have {configured.geometry.describe_shape()} and {configured.vocab_size}"
            )
        fitted = checkpoint.training.get("tokenizer", {}).get("sha256")
        recorded = self.datamodule.manifest.tokenizer.sha256
        if None not in (fitted, recorded) and fitted != recorded:
            raise UserError(f"{path}: was fitted with another tokenizer than that of {self.datamodule.traces.folder}")
        for traces in self.datamodule.measured_sets:
            check_projection(stored, traces)


def check_linked(options: Namespace) -> None:
    """Refuse arguments of the task that the traces determine.

    Raises:
        UserError: Such an argument is given.
    """
    given = options.model.get("init_args") or {}
    for name in LINKED:
        if given.get(name) is not None:
            raise UserError(f"--model.{name}: is read from the traces (got {brief(given[name], 40)}); leave it out")


def check_trainer_options(options: Namespace) -> None:
    """Refuse values that Lightning accepts, and later fails on or misreads.

    Raises:
        UserError: There is such a value.
    """
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval", "log_every_n_steps"):
        if isinstance(options[name], (int, float)) and options[name] <= 0:
            raise UserError(f"--trainer.{name}: must be more than 0 (got {options[name]})")
    if (options.gradient_clip_val or 0) < 0:
        raise UserError(f"--trainer.gradient_clip_val: must not be less than 0 (got {options.gradient_clip_val})")
    strategy = options.strategy
    if isinstance(strategy, str) and any(launcher in strategy for launcher in ("spawn", "fork", "notebook")):
        raise UserError(f"--trainer.strategy: {strategy} starts processes that return no result; set ddp")


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse a trainer that would fail later, or wait forever.

    Raises:
        UserError: The weights would not be kept in 32 bits, a Python library would start the processes, or nothing
            starts the processes of the other nodes.
    """
    if str(trainer.precision) in ("16-true", "bf16-true", "64-true"):
        raise UserError(
            f"--trainer.precision: weights are kept in 32 bits; set 32-true, 16-mixed or bf16-mixed "
            f"(got {trainer.precision})"
        )
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        raise UserError(
            f"--trainer.strategy: {launcher._start_method} starts processes that return no result; set ddp"  # noqa: SLF001
        )
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment):
        missing = [name for name in NODE_VARIABLES if name not in os.environ]
        if missing:
            raise UserError(
                f"--trainer.num_nodes: {trainer.num_nodes} nodes need a launcher (torchrun, srun), or on each node "
                f"{', '.join(NODE_VARIABLES)} in the environment (missing: {', '.join(missing)})"
            )
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        print(f"moe-beyond: waiting for all {trainer.num_nodes} nodes at {address}", file=sys.stderr)


@contextmanager
def silenced() -> Iterator[None]:
    """Silence Lightning, wandb and warnings."""
    loggers = [logging.getLogger(name) for name in LIGHTNING_LOGGERS]
    levels = [logger.level for logger in loggers]
    os.environ["WANDB_SILENT"] = "true"  # `finishing_wandb` restores it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def removing_empty_run(trainer: L.Trainer) -> Iterator[None]:
    """Remove the folder that a command made for its run, if it fails before the first training step."""
    folder = trainer_folder(trainer)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        if trainer.is_global_zero and not trainer.global_step:
            discard_offline_run()
            if folder in missing:
                shutil.rmtree(folder, ignore_errors=True)
            for path in missing:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
        raise


def main(argv: list[str]) -> None:
    """Run a Lightning command.

    Args:
        argv: The command and its options.
    """
    for message in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: LITLOGGER_HINT not in record.getMessage()
    )
    import_tasks()  # configs name tasks without their module
    guard_configurations(trusted=TRUST in argv)
    argv = with_resume([argument for argument in argv if argument != TRUST])
    check_options(argv)
    # On the class, for the parsers that jsonargparse makes of it.
    Parser.command, Parser.example = argv[0], EXAMPLES[argv[0]]
    with printing_last_lines(), finishing_wandb():
        PredictorCLI(
            PredictorTask,
            TraceDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={"callbacks": TrackWandb()},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=Parser,
            parser_kwargs={
                "formatter_class": ExampleAsWritten,
                **{command: {"epilog": example_text(example)} for command, example in EXAMPLES.items()},
            },
            args=argv,
        )
