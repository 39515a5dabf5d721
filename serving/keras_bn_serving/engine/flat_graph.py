"""A signature's operations as one graph: what its outputs need, the functions that it calls put in their places."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf
from tensorflow.core.framework import (
    attr_value_pb2,
    function_pb2,
    graph_pb2,
    node_def_pb2,
    op_def_pb2,
)
from tensorflow.core.protobuf import meta_graph_pb2

# Private, as nothing public tells what an operation's outputs are called. Seen to hold on TensorFlow 2.20 and 2.21.
from tensorflow.python.framework import op_def_registry

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
# True of the place where a node was, not of what it computes.
_LEFT_OUT = ("_output_shapes", "_class", "_user_specified_name")


class FlatGraph(NamedTuple):
    """Operations to look at, never to run.

    Attributes:
        graph: The operations; TensorFlow has inferred their shapes.
        inputs: What is fed, by the name it was asked for.
        outputs: What is fetched, in the order asked for.
        library: The functions that loops and conditions still name.
    """

    graph: tf.Graph
    inputs: dict[str, tf.Tensor]
    outputs: list[tf.Tensor]
    library: Mapping[str, function_pb2.FunctionDef]

    def operations(self) -> list[tf.Operation]:
        """Returns what the outputs need, control dependencies too, each after all that it needs."""
        fed = {tensor.op.name for tensor in self.inputs.values()}
        order: list[tf.Operation] = []
        # Whether what an operation needs has been put before it already.
        ready: dict[str, bool] = {}
        waiting = [tensor.op for tensor in self.outputs]
        while waiting:
            operation = waiting[-1]
            if operation.name in ready:
                waiting.pop()
                if not ready[operation.name]:
                    ready[operation.name] = True
                    order.append(operation)
                continue
            ready[operation.name] = False
            if operation.name not in fed:
                needed = [*(tensor.op for tensor in operation.inputs), *operation.control_inputs]
                waiting.extend(one for one in needed if one.name not in ready)
        return order


def of_signature(
    meta_graph: meta_graph_pb2.MetaGraphDef,
    inputs: Mapping[str, str],
    outputs: Iterable[str],
    shapes: Mapping[str, Sequence[int] | None],
) -> FlatGraph:
    """Returns the operations behind a signature.

    Args:
        meta_graph: The model.
        inputs: TensorFlow's tensor name by input.
        outputs: TensorFlow's tensor names of the outputs.
        shapes: What is fed, by input: -1 where a size is open, `None` where the rank is.

    Raises:
        ValueError: If TensorFlow knows that the shapes do not fit the operations, or the graph cannot be read.
    """
    library = {function.signature.name: function for function in meta_graph.graph_def.library.function}
    types = _input_types(meta_graph, inputs)
    flattening = _Flattening(library)
    fed = {name: flattening.feed(types[name], shapes[name]) for name in inputs}
    nodes = {node.name: node for node in meta_graph.graph_def.node}
    known = {_whole(inputs[name]): tensor for name, tensor in fed.items()}
    fetched = flattening.add_needed(nodes, known, [_whole(name) for name in outputs])
    return flattening.imported(fed, fetched)


def of_function(
    library: Mapping[str, function_pb2.FunctionDef], name: str, arguments: Sequence[tf.Tensor]
) -> FlatGraph:
    """Returns the operations of a function called with tensors of another flat graph.

    Its inputs are called by their position: "0", "1", ...
    """
    flattening = _Flattening(library)
    function = library[name]
    fed = {
        str(position): flattening.feed_like(argument.type, tensor)
        for position, (argument, tensor) in enumerate(zip(function.signature.input_arg, arguments, strict=True))
    }
    fetched = flattening.add_function(function, "", list(fed.values()))
    return flattening.imported(fed, fetched)


def functions_of(attributes: Mapping[str, attr_value_pb2.AttrValue]) -> Iterator[str]:
    """Yields the names of the functions that an operation's attributes name."""
    for value in attributes.values():
        if value.HasField("func"):
            yield value.func.name
        for function in value.list.func:
            yield function.name


class _Flattening:
    def __init__(self, library: Mapping[str, function_pb2.FunctionDef]):
        self._library = library
        self._nodes: list[node_def_pb2.NodeDef] = []
        self._feeds = 0

    def feed(self, data_type: int, shape: Sequence[int | None] | None) -> str:
        """Adds what stands for a fed tensor; returns its name."""
        node = node_def_pb2.NodeDef(name=f"feed_{self._feeds}", op="Placeholder")
        self._feeds += 1
        node.attr["dtype"].type = data_type
        node.attr["shape"].shape.CopyFrom(tf.TensorShape(_open(shape)).as_proto())
        self._nodes.append(node)
        return f"{node.name}:0"

    def feed_like(self, data_type: int, tensor: tf.Tensor) -> str:
        """Adds what stands for a tensor of another graph; returns its name."""
        while tensor.op.type == "Identity":
            tensor = tensor.op.inputs[0]
        if tensor.op.type == "VarHandleOp":
            # The variable again: only so its shape is known.
            node = node_def_pb2.NodeDef(name=f"feed_{self._feeds}", op="VarHandleOp")
            self._feeds += 1
            for name in ("dtype", "shape"):
                node.attr[name].CopyFrom(tensor.op.node_def.attr[name])
            self._nodes.append(node)
            return f"{node.name}:0"
        shape = tf.TensorShape([]) if tensor.dtype == tf.variant else tensor.shape
        return self.feed(data_type, None if shape.rank is None else shape.as_list())

    def add_needed(
        self, nodes: Mapping[str, node_def_pb2.NodeDef], known: dict[str, str], outputs: Sequence[str]
    ) -> list[str]:
        """Adds what `outputs` need of a graph; returns their names. `known` are tensors that are there already."""
        wanted = {_node_name(name) for name in outputs if name not in known}
        waiting = list(wanted)
        while waiting:
            for name in nodes[waiting.pop()].input:
                if _whole(name) not in known and _node_name(name) not in wanted:
                    wanted.add(_node_name(name))
                    waiting.append(_node_name(name))
        scope = _Scope("graph/", known, {})
        self._add_all([node for name, node in nodes.items() if name in wanted], scope)
        return [scope.tensor(name) for name in outputs]

    def add_function(self, function: function_pb2.FunctionDef, prefix: str, arguments: Sequence[str]) -> list[str]:
        """Adds the body of a function; returns what it returns."""
        names = [argument.name for argument in function.signature.input_arg]
        flat = {name: tensor for node in function.node_def for name, tensor in self._flat_names(node)}
        scope = _Scope(prefix + "body/", dict(zip(names, arguments, strict=True)), flat)
        self._add_all(list(function.node_def), scope)
        # What has an effect runs, whether its result is used or not.
        effects = [scope.control(name) for name in function.control_ret.values()]
        effects += [scope.control(node.name) for node in function.node_def if self._is_stateful(node)]
        returned = []
        for position, output in enumerate(function.signature.output_arg):
            value = scope.tensor(function.ret[output.name])
            returned.append(self._identity(f"{prefix}return_{position}", value, output.type, effects))
        if not returned:
            self._nodes.append(node_def_pb2.NodeDef(name=f"{prefix}return_0", op="NoOp", input=effects))
        return returned

    def imported(self, fed: Mapping[str, str], fetched: Sequence[str]) -> FlatGraph:
        """Hands everything to TensorFlow, which infers the shapes."""
        flat = graph_pb2.GraphDef(node=self._nodes)
        flat.library.function.extend(self._still_named())
        # Of an old version a scalar placeholder would be one of any shape.
        flat.versions.producer = tf.version.GRAPH_DEF_VERSION
        graph = tf.Graph()
        with graph.as_default():
            tf.import_graph_def(flat, name="")
        inputs = {name: graph.get_tensor_by_name(tensor) for name, tensor in fed.items()}
        return FlatGraph(graph, inputs, [graph.get_tensor_by_name(name) for name in fetched], self._library)

    def _still_named(self) -> list[function_pb2.FunctionDef]:
        found: dict[str, function_pb2.FunctionDef] = {}
        waiting = list(self._nodes)
        while waiting:
            node = waiting.pop()
            for name in (node.op, *functions_of(node.attr)):
                if name in self._library and name not in found:
                    found[name] = self._library[name]
                    waiting.extend(found[name].node_def)
        return list(found.values())

    def _add_all(self, nodes: list[node_def_pb2.NodeDef], scope: "_Scope") -> None:
        called = {node.name: self._called(node) for node in nodes}
        scope.calls = {name for name, function in called.items() if function is not None}
        for node in nodes:
            function = called[node.name]
            if function is None:
                moved = _moved(node, scope)
                self._nodes += _of_known_shape(moved) if node.op == "LookupTableFindV2" else [moved]
                continue
            prefix = f"{scope.prefix}{node.name}/"
            before = [scope.control(name[1:]) for name in node.input if name.startswith("^")]
            values = [scope.tensor(name) for name in node.input if not name.startswith("^")]
            arguments = [
                self._identity(f"{prefix}argument_{position}", value, argument.type, before)
                for position, (value, argument) in enumerate(zip(values, function.signature.input_arg, strict=True))
            ]
            self.add_function(function, prefix, arguments)

    def _called(self, node: node_def_pb2.NodeDef) -> function_pb2.FunctionDef | None:
        return self._library.get(node.attr["f"].func.name if node.op in _CALLS else node.op)

    def _identity(self, name: str, tensor: str, data_type: int, after: Sequence[str]) -> str:
        node = node_def_pb2.NodeDef(name=name, op="Identity", input=[tensor, *after])
        node.attr["T"].type = data_type
        self._nodes.append(node)
        return f"{name}:0"

    def _is_stateful(self, node: node_def_pb2.NodeDef) -> bool:
        definition = self._definition(node)
        return definition is None or definition.is_stateful

    def _definition(self, node: node_def_pb2.NodeDef) -> op_def_pb2.OpDef | None:
        function = self._called(node) if node.op not in _CALLS else None
        return op_def_registry.get(node.op) if function is None else function.signature

    def _flat_names(self, node: node_def_pb2.NodeDef) -> Iterator[tuple[str, str]]:
        """Yields the names of a node's tensors in a function beside those in a graph."""
        definition = self._definition(node)
        if definition is None:
            raise ValueError(f"Operation {node.op} is not known.")
        position = 0
        for argument in definition.output_arg:
            for index in range(_count(argument, node.attr)):
                yield f"{node.name}:{argument.name}:{index}", f"{node.name}:{position}"
                position += 1


class _Scope:
    """How names of one graph or function are called in the flat graph."""

    def __init__(self, prefix: str, known: dict[str, str], flat: Mapping[str, str]):
        self.prefix = prefix
        self.calls: set[str] = set()
        self._known = known
        self._flat = flat

    def tensor(self, name: str) -> str:
        if name in self._known:
            return self._known[name]
        name = _whole(self._flat.get(name, name))
        if name in self._known:
            return self._known[name]
        node, _, position = name.rpartition(":")
        return f"{self.prefix}{node}/return_{position}:0" if node in self.calls else f"{self.prefix}{name}"

    def control(self, name: str) -> str:
        if name in self._known:
            return f"^{_node_name(self._known[name])}"
        return f"^{self.prefix}{name}/return_0" if name in self.calls else f"^{self.prefix}{name}"


def _moved(node: node_def_pb2.NodeDef, scope: _Scope) -> node_def_pb2.NodeDef:
    moved = node_def_pb2.NodeDef(name=scope.prefix + node.name, op=node.op)
    for name, value in node.attr.items():
        if name not in _LEFT_OUT:
            moved.attr[name].CopyFrom(value)
    moved.input.extend(scope.control(name[1:]) if name.startswith("^") else scope.tensor(name) for name in node.input)
    return moved


def _of_known_shape(look_up: node_def_pb2.NodeDef) -> list[node_def_pb2.NodeDef]:
    """Returns a look-up and what gives its values the shape of its keys, which TensorFlow does not know they have."""
    name, keys = look_up.name, look_up.input[1]
    look_up.name = f"{name}/values"
    shape = node_def_pb2.NodeDef(name=f"{name}/shape", op="Shape", input=[keys])
    shape.attr["T"].CopyFrom(look_up.attr["Tin"])
    shaped = node_def_pb2.NodeDef(name=name, op="Reshape", input=[f"{look_up.name}:0", f"{shape.name}:0"])
    shaped.attr["T"].CopyFrom(look_up.attr["Tout"])
    return [look_up, shape, shaped]


def _input_types(meta_graph: meta_graph_pb2.MetaGraphDef, inputs: Mapping[str, str]) -> dict[str, int]:
    known = {
        info.name: info.dtype for definition in meta_graph.signature_def.values() for info in definition.inputs.values()
    }
    return {name: known[tensor] for name, tensor in inputs.items()}


def _open(shape: Sequence[int | None] | None) -> list[int | None] | None:
    return None if shape is None else [None if size is None or size < 0 else size for size in shape]


def _count(argument: op_def_pb2.OpDef.ArgDef, attributes: Mapping[str, attr_value_pb2.AttrValue]) -> int:
    if argument.number_attr:
        return attributes[argument.number_attr].i
    return len(attributes[argument.type_list_attr].list.type) if argument.type_list_attr else 1


def _whole(name: str) -> str:
    return name if ":" in name or name.startswith("^") else f"{name}:0"


def _node_name(tensor_name: str) -> str:
    return tensor_name.removeprefix("^").split(":")[0]
