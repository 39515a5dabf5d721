"""The data sets of the experiments: Fashion-MNIST as the other commands find it, or one of `keras.datasets`."""

import dataclasses

import numpy as np

from models import data


def load(dataset: str, source: str | None = None) -> data.ImageData:
    """Load a data set of small images in ten classes.

    Args:
        dataset: "fashion_mnist", as `models.data.load` finds it; "mnist" or "cifar10", by `keras.datasets`.
        source: Where the images of "fashion_mnist" are; None where that is to be found.

    Returns:
        The images; those of "cifar10" have shape `(n, 32, 32, 3)`.

    Raises:
        FileNotFoundError: The data is not here and could not be downloaded.
        ValueError: `dataset` is none of the three.
    """
    if dataset == "fashion_mnist":
        return data.load(source)
    import keras

    loaders = {"mnist": keras.datasets.mnist.load_data, "cifar10": keras.datasets.cifar10.load_data}
    if dataset not in loaders:
        raise ValueError(f"`dataset` must be one of fashion_mnist, {', '.join(loaders)}. Received: dataset={dataset}")
    try:
        (x_train, y_train), (x_test, y_test) = loaders[dataset]()
    # Keras raises plain `Exception` where the download fails.
    except Exception as error:
        raise FileNotFoundError(
            f"keras.datasets could not load {dataset}, which it downloads once. Without a network choose "
            f"`--dataset fashion_mnist`. It said: {error}"
        ) from error
    return data.ImageData(
        _scaled(x_train),
        y_train.reshape(-1).astype(np.int32),
        _scaled(x_test),
        y_test.reshape(-1).astype(np.int32),
        origin=f"keras.datasets.{dataset}",
    )


def first(images: data.ImageData, training: int, test: int) -> data.ImageData:
    """The first of the training and of the test images.

    Args:
        images: All of them.
        training: How many to train on, at most.
        test: How many to test with, at most.
    """
    return dataclasses.replace(
        images,
        x_train=images.x_train[:training],
        y_train=images.y_train[:training],
        x_test=images.x_test[:test],
        y_test=images.y_test[:test],
    )


def halved(images: data.ImageData) -> data.ImageData:
    """Images of half the height and width, each pixel the mean of four: a quarter of the work for a convolution."""
    return dataclasses.replace(images, x_train=_halved(images.x_train), x_test=_halved(images.x_test))


def _halved(images: np.ndarray) -> np.ndarray:
    number, height, width, channels = images.shape
    return images.reshape(number, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def _scaled(images: np.ndarray) -> np.ndarray:
    shaped = images if images.ndim == 4 else images[..., np.newaxis]
    return shaped.astype(np.float32) / np.float32(255)
