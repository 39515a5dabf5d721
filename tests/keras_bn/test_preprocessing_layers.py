"""What Keras's preprocessing layers were adapted to, and keep in no variable of Keras's, goes along with every copy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn

L = keras.layers
STOCK, OURS = L.BatchNormalization, keras_bn.BatchNormalization
NUMBERS = np.random.default_rng(0).lognormal(2, 1, (96, 1)).astype("float32")
INTEGERS = np.random.default_rng(0).integers(3, 9, (96, 2))
# Of lines and of bytes: what is read and written as text is another afterwards.
WORDS = np.random.default_rng(0).choice(
    ["a", "shirt", "two\nlines", "with\u2028a separator", "schön", "", " b "], (96, 2)
)
TEXTS = np.random.default_rng(0).choice(["a shirt", "a Shoe!", "a hat and a shoe", "schöne\u2028 shoes", ""], 96)
MODES = ("one_hot", "multi_hot", "count", "tf_idf")


def adapted(layer, data):
    layer.adapt(data)
    return layer


CASES = {
    "Normalization": lambda: (adapted(L.Normalization(), NUMBERS), NUMBERS),
    "Normalization of given moments": lambda: (L.Normalization(mean=7.0, variance=90.0), NUMBERS),
    "Normalization inverted": lambda: (adapted(L.Normalization(invert=True), NUMBERS), NUMBERS),
    "Normalization of no axis": lambda: (adapted(L.Normalization(axis=None), NUMBERS), NUMBERS),
    **{
        f"Discretization {mode}": lambda mode=mode: (
            adapted(L.Discretization(num_bins=6, output_mode=mode), NUMBERS),
            NUMBERS,
        )
        for mode in ("int", *MODES[:3])
    },
    "Discretization of given bins": lambda: (L.Discretization(bin_boundaries=[3.0, 9.0]), NUMBERS),
    **{
        f"StringLookup {mode}": lambda mode=mode: (adapted(L.StringLookup(output_mode=mode), WORDS), WORDS[:, :1])
        for mode in ("int", *MODES)
    },
    "StringLookup of several others": lambda: (adapted(L.StringLookup(num_oov_indices=3, max_tokens=6), WORDS), WORDS),
    "StringLookup of a given vocabulary": lambda: (
        L.StringLookup(vocabulary=["a", "shirt"], idf_weights=[0.25, 0.75], output_mode="tf_idf"),
        WORDS,
    ),
    **{
        f"IntegerLookup {mode}": lambda mode=mode: (
            adapted(L.IntegerLookup(output_mode=mode), INTEGERS),
            INTEGERS[:, :1],
        )
        for mode in ("int", *MODES)
    },
    "IntegerLookup padded": lambda: (
        adapted(L.IntegerLookup(output_mode="tf_idf", max_tokens=12, pad_to_max_tokens=True), INTEGERS),
        INTEGERS,
    ),
    **{
        f"TextVectorization {mode}": lambda mode=mode: (
            adapted(L.TextVectorization(output_mode=mode, output_sequence_length=5 if mode == "int" else None), TEXTS),
            TEXTS,
        )
        for mode in ("int", *MODES[1:])
    },
    "TextVectorization of words in pairs": lambda: (
        adapted(L.TextVectorization(output_mode="tf_idf", ngrams=2, max_tokens=9, pad_to_max_tokens=True), TEXTS),
        TEXTS,
    ),
    "Hashing": lambda: (L.Hashing(7, output_mode="one_hot", salt=3), WORDS[:, :1]),
    "HashedCrossing": lambda: (L.HashedCrossing(7, output_mode="one_hot"), (WORDS[:, 0], INTEGERS[:, 0])),
    "CategoryEncoding": lambda: (L.CategoryEncoding(9, output_mode="multi_hot"), INTEGERS),
}


@keras.saving.register_keras_serializable("test_preprocessing_layers")
class Subclassed(keras.Model):
    def __init__(self, layer, norm, **options):
        super().__init__(**options)
        self.layer, self.dense, self.norm = layer, L.Dense(4), norm
        if isinstance(layer, L.Normalization) and not layer.built:
            layer.build((None, 1))  # Within a call Keras keeps tensors of a graph that is gone afterwards.

    def call(self, x, training=None):
        return self.norm(self.dense(keras.ops.cast(self.layer(x), "float32")), training=training)

    def get_config(self):
        return {name: keras.saving.serialize_keras_object(getattr(self, name)) for name in ("layer", "norm")}

    @classmethod
    def from_config(cls, config):
        return cls(**{name: keras.saving.deserialize_keras_object(value) for name, value in config.items()})


def functional(layer, norm, examples):
    inputs = keras.tree.map_structure(lambda leaf: keras.Input(leaf.shape[1:], dtype=leaf.dtype), examples)
    known = keras.ops.cast(layer(inputs), "float32")
    if len(known.shape) == 1:
        known = keras.ops.expand_dims(known, -1)
    return keras.Model(inputs, norm(L.Dense(4)(known)))


def subclassed(layer, norm, examples):
    model = Subclassed(layer, norm)
    model(examples)
    return model


def unsettled(model):
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model


def as_tensors(examples):
    return keras.tree.map_structure(tf.convert_to_tensor, examples)


@pytest.mark.parametrize(
    ("case", "make"),
    # Keras builds no subclassed model anew that takes two inputs of rank 1.
    [
        (case, make)
        for make in (functional, subclassed)
        for case in CASES
        if (case, make) != ("HashedCrossing", subclassed)
    ],
)
def test_what_a_layer_was_adapted_to_goes_along_with_every_copy(case, make):
    layer, examples = CASES[case]()
    examples = as_tensors(examples)
    stock = unsettled(make(layer, STOCK(), examples))
    expected = stock(examples)
    assert len(np.unique(expected, axis=0)) > 1  # Else there is nothing to tell.
    ours = keras_bn.convert(stock, check=examples)
    np.testing.assert_allclose(ours(examples), expected, rtol=1e-5)
    np.testing.assert_array_equal(keras_bn.revert(ours, check=examples)(examples), expected)
    if make is functional:
        folded, _ = keras_bn.fold(ours, check=examples)
        np.testing.assert_allclose(folded(examples), expected, rtol=1e-4)


def test_a_feature_space_goes_along_with_every_copy():
    examples = {"age": NUMBERS[:, 0], "income": NUMBERS[:, 0] ** 2, "kind": WORDS[:, 0], "number": INTEGERS[:, 0]}
    kinds = ("float_normalized", "float_discretized", "string_categorical", "integer_categorical")
    space = keras.utils.FeatureSpace(
        features=dict(zip(examples, kinds, strict=True)), crosses=[("kind", "number")], output_mode="concat"
    )
    space.adapt(tf.data.Dataset.from_tensor_slices(examples))
    examples = {name: tf.convert_to_tensor(value[:, None]) for name, value in examples.items()}
    inputs = space.get_inputs()
    stock = unsettled(keras.Model(inputs, STOCK()(L.Dense(4)(space.get_encoded_features()))))
    expected = stock(examples)
    ours = keras_bn.convert(stock, check=examples)
    np.testing.assert_allclose(ours(examples), expected, rtol=1e-5)
    np.testing.assert_array_equal(keras_bn.revert(ours, check=examples)(examples), expected)
    folded, _ = keras_bn.fold(ours, check=examples)
    np.testing.assert_allclose(folded(examples), expected, rtol=1e-4)


def test_a_model_that_keras_cannot_build_anew_is_refused_in_words():
    layer, examples = CASES["HashedCrossing"]()
    examples = as_tensors(examples)
    model = subclassed(layer, STOCK(name="n"), examples)
    with pytest.raises(
        ValueError, match=r"Keras builds anew .*type Subclassed with 2 variables in 4 .*anew it has 0 in 4"
    ):
        keras_bn.convert(model, check=examples)
