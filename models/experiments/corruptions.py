"""Ten ways to spoil an image, at five strengths each: pure functions of the images, the strength and a seed."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

STRENGTHS = (1, 2, 3, 4, 5)


def corrupt(images: np.ndarray, name: str, strength: int, seed: int) -> np.ndarray:
    """Spoil images.

    Args:
        images: float32 of shape `(n, height, width, channels)`, intensities in `[0, 1]`.
        name: One of `CORRUPTIONS`.
        strength: One of `STRENGTHS`.
        seed: Of what is drawn at random.

    Returns:
        As `images`.

    Raises:
        ValueError: `name` or `strength` is none of those.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"`name` must be one of {', '.join(CORRUPTIONS)}. Received: name={name}")
    if strength not in STRENGTHS:
        raise ValueError(f"`strength` must be one of {STRENGTHS}. Received: strength={strength}")
    function, amounts = CORRUPTIONS[name]
    changed = function(images, amounts[strength - 1], np.random.default_rng([seed, strength]))
    return np.clip(changed, 0, 1).astype(np.float32)


Corruption = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def _noise(images, deviation, draws):
    return images + deviation * draws.standard_normal(images.shape, dtype=np.float32)


def _salt_and_pepper(images, share, draws):
    values = draws.integers(0, 2, images.shape)
    return np.where(draws.random(images.shape) < share, values, images)


def _blur(images, deviation, _):
    reach = int(np.ceil(3 * deviation))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    weights /= weights.sum()
    for axis in (1, 2):
        margins = [(0, 0)] * 4
        margins[axis] = (reach, reach)
        padded = np.pad(images, margins)
        size = images.shape[axis]
        images = sum(
            weight * np.take(padded, np.arange(begin, begin + size), axis) for begin, weight in enumerate(weights)
        )
    return images


def _contrast(images, factor, _):
    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    return mean + factor * (images - mean)


def _brightness(images, added, _):
    return images + added


def _darkness(images, factor, _):
    return factor * images


def _inversion(images, share, _):
    return images + share * (1 - 2 * images)


def _occlusion(images, share, draws):
    height, width = images.shape[1:3]
    sides = round(share * height), round(share * width)
    rows = draws.integers(0, height - sides[0] + 1, len(images))[:, None, None]
    columns = draws.integers(0, width - sides[1] + 1, len(images))[:, None, None]
    y, x = np.arange(height)[None, :, None], np.arange(width)[None, None, :]
    inside = (y >= rows) & (y < rows + sides[0]) & (x >= columns) & (x < columns + sides[1])
    return np.where(inside[..., None], 0, images)


def _rotation(images, degrees, draws):
    angles = np.deg2rad(degrees) * draws.choice([-1.0, 1.0], len(images))
    height, width = images.shape[1:3]
    y, x = (size / 2 - 0.5 for size in (height, width))
    cos, sin, none = np.cos(angles), np.sin(angles), np.zeros(len(images))
    rows = [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y, none, none]
    turned = tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=np.stack(rows, axis=1).astype("float32"),
        output_shape=[height, width],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    return turned.numpy()


def _pixelation(images, factor, _):
    height, width = images.shape[1:3]
    size = [max(1, round(height / factor)), max(1, round(width / factor))]
    return tf.image.resize(tf.image.resize(images, size, method="area"), [height, width], method="nearest").numpy()


CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, float, float, float, float]]] = {
    "noise": (_noise, (0.05, 0.1, 0.2, 0.3, 0.5)),
    "salt and pepper": (_salt_and_pepper, (0.02, 0.05, 0.1, 0.2, 0.35)),
    "blur": (_blur, (0.5, 1.0, 1.5, 2.0, 3.0)),
    "contrast": (_contrast, (0.8, 0.6, 0.4, 0.25, 0.15)),
    "brightness": (_brightness, (0.05, 0.1, 0.2, 0.35, 0.5)),
    "darkness": (_darkness, (0.8, 0.6, 0.4, 0.25, 0.15)),
    "inversion": (_inversion, (0.1, 0.2, 0.35, 0.65, 1.0)),
    "occlusion": (_occlusion, (0.2, 0.3, 0.4, 0.5, 0.65)),
    "rotation": (_rotation, (5, 10, 20, 40, 90)),
    "pixelation": (_pixelation, (1.5, 2, 3, 4, 7)),
}
