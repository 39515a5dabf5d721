"""What the notes and the papers claim of batch normalization, measured: `python -m models.experiments`."""

import importlib
from typing import Any

NAMES = (
    "drift",
    "learning_rate",
    "optimizers",
    "batch_size",
    "regularization",
    "population",
    "test_time",
    "why",
)
DATASETS = ("fashion_mnist", "mnist", "cifar10")


def load(name: str) -> Any:
    """The module of an experiment, which imports TensorFlow.

    Args:
        name: One of `NAMES`.

    Returns:
        A module with `TITLE`, `CLAIM` and `SOURCE` in words; `FULL` and `QUICK`, settings as dataclasses with a
        `cost`, the seconds that a seed takes about; `parts(setting)`, how often a run ticks;
        `run(setting, images, seed, tick)`, which returns what was measured as JSON knows it; and `figure(runs)`,
        `table(runs)` and `verdict(runs)` of what several seeds returned.

    Raises:
        ValueError: `name` is none of `NAMES`.
    """
    if name not in NAMES:
        raise ValueError(f"`name` must be one of {', '.join(NAMES)}. Received: name={name}")
    return importlib.import_module(f"models.experiments.{name}")
