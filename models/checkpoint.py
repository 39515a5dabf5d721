"""The log and the checkpoint of a training run, written together after each epoch."""

import contextlib
import csv
import os
import time
from collections.abc import Iterator
from pathlib import Path

import keras

from models import run_folder


class Checkpoint(keras.callbacks.Callback):
    """After each epoch, writes a row to `log.csv` and all weights, the optimizer's too, to a checkpoint.

    Args:
        folder: Where the two files are.
    """

    def __init__(self, folder: str | os.PathLike):
        super().__init__()
        self.log = Path(folder) / run_folder.LOG
        self.path = Path(folder) / run_folder.CHECKPOINT

    def restore(self, model: keras.Model) -> None:
        """Give the compiled `model` the weights that it had after its last whole epoch, where there was one."""
        if self.path.exists():
            model.optimizer.build(model.trainable_variables)
            model.load_weights(self.path)

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        seconds = time.perf_counter() - self._begin
        row = {
            "epoch": epoch + 1,
            **{name: f"{value:.6g}" for name, value in logs.items()},
            "seconds": f"{seconds:.1f}",
        }
        # A row whose checkpoint was not written any more is replaced when the epoch is done again.
        rows = [*(past for past in read_log(self.log) if int(past["epoch"]) <= epoch), row]
        with whole(self.log) as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            writer.writeheader()
            writer.writerows(rows)
        with whole(self.path) as path:
            self.model.save_weights(path)


def read_log(path: str | os.PathLike) -> list[dict[str, str]]:
    """The rows of a `log.csv`, one an epoch counted from 1; none where it is missing."""
    if not Path(path).exists():
        return []
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` in one step: who is killed meanwhile leaves the file of before."""
    half = path.with_name(f".half-{path.name}")
    yield half
    half.replace(path)
