"""Operations of a graph that are TensorFlow's own to all who read it, and ours to a runtime that has them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.core.framework import kernel_def_pb2
from tensorflow.core.protobuf import config_pb2

from keras_bn._version import __version__

# Several threads may trace at the same time.
_MAKING = threading.RLock()

_CALL = "PartitionedCall"
# Of the attributes that a call has beside those of other calls: those of our operation.
PREFIX = "_keras_bn_"
_MARK = "config_proto"

# What tells our calls from others, in an attribute that every call has: a setting that changes nothing where it is not
# known. Whoever loads a graph that was saved must find what does the same, or nothing.
_SETTINGS = config_pb2.ConfigProto(
    experimental=config_pb2.ConfigProto.Experimental(
        session_metadata=config_pb2.SessionMetadata(name=f"keras_bn {__version__}")
    )
).SerializeToString()

# With this attribute TensorFlow's optimizers neither inline a call nor change what goes in and out: they take it for a
# part of a program for TPUs, and without one nobody else does. Converters may inline the function.
_KEPT = {"_tpu_replicate": tf.compat.v1.AttrValue(s=b"keras_bn")}


def kernel_definition() -> bytes:
    """The KernelDef, serialized, of what runs the calls in the place of TensorFlow's own kernel for calls."""
    definition = kernel_def_pb2.KernelDef(op=_CALL, device_type="CPU", priority=1)
    definition.constraint.add(name=_MARK).allowed_values.list.s.append(_SETTINGS)
    return definition.SerializeToString()


class StandIn(NamedTuple):
    """A function of plain operations, whose call one of our operations runs where there is one.

    A graph holds an ordinary call of an ordinary function, which says by the way which of our operations does the
    same. A process in which `kernel_definition` was registered runs that, without calling anything; XLA, and any
    process without it, runs the function. Calls have no gradient of their own.
    """

    function: tf.types.experimental.ConcreteFunction
    dtypes: Sequence[tf.DType]
    shapes: Sequence[tf.TensorShape]
    attributes: dict[str, Any]

    def __call__(self, *inputs: tf.Tensor) -> list[tf.Tensor]:
        """Adds a call to the graph that is being traced."""
        graph = tf.compat.v1.get_default_graph()
        self.function.add_to_graph(graph)
        outputs = graph.create_op(_CALL, inputs, self.dtypes, name="keras_bn", attrs=self.attributes).outputs
        for output, shape in zip(outputs, self.shapes, strict=True):
            output.set_shape(shape)
        return outputs


def stand_in(
    plain: Callable[..., Sequence[tf.Tensor]],
    operation: str,
    inputs: Sequence[tf.Tensor],
    **options: int | float | bool | str,
) -> StandIn:
    """The one for such inputs; made once.

    Args:
        plain: Module-level function of tensors and `options`.
        operation: The name of ours, which has the same inputs, outputs and `options`.
        inputs: Whose shapes and dtypes it is made for. The first one's dtype is the operation's `T`.
    """
    signature = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
    with _MAKING:
        return _made(plain, operation, signature, tuple(sorted(options.items())))


@functools.cache
def _made(plain, operation, signature, options) -> StandIn:
    def whole(*inputs):
        return plain(*inputs, **dict(options))

    whole.__name__ = plain.__name__
    specs = [tf.TensorSpec(shape, dtype) for shape, dtype in signature]
    value = tf.compat.v1.AttrValue
    with tf.init_scope():
        concrete = tf.function(whole, autograph=False).get_concrete_function(*specs)
    ours = {"operation": operation.encode(), "T": signature[0][1], **dict(options)}
    dtypes = [output.dtype for output in concrete.outputs]
    attributes = {
        "Tin": value(list=value.ListValue(type=[dtype.as_datatype_enum for _, dtype in signature])),
        "Tout": value(list=value.ListValue(type=[dtype.as_datatype_enum for dtype in dtypes])),
        "f": value(func=tf.compat.v1.NameAttrList(name=concrete.name)),
        **_KEPT,
        _MARK: value(s=_SETTINGS),
        **{PREFIX + name: _attribute(option) for name, option in ours.items()},
    }
    return StandIn(concrete, dtypes, [output.shape for output in concrete.outputs], attributes)


def _attribute(option: Any) -> tf.compat.v1.AttrValue:
    value = tf.compat.v1.AttrValue
    if isinstance(option, bool):
        return value(b=option)
    if isinstance(option, int):
        return value(i=option)
    if isinstance(option, float):
        return value(f=option)
    if isinstance(option, tf.DType):
        return value(type=option.as_datatype_enum)
    return value(s=option if isinstance(option, bytes) else option.encode())
