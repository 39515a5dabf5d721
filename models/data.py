"""Fashion-MNIST as arrays and as endless, repeatable training batches; `python -m models.data` fetches it."""

import argparse
import gzip
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models import debian_package

if TYPE_CHECKING:
    import tensorflow as tf

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN_PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
UNPACKED = Path(__file__).resolve().parents[1] / ".data" / DEBIAN_PACKAGE

_IDX_NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


@dataclass(frozen=True)
class ImageData:
    """Labelled 28x28 greyscale images in ten classes.

    Attributes:
        x_train: float32 of shape `(n, 28, 28, 1)`, intensities in `[0, 1]`.
        y_train: int32 of shape `(n,)`, classes in `[0, 9]`, named by `CLASS_NAMES`.
        x_test: As `x_train`.
        y_test: As `y_train`.
        origin: Where the images came from, in words.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    origin: str

    def __str__(self):
        return f"{len(self.x_train):,} training and {len(self.x_test):,} test images from {self.origin}"


def load(source: str | Path | None = None) -> ImageData:
    """Load Fashion-MNIST, or other data of its form, and print where it was found.

    Args:
        source: A folder with the four IDX files (`train-images-idx3-ubyte` and its siblings, plain or `.gz`), or an
            `.npz` file with the arrays `x_train`, `y_train`, `x_test` and `y_test`. By default the first there is of:
            Debian's package `dataset-fashion-mnist`, installed; the same as `make data` unpacked it;
            `keras.datasets.fashion_mnist`, which downloads.

    Returns:
        The images and labels as `ImageData`.

    Raises:
        FileNotFoundError: `source` is missing or incomplete, or no `source` was given and none could be had.
        ValueError: The files hold something other than 28x28 greyscale images in ten classes.
    """
    if source is not None:
        data = _load_named(Path(source))
    elif INSTALLED.is_dir():
        data = _load_folder(INSTALLED, f"Debian's package {DEBIAN_PACKAGE}, installed")
    elif UNPACKED.is_dir():
        data = _load_folder(UNPACKED / INSTALLED.relative_to("/"), f"Debian's package {DEBIAN_PACKAGE}, in {UNPACKED}")
    else:
        data = _load_keras()
    print(f"Data: {data}", file=sys.stderr)
    return data


def check(source: str | Path) -> None:
    """Raise what `load` would raise of `source`, and print nothing: before all that takes long.

    Args:
        source: As in `load`.

    Raises:
        FileNotFoundError: As in `load`.
        ValueError: As in `load`.
    """
    _load_named(Path(source))


def fetch_and_load(source: str | Path | None = None) -> ImageData:
    """As `load`, but where no `source` is given, first fetch Debian's package where it is missing and apt-get is there.

    Args:
        source: As in `load`.

    Returns:
        As `load`.

    Raises:
        FileNotFoundError: As in `load`.
        ValueError: As in `load`.
    """
    if source is None and not INSTALLED.is_dir():
        try:
            debian_package.fetch(DEBIAN_PACKAGE, UNPACKED)
        except debian_package.FetchError as error:
            print(f"Data: no Debian package: {error}", file=sys.stderr)
    return load(source)


def training_batches(
    x: np.ndarray,
    y: np.ndarray,
    batch_size: int,
    *,
    seed: int,
    first_epoch: int = 0,
    augment: "Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None" = None,
) -> "tf.data.Dataset":
    """Shuffled batches without end, a pure function of `seed` and the epoch, so a training run can be taken up again.

    Each epoch holds `len(x) // batch_size` whole batches in an order of its own; the images left over differ from epoch
    to epoch. Give `fit` that number as `steps_per_epoch`.

    Args:
        x: Images, float32 of shape `(n, height, width, channels)`.
        y: Labels of shape `(n, ...)`.
        batch_size: Images in a batch, in `[1, n]`.
        seed: Any integer; the same seed gives the same batches.
        first_epoch: The epoch to begin with, counted from 0.
        augment: Called as `augment(images, seed)` with a batch and an int32 seed of shape `(2,)` that no other batch
            has; returns the images to train on.

    Returns:
        A `tf.data.Dataset` of `(images, labels)`.

    Raises:
        ValueError: `batch_size` is out of range.
    """
    import tensorflow as tf

    if not 1 <= batch_size <= len(x):
        raise ValueError(f"`batch_size` must be in [1, {len(x)}], the number of images. Received: {batch_size}")
    steps = len(x) // batch_size
    images, labels = tf.constant(x), tf.constant(y)

    def indices(epoch):
        order = tf.random.experimental.stateless_shuffle(tf.range(len(x)), seed=[seed, epoch])
        batches = tf.data.Dataset.from_tensor_slices(tf.reshape(order[: steps * batch_size], (steps, batch_size)))
        return batches.enumerate(epoch * steps)

    def batch(step, chosen):
        chosen_images = tf.gather(images, chosen)
        if augment is not None:
            chosen_images = augment(chosen_images, tf.stack([tf.cast(seed, tf.int32), tf.cast(step, tf.int32)]))
        return chosen_images, tf.gather(labels, chosen)

    epochs = tf.data.Dataset.counter(tf.constant(first_epoch, tf.int64))
    return epochs.flat_map(indices).map(batch, num_parallel_calls=1).prefetch(2)


def _load_named(source: Path) -> ImageData:
    if source.is_dir():
        return _load_folder(source, str(source))
    if not source.exists():
        raise FileNotFoundError(f"`source` must be a folder or an .npz file that exists. Received: {source}")
    if source.suffix != ".npz":
        raise ValueError(f"`source` must be a folder with IDX files or an .npz file. Received: {source}")
    with np.load(source) as arrays:
        missing = sorted(set(_IDX_NAMES) - set(arrays))
        if missing:
            raise ValueError(f"{source} must hold the arrays {', '.join(_IDX_NAMES)}. Missing: {', '.join(missing)}")
        return _image_data({name: arrays[name] for name in _IDX_NAMES}, str(source))


def _load_folder(folder: Path, origin: str) -> ImageData:
    return _image_data({name: _read_idx(folder, stem) for name, stem in _IDX_NAMES.items()}, origin)


def _load_keras() -> ImageData:
    import keras

    print(f"Data: no Debian package {DEBIAN_PACKAGE} here, trying keras.datasets", file=sys.stderr)
    try:
        (x_train, y_train), (x_test, y_test) = keras.datasets.fashion_mnist.load_data()
    # Keras raises plain `Exception` where the download fails.
    except Exception as error:
        raise FileNotFoundError(
            "Fashion-MNIST is not on this machine and keras.datasets could not download it. Any of these helps: "
            f"`make data`; `apt-get install {DEBIAN_PACKAGE}`; or name a folder with its four IDX files, or an .npz "
            "with x_train, y_train, x_test and y_test, by `--data` (in make: `DATA=`). "
            f"The download said: {error}"
        ) from error
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    return _image_data(arrays, "keras.datasets.fashion_mnist")


def _read_idx(folder: Path, stem: str) -> np.ndarray:
    """The array in an IDX file: two zero bytes, type 8 (uint8), the rank, the shape as big-endian int32, the values."""
    for path in (folder / f"{stem}.gz", folder / stem):
        if path.is_file():
            break
    else:
        raise FileNotFoundError(f"{folder} must hold the files of Fashion-MNIST. Missing: {stem}.gz (or {stem})")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    header = np.frombuffer(content[:4], np.uint8)
    rank = int(header[3]) if len(header) == 4 and header[:3].tolist() == [0, 0, 8] else 0
    if not rank or len(content) < 4 + 4 * rank:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes.")
    shape = np.frombuffer(content, ">i4", count=rank, offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if values.size != shape.prod(dtype=np.int64):
        raise ValueError(f"{path} is cut off: {values.size} values where its header says {shape.tolist()}.")
    return values.reshape(shape)


def _image_data(arrays: dict[str, np.ndarray], origin: str) -> ImageData:
    images = {name: _images(array, name, origin) for name, array in arrays.items() if name.startswith("x_")}
    labels = {name: _labels(array, name, origin) for name, array in arrays.items() if name.startswith("y_")}
    for part in ("train", "test"):
        counts = len(images[f"x_{part}"]), len(labels[f"y_{part}"])
        if not counts[0]:
            raise ValueError(f"{origin} must hold {part} images. Received: none")
        if counts[0] != counts[1]:
            raise ValueError(f"{origin} must hold one label for each {part} image. Received: {counts[0]}, {counts[1]}")
    return ImageData(**images, **labels, origin=origin)


def _images(array: np.ndarray, name: str, origin: str) -> np.ndarray:
    if array.shape[1:] not in ((28, 28), (28, 28, 1)):
        raise ValueError(f"`{name}` in {origin} must have shape (n, 28, 28) or (n, 28, 28, 1). Received: {array.shape}")
    if array.dtype == np.uint8:
        array = array / np.float32(255)
    elif not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"`{name}` in {origin} must be uint8, or floating in [0, 1]. Received: {array.dtype}")
    elif array.size and not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(
            f"`{name}` in {origin} must be uint8, or floating in [0, 1]. "
            f"Received: {array.dtype} from {array.min():g} to {array.max():g}"
        )
    return array.astype(np.float32).reshape(-1, 28, 28, 1)


def _labels(array: np.ndarray, name: str, origin: str) -> np.ndarray:
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"`{name}` in {origin} must be integers of shape (n,). Received: {array.dtype} {array.shape}")
    if array.size and not (array.min() >= 0 and array.max() < len(CLASS_NAMES)):
        raise ValueError(f"`{name}` in {origin} must lie in [0, 9]. Received: {array.min()} to {array.max()}")
    return array.astype(np.int32)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models.data",
        description=f"Make sure that Fashion-MNIST is here: fetch Debian's package {DEBIAN_PACKAGE} into .data/ where "
        "apt-get is there, else download it by keras.datasets. Needs no root. Says what it found.",
    )
    parser.add_argument("--data", metavar="PATH", help="check this folder of IDX files or .npz instead; fetch nothing")
    named = parser.parse_args(arguments).data
    try:
        fetch_and_load(named)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
