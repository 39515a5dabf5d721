"""Inputs on which two models are compared: what a person gave, or random numbers that the model takes."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bn.examples import as_arrays, dense, reason
from keras_bn.folding.absorbing import idle_in_inference
from keras_bn.folding.graph import Graph
from keras_bn.inference import inference_mode
from keras_bn.model import channel_axes, graph_of, input_structure, statistics_of
from keras_bn.state import variables_restored
from keras_bn.warning import warn

Normalized = Sequence[tuple[np.ndarray, np.ndarray] | None]
KINDS = ("normal", "pixels", "zeros and ones")
_FREE_SIZE = 64
_CLOSE = 1e-3
# Of all free sizes together: pictures of 512 by 512, or series of 262,144.
_MOST_POSITIONS = 2**18


def proof_batches(model: keras.Model, check: Any = None, argument: str = "check") -> list[Any]:
    """`check`, a batch of inputs of `model`, or random ones where that is None.

    Args:
        model: what takes them.
        check: as a person gave them.
        argument: where.

    Raises:
        TypeError: when `check` is no arrays.
        ValueError: when `check` holds no example, or there is none and the model takes no random inputs.
    """
    if check is not None:
        return [as_arrays(argument, check, model)]

    structure = input_structure(model)
    is_free = any(None in list(leaf.shape)[1:] for leaf in keras.tree.flatten(structure))
    refusals: dict[Any, Exception | None] = {}

    def run(inputs: Any) -> Any:
        with variables_restored(model), inference_mode(model):
            # Of fewer values than its kernel has, TensorFlow's convolution returns whatever is in memory.
            shapes = tuple(tuple(leaf.shape) for leaf in keras.tree.flatten(inputs))
            if is_free and shapes not in refusals:
                refusals[shapes] = _refusal(model, inputs)
            refusal = refusals.get(shapes)
            if refusal is not None:
                raise refusal
            return model(inputs, training=False)

    return accepted_inputs(run, structure, argument, normalized=normalized_inputs(model))


def normalized_inputs(model: keras.Model) -> Normalized:
    """What the normalizations that come first know of a model's inputs, flattened, where one does."""
    if graph_of(model) is None:
        return []
    graph, known = Graph(model), []
    for step in list(graph.steps):
        if idle_in_inference(step.op):
            graph.remove(step)
    for value in graph.inputs:
        layers = [step.op for step in graph.consumers(value) if isinstance(step.op, keras.layers.BatchNormalization)]
        known.append(_normal(layers[0]) if layers else None)
    return known


def _normal(layer: keras.layers.BatchNormalization) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the normalization's inputs, of a shape that broadcasts to theirs."""
    mean, variance = statistics_of(layer)
    rank = layer.input_spec.ndim
    sizes = {axis % rank: size for axis, size in layer.input_spec.axes.items()}
    shape = [sizes[axis] if axis in {one % rank for one in channel_axes(layer)} else 1 for axis in range(rank)]
    return np.reshape(mean, shape), np.reshape(np.sqrt(variance + layer.epsilon), shape)


def random_inputs(
    structure: Any,
    kind: str,
    argument: str,
    batch: int = 3,
    seed: int = 0,
    size: int = 64,
    normalized: Normalized = (),
) -> Any:
    """One batch of random numbers.

    Integers are 0 or 1, but uint8 pixels from 0 to 255.

    Args:
        structure: of things with a shape and a dtype.
        kind: of floating-point numbers: "normal", "pixels" from 0 to 255, or "zeros and ones".
        argument: where a person can give inputs instead.
        batch: how many examples, where the shape leaves it open.
        seed: of the numbers.
        size: what other free sizes become.
        normalized: for each thing in the structure mean and standard deviation of normal numbers, or None for 0 and 1.

    Raises:
        ValueError: for inputs that are strings.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf: Any, known: tuple[np.ndarray, np.ndarray] | None) -> tf.Tensor:
        first, *others = [*leaf.shape] or [None]
        shape = (first or batch, *(other or size for other in others))
        dtype = tf.as_dtype(leaf.dtype)
        if dtype == tf.string:
            raise ValueError(f"`{argument}` must be given for a model that takes strings. Received: {argument}=None.")
        if not dtype.is_floating or kind == "zeros and ones":
            return tf.cast(rng.integers(0, 256 if dtype == tf.uint8 else 2, shape), dtype)
        if kind == "pixels":
            return tf.cast(rng.uniform(0, 255, shape), dtype)
        mean, deviation = known or (0.0, 1.0)
        return tf.cast(mean + deviation * rng.normal(size=shape), dtype)

    leaves = keras.tree.flatten(structure)
    drawn = [draw(leaf, known) for leaf, known in zip(leaves, normalized or [None] * len(leaves), strict=True)]
    return keras.tree.pack_sequence_as(structure, drawn)


def accepted_inputs(
    run: Callable[[Any], Any], structure: Any, argument: str, batch: int = 3, normalized: Normalized = ()
) -> list[Any]:
    """Batches of random numbers, those of each kind that `run` takes, with free sizes as large as it needs them.

    Batches of which all outputs are saturated prove little: they are left out where there are others, and where there
    are none, that is warned of.

    Args:
        run: what takes them. It accepts a batch if it raises nothing and all its outputs have values.
        structure, argument, batch, normalized: as for `random_inputs`.

    Raises:
        ValueError: when it takes none; says why, and what to give.
    """
    leaves = keras.tree.flatten(structure)
    free = max(sum(size is None for size in leaf.shape[1:]) for leaf in leaves)
    sizes = [_FREE_SIZE]
    while free and (2 * sizes[-1]) ** free <= _MOST_POSITIONS:
        sizes.append(2 * sizes[-1])
    kinds = KINDS if any(tf.as_dtype(leaf.dtype).is_floating for leaf in leaves) else KINDS[:1]
    refusals = []
    for size in sizes:
        accepted, telling = [], []
        for kind in kinds:
            inputs = random_inputs(structure, kind, argument, batch, size=size, normalized=normalized)
            try:
                outputs = keras.tree.flatten(run(inputs))
            except Exception as error:  # Any: a model may raise what it likes.
                refusals.append(f"{type(error).__name__}: {reason(error)}"[:300])
                continue
            if not all(int(tf.size(output)) for output in outputs):
                refusals.append("outputs without values")
                continue
            accepted.append(inputs)
            if not _is_saturated(outputs):
                telling.append(inputs)
        if accepted and not telling:
            warn(
                f"`{argument}` should be given, a batch of what the model takes: of random inputs it makes nothing but "
                "0, 1 and -1, as a softmax, a sigmoid or a ReLU does that is saturated, and that proves little. "
                f"Received: {argument}=None."
            )
        if accepted:
            return telling or accepted
    shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
    raise ValueError(
        f"`{argument}` must be given, a batch of what the model takes: it takes none of the random ones that were tried"
        f"{f' (free sizes from {sizes[0]} to {sizes[-1]})' if free else ''}. "
        f"Received: {argument}=None, and a model of inputs {shapes} that answered: {refusals[-1]}"
    )


def _is_saturated(outputs: list[Any]) -> bool:
    """Whether all floating outputs are at the ends of a softmax, sigmoid, tanh or ReLU, whatever made them."""
    floating = [np.abs(dense(output).astype("float64")) for output in outputs if output.dtype.is_floating]
    at_ends = all(np.all(np.minimum(values, np.abs(values - 1)) <= _CLOSE) for values in floating)
    # Probabilities of very many classes are all small.
    return bool(floating) and at_ends and all(np.max(values) > 0.5 or not np.any(values) for values in floating)


def _refusal(model: keras.Model, inputs: Any) -> Exception | None:
    """What a model has against the sizes of `inputs`, whatever their numbers, as far as tracing tells."""
    specs = keras.tree.map_structure(tf.TensorSpec.from_tensor, inputs)
    call = tf.function(lambda x: model(x, training=False), autograph=False)
    try:
        graph = call.get_concrete_function(specs).graph
    except Exception as error:  # Any: a model may raise what it likes.
        return error
    shapes = " and ".join(str(tuple(leaf.shape)) for leaf in keras.tree.flatten(inputs))
    return ValueError(f"inputs of {shapes} leave a layer no values") if leaves_nothing(graph) else None


def leaves_nothing(graph: tf.Graph) -> bool:
    """Whether some operation of a graph that was traced for fixed sizes computes a tensor without values.

    Constants do not count, nor vectors of integers, which are shapes and axes: those of a scalar have no values.
    """
    computed = (tensor for operation in graph.get_operations() if operation.inputs for tensor in operation.outputs)
    return any(
        tensor.shape.rank
        and 0 in list(tensor.shape)
        and not (tensor.shape.rank == 1 and tensor.dtype in (tf.int32, tf.int64))
        for tensor in computed
    )
