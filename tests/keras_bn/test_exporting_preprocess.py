"""export(): what a person's `preprocess` does wrong is said of it, with what it got and what it made."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn


def _pictures_model():
    layers = [keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization(), keras.layers.GlobalAveragePooling2D()]
    return keras.Sequential([keras.Input((8, 8, 3)), *layers])


class Subclassed(keras.Model):
    """Takes what a convolution takes, and tells only what it was built with."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = keras.layers.Conv2D(4, 3), keras.layers.GlobalAveragePooling2D()

    def call(self, x):
        return self.pool(self.conv(x))


def _fails(pictures):
    raise RuntimeError("no luck")


def _by_numpy(pictures):
    return np.asarray(pictures) / 255


@pytest.mark.parametrize("subclassed", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["random", "warmup"])
@pytest.mark.parametrize(
    ("preprocess", "text"),
    [
        (_fails, "preprocess=_fails, which got shape (any, 8, 8, 3), float32 and raised RuntimeError: no luck"),
        (_by_numpy, "preprocess=_by_numpy, which got shape (any, 8, 8, 3), float32 and raised NotImplementedError: "),
        (
            tf.image.rgb_to_grayscale,
            "=rgb_to_grayscale, which got such pictures and made shape (any, 8, 8, 1), float32",
        ),
        (
            lambda x: tf.reshape(x, [-1, 192]),
            "which got such pictures and made shape (any, 192), float32, of which the",
        ),
        (lambda x: tf.reduce_mean(x, 0), "which got shape (any, 8, 8, 3), float32 and made shape (8, 8, 3), float32"),
        (lambda x: tf.reduce_mean(x, 0, keepdims=True), "and made shape (1, 8, 8, 3), float32"),
        (lambda x: np.zeros((2, 8, 8, 3), "float32"), "and made shape (2, 8, 8, 3), float32, from 0 to 0"),
        (tf.strings.as_string, "and made shape (any, 8, 8, 3), string"),
        (lambda x: tf.cast(x, tf.complex64), "and made shape (any, 8, 8, 3), complex64"),
        (lambda x: None, "and made None of type NoneType"),
        (lambda x: (x, x), "of type tuple"),
        (lambda x: {"a": x}, "of type dict"),
        (lambda x: x / 0.0 - x / 0.0, "and made no finite number: shape ("),
    ],
)
def test_what_preprocess_does_wrong_is_said_of_it(preprocess, text, given, subclassed, tmp_path):
    model = Subclassed() if subclassed else _pictures_model()
    model(np.zeros((2, 8, 8, 3), "float32"))
    warmup = (np.arange(3 * 8 * 8 * 3) % 256).astype("uint8").reshape(3, 8, 8, 3) if given else None
    with pytest.raises(ValueError, match=r"^`preprocess` must make the model's input of a batch of pi") as caught:
        keras_bn.export(model, tmp_path / "m", preprocess=preprocess, fold=not subclassed, warmup=warmup)
    said = str(caught.value)
    assert "one tensor of shape (any, 8, 8, 3), float32." in said
    assert text in said
    assert ("TensorFlow's operations" in said) == (preprocess is _by_numpy)
    assert not list(tmp_path.glob("m/*"))


def test_a_mistake_of_the_model_is_not_said_of_a_preprocess_that_makes_what_it_takes(tmp_path):
    class Refuses(keras.layers.Layer):
        refuses = False

        def call(self, x):
            if self.refuses:
                raise RuntimeError("not today")
            return x

    model = Subclassed()
    model.pool = Refuses()
    model(np.zeros((2, 8, 8, 3), "float32"))
    model.pool.refuses = True
    with pytest.raises(RuntimeError, match="not today"):
        keras_bn.export(model, tmp_path, preprocess=lambda x: x / 255.0, fold=False)


def test_what_a_model_takes_preprocess_may_make(tmp_path):
    for number, preprocess in enumerate((lambda x: x[:, ::2, ::2], lambda x: tf.cast(x, tf.uint8))):
        assert keras_bn.export(_pictures_model(), tmp_path, preprocess=preprocess).version == number + 1
