"""Where the code runs: eagerly or in a graph, compiled by XLA or not, on which device, in which loop.

The private names of TensorFlow and Keras that normalization needs stand here, and nowhere else; they were seen to hold
with TensorFlow 2.20 and 2.21 and with Keras 3.12 to 3.15.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import func_graph
from tensorflow.python.ops import control_flow_util

# What Keras's `predict` traces: it is handed batches, where `fit` and `evaluate` are handed an iterator.
_KERAS_PREDICTS = ("one_step_on_data_distributed", "multi_step_on_data")


def in_xla_context() -> bool:
    """Whether the graph that is being traced will be compiled by XLA."""
    return not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def in_loop_over_data() -> bool:
    """Whether the graph that is being traced is of a loop over data: those of fit, evaluate and predict, or one's own.

    Nobody exports such a graph: among its inputs is an iterator.
    """
    graph = tf.compat.v1.get_default_graph()
    while isinstance(graph, func_graph.FuncGraph):
        inputs = tf.nest.flatten(graph.structured_input_signature)
        if graph.name in _KERAS_PREDICTS or any(isinstance(value, tf.data.IteratorSpec) for value in inputs):
            return True
        graph = graph.outer_graph
    return False


def on_cpu() -> bool:
    """Whether TensorFlow sees no GPU."""
    return not tf.config.get_visible_devices("GPU")


def in_this_process() -> bool:
    """Whether operations run here: not on a cluster, whose other processes may lack ours, nor in a Session."""
    if tf.executing_eagerly():
        return True
    devices = tf.config.list_logical_devices("CPU")
    local = all("/job:" not in device.name or "/job:localhost/" in device.name for device in devices)
    return local and tf.compat.v1.executing_eagerly_outside_functions()


def either(condition: tf.Tensor | bool, if_true: Callable[[], Any], if_false: Callable[[], Any]) -> Any:
    """What one of the two functions returns; a branch in the graph where the condition is not known yet."""
    if not isinstance(condition, bool) and tf.is_symbolic_tensor(condition):
        return tf.cond(tf.cast(condition, tf.bool), if_true, if_false)
    return if_true() if condition else if_false()


def say_once_if(condition: tf.Tensor, message: str) -> None:
    """Prints on stderr when `condition` is true for the first time; for graphs, where Python is not there to warn."""

    def say():
        return tf.group(tf.raw_ops.Print(input=condition, data=[], message=message, first_n=1))

    tf.cond(condition, say, tf.no_op)
