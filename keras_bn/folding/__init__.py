"""fold(): normalizations absorbed into the weights of their neighbours, and proved to compute the same."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras.layers import BatchNormalization

from keras_bn.folding.absorbing import (
    absorb_after,
    absorb_before,
    absorbing_kind,
    channel_axis,
    idle_in_inference,
    pads_with_zeros,
    weights_of,
)
from keras_bn.folding.graph import Graph, Step, Value
from keras_bn.folding.proof import errors_between, random_inputs
from keras_bn.folding.weights import Affine, affine_of, fold_affine
from keras_bn.model import channel_axes, copy_variables, layers_below, named_batch_norms
from keras_bn.tables import table

_LINEAR = keras.activations.linear


class FoldedNormalization(NamedTuple):
    """What became of one batch normalization.

    Attributes:
        name: the layer's, with the names of the nested models around it.
        into: names of the layers that absorbed it; empty if it stayed as a multiply-add.
        reason: why it was not absorbed; empty if it was.
    """

    name: str
    into: list[str]
    reason: str


class FoldingReport(NamedTuple):
    """What `fold` did, and how well the new model agrees with the old; prints as a table.

    Attributes:
        normalizations: a `FoldedNormalization` each.
        absolute_error: largest difference of any output value.
        relative_error: largest difference of an output, divided by the largest magnitude in that output.
        tolerance: what the relative error had to stay below.
        shared: names of the layers that could not be copied and belong to both models.
    """

    normalizations: list[FoldedNormalization]
    absolute_error: float
    relative_error: float
    tolerance: float
    shared: list[str]

    @property
    def absorbed(self) -> int:
        """How many normalizations are gone."""
        return sum(bool(one.into) for one in self.normalizations)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self._asdict(),
            "normalizations": [one._asdict() for one in self.normalizations],
            "absorbed": self.absorbed,
        }

    def __str__(self) -> str:
        rows = [[one.name, ", ".join(one.into) or "-", one.reason] for one in self.normalizations]
        return (
            f"{self.absorbed} of {len(self.normalizations)} normalizations absorbed; largest error "
            f"{self.absolute_error:.3g} absolute, {self.relative_error:.3g} relative (allowed: {self.tolerance:g}).\n"
            + table(["layer", "absorbed by", "why it stays"], rows)
        )


def fold(model: keras.Model, check: Any = None, tolerance: float | None = None) -> keras.Model:
    """A new model that computes in inference what `model` does, its batch normalizations absorbed by other weights.

    scale = gamma / sqrt(moving_variance + epsilon), shift = beta - moving_mean * scale

    and then, computed in float64 and cast last,

    scale * (kernel * x + bias) + shift = (scale * kernel) * x + (scale * bias + shift)

    into the Dense, (depthwise, separable, transposed) convolution or multiply-add before it, or else

    kernel * (scale * x + shift) + bias = (kernel * scale) * x + (kernel * shift + bias)

    into all the Dense and convolutions after it, where they do not pad with zeros. Biases are made where there are
    none, shared layers are folded if all their uses allow it, nested models are laid out flat, and layers that do
    nothing in inference (dropout, noise) are left out. What nobody can absorb stays as one multiply-add, a `Rescaling`.
    The new model holds Keras's own layers, is for inference only, and is proved: both models run on random inputs, and
    on `check` where it is given.

    Args:
        model: functional or sequential, built. It is left as it is; nothing is shared with it but layers that cannot
            be made from their configuration, which the report names, and layers without weights.
        check: optional inputs, as `model` takes them, to prove the new model on. Needed for inputs that are strings.
        tolerance: largest relative error allowed; None for 1e-4, or 2e-2 where a layer computes in half precision.

    Returns:
        The new model, with the report in its attribute `folding_report`.

    Raises:
        TypeError: when `model` is no Keras model.
        ValueError: when `model` is subclassed or not built, or the new model is not within the tolerance.

    Reference: Jacob et al. 2018 (arXiv 1712.05877), section 3.2.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`. Received: model={model!r} of type {type(model).__name__}.")
    folder = _Folder(Graph(model), named_batch_norms(model))
    folder.fold_all()
    folded, shared = folder.new_model()
    if tolerance is None:
        halves = any(layer.compute_dtype in ("float16", "bfloat16") for layer in layers_below(model))
        tolerance = 2e-2 if halves else 1e-4
    strings = any(tensor.dtype == "string" for tensor in model.inputs)
    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model._inputs_struct
    drawn = [random_inputs(structure, pixels, "check") for pixels in (False, True) if check is None or not strings]
    errors = errors_between(model, folded, drawn if check is None else [*drawn, check])
    if not errors.relative <= tolerance:
        raise ValueError(
            f"`tolerance` must be above the error of the folded model, or the model is not fit to be folded. "
            f"Received: tolerance={tolerance:g}, relative error {errors.relative:.3g}, "
            f"absolute error {errors.absolute:.3g}."
        )
    report = FoldingReport(folder.outcomes(), *errors, tolerance, shared)
    # Past Keras's own `__setattr__`, which would track the report as a part of the model.
    folded.__dict__["folding_report"] = report
    return folded


class _Folder:
    """Changes a graph normalization by normalization, and the weights beside it."""

    def __init__(self, graph: Graph, names: dict[str, BatchNormalization]):
        self.graph = graph
        self._names = names
        self._weights: dict[Any, dict[str, np.ndarray]] = {}
        self._activations: dict[Any, Any] = {}
        self._affines: dict[BatchNormalization, Affine] = {}
        self._into: dict[BatchNormalization, list[Any]] = {}
        self._reasons: dict[BatchNormalization, str] = {}

    def fold_all(self) -> None:
        for step in list(self.graph.steps):
            if idle_in_inference(step.op) and step.input not in self.graph.inputs:
                self.graph.remove(step)
        in_order = list(dict.fromkeys(step.op for step in self.graph.steps if isinstance(step.op, BatchNormalization)))
        self._affines = {layer: _affine(layer) for layer in in_order}
        for layer in in_order:
            self._reasons[layer] = self._fold_into_previous(layer)
        for layer in in_order:
            if self._reasons[layer]:
                why_not_after = self._fold_into_next(layer)
                self._reasons[layer] = f"{self._reasons[layer]}; {why_not_after}" if why_not_after else ""

    def outcomes(self) -> list[FoldedNormalization]:
        outcomes = []
        for name, layer in self._names.items():
            into = [other.name for other in self._into.get(layer, [])]
            reason = self._reasons.get(layer, "it is inside a layer whose graph is not known")
            outcomes.append(FoldedNormalization(name, into, reason))
        return outcomes

    def new_model(self) -> tuple[keras.Model, list[str]]:
        made: dict[Any, Any] = {}
        shared: list[str] = []

        def make(op: Any, name: str) -> list[Any]:
            if isinstance(op, BatchNormalization):
                return self._multiply_add(op, name)
            if op in self._weights:
                config = {**op.get_config(), "name": name, "use_bias": True}
                if op in self._activations:
                    config["activation"] = self._activations[op]
                made[op] = type(op).from_config(config)
            elif isinstance(op, keras.Layer) and op.variables:
                try:
                    made[op] = type(op).from_config({**op.get_config(), "name": name})
                except (TypeError, ValueError, NotImplementedError):
                    shared.append(name)
                    return [op]
            else:
                return [op]
            return [made[op]]

        model = self.graph.rebuild(make)
        for old, new in made.items():
            if old not in self._weights:
                copy_variables(old, new)
            for name, value in self._weights.get(old, {}).items():
                getattr(new, name).assign(value)
        return model, shared

    def _fold_into_previous(self, layer: BatchNormalization) -> str:
        """Empty once it is absorbed, else the reason why it is not."""
        uses = self.graph.uses(layer)
        producers = [None if step.input is None else self.graph.producer(step.input) for step in uses]
        first = producers[0]
        if first is None:
            return "it comes first"
        previous = first.op
        label = _label(previous)
        merging = isinstance(previous, BatchNormalization) and self._into.get(previous) is None
        if not merging and absorbing_kind(previous) is None:
            return f"{label} before it has no weights to absorb it"
        if any(producer is None or producer.op is not previous for producer in producers):
            return "it is shared, and not all its uses follow the same layer"
        if len(self.graph.uses(previous)) != len(uses):
            return f"{label} before it is shared with a use that is not normalized"
        if any(_takers(self.graph, step.input) != [step] for step in uses):
            return f"{label} before it is also used without the normalization"
        if self._activation(previous) is not _LINEAR:
            return f"{label} before it has an activation inside"
        own = _channel_axis_of(layer, uses[0])
        if own is None or own != (
            _channel_axis_of(previous, uses[0]) if merging else channel_axis(previous, len(uses[0].outputs[0].shape))
        ):
            return f"it normalizes another axis than the channels of {label}"
        if merging:
            self._affines[previous] = fold_affine(self._affines[previous], self._affines[layer])
        else:
            self._weights[previous] = absorb_after(previous, self._weights_of(previous), self._affines[layer])
        if _activation_of(layer) is not _LINEAR:
            self._activations[previous] = _activation_of(layer)
        self._absorbed(layer, [previous])
        return ""

    def _fold_into_next(self, layer: BatchNormalization) -> str:
        """Empty once it is absorbed, else the reason why it is not."""
        if self._activation(layer) is not _LINEAR:
            return "its own activation comes before what follows"
        uses = self.graph.uses(layer)
        if any(self.graph.is_output(step.outputs[0]) for step in uses):
            return "its output is an output of the model"
        takers = [taker for step in uses for taker in self.graph.consumers(step.outputs[0])]
        following = list(dict.fromkeys(taker.op for taker in takers))
        affine = self._affines[layer]
        for op in following:
            label = _label(op)
            if absorbing_kind(op) is None or absorbing_kind(op) == "transposed":
                return f"{label} after it has no weights to absorb it"
            if any(self._maker(step.input) is not layer for step in self.graph.uses(op)):
                return f"{label} after it is also used without the normalization"
            if _channel_axis_of(layer, uses[0]) != channel_axis(op, len(uses[0].outputs[0].shape)):
                return f"it normalizes another axis than the channels of {label}"
            if pads_with_zeros(op) and np.any(affine.shift != 0):
                return f"{label} after it pads with zeros, which the shift would not reach"
        for op in following:
            self._weights[op] = absorb_before(op, self._weights_of(op), affine)
        self._absorbed(layer, following)
        return ""

    def _absorbed(self, layer: BatchNormalization, into: list[Any]) -> None:
        self._into[layer] = into
        for step in self.graph.uses(layer):
            self.graph.remove(step)

    def _maker(self, value: Value | None) -> Any:
        step = None if value is None else self.graph.producer(value)
        return None if step is None else step.op

    def _weights_of(self, layer: Any) -> dict[str, np.ndarray]:
        return self._weights[layer] if layer in self._weights else weights_of(layer)

    def _activation(self, layer: Any) -> Any:
        return self._activations.get(layer, _activation_of(layer))

    def _multiply_add(self, layer: BatchNormalization, name: str) -> list[Any]:
        rank = layer.input_spec.ndim
        known = {axis % rank: size for axis, size in layer.input_spec.axes.items()}
        channels = {axis % rank for axis in channel_axes(layer)}
        sizes = [known[axis] if axis in channels else 1 for axis in range(1, rank)]
        scale, shift = (np.reshape(v, sizes).tolist() for v in self._affines[layer])
        made: list[Any] = [keras.layers.Rescaling(scale, shift, name=name, dtype=layer.dtype_policy)]
        if self._activation(layer) is not _LINEAR:
            made.append(keras.layers.Activation(self._activation(layer), name=f"{name}_activation"))
        return made


def _affine(layer: BatchNormalization) -> Affine:
    gamma, beta = layer.gamma if layer.scale else None, layer.beta if layer.center else None
    gamma, beta, mean, variance = (
        None if v is None else v.numpy().ravel() for v in (gamma, beta, layer.moving_mean, layer.moving_variance)
    )
    return affine_of(gamma, beta, mean, variance, layer.epsilon)


def _activation_of(layer: Any) -> Any:
    return getattr(layer, "activation", _LINEAR)


def _channel_axis_of(layer: BatchNormalization, step: Step) -> int | None:
    """The one axis that has statistics of its own, None where there are several."""
    axes = channel_axes(layer)
    return axes[0] % len(step.outputs[0].shape) if len(axes) == 1 else None


def _takers(graph: Graph, value: Value | None) -> Sequence[Step | None]:
    """Who takes `value`; the model itself counts as one that is unknown."""
    if value is None:
        return []
    return [*graph.consumers(value), *([None] if graph.is_output(value) else [])]


def _label(op: Any) -> str:
    return f"{type(op).__name__} '{op.name}'"
