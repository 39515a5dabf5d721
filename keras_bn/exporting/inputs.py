"""What a signature asks of its inputs before anything is computed: rank, sizes, and as many rows of each."""

from collections.abc import Mapping

import tensorflow as tf

Specs = Mapping[str, tf.TensorSpec]


def checked(tensors: Mapping[str, tf.Tensor], specs: Specs, least: Mapping[str, list[int]]) -> dict[str, tf.Tensor]:
    """`tensors`, once it is sure at run time that they are what `specs` say.

    A server feeds whatever it was sent, and kernels of TensorFlow end the process where a rank is not the one they
    were built for, or a size is 0. `EnsureShape` looks at the rank and the sizes that are fixed, an `Assert` at those
    that are not. Neither is dropped by TensorFlow's optimizers, though the placeholders have a static shape. XLA drops
    an `Assert`, so this stands before what it compiles.

    Args:
        tensors: by input name.
        specs: by input name, each with the batch first.
        least: by input name, the smallest size of each axis.
    """
    result: dict[str, tf.Tensor] = {}
    first_name = next(iter(specs))
    for name, spec in specs.items():
        value = tf.ensure_shape(tensors[name], spec.shape)
        shape = tf.shape(value)
        large_enough = tf.raw_ops.Assert(
            condition=tf.reduce_all(shape >= least[name]),
            data=[
                f"Input {name!r} must have the shape {shape_text(spec.shape)}, with sizes of at least {least[name]}. "
                "Received: shape",
                shape,
            ],
            summarize=16,
        )
        checks = [large_enough]
        if name != first_name:
            first, rows = tf.shape(result[first_name])[0], shape[0]
            message = f"Inputs {first_name!r} and {name!r} must have as many rows. Received:"
            checks.append(tf.raw_ops.Assert(condition=tf.equal(first, rows), data=[message, first, "and", rows]))
        with tf.control_dependencies(checks):
            result[name] = tf.identity(value)
    return result


def shape_text(shape: tf.TensorShape) -> str:
    """As in TensorFlow's own messages: `[?,28,28,1]`."""
    return "[" + ",".join("?" if size is None else str(size) for size in shape) + "]"
