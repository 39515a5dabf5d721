"""Yogi and Shampoo do what their papers publish, in a graph and out of it, and are saved with a model."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from models.optimizers import DistributedShampoo, Yogi, inverse_root

SHAPES = [(7, 5), (6,), (3, 2, 4), ()]
STEPS = 7


def problem(shape, seed=0):
    """A start and a gradient for each step."""
    draws = np.random.default_rng(seed)
    return draws.standard_normal(shape), draws.standard_normal((STEPS, *shape))


def stepped(optimizer, start, gradients, graph):
    variable = keras.Variable(start, dtype="float64")
    optimizer.build([variable])

    def step(gradient):
        optimizer.apply([gradient], [variable])

    step = tf.function(step) if graph else step
    for gradient in gradients:
        step(tf.constant(gradient))
    return variable.numpy()


def yogi_oracle(w, gradients, rate, beta_1, beta_2, epsilon, initial):
    m, v = np.zeros_like(w), np.full_like(w, initial)
    for g in gradients:
        m = beta_1 * m + (1 - beta_1) * g
        v = v - (1 - beta_2) * np.sign(v - g**2) * g**2
        w = w - rate * m / (np.sqrt(v) + epsilon)
    return w


def root_oracle(a, power, ridge):
    largest = np.linalg.eigvalsh(a)[-1]
    values, vectors = np.linalg.eigh(a + ridge * largest * np.eye(len(a)))
    return vectors @ np.diag(values**power) @ vectors.T


def slices(length, block_size):
    number = -(-length // block_size)
    side = -(-length // number)
    return [slice(begin, min(begin + side, length)) for begin in range(0, length, side)]


def shampoo_oracle(w, gradients, rate, options):
    """Block by block and not filled up, with the matrices as the papers write them."""
    shape = w.shape
    is_matrix = w.ndim > 1
    rows = w.size // shape[-1] if is_matrix else w.size
    columns = shape[-1] if is_matrix else 1
    w, m, a = w.reshape(rows, columns), np.zeros((rows, columns)), np.zeros((rows, columns))
    cuts = [(r, c) for r in slices(rows, options["block_size"]) for c in slices(columns, options["block_size"])]
    left = dict.fromkeys(range(len(cuts)), 0)
    right, p, q = dict(left), dict(left), dict(left)
    beta = options["beta_2"]
    weight = 1 if beta == 1 else 1 - beta
    for step, gradient in enumerate(gradients):
        g = gradient.reshape(rows, columns)
        u = np.zeros_like(g)
        for number, (r, c) in enumerate(cuts):
            block = g[r, c]
            if step % options["statistics_interval"] == 0:
                left[number] = beta * left[number] + weight * block @ block.T
                right[number] = beta * right[number] + weight * block.T @ block
            if step % options["preconditioner_interval"] == 0:
                power = -1 / 4 if is_matrix else -1 / 2
                p[number] = root_oracle(left[number], power, options["matrix_epsilon"])
                q[number] = root_oracle(right[number], power, options["matrix_epsilon"])
            u[r, c] = p[number] @ block @ q[number] if is_matrix else p[number] @ block
        if options["grafting"] is not None:
            a = a + g**2
            s = g if options["grafting"] == "sgd" else g / (np.sqrt(a) + options["epsilon"])
            u = u * np.linalg.norm(s) / np.linalg.norm(u) if step >= options["first_preconditioned_step"] else s
        m = options["momentum"] * m + u
        w = w - rate * m
    return w.reshape(shape)


SHAMPOO = {
    "momentum": 0.9,
    "beta_2": 1.0,
    "block_size": 128,
    "grafting": None,
    "statistics_interval": 1,
    "preconditioner_interval": 1,
    "first_preconditioned_step": 0,
    "matrix_epsilon": 1e-4,
    "epsilon": 1e-8,
}


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_yogi_takes_the_steps_of_the_paper(shape, graph):
    start, gradients = problem(shape)
    optimizer = Yogi(0.05, beta_1=0.8, beta_2=0.9, epsilon=1e-2, initial_accumulator=0.3)
    expected = yogi_oracle(start, gradients, 0.05, 0.8, 0.9, 1e-2, 0.3)
    # Keras keeps the learning rate in float32.
    np.testing.assert_allclose(stepped(optimizer, start, gradients, graph), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"momentum": 0.0, "grafting": "sgd"},
        {"grafting": "adagrad", "first_preconditioned_step": 3},
        {"block_size": 3},
        {"beta_2": 0.9, "statistics_interval": 2, "preconditioner_interval": 3, "grafting": "sgd", "block_size": 2},
    ],
    ids=str,
)
def test_shampoo_takes_the_steps_of_the_papers(shape, changed, graph):
    start, gradients = problem(shape)
    options = {**SHAMPOO, **changed}
    expected = shampoo_oracle(start, gradients, 0.05, options)
    found = stepped(DistributedShampoo(0.05, **options), start, gradients, graph)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_an_inverse_root_to_the_fourth_is_the_inverse_of_the_matrix():
    draws = np.random.default_rng(0).standard_normal((3, 6, 9))
    matrices = draws @ draws.transpose(0, 2, 1)
    root = inverse_root(tf.constant(matrices), -0.25, 1e-12).numpy()
    np.testing.assert_allclose(root @ root @ root @ root @ matrices, np.broadcast_to(np.eye(6), (3, 6, 6)), atol=1e-7)


def test_shampoo_stands_still_where_the_gradient_is_zero_and_goes_on_afterwards():
    start, gradients = problem((4, 3))
    gradients[:2] = 0
    found = stepped(DistributedShampoo(0.1), start, gradients[:2], graph=True)
    np.testing.assert_array_equal(found, start)
    assert np.isfinite(stepped(DistributedShampoo(0.1, grafting=None), start, gradients, graph=True)).all()


def test_shampoo_goes_on_as_any_optimizer_when_the_training_diverges():
    variable = keras.Variable(np.ones((3, 2), "float32"))
    optimizer = DistributedShampoo(1.0, preconditioner_interval=1, first_preconditioned_step=0)
    optimizer.build([variable])
    for gradient in (np.ones((3, 2)), np.full((3, 2), 1e30), np.ones((3, 2))):
        optimizer.apply([tf.constant(gradient, tf.float32)], [variable])
    assert np.isnan(variable.numpy()).all()


@pytest.mark.parametrize(
    "optimizer",
    [Yogi(0.02, beta_2=0.99), DistributedShampoo(0.03, grafting="adagrad", block_size=5, preconditioner_interval=2)],
    ids=lambda optimizer: optimizer.name,
)
def test_a_training_goes_on_after_saving_as_if_it_had_not_been_saved(optimizer, tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(3)])
    model.compile(type(optimizer).from_config(optimizer.get_config()), "mse")
    x, y = np.random.rand(20, 6).astype("float32"), np.random.rand(20, 3).astype("float32")
    model.fit(x, y, batch_size=10, epochs=2, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    for each in (model, loaded):
        each.fit(x, y, batch_size=10, epochs=2, shuffle=False, verbose=0)
    for ours, theirs in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (Yogi, {"beta_2": 1.0}, r"`beta_2` must be in \[0, 1\)\. Received: beta_2=1\.0"),
        (Yogi, {"epsilon": 0}, r"`epsilon` must be positive\. Received: epsilon=0"),
        (DistributedShampoo, {"block_size": 0}, r"`block_size` must be a positive integer\. Received: block_size=0"),
        (DistributedShampoo, {"grafting": "adam"}, r"`grafting` must be one of .* Received: grafting='adam'"),
        (
            DistributedShampoo,
            {"grafting": None, "first_preconditioned_step": 5},
            r"0 where `grafting` is None.* Received: first_preconditioned_step=5",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(optimizer, options, message):
    with pytest.raises(ValueError, match=message):
        optimizer(0.1, **options)
