"""The shipped network: fashion_cnn trained on Fashion-MNIST, its card, and one example picture of each class."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

FOLDER = Path(__file__).resolve().parent
NETWORK, CARD, EXAMPLES = "fashion_cnn.keras", "card.json", "examples"


def load(folder: Path = FOLDER) -> "keras.Model":
    """Load the network.

    Args:
        folder: Where `python -m models.pretrained make` has put it.

    Returns:
        A model whose input `image` is float32 of shape `(batch, 28, 28, 1)` with intensities in `[0, 1]`, and whose
        output `probabilities` has shape `(batch, 10)`. It is not compiled.

    Raises:
        FileNotFoundError: There is none.
    """
    import keras

    # Keras finds the layers of a file by their registration, which the import makes.
    import keras_bn  # noqa: F401

    path = folder / NETWORK
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. `python -m models.pretrained make RUN` makes it.")
    return keras.models.load_model(path, compile=False)


def load_card(folder: Path = FOLDER) -> dict[str, Any]:
    """Read the card.

    Args:
        folder: As in `load`.

    Returns:
        What `card.json` says.
    """
    return json.loads((folder / CARD).read_text())


def load_examples(folder: Path = FOLDER) -> np.ndarray:
    """Read the example pictures: the first test image of each class.

    Args:
        folder: As in `load`.

    Returns:
        uint8 of shape `(10, 28, 28, 1)`, in the order of the classes.
    """
    import tensorflow as tf

    return np.stack(
        [tf.io.decode_png(path.read_bytes(), channels=1).numpy() for path in sorted((folder / EXAMPLES).glob("*.png"))]
    )


def preprocess(pictures: "tf.Tensor") -> "tf.Tensor":
    """What the network takes, from pictures as they are.

    Args:
        pictures: uint8 or float32 in `[0, 255]`, of shape `(batch, 28, 28, 1)`.

    Returns:
        float32 of the same shape, in `[0, 1]`.
    """
    import tensorflow as tf

    return tf.cast(pictures, tf.float32) / 255.0
