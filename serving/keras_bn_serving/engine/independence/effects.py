"""Which operations do nothing but compute their outputs: the others keep a signature from being grouped."""

from collections.abc import Mapping

import tensorflow as tf
from tensorflow.core.framework import function_pb2

# Private, as in flat_graph. Seen to hold on TensorFlow 2.20 and 2.21.
from tensorflow.python.framework import op_def_registry

from keras_bn_serving.engine.flat_graph import functions_of
from keras_bn_serving.engine.independence.kinds import NotProvedError

# Stateful in TensorFlow's books, and yet they only read what is loaded, or fail.
READS = frozenset({
    "VarHandleOp", "ReadVariableOp", "VariableV2", "ResourceGather", "HashTableV2", "LookupTableFindV2",
    "LookupTableSizeV2",
})  # fmt: skip
CHECKS = frozenset({"Assert", "CheckNumerics"})
# What they do is what their functions do.
CONTAINERS = frozenset({"If", "While", "Case", "PartitionedCall", "StatefulPartitionedCall"})
_ALLOWED = READS | CHECKS | CONTAINERS


def check(operation: tf.Operation, library: Mapping[str, function_pb2.FunctionDef]) -> None:
    """Raises a NotProvedError if running an operation does more than compute its outputs, or draws random numbers."""
    if operation.op_def.is_stateful and operation.type not in _ALLOWED:
        raise NotProvedError(f"{operation.type} `{operation.name}` has an effect, or draws random numbers")
    waiting = list(functions_of(operation.node_def.attr))
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in library:
            continue
        seen.add(name)
        for node in library[name].node_def:
            definition = op_def_registry.get(node.op)
            if node.op not in library and (definition is None or (definition.is_stateful and node.op not in _ALLOWED)):
                raise NotProvedError(f"{node.op} in `{operation.name}` has an effect, or draws random numbers")
            waiting.extend([node.op, *functions_of(node.attr)])
