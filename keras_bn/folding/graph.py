"""A functional or sequential Keras model as a list of steps that can be changed, and back."""

from collections.abc import Callable
from typing import Any

import keras

from keras_bn.model import check_model, graph_of, mask_of, new_input_layers, nodes_of


class Value:
    """A tensor between two steps.

    Attributes:
        shape: with the batch size first, None where it is free.
        dtype: its name.
    """

    __slots__ = ("dtype", "shape")

    def __init__(self, tensor: Any):
        self.shape, self.dtype = tensor.shape, keras.backend.standardize_dtype(tensor.dtype)


class Step:
    """One call of a layer or of an operation of `keras.ops`.

    Attributes:
        op: the layer or operation.
        args, kwargs: as it is called, a `Value` where a tensor stands.
        outputs: its tensors, flattened.
        prefix: names of the nested models around it, outermost first.
    """

    def __init__(self, op: Any, args: Any, kwargs: Any, outputs: list[Value], prefix: tuple[str, ...]):
        self.op, self.args, self.kwargs, self.outputs, self.prefix = op, args, kwargs, outputs, prefix

    @property
    def inputs(self) -> list[Value]:
        """Its tensors, those given by keyword too."""
        return [x for x in keras.tree.flatten((self.args, self.kwargs)) if isinstance(x, Value)]

    @property
    def input(self) -> Value | None:
        """Its first tensor: what a layer of one input works on."""
        found = self.inputs
        return found[0] if found else None


class Graph:
    """The steps of a model in an order in which they can run, nested models laid out flat.

    Args:
        model: functional or sequential and built.

    Attributes:
        steps: a list of `Step`.
        inputs: a `Value` for each input of the model, flattened.
        outputs: a `Value` for each output of the model, flattened.

    Raises:
        ValueError: when `model` is not built, or subclassed: what it does is known to its `call` only.
    """

    def __init__(self, model: keras.Model):
        if isinstance(model, keras.Sequential):
            check_model(model, built=True)
        if graph_of(model) is None:
            raise ValueError(
                "`model` must be a functional or sequential Keras model; what a subclassed one does, or a sequential "
                "one of which the first layer takes several tensors, is known to its own `call` only. "
                f"Received: model={model.name!r} of type {type(model).__name__}."
            )
        self._model = model
        self.steps: list[Step] = []
        self.inputs = [Value(tensor) for tensor in model.inputs]
        self.outputs = self._lay_out(model, self.inputs, ())

    def producer(self, value: Value) -> Step | None:
        """The step that makes `value`, None for an input of the model."""
        return next((step for step in self.steps if any(out is value for out in step.outputs)), None)

    def consumers(self, value: Value) -> list[Step]:
        """The steps that take `value`, one that takes it twice twice; an output of the model is not among them."""
        return [step for step in self.steps for taken in step.inputs if taken is value]

    def is_output(self, value: Value) -> bool:
        return any(out is value for out in self.outputs)

    def uses(self, op: Any) -> list[Step]:
        """The steps that call `op`: several for a shared layer."""
        return [step for step in self.steps if step.op is op]

    def remove(self, step: Step) -> None:
        """Takes a step out; who took its output takes its input."""
        (old,), new = step.outputs, step.input
        self.steps.remove(step)

        def swap(x: Any) -> Any:
            return new if x is old else x

        for other in self.steps:
            other.args, other.kwargs = keras.tree.map_structure(swap, (other.args, other.kwargs))
        self.outputs = [swap(value) for value in self.outputs]

    def rebuild(self, make: Callable[[Any, str], list[Any]]) -> keras.Model:
        """A new model of the steps as they are now.

        Args:
            make: gives for an operation and its new name the operations to call one after the other in its place.
                Called once for each, also where it is shared.
        """
        inputs = [layer.output for layer in new_input_layers(self._model)]
        made: dict[int, list[Any]] = {}
        names = _unique_names(self.steps, {tensor.name for tensor in inputs})
        tensors = {id(value): tensor for value, tensor in zip(self.inputs, inputs, strict=True)}
        for step in self.steps:
            if id(step.op) not in made:
                made[id(step.op)] = make(step.op, names[id(step.op)])
            first, *more = made[id(step.op)]
            args, kwargs = keras.tree.map_structure(
                lambda x: tensors[id(x)] if isinstance(x, Value) else x, (step.args, step.kwargs)
            )
            if type(first) is type(step.op):
                result = first(*args, **{name: value for name, value in kwargs.items() if name != "training"})
            else:  # Another kind of layer need not know masks.
                result = first(tensors[id(step.input)])
            for op in more:
                result = op(result)
            for value, tensor in zip(step.outputs, keras.tree.flatten(result), strict=True):
                tensors[id(value)] = tensor
        outputs = [tensors[id(value)] for value in self.outputs]
        if isinstance(self._model, keras.Sequential):
            if self._is_chain():
                chain = [op for step in self.steps for op in made[id(step.op)]]
                return keras.Sequential([inputs[0], *chain], name=self._model.name)
            return keras.Model(inputs[0], outputs[0] if len(outputs) == 1 else outputs, name=self._model.name)
        return keras.Model(
            keras.tree.pack_sequence_as(graph_of(self._model).input, inputs),
            keras.tree.pack_sequence_as(graph_of(self._model).output, outputs),
            name=self._model.name,
        )

    def _is_chain(self) -> bool:
        """Whether each step is a layer that takes just what the one before it makes."""
        values = list(self.inputs)
        for step in self.steps:
            if not isinstance(step.op, keras.Layer) or step.inputs != values or len(step.outputs) != 1:
                return False
            values = step.outputs
        return values == self.outputs and len(values) == 1

    def _lay_out(self, model: Any, inputs: list[Value], prefix: tuple[str, ...]) -> list[Value]:
        graph = graph_of(model)
        known = {id(tensor): value for tensor, value in zip(graph.inputs, inputs, strict=True)}
        for node in nodes_of(graph):
            args, kwargs = node.arguments.fill_in(known)
            flat = _nested_inputs(node)
            if flat is None:
                outputs = [Value(tensor) for tensor in node.outputs]
                self.steps.append(Step(node.operation, args, kwargs, outputs, prefix))
            else:
                values = [known[id(tensor)] for tensor in flat]
                outputs = self._lay_out(node.operation, values, (*prefix, node.operation.name))
            known.update({id(tensor): value for tensor, value in zip(node.outputs, outputs, strict=True)})
        return [known[id(tensor)] for tensor in graph.outputs]


def _nested_inputs(node: Any) -> list[Any] | None:
    """The tensors of a call of a nested model, in the order of its inputs; None where it cannot be laid out flat.

    Masks that come with the tensors come by themselves. What a person says in other words (a mask of their own, another
    dtype or rank) is the nested model's to convert.
    """
    graph, (args, kwargs) = graph_of(node.operation), (node.arguments.args, node.arguments.kwargs)
    if graph is None or len(args) != 1:
        return None
    given = args[0]
    if isinstance(given, dict) and not isinstance(graph.input, dict):
        given = [given.get(tensor.name) for tensor in graph.inputs]
    tensors = keras.tree.flatten(given)
    masks = keras.tree.flatten(kwargs.get("mask"))
    others = {name: value for name, value in kwargs.items() if name not in ("mask", "training")}
    if any(value is not None for value in keras.tree.flatten(others)) or len(tensors) != len(graph.inputs):
        return None
    for tensor, expected in zip(tensors, graph.inputs, strict=True):
        if tensor is None or len(tensor.shape) != len(expected.shape) or tensor.dtype != expected.dtype:
            return None
    if any(mask is not None for mask in masks) and any(
        mask is not mask_of(tensor) for tensor, mask in zip(tensors, masks, strict=True)
    ):
        return None
    return tensors


def _unique_names(steps: list[Step], taken: set[str]) -> dict[int, str]:
    """Each operation's own name; where nested models have the same, with the names of the models around it."""
    names: dict[int, str] = {}
    used = set(taken)
    for step in steps:
        if id(step.op) in names:
            continue
        name = step.op.name
        if name in used:
            name = "_".join([*step.prefix, name])
        base, n = name, 1
        while name in used:
            n += 1
            name = f"{base}_{n}"
        names[id(step.op)] = name
        used.add(name)
    return names
