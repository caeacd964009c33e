"""``moe-beyond fit``, ``validate``, ``test`` and ``predict``: Lightning's own command line."""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning 2.6 calls what jsonargparse 5 drops

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

import moe_beyond.callbacks
import moe_beyond.datamodules
import moe_beyond.tasks  # noqa: F401  (configs name these classes without their module)
from moe_beyond.callbacks import TrackWandb
from moe_beyond.callbacks.epoch_summary import EpochSummary
from moe_beyond.callbacks.export import export_folder
from moe_beyond.callbacks.monitors import check_monitors
from moe_beyond.callbacks.save_config import SaveConfig
from moe_beyond.callbacks.trainer_folder import trainer_folder
from moe_beyond.callbacks.write_scores import WriteScores
from moe_beyond.cli.config_files import ConfigFile, guard_yaml
from moe_beyond.cli.options import ExampleAsWritten, Output, add_output, example_text
from moe_beyond.cli.resuming import (
    add_resume,
    check_names_a_file,
    check_unfinished,
    printing_last_words,
    saying_how_to_resume,
    with_resume,
)
from moe_beyond.cli.slips import OneLineErrors, one_line
from moe_beyond.cli.wandb_mode import discard_offline_run, finishing_wandb, settle_wandb
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.errors import UserError
from moe_beyond.fields import brief
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.io.checkpoint import load_checkpoint
from moe_beyond.tasks import PredictorTask
from moe_beyond.tasks.gradient import GradientTask
from moe_beyond.tasks.registry import import_tasks

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
NOTHING_FITTED = (
    "nothing was fitted: no training step was made; "
    "raise trainer.max_epochs, max_steps, max_time or limit_train_batches"
)
LINKED = "geometry", "vocab_size", "hidden_size"
"""Arguments of models that are linked from the data."""
CHATTY = ("lightning.pytorch", "lightning.fabric")
"""Loggers of Lightning that write to the terminal."""
OF_A_NODE = "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"
"""Environment variables by which a node finds the others, where no launcher sets them."""
RUNS = "runs", "predictor"
"""Folder and name of a run whose configuration has no logger, as in the shipped configurations."""

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
    """Lightning's parser, with our errors, and without abbreviations of options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)


class PredictorCLI(LightningCLI):
    """Links the model's sizes to the data, asks for weights where they are needed, and shows the result."""

    output: Output

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with ExitStack() as self.settings:  # what --quiet changes is undone at the end
            super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Start a verb's parser with our ``-c FILE``."""
        parser = self.parser_class(dump_header=[f"lightning.pytorch=={L.__version__}"], **kwargs)
        about = "configuration file in YAML; repeats, and a later one overrides an earlier one"
        parser.add_argument("-c", "--config", metavar="FILE", action=ConfigFile, help=about)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and settle what is printed: bars on a terminal, lines in a pipe, nothing when quiet."""
        super().parse_arguments(parser, args)
        options = self.config[str(self.config.subcommand)]
        self.output = Output(options)
        # Of this call only: they are not for the run's config.yaml.
        options.json, options.quiet, options.resume = None, False, None
        check_linked(options)
        if self.output.quiet or not self.output.console.is_terminal:
            options.trainer.enable_progress_bar = False
        if self.output.quiet:
            self.settings.enter_context(hushed())
            options.trainer.enable_model_summary = False
            if "verbose" in options:
                options.verbose = False

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

    def instantiate_classes(self) -> None:
        """Construct what the configuration names."""
        check_trainer_options(self._get(self.config, "trainer"))
        with one_line(constructing=True):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Settle where runs go before anything logs: a run without a logger gets a folder like those with one."""
        folder = self._get(self.config_init, "trainer").default_root_dir or CSVLogger(*RUNS).log_dir
        trainer = super().instantiate_trainer(default_root_dir=folder, **kwargs)
        configured = self._get(self.config, "trainer.logger")
        check_trainer(trainer)
        settle_wandb(trainer, self.subcommand or "", configured, self.model, self.datamodule)
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Keep to the configuration: Lightning would let a checkpoint's own arguments override it silently."""

    def _set_seed(self) -> None:
        with one_line("--seed_everything", constructing=True):
            super()._set_seed()

    def _run_subcommand(self, subcommand: str) -> None:
        with one_line(), leaving_nothing(self.trainer):
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        """Check the checkpoint to resume, if there is one, and that the fit can be what the options say."""
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
        """Fit; an interrupted fit says how to go on."""
        with saying_how_to_resume(self.trainer):
            self.trainer.fit(**arguments)

    def after_fit(self) -> None:
        """Show where the run and its predictor are.

        Raises:
            UserError: No step was made.
        """
        if not self.trainer.global_step:
            raise UserError(NOTHING_FITTED)
        predictor = export_folder(self.trainer)  # asks all ranks
        paths = {"run": str(predictor.parent), "predictor": str(predictor) if predictor.exists() else None}
        self._say({name: path for name, path in paths.items() if path}, paths | {"metrics": self._metrics()})

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
        """Show where the scores are."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        written = [str(writer.folder) for writer in callbacks if isinstance(writer, WriteScores) and writer.folder]
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


def check_linked(options: Namespace) -> None:
    """Refuse arguments of the model that the traces decide.

    Raises:
        UserError: One is given.
    """
    given = options.model.get("init_args") or {}
    for name in LINKED:
        if given.get(name) is not None:
            raise UserError(f"--model.{name}: is read from the traces (got {brief(given[name], 40)}); leave it out")


def check_trainer_options(options: Namespace) -> None:
    """Refuse values that Lightning accepts and then fails on or misreads.

    Raises:
        UserError: There is one.
    """
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval", "log_every_n_steps"):
        if isinstance(options[name], (int, float)) and options[name] <= 0:
            raise UserError(f"--trainer.{name}: must be more than 0 (got {options[name]})")
    if (options.gradient_clip_val or 0) < 0:
        raise UserError(f"--trainer.gradient_clip_val: must not be less than 0 (got {options.gradient_clip_val})")
    start = options.strategy
    if isinstance(start, str) and any(word in start for word in ("spawn", "fork", "notebook")):
        raise UserError(
            f"--trainer.strategy: {start} starts its processes within Python, from which no result comes back; set ddp"
        )


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse a trainer that would fail later, or wait without end.

    Raises:
        UserError: The weights would not be kept in 32 bits, processes would be started by a library of Python, or
            nothing starts the processes of the other nodes.
    """
    if str(trainer.precision) in ("16-true", "bf16-true", "64-true"):
        raise UserError(
            f"--trainer.precision: weights are kept in 32 bits; set 32-true, 16-mixed or bf16-mixed "
            f"(got {trainer.precision})"
        )
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        raise UserError(
            f"--trainer.strategy: {launcher._start_method} starts the processes within Python, "  # noqa: SLF001
            "from which no result comes back; set ddp"
        )
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment):
        missing = [name for name in OF_A_NODE if name not in os.environ]
        if missing:
            raise UserError(
                f"--trainer.num_nodes: {trainer.num_nodes} nodes need a launcher (torchrun, srun), or on each node "
                f"{', '.join(OF_A_NODE)} in the environment (missing: {', '.join(missing)})"
            )
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        print(f"moe-beyond: waiting for all {trainer.num_nodes} nodes at {where}", file=sys.stderr)


@contextmanager
def hushed() -> Iterator[None]:
    """Keep Lightning, wandb and warnings silent."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    os.environ["WANDB_SILENT"] = "true"  # `finishing_wandb` takes it back
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
def leaving_nothing(trainer: L.Trainer) -> Iterator[None]:
    """Remove the folder that a verb made for its run, if it fails before a training step was made."""
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
    guard_yaml()
    import_tasks()
    Parser.verb, Parser.example = words[0], EXAMPLES[words[0]]  # also of the parsers that jsonargparse makes of it
    with printing_last_words(), finishing_wandb():
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
                **{verb: {"epilog": example_text(example)} for verb, example in EXAMPLES.items()},
            },
            args=with_resume(words),
        )
