"""What a server is asked with and answers: functions of named tensors, made from a Keras model."""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_bn import model as _model
from keras_bn.drift.figures import RowFigures
from keras_bn.drift.rows import row_figures
from keras_bn.exporting import inputs as _inputs
from keras_bn.exporting import pictures as _pictures
from keras_bn.exporting.preprocessing import Preprocessing
from keras_bn.folding.proof import refuse_random
from keras_bn.folding.trials import Normalized, normalized_inputs
from keras_bn.inference import inference_mode
from keras_bn.names import argument, identifier, shown, unique
from keras_bn.state import seeds_of

Tensors = Mapping[str, tf.Tensor]
SERVING, BYTES = "serving_default", "image_bytes"
TOP = 5


class Serving:
    """The functions of a model that a server shall offer, still to be traced.

    Args:
        model: what answers, in inference mode.
        preprocess: makes the model's input of a batch of float32 pictures in [0, 255], or None.
        jit_compile: whether XLA compiles the model in what is traced.
        named_after: gives the names, where `model` was made from the model of that one.

    Attributes:
        inputs: by name the `tf.TensorSpec` that `serving_default` takes.
        output_names: of the model's flattened outputs.
    """

    def __init__(
        self,
        model: keras.Model,
        preprocess: Callable[[tf.Tensor], Any] | None = None,
        jit_compile: bool = False,
        named_after: "Serving | None" = None,
    ):
        self._model, self._jit_compile = model, jit_compile
        self._structure = input_structure(model)
        self.inputs: dict[str, tf.TensorSpec] = {}
        self.output_names: list[str] = []
        leaves = keras.tree.flatten(self._structure)
        self._preprocess = None if preprocess is None else Preprocessing(preprocess, leaves[0])
        if named_after is not None:
            self.inputs, self.output_names = named_after.inputs, named_after.output_names
            return
        if preprocess is not None and (len(leaves) != 1 or len(leaves[0].shape) != 4):
            raise ValueError(
                "`preprocess` must be None for a model that does not take one batch of pictures, rank 4. "
                f"Received: preprocess={shown(preprocess)} for inputs of shapes {[leaf.shape for leaf in leaves]}."
            )
        names = _input_names(leaves, _keys(self._structure))
        self.inputs = {
            name: tf.TensorSpec((None, *leaf.shape[1:]), tf.uint8 if preprocess else wire_dtype(leaf.dtype), name=name)
            for name, leaf in zip(names, leaves, strict=True)
        }
        # Traced here for the names: what an output is called depends on the operation that makes it.
        structures: list[Any] = []

        def run(tensors: Tensors) -> Any:
            structures.append(self._run(tensors))
            return keras.tree.flatten(structures[-1])

        flat = self.concrete(run, self.inputs)
        for seed in seeds_of(model):
            if any(seed.value is variable for variable in flat.graph.variables):
                refuse_random(model, f"calls of it advance {seed.path!r}")
        self.output_names = _output_names(model, flat, _keys(structures[-1]))

    def predict(self, tensors: Tensors) -> dict[str, tf.Tensor]:
        """The model's outputs by name; also eagerly, for comparison."""
        values = self._compiled(lambda values: keras.tree.flatten(self._run(values)))(tensors)
        return {n: tf.cast(v, wire_dtype(v.dtype)) for n, v in zip(self.output_names, values, strict=True)}

    def predict_with(self, labels: Sequence[str]) -> Callable[[Tensors], dict[str, tf.Tensor]]:
        """`predict`, and `top_labels` and `top_scores` of the likeliest classes.

        Args:
            labels: one for each class, in the order of the model's output.
        """

        def predict(tensors: Tensors) -> dict[str, tf.Tensor]:
            outputs = self.predict(tensors)
            scores, shapes = next(iter(outputs.values())), [tuple(value.shape) for value in outputs.values()]
            if len(shapes) != 1 or shapes[0][1:] != (len(labels),):
                advice = ""
                if len(labels) == 2 and shapes in ([(None,)], [(None, 1)]):
                    advice = "; end a model of one sigmoid p in a column for each, `Concatenate()([1 - p, p])`"
                raise ValueError(
                    "`labels` must be one for each class of a model with one output of shape (batch, classes)"
                    f"{advice}. Received: {len(labels)} labels for outputs of shapes {shapes}."
                )
            top = tf.math.top_k(scores, min(TOP, len(labels)))
            return {
                **outputs,
                "top_labels": tf.gather(tf.constant(list(labels)), top.indices),
                "top_scores": top.values,
            }

        return predict

    def decoded(self, predict: Callable[[Tensors], Any]) -> tuple[Callable[[Tensors], Any], dict[str, tf.TensorSpec]]:
        """`predict` for encoded pictures of any size, resized to the model's, see `pictures.decoded`."""
        (name, spec), *_ = self.inputs.items()
        size = spec.shape[1:]

        def predict_bytes(tensors: Tensors) -> Any:
            pictures = tf.map_fn(
                lambda contents: _pictures.decoded(contents, *size), tensors[BYTES], fn_output_signature=tf.uint8
            )
            return predict({name: tf.ensure_shape(pictures, spec.shape)})

        return predict_bytes, {BYTES: tf.TensorSpec((None,), tf.string, BYTES)}

    @property
    def takes_pictures(self) -> bool:
        """Whether there can be a signature for encoded pictures."""
        if self._preprocess is None:
            return False
        *size, channels = next(iter(self.inputs.values())).shape[1:]
        return None not in size and channels in (1, 3, 4)

    def drift(self, tensors: Tensors) -> dict[str, tf.Tensor]:
        """For each row its own figures at each normalization, all channels side by side: `drift.rows.row_figures`."""
        figures = self._compiled(lambda values: row_figures(self._model, self.model_inputs(values)))(tensors)
        rows = tf.shape(next(iter(tensors.values())))[:1]
        widths = [one.count.shape[1] for one in figures.values()]

        def in_each_row(values: list[Any]) -> tf.Tensor:
            return tf.tile(
                tf.constant([values]), tf.concat([rows, [1]], 0)
            )  # LiteRT tiles strings, and broadcasts none.

        columns = zip(RowFigures._fields, zip(*figures.values(), strict=True), strict=True)
        return {
            "layer": in_each_row(list(figures)),
            "channels": in_each_row(widths),
            **{name: tf.concat(parts, 1) for name, parts in columns},
        }

    def normalized_inputs(self) -> Normalized:
        """What is known of the numbers of each input, in the order of the names; nothing of pictures."""
        by_name = {} if self._preprocess else dict(zip(self.inputs, normalized_inputs(self._model), strict=False))
        return [by_name.get(name) for name in sorted(self.inputs)]

    def least_sizes(self) -> dict[str, list[int]]:
        """By input name the smallest size of each axis, see `inputs.least_sizes`."""

        def trace(specs: Mapping[str, tf.TensorSpec]) -> tf.Graph:
            with_keywords = tf.function(lambda **tensors: self.predict(tensors), autograph=False)
            return with_keywords.get_concrete_function(**specs).graph

        return _inputs.least_sizes(trace, self.inputs)

    def concrete(
        self,
        function: Callable[[Tensors], Any],
        inputs: Mapping[str, tf.TensorSpec],
        least: Mapping[str, list[int]] | None = None,
    ) -> Any:
        """`function` traced for `inputs` of any batch size, which are checked first, see `inputs.checked`.

        Args:
            function: of tensors by input name.
            inputs: what it takes.
            least: by input name the smallest size of each axis; None for 1.
        """
        if least is None:
            least = {name: [1] * spec.shape.rank for name, spec in inputs.items()}

        def with_keywords(**tensors: tf.Tensor) -> Any:
            return function(_inputs.checked(tensors, inputs, least))

        return tf.function(with_keywords, autograph=False).get_concrete_function(**inputs)

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, in a graph by XLA where that is asked for: only what is numbers, as XLA has no strings."""
        if not self._jit_compile or tf.executing_eagerly():
            return function
        return tf.function(function, autograph=False, jit_compile=True)

    def _run(self, tensors: Tensors) -> Any:
        values = self.model_inputs(tensors)
        with inference_mode(self._model), contextlib.ExitStack() as stack:
            if self._preprocess is not None:
                stack.enter_context(self._preprocess.given_to_model(keras.tree.flatten(values)[0]))
            return self._model(values, training=False)

    def model_inputs(self, tensors: Tensors) -> Any:
        """What the model itself is called with."""
        values = [tensors[name] for name in self.inputs]
        if self._preprocess is not None:
            values = [self._preprocess(tf.cast(values[0], tf.float32))]
        return keras.tree.pack_sequence_as(self._structure, values)


def wire_dtype(dtype: Any) -> tf.DType:
    """float32 for the half precisions, which TensorFlow Serving's REST interface can not carry."""
    return tf.float32 if tf.as_dtype(dtype) in (tf.float16, tf.bfloat16) else tf.as_dtype(dtype)


def input_structure(model: keras.Model) -> Any:
    """The model's inputs as it is called with them, KerasTensors at the leaves."""
    if isinstance(model, keras.Sequential):
        return model.inputs[0]
    if getattr(model, "inputs", None):
        return model.input
    return _model.input_structure(model)


def _keys(structure: Any) -> list[str] | None:
    """The keys of a dictionary of tensors, in the order in which it is flattened; None for anything else."""
    if not isinstance(structure, Mapping) or any(keras.tree.is_nested(value) for value in structure.values()):
        return None
    return sorted(structure) if all(isinstance(key, str) for key in structure) else None


def _input_names(leaves: list[keras.KerasTensor], keys: list[str] | None) -> list[str]:
    given = [_input_name(leaf) for leaf in leaves]
    if keys is not None:
        given = [name or argument(key) or None for name, key in zip(given, keys, strict=True)]
    if len(leaves) == 1 and given[0] is None:
        shape = leaves[0].shape
        return ["image" if len(shape) == 4 and shape[-1] in (1, 3, 4) else "inputs"]
    return unique([name or f"input_{i + 1}" for i, name in enumerate(given)])


def _input_name(leaf: keras.KerasTensor) -> str | None:
    """The name a person gave, cleaned; None if Keras gave it, or nothing of it can stay."""
    return None if re.fullmatch(r"(input_layer|keras_tensor|input)(_\d+)?", leaf.name) else argument(leaf.name) or None


def _output_names(model: keras.Model, flat: Any, keys: list[str] | None) -> list[str]:
    """Names of the flattened outputs: dictionary keys, else what the last operation says, else the layer's own name."""
    if keys is not None:
        return unique([identifier(key) for key in keys])
    tensors = keras.tree.flatten(flat.structured_outputs)
    symbolic = getattr(model, "outputs", None)
    given = [_layer_name(tensor) for tensor in symbolic] if symbolic else [None] * len(tensors)
    kinds = ["probabilities" if _is_probability(output) else None for output in flat.outputs]
    if len(tensors) == 1:
        return [kinds[0] or given[0] or "outputs"]
    return unique([g or k or f"output_{i + 1}" for i, (g, k) in enumerate(zip(given, kinds, strict=True))])


def _layer_name(tensor: keras.KerasTensor) -> str | None:
    """The name of the layer that made `tensor` if a person gave it, None if Keras did."""
    layer = tensor._keras_history.operation
    automatic = type(layer).__name__.lower()  # Keras calls the second `BatchNormalization` batch_normalization_1.
    return None if re.sub(r"_\d+$", "", layer.name).replace("_", "") == automatic else identifier(layer.name)


def _is_probability(tensor: tf.Tensor) -> bool:
    operation = tensor.op
    while operation.type in ("Identity", "Cast", "Reshape"):
        operation = operation.inputs[0].op
    return operation.type in ("Softmax", "Sigmoid")
