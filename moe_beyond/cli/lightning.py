"""``moe-beyond fit``, ``validate``, ``test`` and ``predict``: Lightning's own command line."""

import os
import warnings

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning 2.6 calls what jsonargparse 5 drops

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import moe_beyond.callbacks
import moe_beyond.datamodules
import moe_beyond.tasks  # noqa: F401  (configs name these classes without their module)
from moe_beyond.callbacks.config import KeepConfig
from moe_beyond.datamodules import TraceDataModule
from moe_beyond.errors import UserError
from moe_beyond.geometry import Geometry
from moe_beyond.tasks import PredictorTask

# Harmless on the machines this runs on, and not for the user to act on.
QUIET = (
    ".*does not have many workers.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*args parameter is intended to run from within Python.*",
)


class PredictorCLI(LightningCLI):
    """Links the model's sizes to the data, and asks for weights where they are needed."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link geometry and vocabulary."""
        # As a dictionary, since jsonargparse would want a dataclass's fields one by one.
        parser.link_arguments(
            "data.geometry", "model.init_args.geometry", compute_fn=Geometry.to_json, apply_on="instantiate"
        )
        parser.link_arguments("data.vocab_size", "model.init_args.vocab_size", apply_on="instantiate")

    def before_validate(self) -> None:
        """Refuse to score random weights."""
        self._require_checkpoint()

    def before_test(self) -> None:
        """Refuse to score random weights."""
        self._require_checkpoint()

    def before_predict(self) -> None:
        """Refuse to score random weights; scores are written, not returned."""
        self._require_checkpoint()
        self.config_init["predict"]["return_predictions"] = False

    def _require_checkpoint(self) -> None:
        verb = self.subcommand or ""
        if self.config_init[verb].get("ckpt_path") is None:
            raise UserError(f"{verb} needs trained weights; give --ckpt_path FILE")


def run(words: list[str]) -> None:
    """Run a Lightning verb.

    Args:
        words: The verb and its options.
    """
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    PredictorCLI(
        PredictorTask,
        TraceDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=KeepConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        args=words,
    )
