"""Optimizers that Keras does not have: Yogi, and Shampoo with the blocks and the grafting of its distributed form."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

GRAFTINGS = ("sgd", "adagrad", None)


@keras.saving.register_keras_serializable(package="models")
class Yogi(keras.optimizers.Optimizer):
    """Adam whose second moment changes additively, so that it forgets large gradients slowly.

    m = beta_1 * m + (1 - beta_1) * g
    v = v - (1 - beta_2) * sign(v - g**2) * g**2
    w = w - learning_rate * m / (sqrt(v) + epsilon)

    with m = 0 and v = initial_accumulator at first, and without a correction for that, as in the paper.

    Args:
        learning_rate: A number or a schedule.
        beta_1: Of the first moment, in [0, 1).
        beta_2: Of the second moment, in [0, 1).
        epsilon: Added to the root, positive.
        initial_accumulator: Where the second moment begins, not negative.
        name: Of the optimizer.
        **kwargs: Of `keras.optimizers.Optimizer`.

    Raises:
        ValueError: An argument is out of its range.

    Reference: Zaheer et al. 2018, "Adaptive Methods for Nonconvex Optimization", Algorithm 2.
    """

    def __init__(
        self,
        learning_rate=0.01,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-3,
        initial_accumulator: float = 1e-6,
        name: str = "yogi",
        **kwargs,
    ):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        _check_share("beta_1", beta_1)
        _check_share("beta_2", beta_2)
        _check("epsilon", epsilon, epsilon > 0, "positive")
        _check("initial_accumulator", initial_accumulator, initial_accumulator >= 0, "0 or more")
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon
        self.initial_accumulator = initial_accumulator

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        initial = keras.initializers.Constant(self.initial_accumulator)
        self._momentums = [self.add_variable_from_reference(variable, "momentum") for variable in variables]
        self._velocities = [
            self.add_variable_from_reference(variable, "velocity", initializer=initial) for variable in variables
        ]

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        m, v = self._momentums[index], self._velocities[index]
        g = tf.cast(tf.convert_to_tensor(gradient), variable.dtype)
        squared = tf.square(g)
        self.assign(m, self.beta_1 * m + (1.0 - self.beta_1) * g)
        self.assign(v, v - (1.0 - self.beta_2) * tf.sign(v - squared) * squared)
        self.assign_sub(variable, tf.cast(learning_rate, g.dtype) * m / (tf.sqrt(v) + self.epsilon))

    def get_config(self):
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "initial_accumulator": self.initial_accumulator,
        }


@keras.saving.register_keras_serializable(package="models")
class DistributedShampoo(keras.optimizers.Optimizer):
    """Shampoo: each block of a matrix is preconditioned from the left and from the right, on a single machine.

    For each block G of a gradient, with L = R = 0 at first, every `statistics_interval` steps:

    L = beta_2 * L + w * G @ G.T,  R = beta_2 * R + w * G.T @ G,  w = 1 - beta_2, or 1 where beta_2 = 1

    every `preconditioner_interval` steps, with l the largest eigenvalue of the matrix that is raised to a power:

    P = (L + matrix_epsilon * l * I)**(-1/4),  Q = (R + matrix_epsilon * l * I)**(-1/4)

    and at every step, with the step of another optimizer, s, which is grafted: it gives the length.

    u = P @ G @ Q for all blocks,  u = u * |s| / |u|,  m = momentum * m + u,  w = w - learning_rate * m

    s is G for "sgd" and G / (sqrt(a) + epsilon) for "adagrad", where a sums the squares of G; with None u keeps its
    length. Until `first_preconditioned_step` u is s. Gradients of more than two axes are matrices whose columns are the
    last axis; a vector has one preconditioner, with the exponent -1/2. Axes longer than `block_size` are divided into
    as few blocks of equal length as there can be, the last one filled up with zeros.

    The roots are of eigenvalues in float64, where Anil et al. iterate.

    Args:
        learning_rate: A number or a schedule.
        momentum: In [0, 1).
        beta_2: Of the statistics, in (0, 1]; 1 sums them, as Gupta et al. do.
        block_size: The longest side of a preconditioner, positive.
        grafting: "sgd", "adagrad" or None.
        statistics_interval: Steps between two updates of the statistics, positive.
        preconditioner_interval: Steps between two roots, positive.
        first_preconditioned_step: Counted from 0; the steps before are those of the grafted optimizer. With
            `grafting=None` it must be 0.
        matrix_epsilon: Relative to the largest eigenvalue, positive.
        epsilon: Of AdaGrad, positive.
        name: Of the optimizer.
        **kwargs: Of `keras.optimizers.Optimizer`.

    Raises:
        ValueError: An argument is out of its range.

    Reference: Gupta, Koren & Singer 2018 (arXiv 1802.09568), Algorithm 1; Anil et al. 2020 (arXiv 2002.09018), blocks,
        intervals, grafting (Agarwal et al. 2020, arXiv 2002.11803) and the ridge relative to the largest eigenvalue.
    """

    def __init__(
        self,
        learning_rate=0.1,
        momentum: float = 0.9,
        beta_2: float = 1.0,
        block_size: int = 128,
        grafting: str | None = "sgd",
        statistics_interval: int = 1,
        preconditioner_interval: int = 10,
        first_preconditioned_step: int = 0,
        matrix_epsilon: float = 1e-6,
        epsilon: float = 1e-8,
        name: str = "distributed_shampoo",
        **kwargs,
    ):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        _check_share("momentum", momentum)
        _check("beta_2", beta_2, 0 < beta_2 <= 1, "in (0, 1]")
        for argument, value in (
            ("block_size", block_size),
            ("statistics_interval", statistics_interval),
            ("preconditioner_interval", preconditioner_interval),
        ):
            _check(argument, value, isinstance(value, int) and value > 0, "a positive integer")
        _check("grafting", grafting, grafting in GRAFTINGS, 'one of "sgd", "adagrad" and None')
        _check(
            "first_preconditioned_step",
            first_preconditioned_step,
            first_preconditioned_step >= 0 and (grafting is not None or first_preconditioned_step == 0),
            "0 or more, and 0 where `grafting` is None, which has no other step to take",
        )
        _check("matrix_epsilon", matrix_epsilon, matrix_epsilon > 0, "positive")
        _check("epsilon", epsilon, epsilon > 0, "positive")
        self.momentum, self.beta_2, self.block_size, self.grafting = momentum, beta_2, block_size, grafting
        self.statistics_interval, self.preconditioner_interval = statistics_interval, preconditioner_interval
        self.first_preconditioned_step = first_preconditioned_step
        self.matrix_epsilon, self.epsilon = matrix_epsilon, epsilon

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._momentums = [self.add_variable_from_reference(variable, "momentum") for variable in variables]
        self._accumulators = []
        if self.grafting == "adagrad":
            self._accumulators = [self.add_variable_from_reference(variable, "accumulator") for variable in variables]
        self._statistics, self._preconditioners = [], []
        for number, variable in enumerate(variables):
            blocks = Blocks(variable.shape, self.block_size)
            self._statistics.append(
                [
                    self.add_variable(
                        (blocks.count, side, side), "zeros", variable.dtype, name=f"statistics_{number}_{axis}"
                    )
                    for axis, side in enumerate(blocks.sides)
                ]
            )
            self._preconditioners.append(
                [
                    self.add_variable(
                        (blocks.count, side, side), _identities, variable.dtype, name=f"preconditioner_{number}_{axis}"
                    )
                    for axis, side in enumerate(blocks.sides)
                ]
            )

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        step = tf.convert_to_tensor(self.iterations)
        g = tf.cast(tf.convert_to_tensor(gradient), variable.dtype)
        blocks = Blocks(variable.shape, self.block_size)
        divided = blocks.divided(g)
        for axis, (statistics, root) in enumerate(
            zip(self._statistics[index], self._preconditioners[index], strict=True)
        ):
            due = tf.equal(step % self.statistics_interval, 0)
            self.assign(statistics, _where(due, lambda: self._moved(statistics, divided, axis), statistics))  # noqa: B023
            due = tf.equal(step % self.preconditioner_interval, 0)
            power = -1.0 / (2 * len(blocks.sides))
            self.assign(root, _where(due, lambda: inverse_root(statistics, power, self.matrix_epsilon), root))  # noqa: B023
        update = blocks.joined(_preconditioned(divided, self._preconditioners[index]))
        grafted = self._grafted(index, g)
        if grafted is not None:
            scaled = update * tf.math.divide_no_nan(tf.norm(grafted), tf.norm(update))
            update = tf.where(step >= self.first_preconditioned_step, scaled, grafted)
        momentum = self._momentums[index]
        self.assign(momentum, self.momentum * momentum + update)
        self.assign_sub(variable, tf.cast(learning_rate, g.dtype) * momentum)

    def get_config(self):
        names = (
            "momentum",
            "beta_2",
            "block_size",
            "grafting",
            "statistics_interval",
            "preconditioner_interval",
            "first_preconditioned_step",
            "matrix_epsilon",
            "epsilon",
        )
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}

    def _moved(self, statistics: Any, divided: tf.Tensor, axis: int) -> tf.Tensor:
        product = tf.matmul(divided, divided, transpose_a=axis == 1, transpose_b=axis == 0)
        return self.beta_2 * statistics + (1.0 if self.beta_2 == 1 else 1.0 - self.beta_2) * product

    def _grafted(self, index: int, g: tf.Tensor) -> tf.Tensor | None:
        if self.grafting != "adagrad":
            return g if self.grafting == "sgd" else None
        accumulator = self._accumulators[index]
        self.assign_add(accumulator, tf.square(g))
        return g / (tf.sqrt(accumulator) + self.epsilon)


class Blocks:
    """How a tensor is seen as blocks of matrices, and back.

    Args:
        shape: Of the tensor.
        block_size: The longest side of a block that has a preconditioner.

    Attributes:
        sides: Of a block: rows and columns; of a vector or a scalar the rows alone, and it has one column.
        count: How many blocks there are.
    """

    def __init__(self, shape: Sequence[int], block_size: int):
        self._shape = tuple(shape)
        columns = self._shape[-1:] if len(self._shape) > 1 else ()
        self._lengths = (math.prod(self._shape[: -1 if columns else None]), *columns)
        self._numbers = [-(-length // block_size) for length in self._lengths]
        self.sides = [-(-length // number) for length, number in zip(self._lengths, self._numbers, strict=True)]
        self.count = math.prod(self._numbers)

    def divided(self, tensor: tf.Tensor) -> tf.Tensor:
        """The blocks, shape `(count, rows, columns)`, filled up with zeros."""
        matrix = tf.reshape(tensor, self._matrix(self._lengths))
        filled = self._matrix([n * side for n, side in zip(self._numbers, self.sides, strict=True)])
        matrix = tf.pad(matrix, [[0, whole - length] for whole, length in zip(filled, matrix.shape, strict=True)])
        (rows, columns), (down, across) = self._matrix(self.sides), self._matrix(self._numbers)
        blocks = tf.transpose(tf.reshape(matrix, [down, rows, across, columns]), [0, 2, 1, 3])
        return tf.reshape(blocks, [self.count, rows, columns])

    def joined(self, blocks: tf.Tensor) -> tf.Tensor:
        """The tensor of its blocks."""
        (rows, columns), (down, across) = self._matrix(self.sides), self._matrix(self._numbers)
        matrix = tf.transpose(tf.reshape(blocks, [down, across, rows, columns]), [0, 2, 1, 3])
        matrix = tf.reshape(matrix, [down * rows, across * columns])
        height, width = self._matrix(self._lengths)
        return tf.reshape(matrix[:height, :width], self._shape)

    @staticmethod
    def _matrix(sizes: Sequence[int]) -> tuple[int, int]:
        return (sizes[0], sizes[1] if len(sizes) > 1 else 1)


def inverse_root(matrices: Any, power: float, ridge: float) -> tf.Tensor:
    """(A + ridge * l * I)**power of symmetric matrices without negative eigenvalues, of which l is the largest.

    Args:
        matrices: Shape `(..., n, n)`; computed in float64.
        power: Negative.
        ridge: Relative to l.

    Returns:
        As `matrices`; the identity for a matrix that is zero, NaN for one that is not finite (the training has
        diverged), which has no eigenvalues.
    """
    a = tf.convert_to_tensor(matrices)
    finite = tf.reduce_all(tf.math.is_finite(a), axis=[-2, -1], keepdims=True)
    values, vectors = tf.linalg.eigh(tf.cast(tf.where(finite, a, tf.zeros_like(a)), tf.float64))
    largest = values[..., -1:]
    # Rounding makes eigenvalues that are 0 a little less.
    values = tf.where(largest > 0, tf.maximum(values, 0.0) + ridge * largest, tf.ones_like(values))
    roots = tf.matmul(vectors * tf.pow(values, power)[..., tf.newaxis, :], vectors, transpose_b=True)
    return tf.where(finite, tf.cast(roots, a.dtype), math.nan)


def _preconditioned(blocks: tf.Tensor, roots: Sequence[Any]) -> tf.Tensor:
    left, *right = (tf.convert_to_tensor(root) for root in roots)
    blocks = tf.matmul(left, blocks)
    return tf.matmul(blocks, right[0]) if right else blocks


def _where(due: tf.Tensor, compute, variable) -> tf.Tensor:
    return tf.cond(due, lambda: tf.convert_to_tensor(compute()), lambda: tf.convert_to_tensor(variable))


def _identities(shape, dtype=None):
    return tf.eye(shape[-1], batch_shape=[shape[0]], dtype=dtype)


def _check_share(name: str, value: float) -> None:
    _check(name, value, 0 <= value < 1, "in [0, 1)")


def _check(name: str, value: object, allowed: bool, words: str) -> None:
    if not allowed:
        raise ValueError(f"`{name}` must be {words}. Received: {name}={value!r}")
