"""fold(): every absorption computes what it absorbed, and what would be wrong is refused with the reason."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn
from keras_bn.folding import proof, trials, weights
from keras_bn.folding.weights import Affine
from models import networks

NORMS = [keras.layers.BatchNormalization, keras_bn.BatchNormalization]


def unsettled(model, seed=0):
    """Every weight random, so that a forgotten term shows."""
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights(
                [rng.uniform(0.5, 2, w.shape) * rng.choice([1, 1, -1], w.shape) for w in layer.get_weights()]
            )
            layer.moving_variance.assign(np.abs(layer.moving_variance.numpy()))
        elif getattr(layer, "bias", None) is not None:
            layer.bias.assign(rng.normal(size=layer.bias.shape))
    return model


def norms_in(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]


def chain(shape, *layers):
    return unsettled(keras.Sequential([keras.Input(shape), *layers]))


def reasons(folded):
    return {one.name: one.reason for one in folded.report.normalizations}


def random_affine(n, seed=1):
    rng = np.random.default_rng(seed)
    return Affine(rng.normal(size=n), rng.normal(size=n))


LAYERS_BEFORE = {
    "Dense": ((5,), lambda: keras.layers.Dense(3)),
    "Dense without bias": ((5,), lambda: keras.layers.Dense(3, use_bias=False)),
    "Dense on sequences": ((7, 5), lambda: keras.layers.Dense(3)),
    "Conv1D causal": ((9, 4), lambda: keras.layers.Conv1D(6, 3, padding="causal", groups=2)),
    "Conv2D same": ((9, 8, 4), lambda: keras.layers.Conv2D(6, 3, padding="same", strides=2)),
    "Conv3D": ((5, 5, 5, 2), lambda: keras.layers.Conv3D(3, 2, use_bias=False)),
    "DepthwiseConv1D": ((9, 3), lambda: keras.layers.DepthwiseConv1D(3, depth_multiplier=2)),
    "DepthwiseConv2D": ((9, 8, 3), lambda: keras.layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same")),
    "SeparableConv1D": ((9, 3), lambda: keras.layers.SeparableConv1D(5, 3, depth_multiplier=2)),
    "SeparableConv2D": ((9, 8, 3), lambda: keras.layers.SeparableConv2D(5, 3, use_bias=False)),
    "Conv1DTranspose": ((9, 3), lambda: keras.layers.Conv1DTranspose(5, 3, strides=2)),
    "Conv2DTranspose": ((5, 6, 3), lambda: keras.layers.Conv2DTranspose(4, 3, strides=2, padding="same")),
    "Conv3DTranspose": ((3, 3, 3, 2), lambda: keras.layers.Conv3DTranspose(3, 2, use_bias=False)),
}
LAYERS_AFTER = {
    name: value for name, value in LAYERS_BEFORE.items() if "Transpose" not in name and "causal" not in name
} | {
    "Conv1D in groups": ((9, 4), lambda: keras.layers.Conv1D(6, 3, groups=2)),
    "Conv2D same": ((9, 8, 4), lambda: keras.layers.Conv2D(6, 1, padding="same", strides=2, activation="relu")),
    "Conv2D dilated": ((9, 8, 4), lambda: keras.layers.Conv2D(6, 3, dilation_rate=2, groups=2)),
    "DepthwiseConv2D": ((9, 8, 3), lambda: keras.layers.DepthwiseConv2D(3, depth_multiplier=2)),
}


@pytest.mark.parametrize("norm", NORMS, ids=["keras", "keras_bn"])
@pytest.mark.parametrize("name", LAYERS_BEFORE)
def test_a_normalization_goes_into_the_layer_before_it(name, norm):
    shape, layer = LAYERS_BEFORE[name]
    model = chain(shape, layer(), norm(), keras.layers.Activation("tanh"))
    folded = keras_bn.fold(model)
    assert folded.report.absorbed == 1
    assert (len(folded.model.layers), len(norms_in(folded.model))) == (2, 0)
    x = np.random.default_rng(2).normal(size=(4, *shape)).astype("float32")
    np.testing.assert_allclose(folded.model(x), model(x), atol=2e-5)


@pytest.mark.parametrize("name", LAYERS_AFTER)
def test_a_normalization_goes_into_the_layer_after_it(name):
    shape, layer = LAYERS_AFTER[name]
    model = chain(shape, keras.layers.Activation("relu"), keras.layers.BatchNormalization(), layer())
    folded = keras_bn.fold(model)
    assert folded.report.absorbed == 1
    x = np.random.default_rng(2).normal(size=(4, *shape)).astype("float32")
    np.testing.assert_allclose(folded.model(x), model(x), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel_shape", [(4, 6), (3, 4, 6), (3, 2, 4, 6)])
def test_fold_conv_scales_each_output_channel_of_convolutions_and_dense_layers(kernel_shape):
    rng = np.random.default_rng(0)
    kernel, bias, affine = rng.normal(size=kernel_shape), rng.normal(size=6), random_affine(6)
    window = rng.normal(size=kernel_shape[:-1])  # One position of the convolution.
    expected = affine.scale * (np.tensordot(window, kernel, window.ndim) + bias) + affine.shift
    folded, folded_bias = weights.fold_conv(kernel, bias, affine)
    np.testing.assert_allclose(np.tensordot(window, folded, window.ndim) + folded_bias, expected, rtol=1e-12)


def test_folded_weights_are_nearer_to_the_truth_than_those_of_pytorch():
    torch = pytest.importorskip("torch")
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 16, 32)).astype("float32")
    bias, gamma, beta, mean = rng.normal(size=(4, 32)).astype("float32")
    variance = rng.uniform(0.01, 2, 32).astype("float32")
    exact, _ = weights.fold_conv(kernel, bias, weights.affine_of(gamma, beta, mean, variance, 1e-3))
    theirs, _ = fuse_conv_bn_weights(
        *(torch.tensor(v) for v in (kernel.transpose(3, 2, 0, 1), bias, mean, variance)),
        1e-3,
        *(torch.tensor(v) for v in (gamma, beta)),
    )
    theirs = theirs.detach().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_allclose(theirs, exact, rtol=1e-5)
    assert np.abs(exact.astype("float32") - exact).sum() < 0.7 * np.abs(theirs - exact).sum()


def test_fold_depthwise_conv_follows_the_order_of_output_channels():
    rng = np.random.default_rng(0)
    kernel, bias, affine = rng.normal(size=(3, 2, 4, 5)), rng.normal(size=20), random_affine(20)
    window = rng.normal(size=(3, 2, 4))
    output = np.einsum("hwc,hwcm->cm", window, kernel).ravel() + bias
    folded, folded_bias = weights.fold_depthwise_conv(kernel, bias, affine)
    got = np.einsum("hwc,hwcm->cm", window, folded).ravel() + folded_bias
    np.testing.assert_allclose(got, affine.scale * output + affine.shift, rtol=1e-12)


def test_fold_transposed_conv_scales_the_last_axis_but_one():
    rng = np.random.default_rng(0)
    kernel, bias, affine, x = rng.normal(size=(3, 2, 5, 4)), rng.normal(size=5), random_affine(5), rng.normal(size=4)
    folded, folded_bias = weights.fold_transposed_conv(kernel, bias, affine)
    np.testing.assert_allclose(folded @ x + folded_bias, affine.scale * (kernel @ x + bias) + affine.shift, rtol=1e-12)


def test_fold_into_conv_moves_the_shift_into_the_bias_of_convolutions_and_dense_layers():
    rng = np.random.default_rng(0)
    affine = random_affine(4)
    for shape in ((4, 6), (3, 2, 4, 6)):
        kernel, bias, window = rng.normal(size=shape), rng.normal(size=6), rng.normal(size=shape[:-1])
        expected = np.tensordot(affine.scale * window + affine.shift, kernel, window.ndim) + bias
        folded, folded_bias = weights.fold_into_conv(affine, kernel, bias)
        np.testing.assert_allclose(np.tensordot(window, folded, window.ndim) + folded_bias, expected, rtol=1e-12)


def test_fold_into_conv_knows_the_channels_of_each_group():
    rng = np.random.default_rng(0)
    kernel, affine, window = rng.normal(size=(3, 2, 6)), random_affine(4), rng.normal(size=(3, 4))

    def grouped(window, kernel):
        return np.concatenate(
            [np.tensordot(window[:, 2 * g : 2 * g + 2], kernel[..., 3 * g : 3 * g + 3], 2) for g in (0, 1)]
        )

    folded, bias = weights.fold_into_conv(affine, kernel, None)
    expected = grouped(affine.scale * window + affine.shift, kernel)
    np.testing.assert_allclose(grouped(window, folded) + bias, expected, rtol=1e-12)


def test_fold_into_depthwise_conv_sums_the_kernel_for_the_bias():
    rng = np.random.default_rng(0)
    kernel, affine, window = rng.normal(size=(3, 4, 2)), random_affine(4), rng.normal(size=(3, 4))
    folded, bias = weights.fold_into_depthwise_conv(affine, kernel, None)
    expected = np.einsum("kc,kcm->cm", affine.scale * window + affine.shift, kernel).ravel()
    np.testing.assert_allclose(np.einsum("kc,kcm->cm", window, folded).ravel() + bias, expected, rtol=1e-12)


def test_affine_of_is_the_normalization_in_inference():
    rng = np.random.default_rng(0)
    gamma, beta, mean, variance, x = rng.uniform(0.5, 2, (5, 7))
    affine = weights.affine_of(gamma, beta, mean, variance, 0.1)
    np.testing.assert_allclose(affine.scale * x + affine.shift, gamma * (x - mean) / np.sqrt(variance + 0.1) + beta)


def test_fold_affine_composes():
    first, second, x = random_affine(3), random_affine(3, seed=2), np.array([1.0, -2.0, 3.0])
    both = weights.fold_affine(first, second)
    expected = second.scale * (first.scale * x + first.shift) + second.shift
    np.testing.assert_allclose(both.scale * x + both.shift, expected)


def test_folded_weights_are_computed_in_float64_and_cast_last():
    """A scale and its inverse: in float32 from one to the next the rounding of the first would stay."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.add(keras.layers.BatchNormalization(center=False, epsilon=0.0))
    model.add(keras.layers.BatchNormalization(center=False, epsilon=0.0))
    kernel = np.float32(1.1)
    model.layers[0].kernel.assign([[kernel]])
    for layer, gamma in zip(model.layers[1:], (np.float32(3.3), np.float32(0.7)), strict=True):
        layer.gamma.assign([gamma])
    expected = np.float32(np.float64(kernel) * np.float64(np.float32(3.3)) * np.float64(np.float32(0.7)))
    assert keras_bn.fold(model).model.layers[0].kernel.numpy()[0, 0] == expected


def test_a_chain_of_normalizations_is_absorbed_whole():
    norm = keras.layers.BatchNormalization
    folded = keras_bn.fold(
        chain((6, 6, 2), keras.layers.Conv2D(3, 3), norm(), keras.layers.Dropout(0.5), norm(), norm())
    )
    assert [type(layer).__name__ for layer in folded.model.layers] == ["Conv2D"]


def test_a_normalization_between_two_layers_goes_back_and_one_after_relu_goes_on():
    model = chain(
        (8, 8, 2),
        keras.layers.Conv2D(3, 3),
        keras.layers.BatchNormalization(name="back"),
        keras.layers.ReLU(),
        keras.layers.BatchNormalization(name="on"),
        keras.layers.Conv2D(4, 3, name="second"),
        keras.layers.BatchNormalization(name="back_too"),
    )
    report = keras_bn.fold(model).report
    assert {one.name: one.into for one in report.normalizations} == {
        "back": [model.layers[0].name],
        "on": ["second"],
        "back_too": ["second"],
    }


def test_what_nobody_absorbs_stays_as_one_multiply_add():
    norm = keras.layers.BatchNormalization
    model = chain((4,), keras.layers.ReLU(name="r"), norm(name="a"), norm(name="b"), keras.layers.ReLU(name="s"))
    folded = keras_bn.fold(model)
    assert [type(layer).__name__ for layer in folded.model.layers] == ["ReLU", "Rescaling", "ReLU"]
    assert reasons(folded)["a"] == (
        "ReLU 'r' before it has no weights, and so nothing to absorb it with (Dense and convolutions have); "
        "ReLU 's' after it has no weights, and so nothing to absorb it with (Dense and convolutions have)"
    )
    assert reasons(folded)["b"] == ""
    assert str(folded.report).endswith("What stays is computed as a multiply-add, and everything else is as before.")


class Twice(keras.layers.Dense):
    """What it computes is its own."""

    def call(self, inputs):
        return super().call(super().call(inputs))


def test_why_a_normalization_stays_is_said_as_it_is():
    def reason(*layers, shape=(4,)):
        (text,) = reasons(keras_bn.fold(chain(shape, *layers))).values()
        return text

    norm, dense = keras.layers.BatchNormalization, keras.layers.Dense
    assert reason(Twice(4, name="t"), norm()).startswith(
        "Twice 't' before it is a subclass of Dense, which may compute something else; "
    )
    assert reason(dense(4), keras.layers.LayerNormalization(name="l"), norm()).startswith(
        "LayerNormalization 'l' before it is no layer that absorbs it (Dense and convolutions do); "
    )
    assert reason(norm(), keras.layers.Conv2DTranspose(2, 3, name="up"), shape=(5, 5, 1)) == (
        "only an input of the model is before it; Conv2DTranspose 'up' after it adds up fewer inputs at its edges, "
        "where the shift would be another"
    )
    lora = dense(4, name="adapted")
    lora.build((None, 4))
    lora.enable_lora(1)
    assert "Dense 'adapted' before it is quantized or adapted (LoRA)" in reason(lora, norm())


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_a_multiply_add_keeps_its_axis(axis):
    model = chain((3, 4, 5), keras.layers.BatchNormalization(axis=axis))
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype("float32")
    np.testing.assert_allclose(keras_bn.fold(model).model(x), model(x), atol=1e-5)


def test_several_axes_stay_as_a_multiply_add():
    model = chain((3, 4, 5), keras.layers.Conv2D(6, 1), keras_bn.BatchNormalization(axis=[1, 3], name="norm"))
    folded = keras_bn.fold(model)
    assert "it normalizes another axis than the channels of Conv2D" in reasons(folded)["norm"]
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype("float32")
    np.testing.assert_allclose(folded.model(x), model(x), atol=1e-5)


def test_zero_padding_refuses_a_shift_but_not_a_scale():
    relu, conv = keras.layers.ReLU, lambda: keras.layers.Conv2D(2, 3, padding="same")
    shifted = chain((6, 6, 2), relu(), keras.layers.BatchNormalization(name="norm"), conv())
    assert "pads with zeros, which the shift would not reach" in reasons(keras_bn.fold(shifted))["norm"]
    scaled = chain((6, 6, 2), relu(), keras.layers.BatchNormalization(center=False), conv())
    scaled.layers[1].moving_mean.assign([0, 0])
    assert keras_bn.fold(scaled).report.absorbed == 1


def test_an_activation_inside_the_convolution_refuses():
    model = chain(
        (6, 6, 2), keras.layers.Conv2D(3, 3, activation="relu", name="c"), keras.layers.BatchNormalization(name="n")
    )
    assert reasons(keras_bn.fold(model))["n"].startswith("Conv2D 'c' before it has an activation inside")


def test_another_axis_than_the_channels_refuses():
    model = chain((6, 6, 2), keras.layers.Conv2D(3, 3), keras.layers.BatchNormalization(axis=1, name="n"))
    assert "it normalizes another axis than the channels of Conv2D" in reasons(keras_bn.fold(model))["n"]


def test_a_convolution_whose_raw_output_is_used_too_is_left_alone():
    x = keras.Input((6, 6, 2))
    y = keras.layers.Conv2D(3, 3, name="c")(x)
    z = keras.layers.BatchNormalization(name="n")(y)
    branch = unsettled(keras.Model(x, keras.layers.Add()([y, z])))
    output = unsettled(keras.Model(x, [y, z]))
    for model in (branch, output):
        assert "Conv2D 'c' before it is also used without the normalization" in reasons(keras_bn.fold(model))["n"]


def test_residual_branches_fold_each_on_its_own():
    x = keras.Input((6, 6, 3))
    y = keras.layers.BatchNormalization()(keras.layers.Conv2D(3, 3, padding="same")(x))
    z = keras.layers.BatchNormalization()(keras.layers.Conv2D(3, 1)(x))
    model = unsettled(keras.Model(x, keras.layers.ReLU()(keras.layers.Add()([y, z]) + x)))
    folded = keras_bn.fold(model)
    assert (folded.report.absorbed, len(norms_in(folded.model))) == (2, 0)


def test_a_normalization_before_two_convolutions_goes_into_both():
    x = keras.Input((6, 6, 3))
    y = keras.layers.BatchNormalization(name="n")(keras.layers.ReLU()(x))
    a, b = keras.layers.Conv2D(2, 3, name="a"), keras.layers.Conv2D(2, 3, name="b")
    folded = keras_bn.fold(unsettled(keras.Model(x, [a(y), b(y)])))
    assert sorted(folded.report.normalizations[0].into) == ["a", "b"]


def test_shared_layers_fold_where_all_their_uses_agree():
    a, b = keras.Input((4,)), keras.Input((4,))
    dense, norm = keras.layers.Dense(3), keras.layers.BatchNormalization()
    both = unsettled(keras.Model([a, b], [norm(dense(a)), norm(dense(b))]))
    folded = keras_bn.fold(both)
    assert folded.report.absorbed == 1
    assert sum(isinstance(layer, keras.layers.Dense) for layer in folded.model.layers) == 1


def test_shared_layers_refuse_where_one_use_differs():
    a, b = keras.Input((4,)), keras.Input((4,))
    dense, norm = keras.layers.Dense(3, name="d"), keras.layers.BatchNormalization(name="n")
    one_normalized = unsettled(keras.Model([a, b], [norm(dense(a)), dense(b)]))
    assert (
        "Dense 'd' before it is shared with a use that is not normalized" in reasons(keras_bn.fold(one_normalized))["n"]
    )
    dense, other = keras.layers.Dense(3), keras.layers.Dense(3)
    norm = keras.layers.BatchNormalization(name="n")
    two_layers = unsettled(keras.Model([a, b], [norm(dense(a)), norm(other(b))]))
    assert "it is shared, and not all its uses follow the same layer" in reasons(keras_bn.fold(two_layers))["n"]


def test_a_following_layer_that_also_takes_something_else_is_left_alone():
    a, b = keras.Input((4,)), keras.Input((4,))
    dense, norm = keras.layers.Dense(3, name="d"), keras.layers.BatchNormalization(name="n")
    folded = keras_bn.fold(unsettled(keras.Model([a, b], [dense(norm(keras.layers.ReLU()(a))), dense(b)])))
    assert "Dense 'd' after it is also used without the normalization" in reasons(folded)["n"]


def test_nested_models_are_laid_out_and_folded_across_their_borders():
    inner = keras.Sequential([keras.Input((6, 6, 2)), keras.layers.Conv2D(3, 3, name="c")], name="inner")
    x = keras.Input((6, 6, 2))
    y = keras.layers.BatchNormalization(name="outside")(inner(x))
    model = unsettled(
        keras.Model(x, keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Conv2D(2, 3, name="c")])(y))
    )
    folded = keras_bn.fold(model)
    assert folded.report.normalizations[0].into == ["c"]
    assert len({layer.name for layer in folded.model.layers}) == len(folded.model.layers) == 3


def test_a_nested_model_used_twice_is_folded_once():
    inner = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()], name="tower"
    )
    a, b = keras.Input((4,)), keras.Input((4,))
    folded = keras_bn.fold(unsettled(keras.Model([a, b], keras.layers.Subtract()([inner(a), inner(b)]))))
    assert (folded.report.absorbed, sum(isinstance(v, keras.layers.Dense) for v in folded.model.layers)) == (1, 1)


def test_a_normalization_inside_a_wrapper_stays_and_is_reported():
    inner = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization(name="n")], name="i"
    )
    model = chain((5, 4), keras.layers.TimeDistributed(inner, name="steps"))
    folded = keras_bn.fold(model)
    assert reasons(folded) == {"steps/i/n": "it is inside a layer whose graph is not known"}
    assert len(norms_in(folded.model)) == 1


def test_an_activation_of_the_normalization_moves_along():
    absorbed = chain((6, 6, 2), keras.layers.Conv2D(3, 3), keras_bn.BatchNormalization(activation="relu"))
    assert keras_bn.fold(absorbed).model.layers[0].activation is keras.activations.relu
    kept = chain((4,), keras_bn.BatchNormalization(activation="relu"), keras.layers.Dense(2))
    assert [type(layer).__name__ for layer in keras_bn.fold(kept).model.layers] == ["Rescaling", "Activation", "Dense"]


def test_training_true_of_the_author_does_not_survive():
    x = keras.Input((4,))
    y = keras.layers.Dropout(0.5)(
        keras.layers.BatchNormalization()(keras.layers.Dense(3)(x), training=True), training=True
    )
    folded = keras_bn.fold(unsettled(keras.Model(x, y)))
    assert folded.report.absorbed == 1


def test_mixed_precision_keeps_its_policy():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = chain((8, 8, 2), keras.layers.Conv2D(3, 3), keras.layers.BatchNormalization(), keras.layers.ReLU())
        folded = keras_bn.fold(model)
    finally:
        keras.config.set_dtype_policy("float32")
    assert (folded.model.layers[0].compute_dtype, folded.model.layers[0].kernel.dtype) == ("float16", "float32")
    assert folded.report.tolerance == 2e-2


def test_the_original_is_left_as_it_was_and_shares_no_weights():
    model = chain((6, 6, 2), keras.layers.Conv2D(3, 3), keras.layers.BatchNormalization(), keras.layers.Conv2D(2, 3))
    before = [v.numpy().tobytes() for v in model.variables]
    folded = keras_bn.fold(model)
    for variable in folded.model.variables:
        variable.assign(variable * 0)
    assert [v.numpy().tobytes() for v in model.variables] == before


def test_the_folded_model_is_saved_and_loaded_by_stock_keras(tmp_path):
    model = chain(
        (6, 6, 2), keras.layers.ReLU(), keras_bn.BatchNormalization(), keras.layers.Conv2D(3, 3, padding="same")
    )
    folded = keras_bn.fold(model)
    folded.model.save(tmp_path / "folded.keras")
    with keras.saving.custom_object_scope({}):
        again = keras.models.load_model(tmp_path / "folded.keras", safe_mode=True)
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 2)).astype("float32")
    np.testing.assert_array_equal(again(x), folded.model(x))
    assert not any(type(layer).__module__.startswith("keras_bn") for layer in again._flatten_layers())


def test_the_proof_raises_above_the_tolerance():
    model = chain((6, 6, 2), keras.layers.Conv2D(3, 3), keras.layers.BatchNormalization())
    with pytest.raises(ValueError, match=r"`tolerance` must be above the error.*tolerance=1e-12, relative error"):
        keras_bn.fold(model, tolerance=1e-12)


def test_the_proof_catches_a_layer_that_computes_something_else(monkeypatch):
    monkeypatch.setattr(
        "keras_bn.folding.absorbing.fold_conv",
        lambda kernel, bias, affine: (kernel * affine.scale, bias * affine.scale),
    )
    with pytest.raises(ValueError, match="the model is not fit to be folded"):
        keras_bn.fold(chain((4,), keras.layers.Dense(3), keras.layers.BatchNormalization()))


def test_given_inputs_are_part_of_the_proof():
    model = chain((4,), keras.layers.Dense(3), keras.layers.BatchNormalization())
    with pytest.raises(ValueError, match=r"(?i)incompatible|expected"):
        keras_bn.fold(model, check=np.ones((2, 5), "float32"))


def test_models_of_strings_need_inputs_for_the_proof():
    lookup = keras.layers.StringLookup(vocabulary=["shirt", "shoe"], output_mode="one_hot")
    x = keras.Input((), dtype="string")
    model = unsettled(keras.Model(x, keras.layers.BatchNormalization()(keras.layers.Dense(3)(lookup(x)))))
    with pytest.raises(ValueError, match="`check` must be given for a model that takes strings"):
        keras_bn.fold(model)
    assert keras_bn.fold(model, check=tf.constant(["shoe", "hat"])).report.absorbed == 1


def test_the_report_prints_counts_errors_and_reasons():
    model = chain(
        (4,),
        keras.layers.Dense(3, name="d"),
        keras.layers.BatchNormalization(name="n"),
        keras.layers.ReLU(),
        keras.layers.BatchNormalization(name="m"),
    )
    text = str(keras_bn.fold(model).report)
    assert text.startswith("1 of 2 normalizations absorbed; largest error ")
    *rows, last = text.splitlines()[3:]
    assert [line.split()[:2] for line in rows] == [["n", "d"], ["m", "-"]]
    assert last.startswith("What stays is computed as a multiply-add")
    assert "its output is an output of the model" in text


def test_wrong_models_are_named():
    class Subclassed(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(TypeError, match=r"`model` must be a `keras.Model`. Received: model=3 of type int"):
        keras_bn.fold(3)
    with pytest.raises(ValueError, match=r"`model` must be a functional or sequential Keras model.*type Subclassed"):
        keras_bn.fold(Subclassed())
    two = keras.Sequential([keras.layers.Concatenate(), keras_bn.BatchNormalization()])
    two((np.ones((2, 3)), np.ones((2, 1))))
    with pytest.raises(ValueError, match=r"of which the first layer takes several tensors.*type Sequential"):
        keras_bn.fold(two)


def test_a_sequential_model_that_is_not_built_is_called_that():
    layers = [keras.layers.Dense(2), keras_bn.BatchNormalization()]
    text = r"`model` must be built: give it an `Input`, or call it once on a batch of data. Received: model='{}', which"
    for model in (keras.Sequential(layers, name="open"), keras.Sequential([keras.Sequential(layers)], name="open")):
        with pytest.raises(ValueError, match=text.format("open")):
            keras_bn.fold(model)
    model = keras.Sequential(layers)
    model(np.ones((2, 3)))
    keras_bn.fold(model)


def on_random_images(network, n=24, size=64):
    keras.utils.set_random_seed(0)
    model = network(weights=None, input_shape=(size, size, 3), classes=10)
    images = np.random.default_rng(0).uniform(0, 1, (n, size, size, 3)).astype("float32")
    keras_bn.recalibrate(model, images, batch_size=n, verbose=0)
    return model, images


APPLICATIONS = {
    # How many of how many: the others have a ReLU or a concatenation on both sides.
    "MobileNetV2": (52, 52),
    "ResNet50V2": (32, 49),
    "EfficientNetB0": (49, 49),
    "DenseNet121": (59, 121),
}


@pytest.mark.parametrize(
    "name", [n if n == "MobileNetV2" else pytest.param(n, marks=pytest.mark.slow) for n in APPLICATIONS]
)
def test_keras_applications_fold_within_the_bar(name):
    model, images = on_random_images(getattr(keras.applications, name))
    report = keras_bn.fold(model, check=images[:4]).report
    assert (report.absorbed, len(report.normalizations)) == APPLICATIONS[name]
    assert report.relative_error < 1e-4
    assert all(bool(one.reason) != bool(one.into) for one in report.normalizations)


@pytest.mark.parametrize("norm", NORMS, ids=["keras", "keras_bn"])
@pytest.mark.parametrize("name", ["fashion_cnn", "resnet"])
def test_the_reference_networks_fold_whole(name, norm):
    keras.utils.set_random_seed(0)
    model = getattr(networks, name)(width=8, normalization=norm)
    images = np.random.default_rng(0).uniform(0, 1, (32, *networks.IMAGE_SHAPE)).astype("float32")
    keras_bn.recalibrate(model, images, verbose=0)
    folded = keras_bn.fold(model, check=images)
    assert (folded.report.absorbed, norms_in(folded.model)) == (len(norms_in(model)), [])
    assert folded.report.relative_error < 1e-4
    np.testing.assert_allclose(folded.model(images), model(images), atol=1e-5)


def test_a_model_that_rounds_more_than_the_tolerance_itself_is_folded_and_exported(tmp_path):
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(256, 8)), rng.normal(size=(16, 256))
    # Sums of large numbers that cancel but for a thousandth.
    check = np.concatenate([x, x + 1e-3 * rng.normal(size=x.shape)], 1).astype("float32")
    model = keras.Sequential([keras.Input((512,)), keras.layers.Dense(8), keras_bn.BatchNormalization()])
    model.layers[0].set_weights([np.concatenate([kernel, -kernel]), np.zeros(8)])
    model.layers[1].moving_variance.assign(rng.uniform(1e-4, 3e-4, 8))
    with pytest.raises(ValueError, match="`tolerance` must be above the error of the folded model"):
        keras_bn.fold(model, check, tolerance=1e-5)
    folded, report = keras_bn.fold(model, check)
    dense = check.astype("float64") @ np.concatenate([kernel, -kernel]).astype("float32").astype("float64")
    exact = dense / np.sqrt(model.layers[1].moving_variance.numpy().astype("float64") + 1e-3)
    errors = [np.abs(one(check) - exact).max() / np.abs(exact).max() for one in (model, folded)]
    assert report.absorbed == 1
    assert 1e-4 < report.tolerance == pytest.approx(4 * errors[0], rel=0.01)
    assert report.relative_error <= report.tolerance
    assert keras_bn.export(model, tmp_path / "m", warmup=check).errors.relative <= report.tolerance


def test_no_model_rounds_so_much_itself_that_anything_would_pass():
    # float32 holds nothing of 1 beside 1e9: the model itself is off by all of it.
    loses_all = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: (x + 1e9) - 1e9)])
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    assert proof.rounding_error(loses_all, x) > 0.5
    tolerance = proof.Tolerance(loses_all)
    assert not tolerance.allows(0.02, [x])
    assert tolerance.allows(0.009, [x])


def test_a_model_that_only_folding_makes_round_is_refused():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, use_bias=False), keras_bn.BatchNormalization()])
    model.layers[0].set_weights([np.eye(4)])
    model.layers[1].moving_mean.assign([1e5] * 4)
    model.layers[1].moving_variance.assign([1e-2] * 4)
    check = 1e5 + np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    with pytest.raises(ValueError, match=r"or the model is not fit to be folded\. Received"):
        keras_bn.fold(model, check)
    model.layers[1].moving_variance.assign([0.3] * 4)
    with pytest.raises(ValueError, match="It was tried on random inputs; give real ones, as `check`"):
        keras_bn.fold(model, tolerance=1e-30)


def test_dtype_policies_are_as_before_when_a_layer_refuses_float64():
    class Single(keras.layers.Layer):
        def call(self, x):
            if x.dtype == "float64":
                raise TypeError("no float64")
            return x

    layers = [keras.layers.Dense(4, dtype="mixed_bfloat16"), Single(), keras_bn.BatchNormalization()]
    model = keras.Sequential([keras.Input((4,)), *layers])
    before = [layer.dtype_policy for layer in model._flatten_layers()]
    assert proof.rounding_error(model, np.ones((2, 4), "float32")) == 0.0
    assert [layer.dtype_policy for layer in model._flatten_layers()] == before


def test_sizes_that_are_too_small_are_asked_of_a_model_once_and_not_for_numbers_of_each_kind():
    traced = []

    class Watching(keras.layers.Layer):
        def call(self, x):
            if tf.is_symbolic_tensor(x):
                traced.append(x.shape[1])
            return x

    layers = [keras.layers.Conv1D(3, 1), keras.layers.BatchNormalization(), Watching(), keras.layers.Cropping1D(100)]
    model = keras.Sequential([keras.Input((None, 4)), *layers])
    traced.clear()
    (batch, *_) = trials.proof_batches(model)
    assert batch.shape == (3, 256, 4)
    assert traced == [64, 128, 256]


def test_of_what_a_model_rounds_only_as_much_is_measured_as_it_takes(monkeypatch):
    asked = []

    def rounding_error(model, inputs):
        asked.append(inputs)
        return {"little": 1e-5, "more": 1e-3, "most": 1e-2}[inputs]

    monkeypatch.setattr(proof, "rounding_error", rounding_error)
    tolerance = proof.Tolerance(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]))
    batches = ["little", "more", "most"]
    assert tolerance.allows(5e-5, batches)
    assert asked == []
    assert tolerance.allows(3e-3, batches)
    assert asked == ["little", "more"]
    assert tolerance.value == 4e-3
    assert tolerance.allows(9e-3, ["others"])
    assert asked == batches
    assert not tolerance.allows(2e-2, batches)
    assert not tolerance.allows(float("nan"), batches)
    assert asked == batches


def test_what_ragged_inputs_become_is_compared():
    x = keras.Input((None, 4), ragged=True)
    model = unsettled(keras.Model(x, keras_bn.BatchNormalization()(x)))
    ragged = tf.RaggedTensor.from_row_lengths(tf.ones((9, 4)), [2, 3, 4])
    assert proof.errors_between(model, keras_bn.revert(model, ragged), [ragged])[0].relative < 1e-6
    other = unsettled(keras.models.clone_model(model), seed=1)
    assert proof.errors_between(model, other, [ragged])[0].relative > 1e-2


def test_both_parts_of_complex_numbers_are_compared():
    one, other = tf.constant([3 + 4j]), tf.constant([3 + 5j])
    assert proof.largest_errors(one, one) == (0.0, 0.0)
    assert proof.largest_errors(one, other) == (1.0, 0.2)


def test_strings_and_numbers_are_given_together():
    kinds, sizes = keras.Input((1,), dtype="string", name="kind"), keras.Input((2,), name="size")
    one_hot = keras.layers.StringLookup(vocabulary=["hat", "shoe"], output_mode="one_hot")(kinds)
    dense = keras.layers.Dense(3)(keras.layers.Concatenate()([one_hot, sizes]))
    model = unsettled(keras.Model({"kind": kinds, "size": sizes}, keras.layers.BatchNormalization()(dense)))
    examples = {"kind": np.array([["hat"], ["shoe"], ["?"]], object), "size": np.ones((3, 2))}
    assert norms_in(keras_bn.fold(model, examples).model) == []
    assert len(norms_in(keras_bn.convert(model, examples))) == 1
    assert len(keras_bn.drift(model, examples)) == 1


class Named(keras.layers.Layer):
    """The name of the likeliest class."""

    def call(self, x):
        return tf.gather(tf.constant(["a", "b", "c"]), tf.argmax(x, -1))

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape[:1], "string")


@pytest.mark.parametrize("numbers_too", [True, False])
def test_models_that_name_the_class_are_folded_converted_and_exported(tmp_path, numbers_too):
    x = keras.Input((4,))
    scores = keras.layers.Dense(3)(keras.layers.BatchNormalization()(x))
    name = Named(name="name")(scores)
    model = unsettled(keras.Model(x, {"scores": scores, "name": name} if numbers_too else name))
    examples = np.random.default_rng(0).normal(size=(9, 4)).astype("float32")
    for options in ({}, {"check": examples}):
        assert norms_in(keras_bn.fold(model, **options).model) == []
        keras_bn.convert(model, **options)
    for options in ({}, {"warmup": examples}):
        served = tf.saved_model.load(keras_bn.export(model, tmp_path, **options).path).signatures["serving_default"]
        name = served(tf.constant(examples))["name"]
        np.testing.assert_array_equal(name, model(examples)["name"] if numbers_too else model(examples))
    mirrored = keras.Model(x, Named()(-scores))
    if not numbers_too:
        assert proof.errors_between(model, mirrored, [examples])[0].absolute == 1.0


FAR = {
    "Dense after it": ((3,), lambda: [keras.layers.Dense(2)]),
    "an activation after it": ((3,), lambda: [keras.layers.Activation("gelu"), keras.layers.Dense(2)]),
    "a convolution after it": ((5, 6, 3), lambda: [keras.layers.Conv2D(2, 3)]),
    "another normalization after it": ((3,), lambda: [keras_bn.BatchNormalization(), keras.layers.ReLU()]),
}


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("name", FAR)
def test_raw_features_far_from_zero_keep_their_digits(tmp_path, name, data_format):
    shape, layers = FAR[name]
    if data_format == "channels_first" and len(shape) > 1:
        pytest.skip("convolutions with channels first need a GPU")
    x = np.random.default_rng(0).normal(1e6, 3.0, (64, *shape)).astype("float32")
    before = keras.config.image_data_format()
    keras.config.set_image_data_format(data_format)
    try:
        norm = keras_bn.BatchNormalization()
        model = unsettled(keras.Sequential([keras.Input(shape), norm, *layers()]))
        norm.moving_mean.assign(np.full(3, 1e6))
        norm.moving_variance.assign([4.0, 9.0, 16.0])
        folded, report = keras_bn.fold(model)
        exported = keras_bn.export(model, tmp_path)
    finally:
        keras.config.set_image_data_format(before)
    in_float64 = keras.models.clone_model(
        model, clone_function=lambda layer: type(layer).from_config({**layer.get_config(), "dtype": "float64"})
    )
    in_float64.set_weights(model.get_weights())
    assert proof.errors_between(in_float64, folded, [x])[0].relative < 1e-6
    assert report.relative_error < 1e-6
    assert "its mean is too many standard deviations from zero" in report.normalizations[0].reason
    served = tf.saved_model.load(str(exported.path)).signatures["serving_default"]
    (answer,) = served(tf.constant(x)).values()
    assert proof.largest_errors(in_float64(x), answer).relative < 1e-6


@pytest.mark.parametrize("axis", [-1, 1])
def test_random_inputs_of_a_normalization_are_as_its_statistics_say(axis):
    sizes = (4, 30) if axis == 1 else (30, 4)
    known, other = keras.Input(sizes), keras.Input(sizes)
    norm = keras_bn.BatchNormalization(axis=axis)
    model = keras.Model([known, other], keras.layers.Add()([norm(keras.layers.Dropout(0.5)(known)), other]))
    norm.moving_mean.assign([0.0, -50.0, 1e4, 1e6])
    norm.moving_variance.assign([1.0, 4.0, 1e4, 9.0])
    drawn, unknown = trials.proof_batches(model)[0]
    drawn = np.moveaxis(drawn.numpy().astype("float64"), axis, -1).reshape(-1, 4)
    deviation = np.sqrt(np.array([1.0, 4.0, 1e4, 9.0]) + norm.epsilon)
    np.testing.assert_allclose((drawn.mean(0) - [0.0, -50.0, 1e4, 1e6]) / deviation, 0, atol=0.5)
    np.testing.assert_allclose(drawn.std(0) / deviation, 1, atol=0.5)
    assert abs(np.std(unknown) - 1) < 0.3


@pytest.mark.parametrize(("last", "ends"), [("softmax", (1, 0, 0)), ("tanh", (1, -1, 1)), ("relu", (0, 0, 0))])
def test_random_inputs_whose_outputs_are_all_saturated_are_warned_of(last, ends):
    dense = keras.layers.Dense(3, activation=last)
    model = chain((4,), keras.layers.BatchNormalization(), dense)
    assert norms_in(keras_bn.fold(model).model) == []
    dense.bias.assign([1e6 if end > 0 else -1e6 for end in ends])
    with pytest.warns(UserWarning, match=r"`check` should be given, .* nothing but 0, 1 and -1.*check=None"):
        assert keras_bn.fold(model).report.absolute_error == 0.0


def test_of_random_inputs_those_that_saturate_a_model_are_left_out():
    dense = keras.layers.Dense(3, activation="sigmoid")
    model = keras.Sequential([keras.Input((40,)), dense])
    for slope, largest in ((0.001, [False, True, False]), (0.1, [False, False])):
        dense.kernel.assign(np.full((40, 3), slope))
        assert [np.max(batch) > 100 for batch in trials.proof_batches(model)] == largest


def test_probabilities_of_many_classes_are_not_taken_for_saturated():
    trials.proof_batches(keras.Sequential([keras.Input((4,)), keras.layers.Dense(5000, activation="softmax")]))


class Drawing(keras.layers.Layer):
    """As the middle of a variational autoencoder that samples in inference too."""

    def __init__(self, seeded, **options):
        super().__init__(**options)
        self.seeded = seeded
        self.generator = keras.random.SeedGenerator() if seeded else None

    def call(self, x):
        return x + keras.random.normal(tf.shape(x), seed=self.generator) if self.seeded else x + tf.random.normal([3])

    def get_config(self):
        return {**super().get_config(), "seeded": self.seeded}


@pytest.mark.parametrize(
    ("seeded", "known_by"), [(True, "advance '.*seed_generator_state'"), (False, "same inputs differ by [0-9.]+ relat")]
)
def test_a_model_that_draws_random_numbers_is_called_that(tmp_path, seeded, known_by):
    model = chain((4,), keras.layers.Dense(3), keras.layers.BatchNormalization(), Drawing(seeded))
    refused = pytest.raises(ValueError, match=rf"`model` must compute the same each time.*draws random.*{known_by}")
    with refused:
        proof.check_repeats(model, [np.zeros((2, 4), "float32")])
    with refused:
        keras_bn.export(model, tmp_path)
    if not seeded:
        with refused:
            keras_bn.fold(model)
        with refused:
            keras_bn.convert(model)


def test_a_layer_that_draws_in_training_only_or_keeps_a_state_repeats_itself():
    layers = [keras.layers.Dropout(0.5), keras.layers.GaussianNoise(1.0), keras.layers.GRU(3, stateful=True)]
    model = keras.Sequential([keras.Input((5, 4), batch_size=2), *layers])
    proof.check_repeats(model, [np.ones((2, 5, 4), "float32")])
