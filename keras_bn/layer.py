"""The layer: batch normalization that takes the place of Keras's own."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_bn import arguments, kernels, statistics
from keras_bn.warning import warn

_KERNELS = ("auto", "fused", "xla", "stable")


@keras.saving.register_keras_serializable(package="keras_bn")
class BatchNormalization(keras.layers.BatchNormalization):
    """Normalizes each channel of its input, in training with the statistics of the batch.

    y = activation(gamma * (x - mean) / sqrt(variance + epsilon) + beta)

    In training, mean and (biased) variance are those of the batch, and the moving statistics follow them:

    moving_mean = momentum * moving_mean + (1 - momentum) * mean
    moving_variance = momentum * moving_variance + (1 - momentum) * variance

    Otherwise (in inference, and where `trainable` is False) mean and variance are the moving ones. It is a
    `keras.layers.BatchNormalization`: the same arguments, weights and configuration, so each loads what the other
    saved. What it adds is in the arguments after `synchronized`; weights beyond Keras's four exist only where one of
    them needs to remember something.

    A channel whose batch holds a NaN or an infinity, or one value only, leaves its moving statistics as they are. One
    value per channel gives beta.

    Args:
        axis: Int or list of ints, the axis or axes that keep statistics of their own: the channels. Default: the last.
        momentum: Weight of the past in the moving averages, in [0, 1]. None averages all batches alike: with k batches
            seen the next one weighs 1 / (k + 1). A `keras.optimizers.schedules.LearningRateSchedule` gives the momentum
            for each update, counted from 0.
        epsilon: Added to the variance, not negative; its unit is that of the input squared.
        center: Whether there is a beta.
        scale: Whether there is a gamma.
        beta_initializer: Of beta.
        gamma_initializer: Of gamma.
        moving_mean_initializer: Of the moving mean.
        moving_variance_initializer: Of the moving (biased, see `unbiased_variance`) variance.
        beta_regularizer: Optional, of beta.
        gamma_regularizer: Optional, of gamma.
        beta_constraint: Optional, of beta.
        gamma_constraint: Optional, of gamma.
        renorm: Whether training corrects towards slower moving statistics (batch renormalization): the normalized
            value becomes r * (x - mean) / sqrt(variance + epsilon) + d, see `keras_bn.statistics.renorm_correction`.
        renorm_clipping: Limits of that correction: a dictionary with `rmax`, `rmin`, `dmax`, each a number or a
            `LearningRateSchedule` over the updates; or "warmup", the schedule of the paper. Default: no limits.
        renorm_momentum: As `momentum`, a float, for the statistics that `renorm` corrects towards.
        synchronized: Whether the replicas of a distribution strategy normalize with the statistics of all of them.
        virtual_batch_size: Normalize groups of that many examples, each with its own statistics (ghost batch norm); a
            last smaller group is a group of its own. The moving averages get the mean of the groups, weighted by size.
            Inference is not affected. Default: the whole batch.
        unbiased_variance: Whether the moving variance averages m2 / (count - 1), as Algorithm 2 of the paper does,
            instead of the biased m2 / count.
        zero_debias: Whether the initial values of the moving statistics are left out of the averages: the moving
            statistics are divided by the weight of what was seen, 1 - product(momentum).
        activation: Optional, applied last.
        kernel: How batch statistics are normalized with. "auto": the fastest way that is right where the layer runs.
            "fused": TensorFlow's fused operation. "xla": the normalization compiled by itself, in a graph that is not.
            "stable": plain operations in two passes. Under `jit_compile=True`, and with masks, groups or
            synchronization, there is one way only.
        **kwargs: Of `keras.layers.Layer`: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: Floating-point tensor of rank 2 or more. Half types are accumulated in float32.
        training: Whether the statistics of the batch are used and averaged: a bool or a scalar boolean tensor.
        mask: Which values count, as booleans, or how often, as weights. Any shape that broadcasts to that of the
            inputs, with or without the channel axes. All values are normalized, also those that do not count.

    Raises:
        ValueError: If an argument is not in its range, or two exclude each other.
        TypeError: If an argument is of the wrong type.

    Reference: Ioffe & Szegedy 2015 (arXiv 1502.03167); renorm: Ioffe 2017 (arXiv 1702.03275); virtual_batch_size:
        Hoffer et al. 2017 (arXiv 1705.08741); zero_debias: Kingma & Ba 2014 (arXiv 1412.6980), section 3.
    """

    def __init__(
        self,
        axis: int | list[int] = -1,
        momentum: float | keras.optimizers.schedules.LearningRateSchedule | None = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer="zeros",
        gamma_initializer="ones",
        moving_mean_initializer="zeros",
        moving_variance_initializer="ones",
        beta_regularizer=None,
        gamma_regularizer=None,
        beta_constraint=None,
        gamma_constraint=None,
        renorm: bool = False,
        renorm_clipping: dict[str, Any] | str | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        virtual_batch_size: int | None = None,
        unbiased_variance: bool = False,
        zero_debias: bool = False,
        activation=None,
        kernel: str = "auto",
        **kwargs,
    ):
        axes = arguments.axes(axis)
        momentum = arguments.momentum(momentum)
        super().__init__(
            axis=axes[0],
            momentum=momentum if isinstance(momentum, float) else 0.99,
            epsilon=arguments.number("epsilon", epsilon, 0.0),
            center=arguments.flag("center", center),
            scale=arguments.flag("scale", scale),
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            synchronized=arguments.flag("synchronized", synchronized),
            **kwargs,
        )
        self.axis = axes[0] if len(axes) == 1 else axes
        self.momentum = momentum
        self.renorm = arguments.flag("renorm", renorm)
        self.renorm_clipping = arguments.clipping(renorm_clipping) if self.renorm else renorm_clipping
        self.renorm_momentum = arguments.number("renorm_momentum", renorm_momentum, 0.0, 1.0)
        self.virtual_batch_size = arguments.group_size(virtual_batch_size)
        self.unbiased_variance = arguments.flag("unbiased_variance", unbiased_variance)
        self.zero_debias = arguments.flag("zero_debias", zero_debias)
        self.activation = keras.activations.get(activation)
        self.kernel = arguments.choice("kernel", kernel, _KERNELS)
        self.statistics = "auto"
        self._warned = False
        self.moving_stddev = self.renorm_mean = self.renorm_stddev = None
        self.update_count = self.initial_weight = None
        if self.renorm and self.unbiased_variance:
            raise ValueError(
                "`renorm` cannot be combined with `unbiased_variance=True`: it averages standard deviations. "
                "Received: renorm=True, unbiased_variance=True."
            )
        if self.virtual_batch_size is not None:
            for name in ("renorm", "synchronized"):
                if getattr(self, name):
                    raise ValueError(
                        f"`virtual_batch_size` cannot be combined with `{name}=True`: groups have statistics of their "
                        f"own. Received: virtual_batch_size={virtual_batch_size}, {name}=True."
                    )

    def build(self, input_shape):
        rank = len(input_shape)
        axes = [self.axis] if isinstance(self.axis, int) else self.axis
        for axis in axes:
            if not -rank <= axis < rank:
                raise ValueError(
                    f"`axis` must be in [{-rank}, {rank - 1}] for rank-{rank} inputs. Received: axis={self.axis}."
                )
        axes = sorted({axis % rank for axis in axes})
        if len(axes) == rank:
            raise ValueError(
                f"`axis` must leave at least one axis to take statistics over, for rank-{rank} inputs. "
                f"Received: axis={self.axis}."
            )
        if self.virtual_batch_size is not None and 0 in axes:
            raise ValueError(
                "`virtual_batch_size` needs axis 0 to be the examples, not a channel axis. "
                f"Received: virtual_batch_size={self.virtual_batch_size}, axis={self.axis}."
            )
        shape = tuple(input_shape[axis] for axis in axes)
        if None in shape:
            raise ValueError(
                f"`axis` must name axes of known size, since each has its own statistics. Received: axis={self.axis} "
                f"and inputs of shape {tuple(input_shape)}."
            )
        self._axes = tuple(axes)
        self._reduction_axes = [axis for axis in range(rank) if axis not in axes]
        self.input_spec = keras.layers.InputSpec(ndim=rank, axes={axis: input_shape[axis] for axis in axes})

        def add(name, initializer, **options):
            options = {"trainable": False, **options}
            return self.add_weight(shape=shape, name=name, initializer=initializer, autocast=False, **options)

        def stddev(shape, dtype=None):
            return keras.ops.sqrt(_cloned(self.moving_variance_initializer)(shape, dtype=dtype))

        if self.scale:
            self.gamma = add(
                "gamma",
                self.gamma_initializer,
                trainable=True,
                regularizer=self.gamma_regularizer,
                constraint=self.gamma_constraint,
            )
        if self.center:
            self.beta = add(
                "beta",
                self.beta_initializer,
                trainable=True,
                regularizer=self.beta_regularizer,
                constraint=self.beta_constraint,
            )
        self.moving_mean = add("moving_mean", self.moving_mean_initializer)
        self.moving_variance = add("moving_variance", self.moving_variance_initializer)
        if self.renorm:
            self.moving_stddev = add("moving_stddev", stddev)
            self.renorm_mean = add("renorm_mean", _cloned(self.moving_mean_initializer))
            self.renorm_stddev = add("renorm_stddev", stddev)
        if self._counts_updates():
            self.update_count = add("update_count", "zeros", dtype="float32")
        if self.zero_debias:
            self.initial_weight = add("initial_weight", "ones")

    def call(self, inputs, training=None, mask=None):
        x = tf.convert_to_tensor(inputs)
        if not x.dtype.is_floating:
            x = tf.cast(x, self.compute_dtype)
        if self.statistics == "moving" or (self.statistics == "auto" and not self.trainable):
            y = self._normalize_with_moving(x)
        elif self.statistics == "batch":
            y = self._normalize_with_batch(x, mask, update=training if self.trainable else False)
        else:
            y = kernels.either(
                training,
                lambda: self._normalize_with_batch(x, mask, update=True),
                lambda: self._normalize_with_moving(x),
            )
        return tf.cast(y, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        config = super().get_config()
        config["axis"] = self.axis if isinstance(self.axis, int) else list(self.axis)
        if not isinstance(self.momentum, float):
            config["momentum"] = keras.saving.serialize_keras_object(self.momentum)
        if self.renorm or "renorm" in config:
            clipping = self.renorm_clipping
            if isinstance(clipping, dict):
                clipping = {
                    key: keras.saving.serialize_keras_object(limit) if arguments.is_schedule(limit) else limit
                    for key, limit in clipping.items()
                }
            config.update(renorm=self.renorm, renorm_clipping=clipping, renorm_momentum=self.renorm_momentum)
        # What Keras's layer does not know is left out where it is at its default, so that Keras's layer can be made
        # from the configuration of this one.
        added = {
            "virtual_batch_size": (self.virtual_batch_size, None),
            "unbiased_variance": (self.unbiased_variance, False),
            "zero_debias": (self.zero_debias, False),
            "activation": (
                keras.activations.serialize(self.activation),
                keras.activations.serialize(keras.activations.linear),
            ),
            "kernel": (self.kernel, "auto"),
        }
        config.update({name: value for name, (value, default) in added.items() if value != default})
        return config

    def _normalize_with_moving(self, x):
        dtype = kernels.statistics_dtype(x.dtype)
        y = kernels.normalize_with(
            x,
            _flat(self.moving_mean, dtype),
            _flat(self.moving_variance, dtype),
            _flat(self.gamma, dtype) if self.scale else None,
            _flat(self.beta, dtype) if self.center else None,
            axes=self._axes,
            epsilon=self.epsilon,
        )
        return self.activation(y)

    def _normalize_with_batch(self, x, mask, update):
        dtype = kernels.statistics_dtype(x.dtype)
        gamma = _flat(self.gamma, dtype) if self.scale else None
        beta = _flat(self.beta, dtype) if self.center else None
        weights = None if mask is None else statistics.aligned_weights(mask, x, self._axes)
        options = {
            "axes": self._axes,
            "epsilon": self.epsilon,
            "weights": weights,
            "group_size": self.virtual_batch_size,
            "synchronized": self.synchronized,
            "kernel": self.kernel,
        }
        if update is True and isinstance(self.momentum, float) and not self.zero_debias and not self.renorm:
            moving = kernels.Moving(
                _flat(self.moving_mean, dtype),
                _flat(self.moving_variance, dtype),
                1.0 - self.momentum,
                self.unbiased_variance,
                self._assign_moving,
            )
            y, count = kernels.normalize_and_move(x, gamma, beta, moving, activation=self.activation, **options)
            self._warn_of_single_value(count)
            return y
        if not self.renorm:
            y, moments = kernels.normalize_with_batch(x, gamma, beta, activation=self.activation, **options)
            self._warn_of_single_value(moments.count)
            _when(update, lambda: self._update(moments))
            return y
        y, moments = kernels.normalize_with_batch(tf.cast(x, dtype), None, None, **options)
        self._warn_of_single_value(moments.count)
        batch = statistics.batch_statistics(moments, unbiased=False)
        r, d = self._renorm_correction(batch)
        y = kernels.scale_and_shift(y, r, d, axes=self._axes)
        _when(update, lambda: self._update_with_renorm(batch))
        return self.activation(kernels.scale_and_shift(y, gamma, beta, axes=self._axes))

    def _renorm_correction(self, batch):
        dtype = batch.mean.dtype
        limits = {
            name: limit(tf.reduce_max(_flat(self.update_count, dtype))) if arguments.is_schedule(limit) else limit
            for name, limit in arguments.clipping_limits(self.renorm_clipping).items()
        }
        return statistics.renorm_correction(
            batch, _flat(self.renorm_mean, dtype), _flat(self.renorm_stddev, dtype), limits, self.epsilon
        )

    def _assign_moving(self, mean, variance):
        _assign(self.moving_mean, mean)
        _assign(self.moving_variance, variance)

    def _update(self, moments):
        batch = statistics.batch_statistics(moments, self.unbiased_variance)
        rate = self._next_rate(batch)
        _move(self.moving_mean, batch.mean, rate)
        _move(self.moving_variance, batch.variance, rate)

    def _update_with_renorm(self, batch):
        stddev = tf.sqrt(batch.variance + self.epsilon)
        rate = tf.where(batch.worth, tf.cast(1.0 - self.renorm_momentum, stddev.dtype), 0)
        _move(self.renorm_mean, batch.mean, rate)
        _move(self.renorm_stddev, stddev, rate)
        rate = self._next_rate(batch)
        _move(self.moving_mean, batch.mean, rate)
        moving_stddev = _move(self.moving_stddev, stddev, rate)
        moving_variance = tf.nn.relu(tf.square(moving_stddev) - self.epsilon)
        _move(self.moving_variance, moving_variance, tf.cast(rate > 0, rate.dtype))

    def _next_rate(self, batch):
        """How much this batch weighs in the moving averages, per channel; counts it where that is asked for."""
        dtype = batch.mean.dtype
        if self.momentum is None:
            rate = 1.0 / (_flat(self.update_count, dtype) + 1.0)
        elif arguments.is_schedule(self.momentum):
            rate = 1.0 - tf.cast(self.momentum(tf.reduce_max(_flat(self.update_count, dtype))), dtype)
        else:
            rate = tf.cast(1.0 - self.momentum, dtype)
        rate = tf.where(batch.worth, rate, 0)
        if self.update_count is not None:
            _assign(self.update_count, _flat(self.update_count, dtype) + tf.cast(batch.worth, dtype))
        if self.zero_debias:
            initial_weight = _flat(self.initial_weight, dtype) * (1.0 - rate)
            _assign(self.initial_weight, initial_weight)
            rate = tf.math.divide_no_nan(rate, 1.0 - initial_weight)
        return rate

    def _warn_of_single_value(self, count):
        if isinstance(count, float) and count == 1.0 and not self._warned:
            self._warned = True
            warn(f"{kernels.SINGLE_VALUE} Layer: {self.name!r}.")

    def _counts_updates(self):
        limits = arguments.clipping_limits(self.renorm_clipping).values() if self.renorm else ()
        return self.momentum is None or any(arguments.is_schedule(value) for value in (self.momentum, *limits))


def _when(condition, action):
    if not isinstance(condition, bool) and tf.is_symbolic_tensor(condition):
        tf.cond(tf.cast(condition, tf.bool), lambda: (action(), tf.no_op())[1], tf.no_op)
    elif condition:
        action()


def _flat(variable, dtype):
    # Converted first: a cast of Keras's variable would do so by way of a search for what converts it.
    value = tf.cast(tf.convert_to_tensor(variable.value), dtype)
    return value if len(value.shape) == 1 else tf.reshape(value, [-1])


def _assign(variable, value):
    variable.assign(value if len(variable.shape) == 1 else tf.reshape(value, variable.shape))


def _move(moving, batch, rate):
    value = statistics.moved(_flat(moving, batch.dtype), batch, rate)
    _assign(moving, value)
    return value


def _cloned(initializer):
    """Another initializer of the same configuration: one that draws at random must not be called twice."""
    return initializer.__class__.from_config(initializer.get_config())
