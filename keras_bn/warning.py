"""Warnings that point at the line of a person's program, not into Keras or this library."""

import sys
import warnings

_INSIDE = ("keras_bn", "keras", "tf_keras", "tensorflow")


def warn(message: str) -> None:
    """Warns, with the place of the nearest caller that is neither of this library nor of Keras nor of TensorFlow."""
    # `skip_file_prefixes` does this from Python 3.12 on.
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
