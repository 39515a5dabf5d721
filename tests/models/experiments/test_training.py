"""The training loop of the experiments: many steps a call, repeatable, and honest where it diverges."""

import keras
import numpy as np
import pytest

from models import networks
from models.experiments import training


def data(count=40):
    draws = np.random.default_rng(0)
    return draws.random((count, 6, 6, 1), np.float32), draws.integers(0, 10, count).astype(np.int32)


def trainer(seed=0, rate=0.1, batch_size=8, augment=None, count=40):
    x, y = data(count)
    model = training.seeded(seed, lambda: networks.sigmoid_mlp(width=5, image_shape=(6, 6, 1)))
    return training.Trainer(model, keras.optimizers.SGD(rate), x, y, batch_size, seed, augment)


def weights(one):
    return np.concatenate([weight.ravel() for weight in one.model.get_weights()])


def test_steps_in_one_call_are_those_of_several_calls():
    together, apart = trainer(), trainer()
    together.train(12)
    for steps in (5, 1, 6):
        apart.train(steps)
    np.testing.assert_array_equal(weights(together), weights(apart))


def test_a_step_is_that_of_keras():
    ours, theirs = trainer(batch_size=40), trainer(batch_size=40)
    ours.train(3)
    theirs.model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    theirs.model.fit(*data(), batch_size=40, epochs=3, verbose=0)
    np.testing.assert_allclose(weights(ours), weights(theirs), rtol=1e-4, atol=1e-6)


def test_every_image_is_seen_once_a_pass_and_in_another_order_in_the_next():
    seen = []

    def watch(images, seed):
        import tensorflow as tf

        def keep(batch):
            seen.append(batch[:, 0, 0, 0].copy())
            return batch

        return tf.ensure_shape(tf.numpy_function(keep, [images], tf.float32), images.shape)

    trainer(augment=watch).train(10)
    passes = [np.concatenate(seen[:5]), np.concatenate(seen[5:])]
    for one in passes:
        np.testing.assert_array_equal(np.sort(one), np.sort(data()[0][:, 0, 0, 0]))
    assert not np.array_equal(*passes)


def test_another_seed_is_another_training():
    first, second = trainer(seed=0), trainer(seed=1)
    second.model.set_weights(first.model.get_weights())
    first.train(3)
    second.train(3)
    assert not np.array_equal(weights(first), weights(second))


def test_a_reset_training_is_one_from_the_beginning():
    one = trainer()
    one.train(7)
    one.reset(0.3)
    one.train(7)
    other = trainer(rate=0.3)
    other.train(7)
    np.testing.assert_array_equal(weights(one), weights(other))


def test_the_accuracy_counts_images_that_make_no_whole_batch():
    one = trainer()
    x, y = data(23)
    expected = np.mean(one.model.predict(x, verbose=0).argmax(axis=1) == y)
    assert training.Accuracy(one.model, x, y, batch_size=5)() == pytest.approx(expected)


def test_a_diverged_training_keeps_its_last_accuracy_and_its_length():
    one = trainer(rate=3e38)
    seen = training.curve(one, training.Accuracy(one.model, *data()), steps=12, every=3)
    assert seen["step"] == [3, 6, 9, 12]
    assert not np.isfinite(seen["loss"][-1])
    assert len(set(seen["accuracy"][-2:])) == 1


def test_steps_to_a_target_are_those_of_the_first_look_that_reaches_it():
    seen = {"step": [10, 20, 30, 40], "accuracy": [0.1, 0.6, 0.5, 0.7]}
    assert training.steps_to(seen, 0.6) == 20
    assert training.steps_to(seen, 0.65) == 40
    assert training.steps_to(seen, 0.8) is None


def test_looks_that_do_not_divide_the_steps_are_refused():
    with pytest.raises(ValueError, match=r"`every` must divide `steps`\. Received: steps=10, every=3"):
        training.curve(trainer(), lambda: 0.0, 10, 3)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match=r"`batch_size` must be in \[1, 40\].*Received: 41"):
        trainer(batch_size=41)
