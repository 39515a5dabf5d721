"""Finds the signatures that only XLA can run."""

from collections.abc import Iterable, Mapping

from tensorflow.core.framework import attr_value_pb2
from tensorflow.core.protobuf import meta_graph_pb2

from keras_bn_serving.engine.flat_graph import functions_of

_MUST_COMPILE = "_XlaMustCompile"


def needs_xla(meta_graph: meta_graph_pb2.MetaGraphDef, tensor_names: Iterable[str]) -> bool:
    """Tells whether computing these tensors runs a function that was saved with `jit_compile=True`."""
    nodes = {node.name: node for node in meta_graph.graph_def.node}
    functions = {function.signature.name: function for function in meta_graph.graph_def.library.function}
    waiting = [nodes[name] for name in map(_node_name, tensor_names) if name in nodes]
    needed = {node.name: node for node in waiting}
    while waiting:
        for name in map(_node_name, waiting.pop().input):
            if name in nodes and name not in needed:
                needed[name] = nodes[name]
                waiting.append(nodes[name])
    # Inside a function every node counts, and its names are its own.
    calls = list(needed.values())
    seen: set[str] = set()
    while calls:
        node = calls.pop()
        if _is_set(node.attr):
            return True
        for name in (node.op, *functions_of(node.attr)):
            if name in functions and name not in seen:
                seen.add(name)
                if _is_set(functions[name].attr):
                    return True
                calls.extend(functions[name].node_def)
    return False


def _is_set(attributes: Mapping[str, attr_value_pb2.AttrValue]) -> bool:
    return _MUST_COMPILE in attributes and attributes[_MUST_COMPILE].b


def _node_name(tensor_name: str) -> str:
    return tensor_name.removeprefix("^").split(":")[0]
