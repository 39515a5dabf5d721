"""Which Keras layers can absorb a multiply-add into their weights, and how each does it."""

from typing import Any

import keras
import numpy as np

from keras_bn.folding.weights import (
    Affine,
    fold_conv,
    fold_depthwise_conv,
    fold_into_conv,
    fold_into_depthwise_conv,
    fold_transposed_conv,
)

Weights = dict[str, np.ndarray]

_KINDS: dict[type, str] = {
    keras.layers.Dense: "dense",
    keras.layers.Conv1D: "conv",
    keras.layers.Conv2D: "conv",
    keras.layers.Conv3D: "conv",
    keras.layers.DepthwiseConv1D: "depthwise",
    keras.layers.DepthwiseConv2D: "depthwise",
    keras.layers.SeparableConv1D: "separable",
    keras.layers.SeparableConv2D: "separable",
    keras.layers.Conv1DTranspose: "transposed",
    keras.layers.Conv2DTranspose: "transposed",
    keras.layers.Conv3DTranspose: "transposed",
}


_ABSORBING = "Dense and convolutions"
_IDLE_IN_INFERENCE = (
    keras.layers.Dropout,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
    keras.layers.AlphaDropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.ActivityRegularization,
    keras.layers.Identity,
)


def idle_in_inference(layer: Any) -> bool:
    """Whether `layer` only does something in training."""
    return type(layer) in _IDLE_IN_INFERENCE


def absorbing_kind(layer: Any) -> str | None:
    """The kind of arithmetic, or None for a layer that can not absorb: quantized, adapted (LoRA) or unknown."""
    # Just these classes: a subclass may compute something else.
    kind = _KINDS.get(type(layer))
    if kind is None or getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        return None
    return kind


def why_not_absorbing(layer: Any) -> str:
    """Of a layer whose `absorbing_kind` is None, in words that go on with its name."""
    if type(layer) in _KINDS:
        return "is quantized or adapted (LoRA), so that its weights cannot be changed"
    for known in (*_KINDS, keras.layers.BatchNormalization):
        if isinstance(layer, known) and type(layer).__module__.split(".")[0] not in ("keras", "keras_bn"):
            return f"is a subclass of {known.__name__}, which may compute something else"
    if getattr(layer, "weights", None):
        return f"is no layer that absorbs it ({_ABSORBING} do)"
    return f"has no weights, and so nothing to absorb it with ({_ABSORBING} have)"


def channel_axis(layer: Any, rank: int) -> int:
    """The axis of the layer's channels, of input and output alike."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else rank - 1


def pads_with_zeros(layer: Any) -> bool:
    """Whether some outputs see zeros in the place of inputs."""
    return absorbing_kind(layer) != "dense" and layer.padding != "valid" and any(size > 1 for size in layer.kernel_size)


def weights_of(layer: Any) -> Weights:
    """The layer's weights by the name of the attribute, in float64; a bias of None is left out."""
    names = ["depthwise_kernel", "pointwise_kernel"] if absorbing_kind(layer) == "separable" else ["kernel"]
    names += ["bias"] if layer.bias is not None else []
    return {name: keras.ops.convert_to_numpy(getattr(layer, name)).astype("float64") for name in names}


def absorb_after(layer: Any, weights: Weights, affine: Affine) -> Weights:
    """The weights with which `layer` computes what it and the `affine` after it did."""
    bias = weights.get("bias")
    if absorbing_kind(layer) == "separable":
        kernel, bias = fold_conv(weights["pointwise_kernel"], bias, affine)
        return {"depthwise_kernel": weights["depthwise_kernel"], "pointwise_kernel": kernel, "bias": bias}
    fold_weights = {
        "dense": fold_conv,
        "conv": fold_conv,
        "depthwise": fold_depthwise_conv,
        "transposed": fold_transposed_conv,
    }[str(absorbing_kind(layer))]
    kernel, bias = fold_weights(weights["kernel"], bias, affine)
    return {"kernel": kernel, "bias": bias}


def absorb_before(layer: Any, weights: Weights, affine: Affine) -> Weights:
    """The weights with which `layer` computes what the `affine` before it and it did."""
    bias = weights.get("bias")
    if absorbing_kind(layer) == "separable":
        depthwise, inner_bias = fold_into_depthwise_conv(affine, weights["depthwise_kernel"], None)
        pointwise = weights["pointwise_kernel"]
        _, bias = fold_into_conv(Affine(np.ones_like(inner_bias), inner_bias), pointwise, bias)
        return {"depthwise_kernel": depthwise, "pointwise_kernel": pointwise, "bias": bias}
    fold_weights = {"dense": fold_into_conv, "conv": fold_into_conv, "depthwise": fold_into_depthwise_conv}[
        str(absorbing_kind(layer))
    ]
    kernel, bias = fold_weights(affine, weights["kernel"], bias)
    return {"kernel": kernel, "bias": bias}
