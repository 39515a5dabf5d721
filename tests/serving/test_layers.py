"""Each layer of Keras as people export it: whether its rows are proved independent, and answer alike in a group."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as of
from keras_bn_serving.engine.servable import Servable

pytestmark = pytest.mark.slow
Make = Callable[[], keras.Model]
VECTOR, SEQUENCE, PICTURE, VOLUME = (6,), (6, 4), (6, 6, 4), (4, 6, 6, 4)
WORDS = ["a", "b", "c"]


def stack(shape: tuple[int | None, ...], *make: Callable[[], Any], dtype: str = "float32") -> Make:
    return lambda: keras.Sequential([keras.Input(shape, dtype=dtype), *(layer() for layer in make)])


def join(shapes: list[tuple[int | None, ...]], call: Callable[..., Any]) -> Make:
    def make() -> keras.Model:
        inputs = [keras.Input(shape) for shape in shapes]
        return keras.Model(inputs, call(*inputs))

    return make


def normalization() -> Any:
    layer = of.Normalization()
    layer.adapt(np.random.default_rng(0).normal(size=(9, 6)))
    return layer


def quantized() -> keras.Model:
    model = stack(VECTOR, lambda: of.Dense(4), lambda: of.EinsumDense("ab,bc->ac", (3,)))()
    model.quantize("int8")
    return model


class Mixing(keras.layers.Layer):
    """What a function of the whole batch makes."""

    def __init__(self, function: Callable[[Any], Any]):
        super().__init__()
        self.function = function

    def call(self, x: Any) -> Any:
        return self.function(x)

    def compute_output_shape(self, shape: Any) -> Any:
        return shape


class AlwaysTraining(keras.layers.Layer):
    """Normalizes with the statistics of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = of.BatchNormalization(trainable=True)

    def build(self, shape: Any) -> None:
        self.inner.build(shape)

    def call(self, x: Any) -> Any:
        return self.inner(x, training=True)


PROVED: dict[str, Make] = {
    "UpSampling1D": stack(SEQUENCE, lambda: of.UpSampling1D(2)),
    "UpSampling2D": stack(PICTURE, lambda: of.UpSampling2D((2, 3))),
    "UpSampling2D bilinear": stack(PICTURE, lambda: of.UpSampling2D(2, interpolation="bilinear")),
    "UpSampling2D bicubic": stack(PICTURE, lambda: of.UpSampling2D(2, interpolation="bicubic")),
    "UpSampling2D lanczos3": stack(PICTURE, lambda: of.UpSampling2D(2, interpolation="lanczos3")),
    "UpSampling3D": stack(VOLUME, lambda: of.UpSampling3D(2)),
    "ZeroPadding1D": stack(SEQUENCE, lambda: of.ZeroPadding1D(2)),
    "ZeroPadding2D": stack(PICTURE, lambda: of.ZeroPadding2D(2)),
    "ZeroPadding3D": stack(VOLUME, lambda: of.ZeroPadding3D(2)),
    "Cropping1D": stack(SEQUENCE, lambda: of.Cropping1D(1)),
    "Cropping2D": stack(PICTURE, lambda: of.Cropping2D(1)),
    "Cropping3D": stack(VOLUME, lambda: of.Cropping3D(1)),
    "RepeatVector": stack(VECTOR, lambda: of.RepeatVector(3)),
    "Permute": stack(SEQUENCE, lambda: of.Permute((2, 1))),
    "Reshape": stack(SEQUENCE, lambda: of.Reshape((2, -1))),
    "Flatten": stack(SEQUENCE, of.Flatten),
    "Conv1D": stack(SEQUENCE, lambda: of.Conv1D(4, 3, padding="causal", dilation_rate=2)),
    "Conv2D": stack(PICTURE, lambda: of.Conv2D(4, 3, dilation_rate=2, activation="relu")),
    "Conv3D": stack(VOLUME, lambda: of.Conv3D(4, 3, padding="same")),
    "Conv1DTranspose": stack(SEQUENCE, lambda: of.Conv1DTranspose(4, 3, strides=2)),
    "Conv2DTranspose": stack(PICTURE, lambda: of.Conv2DTranspose(4, 3, strides=2, padding="same")),
    "Conv3DTranspose": stack(VOLUME, lambda: of.Conv3DTranspose(4, 3, strides=2)),
    "DepthwiseConv1D": stack(SEQUENCE, lambda: of.DepthwiseConv1D(3)),
    "DepthwiseConv2D": stack(PICTURE, lambda: of.DepthwiseConv2D(3, dilation_rate=2)),
    "SeparableConv1D": stack(SEQUENCE, lambda: of.SeparableConv1D(4, 3)),
    "SeparableConv2D": stack(PICTURE, lambda: of.SeparableConv2D(4, 3)),
    "SimpleRNN": stack(SEQUENCE, lambda: of.SimpleRNN(4)),
    "LSTM": stack(SEQUENCE, lambda: of.LSTM(4, return_sequences=True), lambda: of.LSTM(3)),
    "LSTM with a mask": stack(SEQUENCE, of.Masking, lambda: of.LSTM(4, return_sequences=True)),
    "LSTM unrolled": stack(SEQUENCE, lambda: of.LSTM(4, unroll=True)),
    "LSTM of any length": stack((None, 4), lambda: of.LSTM(4)),
    "LSTM after an Embedding": stack(VECTOR, lambda: of.Embedding(9, 4, mask_zero=True), lambda: of.LSTM(4)),
    "GRU": stack(SEQUENCE, lambda: of.GRU(4)),
    "GRU backwards": stack(SEQUENCE, lambda: of.GRU(4, go_backwards=True, return_sequences=True)),
    "Bidirectional": stack(SEQUENCE, lambda: of.Bidirectional(of.GRU(4, return_sequences=True))),
    "ConvLSTM2D": stack(VOLUME, lambda: of.ConvLSTM2D(2, 3)),
    "TimeDistributed": stack(VOLUME, lambda: of.TimeDistributed(of.Conv2D(3, 2))),
    "Dense": stack(SEQUENCE, lambda: of.Dense(3)),
    "Dense of any length": stack((None, 4), lambda: of.Dense(3)),
    "EinsumDense": stack(SEQUENCE, lambda: of.EinsumDense("abc,cd->abd", (None, 4))),
    "quantized": quantized,
    "MultiHeadAttention": join([SEQUENCE], lambda x: of.MultiHeadAttention(2, 3)(x, x, use_causal_mask=True)),
    "MultiHeadAttention of any length": join([(None, 4)], lambda x: of.MultiHeadAttention(2, 3)(x, x)),
    "GroupQueryAttention": join([SEQUENCE], lambda x: of.GroupQueryAttention(3, 4, 2)(x, x)),
    "Attention": join([SEQUENCE, (5, 4)], lambda x, y: of.Attention()([x, y])),
    "AdditiveAttention": join([SEQUENCE, (5, 4)], lambda x, y: of.AdditiveAttention()([x, y])),
    "LayerNormalization": stack(SEQUENCE, of.LayerNormalization),
    "RMSNormalization": stack(SEQUENCE, of.RMSNormalization),
    "GroupNormalization": stack(PICTURE, lambda: of.GroupNormalization(2)),
    "UnitNormalization": stack(VECTOR, of.UnitNormalization),
    "BatchNormalization": stack(PICTURE, of.BatchNormalization),
    "SpectralNormalization": stack(PICTURE, lambda: of.SpectralNormalization(of.Conv2D(3, 3))),
    "Embedding": stack(VECTOR, lambda: of.Embedding(9, 4)),
    "Normalization": stack(VECTOR, normalization),
    "Rescaling": stack(PICTURE, lambda: of.Rescaling(1 / 255)),
    "Resizing": stack((6, 8, 3), lambda: of.Resizing(4, 4, crop_to_aspect_ratio=True)),
    "Resizing of any size": stack((None, None, 3), lambda: of.Resizing(4, 4)),
    "CenterCrop": stack(PICTURE, lambda: of.CenterCrop(4, 4)),
    "CenterCrop that enlarges": stack((3, 6, 3), lambda: of.CenterCrop(4, 4)),
    "Discretization": stack(VECTOR, lambda: of.Discretization([0.0, 1.0], output_mode="multi_hot")),
    "CategoryEncoding": stack(VECTOR, lambda: of.CategoryEncoding(9, output_mode="count"), dtype="int32"),
    "CategoryEncoding one_hot": stack((1,), lambda: of.CategoryEncoding(9, output_mode="one_hot"), dtype="int32"),
    "Hashing": stack(VECTOR, lambda: of.Hashing(9), dtype="string"),
    "StringLookup": stack(VECTOR, lambda: of.StringLookup(vocabulary=WORDS), dtype="string"),
    "StringLookup multi_hot": stack(
        VECTOR, lambda: of.StringLookup(vocabulary=WORDS, output_mode="multi_hot"), dtype="string"
    ),
    "StringLookup inverted": stack(VECTOR, lambda: of.StringLookup(vocabulary=WORDS, invert=True), dtype="int64"),
    "IntegerLookup": stack(VECTOR, lambda: of.IntegerLookup(vocabulary=[1, 5]), dtype="int64"),
    "Dot": join([SEQUENCE, (5, 4)], lambda x, y: of.Dot(2, normalize=True)([x, y])),
    "Concatenate": join([SEQUENCE, (5, 4)], lambda x, y: of.Concatenate(1)([x, y])),
    "merging": join(
        [VECTOR, VECTOR],
        lambda x, y: of.Average()([of.Add()([x, y]), of.Subtract()([x, y]), of.Maximum()([x, y])]),
    ),
    "GlobalAveragePooling1D with a mask": stack(SEQUENCE, of.Masking, of.GlobalAveragePooling1D),
    "GlobalMaxPooling2D": stack(PICTURE, of.GlobalMaxPooling2D),
    "AveragePooling1D": stack(SEQUENCE, lambda: of.AveragePooling1D(2)),
    "MaxPooling3D": stack(VOLUME, lambda: of.MaxPooling3D(2)),
    "Softmax": stack(SEQUENCE, lambda: of.Softmax(1)),
    "PReLU": stack(SEQUENCE, of.PReLU),
    "ReLU": stack(SEQUENCE, lambda: of.ReLU(max_value=3.0, negative_slope=0.1, threshold=0.5)),
    "Dropout": stack(SEQUENCE, lambda: of.Dropout(0.5), lambda: of.GaussianNoise(1.0), lambda: of.AlphaDropout(0.5)),
    "activations": stack(
        VECTOR,
        *(lambda name=name: of.Activation(name) for name in ("gelu", "silu", "mish", "hard_sigmoid", "selu", "celu")),
    ),
    "mixed precision": stack(PICTURE, lambda: of.Conv2D(4, 3, dtype="mixed_float16"), of.GlobalAveragePooling2D),
}  # fmt: skip
# What each says is in the reason.
ALONE: dict[str, tuple[Make, str]] = {
    "softmax over the batch": (stack(VECTOR, lambda: of.Activation(lambda x: keras.ops.softmax(x, 0))), ""),
    "mean over the batch": (stack(VECTOR, lambda: Mixing(lambda x: x - keras.ops.mean(x, 0))), "Mean"),
    "batch reversed": (stack(VECTOR, lambda: Mixing(lambda x: x[::-1])), "StridedSlice"),
    "batch sorted": (stack(VECTOR, lambda: Mixing(lambda x: keras.ops.sort(x, 0))), ""),
    "cumulative sum over the batch": (stack(VECTOR, lambda: Mixing(lambda x: keras.ops.cumsum(x, 0))), "Cumsum"),
    "Attention over the batch": (
        stack(SEQUENCE, lambda: Mixing(lambda x: keras.ops.einsum(
            "tab,bac->tac", keras.ops.softmax(keras.ops.einsum("tac,bac->tab", x, x)), x))), "Einsum",
    ),
    "LSTM over the batch": (
        stack(SEQUENCE, lambda: Mixing(lambda x: keras.ops.swapaxes(x, 0, 1)), lambda: of.LSTM(4)), ""
    ),
    "BatchNormalization in training": (stack(PICTURE, AlwaysTraining), ""),
    "batch counted": (
        stack(VECTOR, lambda: Mixing(lambda x: x / keras.ops.cast(keras.ops.shape(x)[0], "float32"))), ""
    ),
    "RandomFlip": (stack(PICTURE, of.RandomFlip), "has an effect"),
    "RandomRotation": (stack(PICTURE, lambda: of.RandomRotation(0.1)), "has an effect"),
    "RandomCrop": (stack(PICTURE, lambda: of.RandomCrop(4, 4)), "has an effect"),
    "TextVectorization": (
        stack((1,), lambda: of.TextVectorization(vocabulary=WORDS), dtype="string"), "StringSplit"
    ),
}  # fmt: skip


def exported(make: Make, folder: Path) -> Servable:
    make().export(folder / "1", verbose=False)
    return Servable(folder / "1")


@pytest.mark.parametrize("name", PROVED)
def test_the_rows_of_a_layer_are_proved_independent_and_are(name: str, tmp_path: Path):
    servable = exported(PROVED[name], tmp_path)
    signature = servable.signature("")
    assert signature.findings.alone == ""
    chance = np.random.default_rng(5)
    inputs = {}
    for key, spec in signature.inputs.items():
        assert spec.shape is not None
        shape = (5, *(7 if size < 0 else size for size in spec.shape[1:]))
        if spec.dtype == "string":
            inputs[key] = chance.choice(np.array([b"a", b"b", b"z"], object), shape)
        elif spec.dtype.startswith("int"):
            inputs[key] = chance.integers(0, 3, shape).astype(spec.dtype)
        else:
            inputs[key] = chance.integers(0, 8, shape).astype(np.float32)
    together = servable.run(signature, inputs)
    apart = [servable.run(signature, {key: a[row : row + 1] for key, a in inputs.items()}) for row in range(5)]
    for key, whole in together.items():
        each = np.concatenate([outputs[key] for outputs in apart])
        if whole.dtype == object:
            np.testing.assert_array_equal(whole, each)
        else:
            np.testing.assert_allclose(whole, each, rtol=1e-2 if name == "mixed precision" else 1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALONE)
def test_rows_that_depend_on_others_or_may_are_not_proved_independent(name: str, tmp_path: Path):
    make, reason = ALONE[name]
    alone = exported(make, tmp_path).signature("").findings.alone
    assert alone != ""
    assert reason in alone
