"""Finds the signatures that only XLA can run."""

from collections.abc import Iterable

from tensorflow.core.framework import attr_value_pb2, node_def_pb2
from tensorflow.core.protobuf import meta_graph_pb2

_MUST_COMPILE = "_XlaMustCompile"


def needs_xla(meta_graph: meta_graph_pb2.MetaGraphDef, tensor_names: Iterable[str]) -> bool:
    """Tells whether computing these tensors runs a function that was saved with `jit_compile=True`."""
    nodes = {node.name: node for node in meta_graph.graph_def.node}
    functions = {function.signature.name: function for function in meta_graph.graph_def.library.function}
    waiting: list[node_def_pb2.NodeDef] = [nodes[name] for name in map(_node_name, tensor_names) if name in nodes]
    seen_nodes = {node.name for node in waiting}
    seen_functions: set[str] = set()
    while waiting:
        node = waiting.pop()
        if node.attr[_MUST_COMPILE].b if _MUST_COMPILE in node.attr else False:
            return True
        for name in map(_node_name, node.input):
            if name in nodes and name not in seen_nodes:
                seen_nodes.add(name)
                waiting.append(nodes[name])
        for name in _called(node):
            if name in functions and name not in seen_functions:
                seen_functions.add(name)
                if _MUST_COMPILE in functions[name].attr and functions[name].attr[_MUST_COMPILE].b:
                    return True
                waiting.extend(functions[name].node_def)
    return False


def _node_name(tensor_name: str) -> str:
    return tensor_name.removeprefix("^").split(":")[0]


def _called(node: node_def_pb2.NodeDef) -> Iterable[str]:
    yield node.op
    for value in node.attr.values():
        yield from _function_names(value)


def _function_names(value: attr_value_pb2.AttrValue) -> Iterable[str]:
    if value.HasField("func"):
        yield value.func.name
    for function in value.list.func:
        yield function.name
