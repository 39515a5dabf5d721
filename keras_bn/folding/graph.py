"""A functional or sequential Keras model as a list of steps that can be changed, and back."""

from collections.abc import Callable
from typing import Any

import keras


class Value:
    """A tensor between two steps.

    Attributes:
        shape: with the batch size first, None where it is free.
    """

    __slots__ = ("shape",)

    def __init__(self, shape: tuple[int | None, ...]):
        self.shape = shape


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
        ValueError: when `model` is subclassed: what it does is known to its `call` only.
    """

    def __init__(self, model: keras.Model):
        if not is_graph(model):
            raise ValueError(
                "`model` must be a functional or sequential Keras model that is built; what a subclassed one does "
                f"is known to its own `call` only. Received: model={model.name!r} of type {type(model).__name__}."
            )
        self._model = model
        self.steps: list[Step] = []
        self.inputs = [Value(tensor.shape) for tensor in model.inputs]
        self.outputs = keras.tree.flatten(self._lay_out(model, self.inputs, ()))

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
        inputs = [
            keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name, sparse=tensor.sparse)
            for tensor in self._model.inputs
        ]
        made: dict[int, list[Any]] = {}
        names = _unique_names(self.steps)
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
            chain = [op for step in self.steps for op in made[id(step.op)]]
            return keras.Sequential([inputs[0], *chain], name=self._model.name)
        return keras.Model(
            keras.tree.pack_sequence_as(self._model._inputs_struct, inputs),
            keras.tree.pack_sequence_as(self._model._outputs_struct, outputs),
            name=self._model.name,
        )

    def _lay_out(self, model: Any, inputs: list[Value], prefix: tuple[str, ...]) -> Any:
        if isinstance(model, keras.Sequential):
            (x,) = inputs
            for layer in model.layers:
                shape = layer.output.shape if not is_graph(layer) else layer.outputs[0].shape
                (x,) = self._add(layer, (x,), {}, [shape], prefix)
            return x
        known = {id(tensor): value for tensor, value in zip(model.inputs, inputs, strict=True)}
        for depth in sorted(model._nodes_by_depth, reverse=True):
            for node in model._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                args, kwargs = node.arguments.fill_in(known)
                outputs = self._add(node.operation, args, kwargs, [t.shape for t in node.outputs], prefix)
                known.update({id(tensor): value for tensor, value in zip(node.outputs, outputs, strict=True)})
        return [known[id(tensor)] for tensor in model.outputs]

    def _add(self, op: Any, args: Any, kwargs: Any, shapes: list[Any], prefix: tuple[str, ...]) -> list[Value]:
        if is_graph(op) and not {k: v for k, v in kwargs.items() if k != "training" and v is not None}:
            return keras.tree.flatten(self._lay_out(op, keras.tree.flatten(args), (*prefix, op.name)))
        outputs = [Value(shape) for shape in shapes]
        self.steps.append(Step(op, args, kwargs, outputs, prefix))
        return outputs


def is_graph(layer: Any) -> bool:
    """Whether `layer` is a built functional or sequential model that computes just what its graph says."""
    if not isinstance(layer, keras.Model):
        return False
    if type(layer).call is keras.Sequential.call:
        return bool(getattr(layer, "inputs", None))
    return hasattr(layer, "_nodes_by_depth") and type(layer).call.__module__.startswith("keras.")


def _unique_names(steps: list[Step]) -> dict[int, str]:
    """Each operation's own name; where nested models have the same, with the names of the models around it."""
    names: dict[int, str] = {}
    for step in steps:
        if id(step.op) in names:
            continue
        name = step.op.name
        if name in names.values():
            name = "_".join([*step.prefix, name])
        base, n = name, 1
        while name in names.values():
            n += 1
            name = f"{base}_{n}"
        names[id(step.op)] = name
    return names
