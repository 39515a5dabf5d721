"""The arithmetic of folding: pure functions on NumPy weights, in float64."""

from typing import Any, NamedTuple

import numpy as np


class Affine(NamedTuple):
    """y = scale * x + shift, per channel; float64 of shape `(C,)`."""

    scale: np.ndarray
    shift: np.ndarray


def affine_of(gamma: Any, beta: Any, mean: Any, variance: Any, epsilon: float) -> Affine:
    """A batch normalization in inference as one multiply-add.

    scale = gamma / sqrt(variance + epsilon), shift = beta - mean * scale

    Args:
        gamma, beta: shape `(C,)`.
        mean: moving mean, shape `(C,)`.
        variance: moving variance, shape `(C,)`.
        epsilon: the layer's.

    Returns:
        An `Affine` in float64.
    """
    gamma, beta, mean, variance = (np.asarray(v, "float64") for v in (gamma, beta, mean, variance))
    scale = gamma / np.sqrt(variance + epsilon)
    return Affine(scale, beta - mean * scale)


def fold_affine(first: Affine, second: Affine) -> Affine:
    """second(first(x)) = (second.scale * first.scale) * x + (second.scale * first.shift + second.shift)."""
    return Affine(second.scale * first.scale, second.scale * first.shift + second.shift)


def fold_conv(kernel: Any, bias: Any, affine: Affine) -> tuple[np.ndarray, np.ndarray]:
    """A convolution, grouped or not, or a dense layer, and the affine map after it as one of its kind.

    scale * (x * kernel + bias) + shift = x * (kernel * scale) + (bias * scale + shift), scale along the last axis

    Args:
        kernel: shape `(*spatial, in / groups, out)`; a dense layer's `(in, out)`, a convolution of one position.
        bias: shape `(out,)`, or None for 0.
        affine: over `out` channels.

    Returns:
        Kernel and bias, float64.
    """
    return np.asarray(kernel, "float64") * affine.scale, _scaled_bias(bias, affine)


def fold_depthwise_conv(kernel: Any, bias: Any, affine: Affine) -> tuple[np.ndarray, np.ndarray]:
    """A depthwise convolution and the affine map after it as one: output channel `c * multiplier + m` is [..., c, m].

    Args:
        kernel: shape `(*spatial, in, multiplier)`.
        bias: shape `(in * multiplier,)`, or None for 0.
        affine: over `in * multiplier` channels.

    Returns:
        Kernel and bias, float64.
    """
    kernel = np.asarray(kernel, "float64")
    return kernel * affine.scale.reshape(kernel.shape[-2:]), _scaled_bias(bias, affine)


def fold_transposed_conv(kernel: Any, bias: Any, affine: Affine) -> tuple[np.ndarray, np.ndarray]:
    """A transposed convolution and the affine map after it as one; its output channels are the last axis but one.

    Args:
        kernel: shape `(*spatial, out, in)`.
        bias: shape `(out,)`, or None for 0.
        affine: over `out` channels.

    Returns:
        Kernel and bias, float64.
    """
    return np.asarray(kernel, "float64") * affine.scale[:, None], _scaled_bias(bias, affine)


def fold_into_conv(affine: Affine, kernel: Any, bias: Any) -> tuple[np.ndarray, np.ndarray]:
    """The affine map before a convolution that pads nothing, or before a dense layer, and that layer as one.

    kernel'[..., i, o] = scale[c] * kernel[..., i, o]
    bias'[o] = bias[o] + sum over ..., i of shift[c] * kernel[..., i, o]

    where c is the input channel that i means for output o: of g groups, that of o has the channels from g(o) * in / g.
    A padding with zeros would stand for channels without their shift: exact only without padding, or with shift 0.

    Args:
        affine: over `in` channels.
        kernel: shape `(*spatial, in / groups, out)`; a dense layer's `(in, out)`, a convolution of one position.
        bias: shape `(out,)`, or None for 0.

    Returns:
        Kernel and bias, float64.
    """
    kernel = np.asarray(kernel, "float64")
    per_group, out = kernel.shape[-2:]
    groups = affine.scale.size // per_group
    # (in,) -> (groups, in / groups) -> (in / groups, out): each output has the channels of its group.
    scale, shift = (np.repeat(v.reshape(groups, per_group).T, out // groups, axis=1) for v in affine)
    spatial = tuple(range(kernel.ndim - 1))
    return scale * kernel, (shift * kernel).sum(spatial) + _bias(bias)


def fold_into_depthwise_conv(affine: Affine, kernel: Any, bias: Any) -> tuple[np.ndarray, np.ndarray]:
    """The affine map before a depthwise convolution that pads nothing, and that convolution, as one.

    kernel'[..., c, m] = scale[c] * kernel[..., c, m]
    bias'[c, m] = bias[c, m] + shift[c] * sum over ... of kernel[..., c, m]

    Args:
        affine: over `in` channels.
        kernel: shape `(*spatial, in, multiplier)`.
        bias: shape `(in * multiplier,)`, or None for 0.

    Returns:
        Kernel and bias, float64.
    """
    kernel = np.asarray(kernel, "float64")
    spatial = tuple(range(kernel.ndim - 2))
    return affine.scale[:, None] * kernel, (affine.shift[:, None] * kernel.sum(spatial)).ravel() + _bias(bias)


def _scaled_bias(bias: Any, affine: Affine) -> np.ndarray:
    return affine.shift if bias is None else np.asarray(bias, "float64") * affine.scale + affine.shift


def _bias(bias: Any) -> Any:
    return 0.0 if bias is None else np.asarray(bias, "float64")
