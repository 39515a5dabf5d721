"""drift(): how far what a normalization sees is from what its statistics say it should see."""

import os
from typing import Any

import keras
import numpy as np

from keras_bn import arguments
from keras_bn.drift.figures import RowFigures, in_float64, merged, plain, pooled, stacked, summary
from keras_bn.drift.figures import distance as distance
from keras_bn.drift.rows import row_figures
from keras_bn.drift.versions import FiguresOf, asked_of_version
from keras_bn.examples import as_arrays, computing_with, rows
from keras_bn.model import check_weights_finite, required_batch_norms
from keras_bn.names import shown


def drift(model: Any, inputs: Any, batch_size: int = 32) -> list[dict[str, Any]]:
    """How far `inputs` are, at each normalization, from the population its statistics describe.

    All examples are pooled, exactly: the answer does not depend on `batch_size` beyond rounding. See
    `keras_bn.drift.distance` for the equations; a layer's three numbers are those of `summary` there. A layer
    called several times is measured over all its calls.

    Args:
        model: a built Keras model, or the folder of a version that `keras_bn.export` wrote.
        inputs: examples, the first axis along them: an array; or a dictionary of arrays by input name (for a model
            also whatever structure it is called with; for a version the names as served, or as the model has them).
        batch_size: examples computed at a time.

    Returns:
        For each normalization a dictionary with its name, `layer`, and the numbers `mean_shift` (standard deviations),
        `variance_ratio` and `kl` (nats).

    Raises:
        TypeError: when `model` is neither a model nor a path.
        ValueError: when it has no normalization, or a version was exported with `drift=False`, or `inputs` do not fit
            or are not finite where a normalization sees them.

    Example:

    ```python
    keras_bn.drift("served/fashion/1", images)  # [{"layer": "bn1", "mean_shift": 0.02, ...}, ...]
    ```
    """
    batch_size = arguments.whole_number("batch_size", batch_size)
    if isinstance(model, keras.Model):
        figures_of, arrays = _asked_of_model(model, inputs)
    elif isinstance(model, str | os.PathLike):
        figures_of, arrays = asked_of_version(model, inputs)
    else:
        raise TypeError(
            "`model` must be a `keras.Model` or the folder of an exported version. "
            f"Received: model={shown(model)} of type {type(model).__name__}."
        )
    parts: dict[str, list[RowFigures]] = {}
    for first in range(0, int(arrays[0].shape[0]), batch_size):
        with computing_with("inputs", model):
            by_layer = figures_of([rows(array, first, first + batch_size) for array in arrays])
        for name, figures in by_layer.items():
            precise = RowFigures(*map(in_float64, figures))
            _check_finite(name, precise, first, model)
            parts.setdefault(name, []).append(merged(precise, axis=0))
    return [{"layer": name, **plain(summary(pooled(stacked(part))))} for name, part in parts.items()]


def _asked_of_model(model: keras.Model, inputs: Any) -> tuple[FiguresOf, list[Any]]:
    required_batch_norms(model)
    given = as_arrays("inputs", inputs, model)
    leaves = keras.tree.flatten(given)
    there = [number for number, leaf in enumerate(leaves) if leaf is not None]

    def figures_of(arrays: list[Any]) -> dict[str, RowFigures]:
        parts = dict(zip(there, arrays, strict=True))
        return row_figures(model, keras.tree.pack_sequence_as(given, [parts.get(n) for n in range(len(leaves))]))

    return figures_of, [leaves[number] for number in there]


def _check_finite(layer: str, figures: RowFigures, first: int, model: Any) -> None:
    finite = np.isfinite(figures.mean_shift) & np.isfinite(figures.variance_ratio)
    (broken,) = np.nonzero(~finite.all(axis=1))
    if broken.size:
        if isinstance(model, keras.Model):
            check_weights_finite(model)
        raise ValueError(
            f"`inputs` must be finite. Received: example {first + broken[0]} (counted from 0) with non-finite values "
            f"at the input of layer {layer!r}."
        )
