"""Operations of a graph that are TensorFlow's own to all who read it, and ours to a runtime that has them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf
from tensorflow.python.ops.parallel_for import pfor

from keras_bn._version import __version__

# Several threads may trace at the same time.
_MAKING = threading.RLock()


class StandIn(NamedTuple):
    """A function of plain operations, for which TensorFlow's graph optimizer takes another one when a graph runs.

    Both are marked as implementing the same thing, the other one as preferred on a CPU. A graph holds the plain one
    alone, and so does what is saved of it; the other is known to this process only. XLA, and any process without it,
    runs the plain one. Calls have no gradient of their own.
    """

    plain: tf.types.experimental.ConcreteFunction
    preferred: tf.types.experimental.ConcreteFunction

    @property
    def name(self) -> str:
        """Of the function, which is the type of the operation that calls it."""
        return self.plain.function_def.signature.name

    def __call__(self, *inputs: tf.Tensor) -> list[tf.Tensor]:
        """Adds a call to the graph that is being traced."""
        graph = tf.compat.v1.get_default_graph()
        self.plain.add_to_graph(graph)
        # No thread is woken for what is one operation.
        executor = tf.compat.v1.AttrValue(s=b"SINGLE_THREADED_EXECUTOR")
        outputs = graph.create_op(
            self.name,
            inputs,
            [output.dtype for output in self.plain.outputs],
            name=self.name.strip("_"),
            attrs={"_executor": executor},
        ).outputs
        for output, known in zip(outputs, self.plain.outputs, strict=True):
            output.set_shape(known.shape)
        return outputs

    def vectorized(self, call):
        """How `tf.vectorized_map`, and with it a Jacobian, converts a call."""
        stacked = [part.t for part in call._inputs if part.is_stacked]

        def one(parts):
            parts = iter(parts)
            return self.plain(*(next(parts) if part.is_stacked else part.t for part in call._inputs))

        return [pfor.wrap(output) for output in tf.vectorized_map(one, stacked)]


def stand_in(
    plain: Callable[..., Sequence[tf.Tensor]],
    preferred: Callable[..., Sequence[tf.Tensor]],
    inputs: Sequence[tf.Tensor],
    **options: int | float | bool | str,
) -> StandIn:
    """The one for such inputs; made once.

    Args:
        plain: Module-level function of tensors and `options`.
        preferred: Likewise, with the same inputs and outputs.
        inputs: Whose shapes and dtypes both functions are traced for.
    """
    signature = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
    with _MAKING:
        return _made(plain, preferred, signature, tuple(sorted(options.items())))


@functools.cache
def _made(plain, preferred, signature, options) -> StandIn:
    sizes = " ".join(f"{dtype.name}{list(shape)}" for shape, dtype in signature)
    # Whoever loads a graph that was saved must find what does the same, or nothing.
    implemented = f"keras_bn{plain.__name__} {__version__} {dict(options)} {sizes}"
    specs = [tf.TensorSpec(shape, dtype) for shape, dtype in signature]

    def traced(function, suffix, device):
        attributes = {"api_implements": implemented, "api_preferred_device": device}

        def whole(*inputs):
            return function(*inputs, **dict(options))

        whole.__name__ = plain.__name__ + suffix
        return tf.function(whole, autograph=False, experimental_attributes=attributes).get_concrete_function(*specs)

    with tf.init_scope():
        made = StandIn(traced(plain, "", ""), traced(preferred, "_preferred", "CPU"))
    pfor.RegisterPFor(made.name)(made.vectorized)
    return made
