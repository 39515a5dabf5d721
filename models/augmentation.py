"""Random flips, shifts and erased squares for small images: pure functions of images and seed."""

import tensorflow as tf


def augment(images: tf.Tensor, seed: tf.Tensor, *, flip: bool = True, shift: int = 2, erase: int = 0) -> tf.Tensor:
    """Change each image of a batch at random, in a way that keeps its class.

    Args:
        images: float32 of shape `(batch, height, width, channels)`; 0 is the background.
        seed: int32 of shape `(2,)`; the same seed gives the same images.
        flip: Mirror left and right with probability 1/2.
        shift: Move by up to so many pixels, in whole pixels, along each axis; background comes in at the edge.
        erase: Side, in pixels, of a square that is set to background, centred anywhere in the image; 0 erases nothing.

    Returns:
        The changed images, of the shape and dtype of `images`.

    Raises:
        ValueError: `shift` or `erase` is negative.

    Reference: the erased square is DeVries & Taylor 2017 (arXiv 1708.04552).
    """
    for name, value in (("shift", shift), ("erase", erase)):
        if value < 0:
            raise ValueError(f"`{name}` must be a number of pixels, 0 or more. Received: {name}={value}")
    flip_seed, shift_seed, erase_seed = tf.unstack(tf.random.split(seed, 3))
    if flip:
        images = _flip(images, flip_seed)
    if shift:
        images = _shift(images, shift_seed, shift)
    if erase:
        images = _erase(images, erase_seed, erase)
    return images


def _flip(images, seed):
    mirrored = tf.random.stateless_uniform([tf.shape(images)[0], 1, 1, 1], seed) < 0.5
    return tf.where(mirrored, images[:, :, ::-1], images)


def _shift(images, seed, most):
    batch, height, width = tf.unstack(tf.shape(images)[:3])
    offsets = tf.random.stateless_uniform([batch, 2], seed, 0, 2 * most + 1, tf.int32)
    padded = tf.pad(images, [[0, 0], [most, most], [most, most], [0, 0]])
    rows = tf.gather(padded, offsets[:, :1] + tf.range(height), batch_dims=1)
    # Columns are gathered as rows of the transposed images.
    columns = tf.gather(tf.transpose(rows, [0, 2, 1, 3]), offsets[:, 1:] + tf.range(width), batch_dims=1)
    return tf.transpose(columns, [0, 2, 1, 3])


def _erase(images, seed, side):
    batch, height, width = tf.unstack(tf.shape(images)[:3])
    size = tf.stack([height, width])
    centres = tf.random.stateless_uniform([batch, 2], seed) * tf.cast(size, tf.float32)
    first = tf.cast(tf.round(centres), tf.int32) - side // 2

    def inside(axis, length):
        pixels = tf.range(length) - first[:, axis : axis + 1]
        return (pixels >= 0) & (pixels < side)

    erased = inside(0, height)[:, :, tf.newaxis] & inside(1, width)[:, tf.newaxis, :]
    return tf.where(erased[..., tf.newaxis], tf.zeros_like(images), images)
