"""The reference networks: functional Keras models from `image` to `probabilities`, normalized by a layer of choice."""

from collections.abc import Callable

import keras
from keras import layers

from keras_bn import BatchNormalization

IMAGE_SHAPE = (28, 28, 1)

ImageShape = tuple[int, int, int]
Normalization = Callable[..., keras.layers.Layer] | None


def fashion_cnn(
    width: int = 32,
    normalization: Normalization = BatchNormalization,
    classes: int = 10,
    image_shape: ImageShape = IMAGE_SHAPE,
    dropout: float = 0.0,
) -> keras.Model:
    """A plain convolutional network for small greyscale images: five blocks of convolution, normalization and ReLU.

    Args:
        width: Channels of the first block; the later ones have two and four times as many. 32 gives 280,000 parameters.
        normalization: Called as `normalization(name=...)` for each layer that normalizes, between the affine map and
            the activation; for example `keras.layers.BatchNormalization`, or a `functools.partial` of it. None builds
            the same network without normalization.
        classes: Number of classes.
        image_shape: Height, width and channels of an image.
        dropout: Share of the values that are dropped in training after each block, in [0, 1).

    Returns:
        A model whose input `image` is float32 of shape `(batch, *image_shape)` with intensities in `[0, 1]`, and whose
        output `probabilities` is float32 of shape `(batch, classes)`, rows that sum to 1.

    Raises:
        ValueError: `width`, `classes` or a size is not positive, or `dropout` is out of range.
    """
    _check_positive(width=width, classes=classes)
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must be in [0, 1). Received: dropout={dropout}")
    image = x = _input(image_shape)
    pools = {1: "pool_1", 3: "pool_2"}
    for number, factor in enumerate((1, 2, 2, 4, 4), start=1):
        x = _block(x, factor * width, normalization, f"block_{number}")
        if dropout:
            x = layers.Dropout(dropout, name=f"block_{number}_dropout")(x)
        if number in pools:
            x = layers.MaxPooling2D(name=pools[number])(x)
    x = layers.GlobalAveragePooling2D(name="pool_3")(x)
    return keras.Model(image, _probabilities(x, classes), name="fashion_cnn")


def resnet(
    width: int = 16,
    blocks: int = 1,
    normalization: Normalization = BatchNormalization,
    classes: int = 10,
    image_shape: ImageShape = IMAGE_SHAPE,
) -> keras.Model:
    """A small residual network: three stages of residual blocks, each stage with half the size and twice the channels.

    Args:
        width: Channels of the first stage.
        blocks: Residual blocks in each stage; the network has `6 * blocks + 2` layers with weights on its longest path.
        normalization: As in `fashion_cnn`.
        classes: Number of classes.
        image_shape: As in `fashion_cnn`.

    Returns:
        A model with the input and the output of `fashion_cnn`.

    Raises:
        ValueError: `width`, `blocks` or `classes` is not positive.

    Reference: He et al. 2015 (arXiv 1512.03385), section 4.2, with a 1x1 convolution where the shape changes.
    """
    _check_positive(width=width, blocks=blocks, classes=classes)
    image = _input(image_shape)
    x = _block(image, width, normalization, "stem")
    for stage in range(3):
        for block in range(blocks):
            name = f"stage_{stage + 1}_block_{block + 1}"
            x = _residual_block(x, width * 2**stage, 2 if stage and not block else 1, normalization, name)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(image, _probabilities(x, classes), name="resnet")


def sigmoid_mlp(
    width: int = 100,
    normalization: Normalization = BatchNormalization,
    classes: int = 10,
    depth: int = 3,
    image_shape: ImageShape = IMAGE_SHAPE,
) -> keras.Model:
    """The fully connected sigmoid network on which the paper shows what batch normalization does on MNIST.

    Args:
        width: Units in each hidden layer.
        normalization: As in `fashion_cnn`.
        classes: Number of classes.
        depth: Number of hidden layers.
        image_shape: As in `fashion_cnn`.

    Returns:
        A model with the input and the output of `fashion_cnn`.

    Raises:
        ValueError: `width`, `classes` or `depth` is not positive.

    Reference: Ioffe & Szegedy 2015 (arXiv 1502.03167), section 4.1: three layers of 100 units, weights drawn from a
        narrow Gaussian.
    """
    _check_positive(width=width, classes=classes, depth=depth)
    image = _input(image_shape)
    x = layers.Flatten(name="pixels")(image)
    for number in range(1, depth + 1):
        affine = layers.Dense(
            width, use_bias=normalization is None, kernel_initializer="random_normal", name=f"hidden_{number}"
        )
        x = _normalized(affine(x), normalization, f"hidden_{number}_bn")
        x = layers.Activation("sigmoid", name=f"hidden_{number}_sigmoid")(x)
    return keras.Model(image, _probabilities(x, classes), name="sigmoid_mlp")


def _input(image_shape: ImageShape) -> keras.KerasTensor:
    height, width, channels = image_shape
    _check_positive(height=height, width=width, channels=channels)
    return keras.Input((height, width, channels), name="image")


def _block(x, channels: int, normalization: Normalization, name: str, strides: int = 1):
    x = _convolution(channels, 3, strides, normalization, f"{name}_conv")(x)
    x = _normalized(x, normalization, f"{name}_bn")
    return layers.ReLU(name=f"{name}_relu")(x)


def _residual_block(x, channels: int, strides: int, normalization: Normalization, name: str):
    shortcut = x
    if strides != 1 or x.shape[-1] != channels:
        shortcut = _convolution(channels, 1, strides, normalization, f"{name}_shortcut_conv")(x)
        shortcut = _normalized(shortcut, normalization, f"{name}_shortcut_bn")
    x = _block(x, channels, normalization, f"{name}_1", strides)
    x = _convolution(channels, 3, 1, normalization, f"{name}_2_conv")(x)
    x = _normalized(x, normalization, f"{name}_2_bn")
    return layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_add")([shortcut, x]))


def _convolution(channels: int, size: int, strides: int, normalization: Normalization, name: str) -> layers.Layer:
    # A bias before a normalization would be subtracted again with the mean: beta takes its place.
    return layers.Conv2D(
        channels,
        size,
        strides=strides,
        padding="same",
        use_bias=normalization is None,
        kernel_initializer="he_normal",
        name=name,
    )


def _normalized(x, normalization: Normalization, name: str):
    return x if normalization is None else normalization(name=name)(x)


def _probabilities(x, classes: int):
    logits = layers.Dense(classes, name="logits")(x)
    # float32 also where the network computes in half precision.
    return layers.Activation("softmax", dtype="float32", name="probabilities")(logits)


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value}")
