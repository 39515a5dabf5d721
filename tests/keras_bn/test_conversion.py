"""Models change their normalizations for ours and back, and weights come in from elsewhere."""

import keras
import numpy as np
import pytest

import keras_bn

STOCK, OURS = keras.layers.BatchNormalization, keras_bn.BatchNormalization


def types(model):
    return [type(layer) for layer in model._flatten_layers() if isinstance(layer, STOCK)]


def unsettled(model, seed=0):
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model


def nested_model():
    """A normalization in a chain, in a nested model, in a wrapper, and a synchronized one."""
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), STOCK(axis=-1, momentum=0.9)], name="inner")
    x = keras.Input((6, 4))
    y = keras.layers.TimeDistributed(inner)(x)
    y = keras.layers.Lambda(lambda v: v * 2.0)(STOCK(synchronized=True, center=False)(y))
    return unsettled(keras.Model(x, keras.layers.GlobalAveragePooling1D()(y)))


def batch(shape=(5, 6, 4)):
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def test_every_normalization_changes_and_computes_the_same():
    model = nested_model()
    ours = keras_bn.convert(model)
    assert (types(model), types(ours)) == ([STOCK, STOCK], [OURS, OURS])
    np.testing.assert_allclose(ours(batch()), model(batch()), rtol=1e-5)
    back = keras_bn.revert(ours)
    assert types(back) == [STOCK, STOCK]
    np.testing.assert_array_equal(back(batch()), model(batch()))


def test_configuration_is_taken_along():
    ours = keras_bn.convert(nested_model())
    layers = [layer for layer in ours._flatten_layers() if isinstance(layer, OURS)]
    assert sorted((layer.momentum, layer.synchronized, layer.center) for layer in layers) == [
        (0.9, False, True),
        (0.99, True, False),
    ]


def test_training_goes_on_where_it_was():
    x, y = batch((32, 4)), batch((32, 1))
    keras.utils.set_random_seed(0)
    # No bias before the normalization: its gradient is rounding only, and Adam makes whole steps of that.
    dense = keras.layers.Dense(3, use_bias=False)
    model = keras.Sequential([keras.Input((4,)), dense, STOCK(), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, y, epochs=2, batch_size=8, shuffle=False, verbose=0)
    ours = keras_bn.convert(model)
    for one in (model, ours):
        one.fit(x, y, epochs=1, batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_allclose(ours.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)


def test_adapted_and_custom_layers_survive():
    class Doubler(keras.layers.Layer):
        def call(self, x):
            return 2 * x

    normalization = keras.layers.Normalization()
    normalization.adapt(batch((50, 4)) * 3 + 1)
    model = unsettled(keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), STOCK(), Doubler()]))
    model = keras.Sequential([keras.Input((4,)), normalization, model])
    np.testing.assert_allclose(keras_bn.convert(model)(batch((5, 4))), model(batch((5, 4))), rtol=1e-5)


def test_subclasses_of_the_author_are_left_alone():
    class Mine(keras.layers.BatchNormalization):
        pass

    model = keras.Sequential([keras.Input((4,)), Mine(), STOCK()])
    assert types(keras_bn.convert(model)) == [Mine, OURS]


def test_a_model_that_makes_its_normalizations_itself_is_refused():
    @keras.saving.register_keras_serializable("test_conversion")
    class Own(keras.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.norm = STOCK(name="hidden")

        def call(self, x):
            return self.norm(x)

    model = Own()
    with pytest.raises(ValueError, match=r"`model` must be built"):
        keras_bn.convert(model)
    model(batch((5, 4)))
    with pytest.raises(ValueError, match=r"one that makes them in its own code.*type Own, which makes \['hidden'\]"):
        keras_bn.convert(model)
    with pytest.raises(TypeError, match=r"`model` must be a `keras.Model`. Received: model=1 of type int"):
        keras_bn.revert(1)


@pytest.mark.parametrize(
    "options",
    [
        {"virtual_batch_size": 8},
        {"unbiased_variance": True},
        {"activation": "relu"},
        {"momentum": None},
        {"renorm": True, "renorm_clipping": "warmup"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_stock_keras_does_not_know_are_refused(options):
    model = keras.Sequential([keras.Input((4,)), OURS(name="special", **options)])
    with pytest.raises(ValueError, match=rf"only options that stock Keras knows.*'special' with .*{list(options)[-1]}"):
        keras_bn.revert(model)


def test_the_choice_of_kernel_does_not_hinder():
    model = keras.Sequential([keras.Input((4,)), OURS(kernel="plain")])
    assert types(keras_bn.revert(model)) == [STOCK]


@pytest.mark.parametrize(
    "name", ["MobileNetV2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ResNet50V2", "EfficientNetB0"))]
)
def test_keras_applications_go_both_ways_with_equal_outputs(name):
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3), classes=5)
    x = np.random.default_rng(0).uniform(0, 1, (24, 64, 64, 3)).astype("float32")
    keras_bn.recalibrate(model, x, verbose=0)
    x = x[:4]
    ours = keras_bn.convert(model)
    assert set(types(ours)) == {OURS}
    np.testing.assert_allclose(ours(x), model(x), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(keras_bn.revert(ours)(x), model(x))


@pytest.mark.parametrize("affine", [True, False])
def test_weights_come_in_from_pytorch(affine):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Identity(), torch.nn.BatchNorm2d(3, affine=affine))
    x = batch((8, 5, 5, 3))
    network(torch.tensor(x).permute(0, 3, 1, 2))
    network.eval()
    expected = network(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy()
    for kind in (STOCK, OURS):
        layer = kind(epsilon=1e-5)
        layer.build(x.shape)
        keras_bn.load_torch_weights(layer, network.state_dict(), "1")
        np.testing.assert_allclose(layer(x), expected, atol=1e-5)


def test_pytorch_entries_that_do_not_fit_are_refused():
    entries = {"bn1.running_mean": np.zeros(3), "bn1.running_var": np.ones(3), "bn1.weight": np.ones(3)}
    layer = OURS(epsilon=1e-5, scale=False, name="n")
    with pytest.raises(ValueError, match=r"`layer` must be built.*'n', not built"):
        keras_bn.load_torch_weights(layer, entries, "bn1")
    layer.build((None, 3))
    with pytest.raises(ValueError, match=r"`prefix` must be.*one of \['bn1.'\]. Received: prefix='bn2'."):
        keras_bn.load_torch_weights(layer, entries, "bn2")
    with pytest.raises(ValueError, match=r"`layer` must be made with scale=True. Received: layer='n' without."):
        keras_bn.load_torch_weights(layer, entries, "bn1")
    with pytest.raises(ValueError, match=r"`layer` must be made with epsilon=0.001.*'n' with epsilon=1e-05"):
        keras_bn.load_torch_weights(layer, entries, "bn1", epsilon=1e-3)
    wide = OURS(epsilon=1e-5, name="w")
    wide.build((None, 4))
    with pytest.raises(ValueError, match=r"as many channels.*'w' with 4, and 3 values of weight"):
        keras_bn.load_torch_weights(wide, entries, "bn1")


def test_weights_come_in_from_legacy_tf_keras():
    tf_keras = pytest.importorskip("tf_keras")
    legacy = tf_keras.layers.BatchNormalization(axis=-1, scale=False)
    x = batch((8, 5, 5, 3))
    for _ in range(3):
        legacy(x * 2 + 1, training=True)
    layer = OURS(scale=False)
    layer.build(x.shape)
    keras_bn.load_tf_keras_weights(layer, legacy)
    np.testing.assert_allclose(layer(x), legacy(x), atol=1e-5)
    with pytest.raises(ValueError, match=r"`legacy_layer` must be a batch normalization that is built"):
        keras_bn.load_tf_keras_weights(layer, tf_keras.layers.BatchNormalization())
