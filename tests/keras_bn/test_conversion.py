"""Models change their normalizations for ours and back, and weights come in from elsewhere."""

import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

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


def test_what_only_rounds_otherwise_becomes_stock_with_a_warning():
    x = np.random.default_rng(0).normal(1e6, 3.0, (64, 3)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), OURS(), keras.layers.Dense(2)])
    keras_bn.recalibrate(model, x, verbose=0)
    for check in (None, x):
        with pytest.warns(UserWarning, match=r"the same in float64, and round differently: outputs differ by 0\.0"):
            assert types(keras_bn.revert(model, check)) == [STOCK]


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
        {"momentum": None},
        {"renorm": True, "renorm_clipping": "warmup"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_stock_keras_does_not_know_are_refused(options):
    model = keras.Sequential([keras.Input((4,)), OURS(name="special", **options)])
    with pytest.raises(ValueError, match=rf"only options that stock Keras knows.*'special' with .*{list(options)[-1]}"):
        keras_bn.revert(model)


def test_groups_of_replicas_are_refused_until_they_are_all_or_none():
    model = unsettled(keras.Sequential([keras.Input((4,)), OURS(name="grouped", synchronized=8)]))
    with pytest.raises(ValueError, match=r"knows no groups of replicas.*layer 'grouped' with synchronized=8"):
        keras_bn.revert(model)
    for way_out in (True, False):
        model.layers[0].synchronized = way_out
        stock = keras_bn.revert(model)
        assert (type(stock.layers[0]), stock.layers[0].synchronized) == (STOCK, way_out)
        np.testing.assert_allclose(stock(batch((5, 4))), model(batch((5, 4))), rtol=1e-5)


def test_groups_of_replicas_are_saved_and_loaded(tmp_path):
    model = unsettled(keras.Sequential([keras.Input((4,)), OURS(synchronized=8)]))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].synchronized == 8
    np.testing.assert_array_equal(loaded(batch((5, 4))), model(batch((5, 4))))


def test_an_activation_becomes_a_layer_of_its_own():
    inputs = keras.Input((4,))
    norm = OURS(activation="relu", name="n")
    model = unsettled(keras.Model(inputs, norm(keras.layers.Dense(4)(norm(inputs)))))
    back = keras_bn.revert(keras.Sequential([model, OURS(activation="tanh", name="last")]))
    assert types(back) == [STOCK, STOCK]
    assert [type(layer).__name__ for layer in back.layers] == ["Functional", "BatchNormalization", "Activation"]
    assert back.layers[0].get_layer("n_activation").activation is keras.activations.relu
    np.testing.assert_allclose(back.layers[0](batch((5, 4))), model(batch((5, 4))), rtol=1e-5, atol=1e-6)


def test_an_activation_inside_a_wrapper_is_refused():
    model = keras.Sequential([keras.Input((3, 4)), keras.layers.TimeDistributed(OURS(activation="relu", name="n"))])
    with pytest.raises(ValueError, match=r"only options that stock Keras knows.*'n' with .*activation"):
        keras_bn.revert(model)


def test_options_of_training_go_into_every_converted_layer():
    model = nested_model()
    ours = keras_bn.convert(model, virtual_batch_size=32, zero_debias=True, momentum=None, synchronized=False)
    layers = [layer for layer in ours._flatten_layers() if isinstance(layer, OURS)]
    assert [(one.virtual_batch_size, one.zero_debias, one.momentum) for one in layers] == [(32, True, None)] * 2
    np.testing.assert_allclose(ours(batch()), model(batch()), rtol=1e-5)


def test_options_for_a_model_whose_layers_are_ours_already_are_refused():
    model = keras.Sequential([keras.Input((3,)), keras_bn.BatchNormalization()])
    with pytest.raises(ValueError, match=r"`options` must be for stock normalizations .* has none.*Received: momentum"):
        keras_bn.convert(model, momentum=None)
    keras_bn.convert(model)


def test_options_that_are_not_of_training_or_wrong_are_refused_at_once():
    with pytest.raises(ValueError, match=r"`options` must be of momentum, renorm, .* Received: epsilon, momentun\."):
        keras_bn.convert(nested_model(), momentun=0.9, epsilon=0.1)
    with pytest.raises(ValueError, match=r"`momentum` must be .*Received: momentum=2"):
        keras_bn.convert(nested_model(), momentum=2.0)


def test_two_classes_of_one_name_stay_what_they_are():
    def scaling_by(factor):
        class Scaling(keras.layers.Layer):
            def call(self, x):
                return factor * x

        return Scaling

    layers = [scaling_by(2.0)(name="a"), STOCK(), scaling_by(-3.0)(name="b")]
    model = unsettled(keras.Sequential([keras.Input((4,)), *layers]))
    np.testing.assert_allclose(keras_bn.convert(model)(batch((5, 4))), model(batch((5, 4))), rtol=1e-5)


def test_two_classes_of_one_name_in_one_wrapper_are_refused():
    def scaling_by(factor):
        class Scaling(keras.layers.Layer):
            def call(self, x):
                return factor * x

        return Scaling(name=f"by{abs(factor)}")

    inner = keras.Sequential([keras.Input((4,)), scaling_by(2), STOCK(), scaling_by(-3)])
    model = keras.Sequential([keras.Input((6, 4)), keras.layers.TimeDistributed(inner, name="steps")])
    with pytest.raises(ValueError, match=r"two classes or functions of one name.*'Scaling' twice in layer 'steps'"):
        keras_bn.convert(model)


def own_initializer(shape, dtype=None):
    return keras.ops.full(shape, 0.5, dtype)


def own_loss(y_true, y_pred):
    return keras.ops.mean((y_true - y_pred) ** 2, -1)


def test_a_functional_class_with_a_constructor_of_its_own_and_functions_of_its_own_is_converted():
    class Net(keras.Model):
        def __init__(self, width):
            inputs = keras.Input((4,), name="x")
            x = STOCK(name="n")(keras.layers.Dense(width, kernel_initializer=own_initializer)(inputs))
            super().__init__(inputs, keras.layers.Dense(1)(x))

        def get_config(self):
            return {"width": 3}

    model = unsettled(Net(3))
    model.compile(keras.optimizers.Adam(0.01), own_loss, metrics=["mae", own_loss])
    x, y = batch((32, 4)), batch((32, 1))
    model.fit(x, y, verbose=0)
    ours = keras_bn.convert(model)
    assert types(ours) == [OURS]
    expected = model.evaluate(x, y, verbose=0)
    np.testing.assert_allclose(ours.evaluate(x, y, verbose=0), expected, rtol=1e-5)
    assert model.metrics[0] is not ours.metrics[0]


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_the_optimizer_remembers_each_variable_by_what_it_is_and_not_by_its_name(policy):
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input((4,))
        towers = [
            keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="d"), STOCK(name="n")]) for _ in range(2)
        ]
        model = keras.Model(inputs, keras.layers.Concatenate()([tower(inputs) for tower in towers]))
        model.compile("adam", "mse")
        x, y = batch((32, 4)), batch((32, 4))
        model.fit(x, y, verbose=0)
        ours = keras_bn.convert(model)
        for one in (model, ours):
            one.fit(x, y, verbose=0, shuffle=False)
        before, after = (m.optimizer.variables for m in (model, ours))
        assert len(before) == len(after) > 16
        for a, b in zip(before, after, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5)
    finally:
        keras.config.set_dtype_policy("float32")


def test_trainable_is_taken_along_layer_by_layer():
    model = nested_model()
    model.trainable = False
    model.layers[1].layer.layers[1].trainable = True
    ours = keras_bn.convert(model)
    assert [one.trainable for one in ours._flatten_layers()] == [one.trainable for one in model._flatten_layers()]


def test_a_vocabulary_that_was_adapted_is_taken_along():
    vectors = keras.layers.TextVectorization(output_mode="multi_hot")
    vectors.adapt(["a shirt", "a shoe"])
    inputs = keras.Input((), dtype="string")
    model = unsettled(keras.Model(inputs, STOCK()(keras.layers.Dense(3)(vectors(inputs)))))
    words = keras.ops.convert_to_tensor(["shoe", "a hat"])
    with pytest.raises(ValueError, match=r"`check` must be given for a model that takes strings"):
        keras_bn.convert(model)
    np.testing.assert_allclose(keras_bn.convert(model, words)(words), model(words), rtol=1e-5)


def test_a_layer_that_its_configuration_does_not_describe_is_found_by_the_proof():
    class Factor(keras.layers.Layer):
        def __init__(self, factor=1.0, **options):
            super().__init__(**options)
            self.factor = factor

        def call(self, x):
            return self.factor * x

        def get_config(self):
            return {"name": self.name}

    with pytest.raises(ValueError, match=r"the copy of it computes something else.*relative error 0.5"):
        keras_bn.convert(unsettled(keras.Sequential([keras.Input((4,)), STOCK(), Factor(2.0)])))


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


def test_a_file_of_a_reverted_model_does_not_name_this_library(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras_bn.BatchNormalization(), keras.layers.Dense(2)])

    def named(saved):
        saved.save(tmp_path / "model.keras")
        return zipfile.ZipFile(tmp_path / "model.keras").read("config.json").decode()

    assert "keras_bn" in named(model)
    assert "keras_bn" not in named(keras_bn.revert(model))


@keras.saving.register_keras_serializable("test_conversion")
class Scaled(keras.Model):
    """Is not what its configuration says, once it was told to be another."""

    def __init__(self, norm, **options):
        super().__init__(**options)
        self.norm, self.dense, self.factor = norm, keras.layers.Dense(3), 1.0

    def call(self, x, training=None):
        first = next(iter(x.values())) if isinstance(x, dict) else x
        return self.factor * self.norm(self.dense(first), training=training)

    def get_config(self):
        return {"norm": keras.saving.serialize_keras_object(self.norm)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config["norm"]))


@keras.saving.register_keras_serializable("test_conversion")
class ScaledOfTwo(Scaled):
    def build(self, x_shape, y_shape):
        self.dense.build(x_shape)
        self.norm.build((None, 3))

    def call(self, x, y, training=None):
        return super().call(x + y, training=training)


@pytest.mark.parametrize("inputs", [batch((5, 4)), {"x": batch((5, 4))}], ids=["array", "dictionary"])
def test_a_subclassed_model_is_proved_on_inputs_of_the_shapes_it_was_called_with(inputs, recwarn):
    for change, norm in ((keras_bn.convert, STOCK()), (keras_bn.revert, OURS())):
        model = Scaled(norm)
        model(inputs)
        unsettled(model)
        np.testing.assert_allclose(change(model)(inputs), model(inputs), rtol=1e-5)
        model.factor = 2.0
        with pytest.raises(ValueError, match=r"the copy of it computes something else.*relative error 0.5"):
            change(model)
    assert not [str(w.message) for w in recwarn if "check" in str(w.message)]


def test_a_subclassed_model_that_was_not_proved_is_called_that():
    model = ScaledOfTwo(STOCK())
    model(batch((5, 4)), batch((5, 4)))
    model.factor = 2.0
    with pytest.warns(UserWarning, match=r"`check` should be given.*not proved.*ScaledOfTwo.*2 known inputs"):
        keras_bn.convert(model)

    @keras.saving.register_keras_serializable("test_conversion")
    class OfWords(Scaled):
        def build(self, shape):
            self.dense.build((None, 1))
            self.norm.build((None, 3))

        def call(self, x, training=None):
            return super().call(keras.ops.expand_dims(keras.ops.cast(tf.strings.length(x), "float32"), -1))

    model = OfWords(STOCK())
    words = tf.constant(["a", "shirt"])
    model(words)
    with pytest.warns(UserWarning, match=r"`check` should be given.*not proved.*none of the random ones"):
        keras_bn.convert(model)
    model.factor = 2.0
    with pytest.raises(ValueError, match=r"the copy of it computes something else.*relative error 0.5"):
        keras_bn.convert(model, words)


@keras.saving.register_keras_serializable("test_conversion")
class Inner(keras.layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3))

    def call(self, x):
        return x @ self.kernel


@keras.saving.register_keras_serializable("test_conversion")
class Outer(keras.layers.Layer):
    """With a layer of the author's inside, and a normalization."""

    def __init__(self, norm=None, **options):
        super().__init__(**options)
        self.inner, self.norm = Inner(), norm or STOCK(scale=False)

    def build(self, shape):
        self.inner.build(shape)
        if not self.norm.built:  # It is, where it was made from its configuration.
            self.norm.build((None, 3))

    def call(self, x, training=None):
        return self.norm(self.inner(x), training=training)

    def get_config(self):
        return {**super().get_config(), "norm": keras.saving.serialize_keras_object(self.norm)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("norm")), **config)


@pytest.mark.parametrize("norm", [STOCK, OURS])
def test_a_model_whose_statistics_are_chosen_for_a_while_is_converted(norm):
    inner = keras.Sequential([keras.Input((4,)), norm(), norm()])
    model = unsettled(keras.Sequential([keras.Input((6, 4)), keras.layers.TimeDistributed(inner)]))
    with keras_bn.use_statistics(model, "batch"):
        ours = keras_bn.convert(model)
    np.testing.assert_allclose(ours(batch()), model(batch()), rtol=1e-5)


def test_layers_of_the_author_within_one_another_go_both_ways():
    model = unsettled(keras.Sequential([keras.Input((4,)), Outer(STOCK()), STOCK(), Outer()]))
    ours = keras_bn.convert(model)
    assert types(ours) == [OURS, OURS, OURS]
    np.testing.assert_allclose(ours(batch((5, 4))), model(batch((5, 4))), rtol=1e-5)
    back = keras_bn.revert(ours)
    assert types(back) == [STOCK, STOCK, STOCK]
    np.testing.assert_array_equal(back(batch((5, 4))), model(batch((5, 4))))
    folded, _ = keras_bn.fold(ours)
    np.testing.assert_allclose(folded(batch((5, 4))), model(batch((5, 4))), rtol=1e-4, atol=1e-5)
