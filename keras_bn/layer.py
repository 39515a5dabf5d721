"""The layer: batch normalization that takes the place of Keras's own."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_bn import arguments, ops, updates
from keras_bn.masks import aligned_weights
from keras_bn.names import shown
from keras_bn.ops.layouts import ragged_as_padded, ragged_as_values
from keras_bn.ops.where import either
from keras_bn.statistics import replica_count, statistics_dtype
from keras_bn.warning import warn


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
    value per channel gives beta; with `renorm` gamma * d + beta, as with Keras's layer.

    Args:
        axis: Int or list of ints, the axis or axes that keep statistics of their own: the channels. Default: the last.
        momentum: Weight of the past in the moving averages, in [0, 1]. None averages all batches alike: with k batches
            seen the next one weighs 1 / (k + 1). A `keras.optimizers.schedules.LearningRateSchedule` gives the momentum
            for each update, counted from 0. A policy of pure half precision keeps the moving statistics in it, as
            Keras does: steps below its digits are lost; "mixed_bfloat16" and "mixed_float16" keep them in float32.
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
            value becomes r * (x - mean) / sqrt(variance + epsilon) + d, see `keras_bn.updates.renorm_correction`.
        renorm_clipping: Limits of that correction: a dictionary with `rmax`, `rmin`, `dmax`, each a number or a
            `LearningRateSchedule` over the updates; or "warmup", the schedule of the paper. Default: no limits.
        renorm_momentum: As `momentum`, a float, for the statistics that `renorm` corrects towards.
        synchronized: Whether the replicas of a distribution strategy normalize with the statistics of all of them; or
            a number: groups of so many replicas, in the order of their ids, with those of their group. Where it is
            False each replica normalizes with its own, and the moving statistics are averaged over the replicas at
            each step.
        virtual_batch_size: Normalize groups of that many examples, each with its own statistics (ghost batch norm); a
            last smaller group is a group of its own. The moving averages get the mean of the groups, weighted by size.
            Inference is not affected. Default: the whole batch.
        unbiased_variance: Whether the moving variance averages m2 / (count - 1), as Algorithm 2 of the paper does,
            instead of the biased m2 / count; under a `mask` of floats m2 / (sum(w) - sum(w**2) / sum(w)).
        zero_debias: Whether the initial values of the moving statistics are left out of the averages: the moving
            statistics are divided by the weight of what was seen, 1 - product(momentum).
        activation: Optional, applied last.
        kernel: What normalizes. "auto": what suits where the layer runs. "native": the compiled operations of this
            package. "fused": TensorFlow's fused operation, for the statistics of the batch. "plain": TensorFlow's own
            operations, everywhere; so that a `tf.function` that was traced by itself can be called within
            `jit_compile=True`, or a training step can be loaded where this package is not. Under `jit_compile=True`,
            in float64 and with masks, groups or synchronization all is plain.
        **kwargs: Of `keras.layers.Layer`: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: Floating-point tensor of rank 2 or more, or `tf.RaggedTensor`, of which the values that are there are
            normalized. Half types are accumulated in float32, integers and booleans are cast to the layer's dtype.
        training: Whether the statistics of the batch are used and averaged: a bool or a scalar boolean tensor.
        mask: What each value weighs, not below 0. Booleans and integers are frequencies: a value of weight 2 is two
            values. Floats are reliabilities: only their proportions say how many values there are,
            sum(w)**2 / sum(w**2); see `keras_bn.statistics.Moments`. Its axes are the first of the inputs, as Keras's
            masks' are, or all but the channel axes; sizes may be 1. All values are normalized, also those of weight 0;
            where none counts by mean and variance 0, and nothing moves. Negative and non-finite weights are refused
            where they can be seen: in eager calls, and as constants of a graph.

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
        synchronized: bool | int = False,
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
            synchronized=arguments.synchronized(synchronized),
            **kwargs,
        )
        arguments.floating_dtype(self.dtype_policy)
        self.axis = axes[0] if len(axes) == 1 else axes
        self.momentum = momentum
        self.renorm = arguments.flag("renorm", renorm)
        self.renorm_clipping = arguments.clipping(renorm_clipping) if self.renorm else renorm_clipping
        self.renorm_momentum = arguments.number("renorm_momentum", renorm_momentum, 0.0, 1.0)
        self.virtual_batch_size = arguments.group_size(virtual_batch_size)
        self.unbiased_variance = arguments.flag("unbiased_variance", unbiased_variance)
        self.zero_debias = arguments.flag("zero_debias", zero_debias)
        self.activation = keras.activations.get(activation)
        self.kernel = arguments.choice("kernel", kernel, ops.KERNELS)
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
        arguments.shape_of_one_tensor(input_shape)
        rank = len(input_shape)
        axes = [self.axis] if isinstance(self.axis, int) else self.axis
        for axis in axes:
            if not -rank <= axis < rank:
                raise ValueError(
                    f"`axis` must be in [{-rank}, {rank - 1}] for rank-{rank} inputs. Received: axis={self.axis}."
                )
        if len({axis % rank for axis in axes}) < len(axes):
            raise ValueError(f"`axis` must name each axis once, for rank-{rank} inputs. Received: axis={self.axis}.")
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

        # Replicas that have the same statistics anyway need not send them.
        aggregation = "none" if self.synchronized is True else "mean"

        def add(name, initializer, **options):
            options = {"trainable": False, "aggregation": aggregation, **options}
            return self.add_weight(shape=shape, name=name, initializer=initializer, autocast=False, **options)

        def stddev(shape, dtype=None):
            return keras.ops.sqrt(_cloned(self.moving_variance_initializer)(shape, dtype=dtype))

        if self.scale:
            self.gamma = add(
                "gamma",
                self.gamma_initializer,
                trainable=True,
                aggregation="none",
                regularizer=self.gamma_regularizer,
                constraint=self.gamma_constraint,
            )
        if self.center:
            self.beta = add(
                "beta",
                self.beta_initializer,
                trainable=True,
                aggregation="none",
                regularizer=self.beta_regularizer,
                constraint=self.beta_constraint,
            )
        self.moving_mean = add("moving_mean", self.moving_mean_initializer)
        self.moving_variance = add("moving_variance", self.moving_variance_initializer)
        if self.renorm:
            self.moving_stddev = add("moving_stddev", stddev)
            self.renorm_mean = add("renorm_mean", _cloned(self.moving_mean_initializer))
            self.renorm_stddev = add("renorm_stddev", stddev)
        if updates.counts_updates(self):
            self.update_count = add("update_count", "zeros", dtype="float32")
        if self.zero_debias:
            # In half precision a product of momenta near 1 would stay 1.
            dtype = statistics_dtype(tf.as_dtype(self.variable_dtype)).name
            self.initial_weight = add("initial_weight", "ones", dtype=dtype)

    def call(self, inputs, training=None, mask=None):
        if isinstance(inputs, tf.RaggedTensor):
            values, mask, restore = self._values_of(inputs, mask)
            return restore(self.call(values, training, mask))
        training = self._known_training(training)
        x = tf.convert_to_tensor(inputs)
        if not x.dtype.is_floating:
            x = tf.cast(arguments.real(x), self.compute_dtype)
        if self.statistics == "moving" or (self.statistics == "auto" and not self.trainable):
            y = self._normalize_with_moving(x)
        elif self.statistics == "batch":
            y = self._normalize_with_batch(x, mask, update=training if self.trainable else False)
        else:
            y = either(
                training,
                lambda: self._normalize_with_batch(x, mask, update=True),
                lambda: self._normalize_with_moving(x),
            )
        return tf.cast(self.activation(y), self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    @classmethod
    def from_config(cls, config):
        if config.get("kernel") in ("stable", "xla"):  # What earlier versions called it.
            config = {**config, "kernel": "plain"}
        return super().from_config(config)

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

    def _values_of(self, ragged, mask):
        """The values that are there as a tensor, its mask, and the way back."""
        if mask is not None:
            raise ValueError(
                "`mask` must be None for ragged inputs, of which all that is there counts; or pad them with "
                f"`inputs.to_tensor()` and mask the padding too. Received: mask={shown(mask)}."
            )
        if self._axes[0] > ragged.ragged_rank and self.virtual_batch_size is None:
            values, restore = ragged_as_values(ragged)
            return values, None, restore
        values, mask, restore = ragged_as_padded(ragged)
        sizes = [self.input_spec.axes.get(axis) for axis in range(len(values.shape))]  # A graph may have lost them.
        return tf.ensure_shape(values, sizes), mask, restore

    def _known_training(self, training):
        """`training` as a bool where the graph tells it; of several replicas it must be one, as Keras's always is."""
        if isinstance(training, bool) or training is None:
            return training
        if not tf.is_symbolic_tensor(training):
            return arguments.training(training)
        known = tf.get_static_value(training)
        if known is None and self.statistics != "moving" and self.trainable and replica_count() > 1:
            raise ValueError(
                "`training` must be True or False for several replicas, whose statistics cannot be put together in a "
                f"branch of a graph. Received: training={training} for {replica_count()} replicas."
            )
        return training if known is None else bool(known)

    def _normalize_with_moving(self, x):
        dtype = statistics_dtype(x.dtype)
        mean, variance = (updates.value_of(moving, dtype) for moving in (self.moving_mean, self.moving_variance))
        return ops.normalize(
            x, mean, variance, *self._affine(dtype), axes=self._axes, epsilon=self.epsilon, kernel=self.kernel
        )

    def _normalize_with_batch(self, x, mask, update):
        dtype = statistics_dtype(x.dtype)
        gamma, beta = self._affine(dtype)
        y, moments, moved = ops.normalize_batch(
            tf.cast(x, dtype) if self.renorm else x,
            *(None, None) if self.renorm else (gamma, beta),
            axes=self._axes,
            epsilon=self.epsilon,
            weights=None if mask is None else aligned_weights(mask, x, self._axes),
            group_size=self.virtual_batch_size,
            synchronized=self.synchronized,
            kernel=self.kernel,
            moving=updates.plain_average(self, dtype) if update is True else None,
        )
        self._warn_of_single_value(moments.count)
        if self.renorm:
            # Before the statistics move, which the correction goes towards.
            y = ops.scale_and_shift(y, *updates.renorm_of(self, moments), axes=self._axes)
            y = ops.scale_and_shift(y, gamma, beta, axes=self._axes)
        if moved is None:
            updates.when(update, lambda: updates.move(self, moments))
        else:
            updates.assign_moving(self, moved)
        return y

    def _affine(self, dtype):
        return (
            updates.value_of(self.gamma, dtype) if self.scale else None,
            updates.value_of(self.beta, dtype) if self.center else None,
        )

    def _warn_of_single_value(self, count):
        if isinstance(count, float) and count == 1.0 and not self._warned:
            self._warned = True
            warn(f"{ops.SINGLE_VALUE} Layer: {self.name!r}.")


def _cloned(initializer):
    """Another initializer of the same configuration: one that draws at random must not be called twice."""
    return initializer.__class__.from_config(initializer.get_config())
