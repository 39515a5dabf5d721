"""Random changes to images: which pixels come out, and that the seed alone decides."""

import numpy as np
import pytest
import tensorflow as tf

from models.augmentation import augment

SEED = tf.constant([3, 4])


def images(count=200):
    return np.random.default_rng(0).uniform(0.1, 1, (count, 8, 6, 1)).astype(np.float32)


def test_half_of_the_images_are_mirrored_and_the_others_left_alone():
    before = images()
    after = augment(before, SEED, shift=0).numpy()
    mirrored = (after == before[:, :, ::-1]).all(axis=(1, 2, 3))
    same = (after == before).all(axis=(1, 2, 3))
    assert np.all(mirrored ^ same)
    assert 70 < mirrored.sum() < 130


def test_each_image_is_moved_by_whole_pixels_and_background_comes_in():
    before = images()
    after = augment(before, SEED, flip=False, shift=1).numpy()
    padded = np.pad(before, [(0, 0), (1, 1), (1, 1), (0, 0)])
    moved = [[padded[:, row : row + 8, column : column + 6] for column in range(3)] for row in range(3)]
    matches = np.array([[(after == each).all(axis=(1, 2, 3)) for each in row] for row in moved])
    assert np.all(matches.sum(axis=(0, 1)) == 1)
    assert np.all(matches.any(axis=2))


def test_a_square_of_each_image_is_erased():
    before = images()
    after = augment(before, SEED, flip=False, shift=0, erase=3).numpy()
    erased = (after == 0)[..., 0]
    np.testing.assert_array_equal(after[..., 0], np.where(erased, 0, before[..., 0]))
    # Cut off at the edge of the image, but never larger, and whole somewhere.
    rows, columns = erased.any(axis=2).sum(axis=1), erased.any(axis=1).sum(axis=1)
    np.testing.assert_array_equal(rows * columns, erased.sum(axis=(1, 2)))
    assert rows.max() == columns.max() == 3


def test_the_seed_alone_decides():
    first = augment(images(), SEED, erase=2)
    np.testing.assert_array_equal(first, augment(images(), SEED, erase=2))
    assert np.any(first != augment(images(), SEED + 1, erase=2))


@pytest.mark.parametrize("name", ["shift", "erase"])
def test_negative_sizes_are_refused(name):
    with pytest.raises(ValueError, match=rf"`{name}` must be .* Received: {name}=-1"):
        augment(images(), SEED, **{name: -1})
