"""Folds a graph normalization by normalization, and keeps the weights beside it."""

import contextlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras.layers import BatchNormalization

from keras_bn.configuration import own_objects_known
from keras_bn.folding.absorbing import (
    absorb_after,
    absorb_before,
    absorbing_kind,
    channel_axis,
    idle_in_inference,
    pads_with_zeros,
    weights_of,
    why_not_absorbing,
)
from keras_bn.folding.graph import Graph, Step, Value
from keras_bn.folding.report import FoldedNormalization
from keras_bn.folding.weights import Affine, affine_of, fold_affine
from keras_bn.model import affine_weights, channel_axes, is_plain_batch_norm, statistics_of
from keras_bn.state import copy_state

_LINEAR = keras.activations.linear
# What rounding may add, relative to a standard deviation.
_MOST_ADDED = 1e-5


class Folder:
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
        in_order = list(dict.fromkeys(step.op for step in self.graph.steps if is_plain_batch_norm(step.op)))
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
            if not is_plain_batch_norm(layer):
                reason = f"it is a {type(layer).__name__}, which may compute something else than a batch normalization"
            outcomes.append(FoldedNormalization(name, into, reason))
        return outcomes

    def new_model(self) -> tuple[keras.Model, list[str]]:
        made: dict[Any, Any] = {}
        shared: list[str] = []

        def make(op: Any, name: str) -> list[Any]:
            if is_plain_batch_norm(op):
                return self._multiply_add(op, name)
            if op in self._weights:
                with own_objects_known(op):
                    config = {**op.get_config(), "name": name, "use_bias": True}
                    if op in self._activations:
                        config["activation"] = self._activations[op]
                    made[op] = type(op).from_config(config)
                return [made[op]]
            has_variables = isinstance(op, keras.Layer) and bool(op.variables)
            if not has_variables and name == op.name:
                return [op]
            try:
                with own_objects_known(op) if isinstance(op, keras.Layer) else contextlib.nullcontext():
                    made[op] = type(op).from_config({**op.get_config(), "name": name})
            except (TypeError, ValueError, NotImplementedError) as error:
                if name != op.name:
                    raise ValueError(
                        "`model` must have no two layers of one name, in nested models either, where they cannot be "
                        f"made anew with another from their configuration. Received: {_label(op)}, twice."
                    ) from error
                shared.append(name)
                return [op]
            return [made[op]]

        model = self.graph.rebuild(make)
        for old, new in made.items():
            if old not in self._weights and isinstance(old, keras.Layer):
                copy_state(old, new)
            for name, value in self._weights.get(old, {}).items():
                getattr(new, name).assign(value)
        return model, shared

    def _fold_into_previous(self, layer: BatchNormalization) -> str:
        """Empty once it is absorbed, else the reason why it is not."""
        uses = self.graph.uses(layer)
        producers = [None if step.input is None else self.graph.producer(step.input) for step in uses]
        first = producers[0]
        if first is None:
            return "only an input of the model is before it"
        previous = first.op
        label = _label(previous)
        merging = is_plain_batch_norm(previous) and self._into.get(previous) is None
        if not merging and absorbing_kind(previous) is None:
            return f"{label} before it {why_not_absorbing(previous)}"
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
        if self._is_far_from_zero(layer):
            return "its mean is too many standard deviations from zero: the digits of its inputs would be lost"
        affine = self._affines[layer]
        for op in following:
            label = _label(op)
            if absorbing_kind(op) is None:
                return f"{label} after it {why_not_absorbing(op)}"
            if absorbing_kind(op) == "transposed":
                return f"{label} after it adds up fewer inputs at its edges, where the shift would be another"
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

    def _is_far_from_zero(self, layer: BatchNormalization) -> bool:
        """Whether digits are lost unless the mean is subtracted first, as the layer does it.

        Of a layer before, whose sum was rounded in front of the normalization already, they are not.
        """
        mean, variance = statistics_of(layer)
        deviations = np.max(np.abs(mean) / np.sqrt(variance + layer.epsilon), initial=0.0)
        # In half precision the mean itself would be rounded.
        is_half = layer.compute_dtype in ("float16", "bfloat16")
        return bool(not is_half and deviations * np.finfo(layer.compute_dtype).eps / 2 > _MOST_ADDED)

    def _multiply_add(self, layer: BatchNormalization, name: str) -> list[Any]:
        rank = layer.input_spec.ndim
        known = {axis % rank: size for axis, size in layer.input_spec.axes.items()}
        channels = {axis % rank for axis in channel_axes(layer)}
        # With the axis of the examples, but for matrices: where channels come first by default, Rescaling takes what
        # has fewer than three axes for channels of pictures.
        sizes = [known[axis] if axis in channels else 1 for axis in range(0 if rank > 2 else 1, rank)]
        scale, shift = (np.reshape(v, sizes) for v in self._affines[layer])
        multiply_add = _rescaling
        if rank == 2 and keras.config.image_data_format() == "channels_first":
            multiply_add = _matrix_multiply_add
        if self._is_far_from_zero(layer):
            mean = np.reshape(statistics_of(layer)[0], sizes)
            made = [
                multiply_add(np.ones_like(mean), -mean, f"{name}_mean", layer.dtype_policy),
                multiply_add(scale, shift + mean * scale, name, layer.dtype_policy),
            ]
        else:
            made = [multiply_add(scale, shift, name, layer.dtype_policy)]
        if self._activation(layer) is not _LINEAR:
            made.append(keras.layers.Activation(self._activation(layer), name=f"{name}_activation"))
        return made


def _rescaling(scale: np.ndarray, shift: np.ndarray, name: str, dtype: Any) -> keras.Layer:
    return keras.layers.Rescaling(scale.tolist(), shift.tolist(), name=name, dtype=dtype)


def _matrix_multiply_add(scale: np.ndarray, shift: np.ndarray, name: str, dtype: Any) -> keras.Layer:
    """For inputs of shape `(batch, C)`."""
    made = keras.layers.EinsumDense("bc,c->bc", scale.size, bias_axes="c", name=name, dtype=dtype)
    made.build((None, scale.size))
    made.kernel.assign(scale)
    made.bias.assign(shift)
    return made


def _affine(layer: BatchNormalization) -> Affine:
    gamma, beta, mean, variance = (v.ravel() for v in (*affine_weights(layer), *statistics_of(layer)))
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
