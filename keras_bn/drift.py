"""How far what a normalization sees is from what its statistics say it should see."""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2

from keras_bn import arguments
from keras_bn.examples import as_arrays, check_kind, computing_with, reason
from keras_bn.inference import calls_replaced, inference_mode, observed_call
from keras_bn.masks import aligned_weights
from keras_bn.model import channel_axes, check_weights_finite, named_batch_norms, required_batch_norms
from keras_bn.names import argument

SIGNATURE = "batch_norm_drift"


class Distance(NamedTuple):
    """How far one normal distribution is from a reference, per channel.

    Attributes:
        mean_shift: (mean - reference mean) / reference standard deviation.
        variance_ratio: variance / reference variance.
        kl: Kullback-Leibler divergence from the reference, in nats, never negative.
    """

    mean_shift: Any
    variance_ratio: Any
    kl: Any


class RowFigures(NamedTuple):
    """What each example of a batch contributes to the distance of the batch, per channel.

    Attributes:
        count: Values behind the two others, shape `(batch, C)`; 0 where all are masked.
        mean_shift: As in `Distance`, of the values of this example alone.
        variance_ratio: Likewise; of a single value a channel it is epsilon / (reference variance + epsilon).
    """

    count: Any
    mean_shift: Any
    variance_ratio: Any


def drift(model: Any, inputs: Any, batch_size: int = 32) -> list[dict[str, Any]]:
    """How far `inputs` are, at each normalization, from the population its statistics describe.

    All examples are pooled, exactly: the answer does not depend on `batch_size` beyond rounding. See `distance` for
    the equations; a layer's three numbers are those of `summary`. A layer called several times is measured over all
    its calls.

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
        figures_of, arrays = _asked_of_version(model, inputs)
    else:
        raise TypeError(
            "`model` must be a `keras.Model` or the folder of an exported version. "
            f"Received: model={model!r} of type {type(model).__name__}."
        )
    parts: dict[str, list[RowFigures]] = {}
    for first in range(0, int(arrays[0].shape[0]), batch_size):
        with computing_with("inputs", model):
            by_layer = figures_of([array[first : first + batch_size] for array in arrays])
        for name, figures in by_layer.items():
            in_float64 = RowFigures(*map(_in_float64, figures))
            _check_finite(name, in_float64, first, model)
            parts.setdefault(name, []).append(merged(in_float64, axis=0))
    return [{"layer": name, **plain(summary(pooled(_stacked(part))))} for name, part in parts.items()]


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


def distance(mean: Any, variance: Any, reference_mean: Any, reference_variance: Any, epsilon: float) -> Distance:
    """Distance of N(mean, variance) from N(reference_mean, reference_variance), channel by channel.

    v = variance + epsilon, r = reference_variance + epsilon
    mean_shift = (mean - reference_mean) / sqrt(r)
    variance_ratio = v / r
    kl = (v / r + mean_shift**2 - 1 - log(v / r)) / 2

    Epsilon is that of the layer: with it a channel that is constant in both has distance 0, as it has for the layer.

    Args:
        mean, variance, reference_mean, reference_variance: shape `(C,)`; computed in float64.
        epsilon: the layer's, of the unit of a variance.

    Returns:
        A `Distance` of float64 tensors of shape `(C,)`.
    """
    m, v, m0, v0 = map(_in_float64, (mean, variance, reference_mean, reference_variance))
    return _distance((m - m0) / tf.sqrt(v0 + epsilon), (v + epsilon) / (v0 + epsilon))


def _distance(mean_shift: tf.Tensor, variance_ratio: tf.Tensor) -> Distance:
    return Distance(mean_shift, variance_ratio, (variance_ratio + mean_shift**2 - 1 - tf.math.log(variance_ratio)) / 2)


def _in_float64(x: Any) -> tf.Tensor:
    """Straight from Python numbers too, which `tf.cast` takes to float32 first."""
    return tf.constant(np.asarray(x, "float64"))


def row_figures(model: keras.Model, inputs: Any) -> dict[str, RowFigures]:
    """What each example of a batch contributes to its distance from the moving statistics, in inference mode.

    With z = (x - moving_mean) / sqrt(moving_variance + epsilon), over the values of one example that count:
    mean_shift = mean(z)
    variance_ratio = variance(z) + epsilon / (moving_variance + epsilon), the variance biased

    In float32, whatever the model computes in: in these units the digits of float32 suffice. `merged` makes the
    figures of several examples of it, exactly those of all their values.

    Where a normalization sees k rows for each example, one after another (`TimeDistributed`), they are merged.

    Args:
        model: any Keras model.
        inputs: one batch, as `model` takes it; also symbolic, inside a `tf.function`.

    Returns:
        By layer name `RowFigures` of float32 tensors of shape `(batch, C)`, C being the product of the sizes where
        `axis` is a list. A layer called several times is measured over all its calls; one that is not called is
        missing.

    Raises:
        ValueError: when a normalization is called inside a loop or function of TensorFlow's.
    """
    layers = named_batch_norms(model)
    seen: dict[str, list[RowFigures]] = {}

    def measuring(name: str, layer: keras.layers.BatchNormalization) -> Callable[..., Any]:
        return observed_call(layer, lambda x, mask: seen.setdefault(name, []).append(_leading_figures(layer, x, mask)))

    with inference_mode(model), calls_replaced({layer: measuring(name, layer) for name, layer in layers.items()}):
        model(inputs, training=False)
    unreachable = [name for name, calls in seen.items() if any(map(_is_elsewhere, calls))]
    if unreachable:
        raise ValueError(
            "`model` must call its normalizations where they can be watched, not inside a loop (an RNN's cell, "
            "`tf.map_fn`) or a `tf.function`; or export it with `drift=False`. "
            f"Received: {unreachable} called there."
        )
    batch = tf.shape(keras.tree.flatten(inputs)[0])[0]

    def by_example(values: tf.Tensor) -> tf.Tensor:
        return tf.reshape(values, [batch, -1, values.shape[-1]])

    return {
        name: merged(RowFigures(*(tf.concat(list(map(by_example, parts)), 1) for parts in zip(*calls, strict=True))), 1)
        for name, calls in seen.items()
    }


def _is_elsewhere(figures: RowFigures) -> bool:
    if not tf.is_symbolic_tensor(figures.count):
        return False
    return tf.executing_eagerly() or figures.count.graph is not tf.compat.v1.get_default_graph()


def _leading_figures(layer: keras.layers.BatchNormalization, x: tf.Tensor, mask: Any) -> RowFigures:
    """The figures of each entry along the first axis of `x`, shape `(len(x), C)`."""
    rank = len(x.shape)
    channels = sorted(axis % rank for axis in channel_axes(layer))
    others = [axis for axis in range(1, rank) if axis not in channels]
    broadcast = [x.shape[axis] if axis in channels else 1 for axis in range(rank)]
    dtype = x.dtype if x.dtype == tf.float64 else tf.float32
    mean, variance = (
        tf.reshape(tf.cast(moving, dtype), broadcast) for moving in (layer.moving_mean, layer.moving_variance)
    )
    reference = variance + layer.epsilon
    z = tf.cast((tf.cast(x, dtype) - mean) * tf.math.rsqrt(reference), tf.float32)
    if mask is None:
        size = math.prod([tf.cast(tf.shape(z)[axis], tf.float32) for axis in others], start=tf.constant(1.0))
        shift = _mean(z, others)
        ratio = _mean(tf.square(z - shift), others)
        count = tf.fill(tf.shape(shift), size)
    else:
        weights = tf.cast(aligned_weights(mask, x, channels), tf.float32)
        weights = tf.broadcast_to(weights, tf.shape(z))
        z = tf.where(weights > 0, z, 0)  # What does not count may be NaN.
        count = tf.reduce_sum(weights, others, keepdims=True)
        shift = tf.math.divide_no_nan(tf.reduce_sum(weights * z, others, keepdims=True), count)
        ratio = tf.math.divide_no_nan(tf.reduce_sum(weights * tf.square(z - shift), others, keepdims=True), count)
    ratio += tf.cast(layer.epsilon / reference, tf.float32)
    width = int(np.prod([x.shape[axis] for axis in channels]))
    return RowFigures(*(tf.reshape(value, [-1, width]) for value in (count, shift, ratio)))


def _mean(z: tf.Tensor, axes: list[int]) -> tf.Tensor:
    """Axis by axis: one sum over a large picture would lose digits that sums of sums keep."""
    for axis in reversed(axes):
        z = tf.reduce_mean(z, axis, keepdims=True)
    return z


def merged(figures: RowFigures, axis: int) -> RowFigures:
    """The figures of all values behind the entries along `axis` together: Chan's formula in units of the reference.

    count = sum(count_i), mean_shift = sum(count_i mean_shift_i) / count
    variance_ratio = sum(count_i (variance_ratio_i + (mean_shift_i - mean_shift)**2)) / count

    Reference: Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
    """
    count = tf.reduce_sum(figures.count, axis, keepdims=True)
    shift = tf.math.divide_no_nan(tf.reduce_sum(figures.count * figures.mean_shift, axis, keepdims=True), count)
    spread = figures.variance_ratio + tf.square(figures.mean_shift - shift)
    ratio = tf.math.divide_no_nan(tf.reduce_sum(figures.count * spread, axis, keepdims=True), count)
    return RowFigures(*(tf.squeeze(value, axis) for value in (count, shift, ratio)))


def _stacked(parts: list[RowFigures]) -> RowFigures:
    return RowFigures(*(tf.stack(values) for values in zip(*parts, strict=True)))


def pooled(figures: RowFigures) -> Distance:
    """The distance of a batch from its examples' figures, which are what `batch_norm_drift` serves.

    Args:
        figures: shape `(batch, C)`; computed in float64.

    Returns:
        A `Distance` of float64 tensors of shape `(C,)`; NaN where no value counts.
    """
    count, shift, ratio = merged(RowFigures(*map(_in_float64, figures)), axis=0)
    nothing = tf.where(count > 0, tf.zeros_like(count), np.nan)
    return _distance(shift + nothing, ratio + nothing)


def summary(one: Distance) -> Mapping[str, Any]:
    """A layer's distance in three numbers: root mean square shift, the ratio farthest from 1, mean divergence.

    Args:
        one: a `Distance` with tensors of shape `(C,)`.

    Returns:
        Scalars `mean_shift` (standard deviations), `variance_ratio`, `kl` (nats).
    """
    ratio = tf.reshape(one.variance_ratio, [-1])
    return {
        "mean_shift": tf.sqrt(tf.reduce_mean(one.mean_shift**2)),
        "variance_ratio": ratio[tf.argmax(tf.abs(tf.math.log(ratio)))],
        "kl": tf.reduce_mean(one.kl),
    }


def plain(numbers: Mapping[str, Any]) -> dict[str, float]:
    """A `summary` as Python numbers."""
    return {name: float(value) for name, value in numbers.items()}


FiguresOf = Callable[[list[Any]], dict[str, RowFigures]]


def _asked_of_model(model: keras.Model, inputs: Any) -> tuple[FiguresOf, list[Any]]:
    required_batch_norms(model)
    given = as_arrays("inputs", inputs, model)
    leaves = keras.tree.flatten(given)
    there = [number for number, leaf in enumerate(leaves) if leaf is not None]

    def figures_of(arrays: list[Any]) -> dict[str, RowFigures]:
        parts = dict(zip(there, arrays, strict=True))
        return row_figures(model, keras.tree.pack_sequence_as(given, [parts.get(n) for n in range(len(leaves))]))

    return figures_of, [leaves[number] for number in there]


def _asked_of_version(folder: str | os.PathLike[str], inputs: Any) -> tuple[FiguresOf, list[Any]]:
    _check_version(os.fspath(folder))
    folder = os.fspath(folder)
    try:
        loaded = tf.saved_model.load(folder)
    except Exception as error:  # Whatever TensorFlow's readers have against a file that is broken.
        raise ValueError(
            "`model` must be the folder of a whole version; copy or export it anew. "
            f"Received: model={folder!r}, of which {_broken_part(folder)} cannot be read: {reason(error)}"
        ) from error
    if SIGNATURE not in loaded.signatures:
        raise ValueError(
            f"`model` must be a version with the signature {SIGNATURE} (a normalization, and `drift=True`). "
            f"Received: {folder} with {sorted(loaded.signatures)}."
        )
    specs = loaded.signatures[SIGNATURE].structured_input_signature[1]
    by_name = inputs if isinstance(inputs, Mapping) else dict(zip(specs, [inputs], strict=False))
    if by_name.keys() != specs.keys():
        by_name = {argument(name): value for name, value in by_name.items()}
    if by_name.keys() != specs.keys():
        raise ValueError(
            f"`inputs` must be a dictionary of arrays with the names {sorted(specs)}, or an array where there is one. "
            f"Received: {sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__}."
        )

    def figures_of(arrays: list[Any]) -> dict[str, RowFigures]:
        pairs = zip(specs, arrays, strict=True)
        tensors = {n: tf.constant(a) if specs[n].dtype == tf.string else tf.cast(a, specs[n].dtype) for n, a in pairs}
        return figures_by_layer(loaded.signatures[SIGNATURE](**tensors))

    arrays = as_arrays("inputs", {name: by_name[name] for name in specs})
    for name, spec in specs.items():
        if not spec.shape.is_compatible_with(arrays[name].shape):
            raise ValueError(
                f"`inputs` must have shape {tuple(spec.shape)} and dtype {spec.dtype.name} for input {name!r}. "
                f"Received: shape {tuple(arrays[name].shape)}, dtype {arrays[name].dtype.name}."
            )
        check_kind("inputs", name, arrays[name], spec.dtype)
    return figures_of, list(arrays.values())


def _broken_part(folder: str) -> str:
    saved = saved_model_pb2.SavedModel()
    try:
        with open(os.path.join(folder, "saved_model.pb"), "rb") as file:
            saved.ParseFromString(file.read())
    except (OSError, DecodeError):
        return "saved_model.pb"
    return "variables/" if saved.meta_graphs else "saved_model.pb"


def _check_version(folder: str) -> None:
    if tf.saved_model.contains_saved_model(folder):
        return
    below = tf.io.gfile.listdir(folder) if tf.io.gfile.isdir(folder) else []
    versions = sorted((name.rstrip("/") for name in below if name.rstrip("/").isdecimal()), key=int)
    hint = f", which has versions: pass {os.path.join(folder, versions[-1])}" if versions else ""
    raise ValueError(
        f"`model` must be a `keras.Model` or the folder of an exported version. Received: model={folder!r}{hint}."
    )


def figures_by_layer(answer: Mapping[str, tf.Tensor]) -> dict[str, RowFigures]:
    """Takes apart what the signature `batch_norm_drift` answers, see `keras_bn.export`."""
    names = [name.decode() for name in answer["layer"][0].numpy()]
    sizes = answer["channels"][0].numpy()
    parts = [tf.split(answer[field], sizes, axis=1) for field in RowFigures._fields]
    return {name: RowFigures(*part) for name, part in zip(names, zip(*parts, strict=True), strict=True)}
