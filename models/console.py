"""What the commands of this folder share: numbers read from flags, and a quiet start of TensorFlow."""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any


def number(
    kind: type, least: float = -math.inf, most: float = math.inf, *, above: bool = False
) -> Callable[[str], Any]:
    """What reads the number of a flag: finite, and within bounds.

    Args:
        kind: int or float.
        least: Of the numbers allowed.
        most: Likewise.
        above: Whether `least` itself is too little.

    Returns:
        For `type` of `argparse`'s `add_argument`.
    """
    allowed = "a whole number" if kind is int else "a finite number"
    if most < math.inf:
        allowed += f" in [{least}, {most}]"
    elif least > -math.inf:
        allowed += f" {'above' if above else 'of at least'} {least}"

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most) or (above and value == least):
            raise argparse.ArgumentTypeError(f"must be {allowed}. Received: {text}")
        return value

    return read


count, positive, share = number(int, 1), number(float, 0, above=True), number(float, 0, 1)


def start_tensorflow() -> None:
    """Import TensorFlow without its messages about its build and missing GPUs.

    They are written by C++ before its log level can be set, so the process's stderr is put aside meanwhile. Where the
    import fails, what was put aside is shown.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            import keras  # noqa: F401
            import tensorflow as tf

            # The search for devices has messages of its own.
            tf.config.list_physical_devices()
        except BaseException:
            aside.seek(0)
            os.write(stderr, aside.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
