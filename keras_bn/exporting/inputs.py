"""What a signature asks of its inputs before anything is computed: rank, sizes, and as many rows of each."""

from collections.abc import Callable, Mapping

import tensorflow as tf

from keras_bn.folding.trials import leaves_nothing

Specs = Mapping[str, tf.TensorSpec]
_LARGEST_LEAST = 4096


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
                f"Input `{name}` must have the shape {shape_text(spec.shape)}, with sizes of at least {least[name]}. "
                "Received: shape",
                shape,
            ],
            summarize=16,
        )
        checks = [large_enough]
        if name != first_name:
            first, rows = tf.shape(result[first_name])[0], shape[0]
            message = f"Inputs `{first_name}` and `{name}` must have as many rows. Received:"
            checks.append(tf.raw_ops.Assert(condition=tf.equal(first, rows), data=[message, first, "and", rows]))
        with tf.control_dependencies(checks):
            result[name] = tf.identity(value)
    return result


def least_sizes(trace: Callable[[Specs], tf.Graph], specs: Specs) -> dict[str, list[int]]:
    """The smallest sizes of each input that leave every operation a value to compute, as far as tracing tells.

    Where it does not tell, an operation's own error says at run time what was wrong, or sizes are what they are: they
    are 1 at least.

    Args:
        trace: makes the graph of a function for other specifications of its inputs.
        specs: by input name, each with the batch first; sizes that are free are looked for.

    Returns:
        By input name the smallest size of each axis.
    """
    least = {name: [size or 1 for size in spec.shape] for name, spec in specs.items()}
    free = [
        (name, axis) for name, spec in specs.items() for axis in range(1, len(spec.shape)) if spec.shape[axis] is None
    ]

    def too_small(sizes: Mapping[tuple[str, int], int]) -> bool:
        shapes = {name: spec.shape.as_list() for name, spec in specs.items()}
        for (name, axis), size in sizes.items():
            shapes[name][axis] = size
        try:
            graph = trace({name: tf.TensorSpec(shapes[name], spec.dtype, name) for name, spec in specs.items()})
        except Exception as error:  # Of any kind: a model's author may have checked sizes too.
            return "negative" in str(error).lower()
        return leaves_nothing(graph)

    together = 1
    while free and too_small(dict.fromkeys(free, together)):
        together *= 2
        if together > _LARGEST_LEAST:
            return least
    for name, axis in free if together > 1 else []:
        low, high = 0, together  # Too small, and not.
        while high - low > 1:
            middle = (low + high) // 2
            if too_small({**dict.fromkeys(free, together), (name, axis): middle}):
                low = middle
            else:
                high = middle
        least[name][axis] = high
    return least


def shape_text(shape: tf.TensorShape) -> str:
    """As in TensorFlow's own messages: `[?,28,28,1]`."""
    return "[" + ",".join("?" if size is None else str(size) for size in shape) + "]"
