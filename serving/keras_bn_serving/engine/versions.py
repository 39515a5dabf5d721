"""One version of a model: where in its life it is, and what lies in its folder."""

import enum
import os

from keras_bn_serving.engine.servable import Servable
from keras_bn_serving.errors import ServingError

# Of each file its path, size and time of change.
Files = tuple[tuple[str, int, int], ...]


class State(enum.IntEnum):
    """The life of a version, numbered as TensorFlow Serving numbers it."""

    START = 10
    LOADING = 20
    AVAILABLE = 30
    UNLOADING = 40
    END = 50


class Version:
    """One version of a model and where in its life it is."""

    def __init__(self, number: int, path: str):
        self.number = number
        self.path = path
        self.state = State.START
        self.error: ServingError | None = None
        self.servable: Servable | None = None
        self.in_use = 0
        # Of a version that has failed: its files when it was tried, how often in a row, and when it is tried again.
        self.tried: Files = ()
        self.failures = 0
        self.retry_at = 0.0


def files_below(path: str) -> Files:
    """Every file below a folder with its size and time of change: tells one state of a version from another."""
    files = []
    for folder, _, names in os.walk(path):
        for name in names:
            file = os.path.join(folder, name)
            try:
                found = os.stat(file)
            except OSError:  # It has just gone, or cannot be read: that may change, too.
                files.append((file, -1, -1))
            else:
                files.append((file, found.st_size, found.st_mtime_ns))
    return tuple(sorted(files))
