"""What a person's `preprocess` makes of pictures, and whose mistake it is where that is nothing for the model."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_bn.examples import reason


class Preprocessing:
    """A person's `preprocess`, whose mistakes are said of it.

    Args:
        function: makes the model's input of a batch of float32 pictures in [0, 255].
        leaf: the model's input, with a shape and a dtype.
    """

    def __init__(self, function: Callable[[tf.Tensor], Any], leaf: Any):
        self._function = function
        self._input = tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype)

    def __call__(self, pictures: tf.Tensor) -> Any:
        """What the model is called with.

        Raises:
            ValueError: when the function raises, or makes no batch of as many examples, or one without a finite number.
        """
        try:
            made = self._function(pictures)
        except Exception as error:  # Any: it is a person's.
            in_python = isinstance(error, NotImplementedError | tf.errors.OperatorNotAllowedInGraphError)
            advice = (
                " It runs inside the server, where there is no Python but TensorFlow's operations." if in_python else ""
            )
            problem = f"{_described(pictures)} and raised {type(error).__name__}: {reason(error)}"
            raise ValueError(self._text(problem, advice)) from error
        if not self._is_batch(made, pictures.shape[0]):
            raise ValueError(self._text(f"{_described(pictures)} and made {_described(made)}"))
        if tf.executing_eagerly() and not np.any(np.isfinite(np.asarray(made, "float64"))):
            raise ValueError(self._text(f"{_described(pictures)} and made no finite number: {_described(made)}"))
        return made

    @contextlib.contextmanager
    def given_to_model(self, made: Any) -> Iterator[None]:
        """Around the model's call: of what has another shape or dtype than the model's input, it is said what came out.

        Raises:
            ValueError: then.
        """
        try:
            yield
        except Exception as error:  # Any: whatever the model has against it.
            if self._input.shape.is_compatible_with(made.shape) and self._input.dtype == tf.as_dtype(made.dtype):
                raise
            problem = f"such pictures and made {_described(made)}, of which the model said: {reason(error)}"
            raise ValueError(self._text(problem)) from error

    def _is_batch(self, made: Any, rows: int | None) -> bool:
        """Whether it is one tensor of numbers, with as many rows as there are pictures."""
        if not (tf.is_tensor(made) or isinstance(made, np.ndarray)):
            return False
        dtype, shape = tf.as_dtype(made.dtype), tf.TensorShape(made.shape)
        if dtype == tf.string or dtype.is_complex:
            return False
        return shape.rank is None or (shape.rank > 0 and (shape[0] is None or shape[0] == rows))

    def _text(self, problem: str, advice: str = "") -> str:
        name = getattr(self._function, "__name__", None) or repr(self._function)
        return (
            "`preprocess` must make the model's input of a batch of pictures, which are float32 in [0, 255]: one "
            f"tensor of {_described(self._input)}.{advice} Received: preprocess={name}, which got {problem}"
        )


def _described(value: Any) -> str:
    """Shape, dtype and, where it is known, the range."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return f"{value!r} of type {type(value).__name__}"
    dtype, shape = tf.as_dtype(value.dtype), tf.TensorShape(value.shape)
    sizes = (
        ["any" if size is None else str(size) for size in shape] if shape.rank is not None else ["any number of axes"]
    )
    text = f"shape ({', '.join(sizes)}), {dtype.name}"
    if not (isinstance(value, np.ndarray) or hasattr(value, "numpy")) or dtype == tf.string or dtype.is_complex:
        return text
    known = np.asarray(value, "float64")
    return f"{text}, from {known.min():g} to {known.max():g}" if known.size else text
