"""The classes that a configuration may name: those of this package, of its plugins, and parts of Lightning's trainer.

A configuration may come from a stranger. A class that calls a function, such as `LambdaCallback`, would let it run any
command, and an import runs the code of a module. Therefore a file or an option can name only the classes of
`allowed_classes`. Every other import path is refused before its module is imported.
"""

import importlib
import sys
from collections.abc import Iterator
from typing import Any

from jsonargparse import set_parsing_settings

from moe_beyond.cli.parser import not_allowed
from moe_beyond.errors import UserError
from moe_beyond.tasks import TASKS

CLASSES = {
    "moe_beyond.geometry": ("Geometry",),
    "lightning": ("Callback", "LightningDataModule", "LightningModule"),  # bases, which do nothing
    "lightning.pytorch.callbacks": (
        *("BackboneFinetuning", "BatchSizeFinder", "DeviceStatsMonitor", "EMAWeightAveraging", "EarlyStopping"),
        *("GradientAccumulationScheduler", "LearningRateFinder", "LearningRateMonitor", "ModelCheckpoint"),
        *("ModelSummary", "OnExceptionCheckpoint", "RichModelSummary", "RichProgressBar"),
        *("StochasticWeightAveraging", "TQDMProgressBar", "Timer", "WeightAveraging"),
    ),
    "lightning.pytorch.loggers": ("CSVLogger", "Logger", "TensorBoardLogger", "WandbLogger"),
    "lightning.pytorch.profilers": ("AdvancedProfiler", "PassThroughProfiler", "Profiler", "SimpleProfiler"),
    "lightning.pytorch.strategies": ("DDPStrategy", "SingleDeviceStrategy", "Strategy"),
    "lightning.pytorch.accelerators": ("Accelerator", "CPUAccelerator", "CUDAAccelerator", "MPSAccelerator"),
    "lightning.pytorch.plugins": (
        *("CheckpointIO", "DoublePrecision", "HalfPrecision", "LayerSync", "MixedPrecision", "Precision"),
        "TorchSyncBatchNorm",
    ),
    "lightning.pytorch.plugins.environments": (
        *(
            "ClusterEnvironment",
            "KubeflowEnvironment",
            "LSFEnvironment",
            "LightningEnvironment",
            "MPIEnvironment",
            "SLURMEnvironment",
        ),
        *("TorchElasticEnvironment",),
    ),
}
"""Module -> its classes that a configuration may name: none of them runs code that an argument names."""


OURS = ("moe_beyond.callbacks", "moe_beyond.datamodules", "moe_beyond.tasks")
"""Modules of this package whose public classes a configuration may name."""


def allowed_classes() -> dict[str, type]:
    """Return the classes that a configuration may name, by each of their import paths.

    Packages that add tasks register them (`moe_beyond.tasks.TASKS`), and are installed by the user, so their tasks are
    allowed.
    """
    named = {f"{module}.{name}": _attribute(module, name) for module, names in CLASSES.items() for name in names}
    public = {f"{module}.{name}": _attribute(module, name) for module in OURS for name in _attribute(module, "__all__")}
    named |= {path: value for path, value in public.items() if isinstance(value, type)}
    return named | {path: cls for cls in (*named.values(), *_registered_tasks()) for path in _paths(cls)}


def _paths(cls: type) -> Iterator[str]:
    """Yield the import paths of a class: that of its module, and those of parent packages that export it."""
    parts = cls.__module__.split(".")
    for end in range(1, len(parts) + 1):
        module = ".".join(parts[:end])
        if getattr(sys.modules[module], cls.__name__, None) is cls:
            yield f"{module}.{cls.__name__}"


def _registered_tasks() -> list[type]:
    tasks = list[type]()
    for name in TASKS:
        try:
            tasks.append(TASKS[name])
        except UserError:  # a package that cannot be imported; `import_tasks` warns
            continue
    return tasks


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def allow_only_known_classes() -> None:
    """Let jsonargparse import nothing but `allowed_classes`, for the whole process."""
    allowed = allowed_classes()
    # An entry of the library allows the members of a class, too, such as load_from_checkpoint, which can read pickle.
    members = [f"{path}.{name}" for path, cls in allowed.items() for name in dir(cls) if name.isidentifier()]
    set_parsing_settings(
        import_path_denylist=["*", *members],
        import_path_allowlist=list(allowed),
        instantiate_subclass_spec_in_any=False,
        config_read_mode_fsspec_enabled=False,
    )


def check_class(path: str) -> None:
    """Refuse a class that a configuration may not name.

    Args:
        path: Import path, or the name of a class.

    Raises:
        UserError: The class is not allowed.
    """
    if "." in path and path not in allowed_classes():  # jsonargparse resolves bare names, and refuses their classes
        raise UserError(not_allowed(path))
