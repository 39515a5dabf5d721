"""export(): a trained model becomes a numbered SavedModel that a server can load and a person can query."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_bn._layers import inference_mode, layers_below
from keras_bn._versions import rename_into_place, temporary_sibling


class Exported(NamedTuple):
    """What `export` wrote."""

    path: Path
    version: int
    inputs: dict[str, tf.TensorSpec]
    outputs: dict[str, tf.TensorSpec]


def export(model: keras.Model, model_base_path: str | os.PathLike[str], version: int | None = None) -> Exported:
    """Writes `model` as the next version below `model_base_path`, ready for TensorFlow Serving.

    The version is written into a sibling folder and renamed into place when it is whole, so a server that polls never
    sees half a version. `serving_default` runs in inference mode, takes any batch size, and has names a person would
    choose: inputs are called as in `keras.Input(name=...)`, a single nameless picture `image`; outputs that end in a
    softmax or sigmoid `probabilities`, others as their layer if it was given a name, else `outputs`.

    Args:
        model: a built Keras model: functional, sequential, or subclassed and called once.
        model_base_path: folder of the model's versions; made if it is not there.
        version: integer from 0, or None for one more than the highest there (1 in an empty folder).

    Returns:
        An `Exported`: the `path` of the version, its number, and the `inputs` and `outputs` of `serving_default`.

    Raises:
        TypeError: when `model` is no Keras model or `version` no integer.
        ValueError: when `model` is not built, or `version` is negative or there already.

    Example:

    ```python
    keras_bn.export(model, "served/fashion").path  # served/fashion/1
    ```
    """
    _check_arguments(model, version)
    base = Path(model_base_path)
    with temporary_sibling(base) as folder:
        serving_default, inputs, outputs = _serving_default(model)
        root = tf.Module()
        root.kept = _resources(model)
        tf.saved_model.save(root, os.fspath(folder), signatures={"serving_default": serving_default})
        path = rename_into_place(folder, base, version)
    return Exported(path, int(path.name), inputs, outputs)


def _check_arguments(model: keras.Model, version: int | None) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`. Received: model={model!r} of type {type(model).__name__}.")
    if not model.built:
        raise ValueError(
            "`model` must be built: give it an `Input`, or call it once on a batch of data. "
            f"Received: model={model.name!r}, which is not built."
        )
    if version is not None and (isinstance(version, bool) or not isinstance(version, int)):
        raise TypeError(f"`version` must be an integer from 0, or None for the next. Received: version={version!r}.")
    if version is not None and version < 0:
        raise ValueError(f"`version` must be an integer from 0, or None for the next. Received: version={version}.")


def _serving_default(model: keras.Model) -> tuple[Any, dict[str, tf.TensorSpec], dict[str, tf.TensorSpec]]:
    structure = _input_structure(model)
    names = _input_names(keras.tree.flatten(structure))
    inputs = {
        name: tf.TensorSpec((None, *leaf.shape[1:]), _wire_dtype(leaf.dtype), name=name)
        for name, leaf in zip(names, keras.tree.flatten(structure), strict=True)
    }

    def predict(tensors: Mapping[str, tf.Tensor]) -> Any:
        return model(keras.tree.pack_sequence_as(structure, [tensors[name] for name in names]), training=False)

    with inference_mode(model):
        # Traced twice: what an output is called depends on the operation that makes it.
        flat = _concrete(lambda tensors: keras.tree.flatten(predict(tensors)), inputs)
        output_names = _output_names(model, flat)

        def serve(tensors: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            values = keras.tree.flatten(predict(tensors))
            return {n: tf.cast(v, _wire_dtype(v.dtype)) for n, v in zip(output_names, values, strict=True)}

        serving_default = _concrete(serve, inputs)
    outputs = {name: tf.TensorSpec(t.shape, t.dtype, name) for name, t in serving_default.structured_outputs.items()}
    return serving_default, inputs, outputs


def _concrete(function: Callable[..., Any], inputs: dict[str, tf.TensorSpec]) -> Any:
    def with_keywords(**tensors: tf.Tensor) -> Any:
        return function(tensors)

    return tf.function(with_keywords, autograph=False, jit_compile=False).get_concrete_function(**inputs)


def _wire_dtype(dtype: Any) -> tf.DType:
    """float32 for the half precisions, which TensorFlow Serving's REST interface can not carry."""
    return tf.float32 if tf.as_dtype(dtype) in (tf.float16, tf.bfloat16) else tf.as_dtype(dtype)


def _input_structure(model: keras.Model) -> Any:
    """The model's inputs as it is called with them, KerasTensors at the leaves."""
    if isinstance(model, keras.Sequential):
        return model.inputs[0]
    if getattr(model, "inputs", None):
        return model._inputs_struct
    shapes = list(model._build_shapes_dict.values()) if getattr(model, "_build_shapes_dict", None) else []
    if len(shapes) != 1:
        raise ValueError(
            "`model` must be functional, sequential, or subclassed with one argument to `call` and called once. "
            f"Received: model={model.name!r} of type {type(model).__name__}, with {len(shapes)} known inputs."
        )
    return keras.tree.map_shape_structure(
        lambda shape: keras.KerasTensor(shape, dtype=model.input_dtype, name="keras_tensor"), shapes[0]
    )


def _input_names(leaves: list[keras.KerasTensor]) -> list[str]:
    given = [_input_name(leaf) for leaf in leaves]
    if len(leaves) == 1 and given[0] is None:
        shape = leaves[0].shape
        return ["image" if len(shape) == 4 and shape[-1] in (1, 3, 4) else "inputs"]
    return _unique([name or f"input_{i + 1}" for i, name in enumerate(given)])


def _input_name(leaf: keras.KerasTensor) -> str | None:
    return None if re.fullmatch(r"(input_layer|keras_tensor|input)(_\d+)?", leaf.name) else leaf.name


def _output_names(model: keras.Model, flat: Any) -> list[str]:
    """Names of the flattened outputs: dictionary keys, else what the last operation says, else the layer's own name."""
    structure = getattr(model, "_outputs_struct", None)
    if isinstance(structure, dict) and not any(keras.tree.is_nested(value) for value in structure.values()):
        return [_identifier(key) for key in sorted(structure)]
    tensors = keras.tree.flatten(flat.structured_outputs)
    symbolic = getattr(model, "outputs", None)
    given = [_layer_name(tensor) for tensor in symbolic] if symbolic else [None] * len(tensors)
    kinds = ["probabilities" if _is_probability(output) else None for output in flat.outputs]
    if len(tensors) == 1:
        return [kinds[0] or given[0] or "outputs"]
    return _unique([g or k or f"output_{i + 1}" for i, (g, k) in enumerate(zip(given, kinds, strict=True))])


def _layer_name(tensor: keras.KerasTensor) -> str | None:
    """The name of the layer that made `tensor` if a person gave it, None if Keras did."""
    layer = tensor._keras_history.operation
    automatic = type(layer).__name__.lower()  # Keras calls the second `BatchNormalization` batch_normalization_1.
    return None if re.sub(r"_\d+$", "", layer.name).replace("_", "") == automatic else _identifier(layer.name)


def _is_probability(tensor: tf.Tensor) -> bool:
    operation = tensor.op
    while operation.type in ("Identity", "Cast", "Reshape"):
        operation = operation.inputs[0].op
    return operation.type in ("Softmax", "Sigmoid")


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _unique(names: list[str]) -> list[str]:
    """Numbers the names that come twice, from 1."""
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    counters: dict[str, int] = {}
    unique = []
    for name in names:
        counters[name] = counters.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}_{counters[name]}")
    return unique


def _resources(model: keras.Model) -> list[Any]:
    """All a graph of the model may capture: its variables, and the tables of preprocessing layers."""
    tables = [
        value
        for layer in layers_below(model)
        for value in vars(layer).values()
        if isinstance(value, tf.saved_model.experimental.TrackableResource)
    ]
    return [variable.value for variable in model.variables] + tables
