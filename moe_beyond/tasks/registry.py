"""The registry of tasks: one task class per architecture.

A package that adds an architecture to the entry-point group ``moe_beyond.predictors`` adds its task, under the same
name, to the group ``moe_beyond.tasks``.
"""

from moe_beyond.errors import UserError
from moe_beyond.messages import notify
from moe_beyond.predictors.registry import CLASSES
from moe_beyond.registry import Registry
from moe_beyond.tasks.base import PredictorTask

TASKS: Registry[type[PredictorTask]] = Registry(
    "task",
    "moe_beyond.tasks",
    {name: f"moe_beyond.tasks.architectures:{cls}Task" for name, cls in CLASSES.items()},
)
"""Task classes by the name of the architecture that they fit."""


def import_tasks() -> None:
    """Import all tasks, so that configs can name them; warn on standard error about a package that fails."""
    for name in TASKS:
        try:
            TASKS[name]
        except UserError as error:
            notify(f"moe-beyond: warning: {error}")
