"""What a person hands over as data: refused in words where it is none, and at once where an hour would be lost."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn


def small_model(*inputs):
    inputs = inputs or (keras.Input((4,), name="x"),)
    x = inputs[0] if len(inputs) == 1 else keras.layers.Concatenate()(list(inputs))
    x = keras.layers.BatchNormalization(name="norm")(keras.layers.Dense(3)(x))
    model = keras.Model(inputs if len(inputs) > 1 else inputs[0], keras.layers.Dense(1)(x))
    model.compile("sgd", "mse")
    return model


def numbers(rows=40, columns=4):
    return np.random.default_rng(0).normal(2, 3, (rows, columns)).astype("float32")


@pytest.mark.parametrize("use", [keras_bn.recalibrate, keras_bn.measure, keras_bn.health])
@pytest.mark.parametrize("beside", ["alone", "with targets", "as targets", "as a batch"])
def test_lists_of_numbers_are_refused_with_the_way_out(use, beside):
    x, y = numbers(), numbers(columns=1)
    data = {
        "alone": x.tolist(),
        "with targets": (x.tolist(), y),
        "as targets": (x, y.tolist()),
        "as a batch": iter([x.tolist()]),
    }[beside]
    with pytest.raises(TypeError, match=r"`data` must hold arrays, not lists of numbers; `np.asarray.* of 40 that"):
        use(small_model(), data)


def test_a_batch_of_lists_is_taken_where_it_is_a_tuple():
    x, model, other = numbers(), small_model(), small_model()
    other.set_weights(model.get_weights())
    keras_bn.recalibrate(model, [(x[:20].tolist(),), (x[20:].tolist(),)], verbose=0)
    keras_bn.recalibrate(other, x, verbose=0)
    np.testing.assert_allclose(
        model.get_layer("norm").moving_mean, other.get_layer("norm").moving_mean, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("others", "what"), [((np.zeros(7),), "targets"), ((np.zeros((40, 1)), np.ones(7)), "sample weights")]
)
def test_arrays_with_another_number_of_targets_or_weights_are_refused(others, what):
    with pytest.raises(ValueError, match=rf"as many {what} as inputs.*Received: 40 inputs, and {what} of shape \(7,\)"):
        keras_bn.recalibrate(small_model(), (numbers(), *others), verbose=0)


def test_targets_of_batches_are_the_loss_s_own_business():
    x, model, other = numbers(), small_model(), small_model()
    other.set_weights(model.get_weights())
    keras_bn.recalibrate(model, [(x, np.zeros((95, 5)))], verbose=0)
    keras_bn.recalibrate(other, x, verbose=0, batch_size=40)
    np.testing.assert_array_equal(model.get_layer("norm").moving_mean, other.get_layer("norm").moving_mean)


def test_batches_of_four_parts_are_refused_without_printing_them():
    x = numbers()
    with pytest.raises(ValueError, match=r"Received: a batch of 4 parts \(ndarray, .*\)\.$"):
        keras_bn.recalibrate(small_model(), [(x, x, x, x)], verbose=0)


def of_kind(kind, x):
    if kind == "array":
        return x
    if kind == "generator":
        return ((part,) for part in np.split(x, 4))
    if kind == "batches":
        return [(part,) for part in np.split(x, 4)]
    if kind == "PyDataset":

        class Parts(keras.utils.PyDataset):
            def __len__(self):
                return 4

            def __getitem__(self, i):
                return (np.split(x, 4)[i],)

        return Parts()
    return tf.data.Dataset.from_tensor_slices(x).batch(10)


KINDS = ("array", "generator", "batches", "PyDataset", "Dataset")


@pytest.mark.parametrize("kind", KINDS)
def test_the_callback_refuses_another_shape_before_the_first_step(kind):
    x, model = numbers(), small_model()
    before = [v.numpy().tobytes() for v in model.variables]
    callback = keras_bn.Recalibrate(of_kind(kind, numbers(columns=3)))
    text = r"`data` must have batches of shape \(None, 4\) for input 'x'\. Received: \((10|32|None), 3\)"
    with pytest.raises(ValueError, match=text):
        model.fit(x, numbers(columns=1), verbose=0, callbacks=[callback])
    assert [v.numpy().tobytes() for v in model.variables] == before


@pytest.mark.parametrize("kind", KINDS)
def test_looking_at_the_shape_takes_no_batch_away(kind):
    x, model, other = numbers(), small_model(), small_model()
    model.fit(x, numbers(columns=1), verbose=0, callbacks=[keras_bn.Recalibrate(of_kind(kind, x))])
    other.set_weights(model.get_weights())
    keras_bn.recalibrate(other, x, verbose=0)
    for name in ("moving_mean", "moving_variance"):
        ours, expected = (getattr(m.get_layer("norm"), name) for m in (model, other))
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_a_data_set_is_not_read_for_its_shape():
    read = []

    def rows():
        for row in numbers():
            read.append(len(read))
            yield row

    data = tf.data.Dataset.from_generator(rows, output_signature=tf.TensorSpec((4,))).batch(10)
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(len(read))

    model = small_model()
    model.fit(numbers(), numbers(columns=1), verbose=0, callbacks=[keras_bn.Recalibrate(data), Watch()])
    assert set(seen) == {0}
    assert read


def test_a_data_set_without_batches_is_named_as_such():
    data = tf.data.Dataset.from_tensor_slices(numbers())
    with pytest.raises(ValueError, match=r"in batches gets into them by `\.batch\(\.\.\.\)`\. Received: \(4,\)"):
        small_model().fit(numbers(), numbers(columns=1), verbose=0, callbacks=[keras_bn.Recalibrate(data)])


@pytest.mark.parametrize("structure", [list, dict])
def test_each_of_several_inputs_is_held_against_its_own_shape(structure):
    model = small_model(keras.Input((4,), name="a"), keras.Input((2,), name="b"))
    good = {"a": numbers(), "b": numbers(columns=2)}
    wrong = {"a": numbers(), "b": numbers(columns=3)}
    as_given = (lambda arrays: list(arrays.values())) if structure is list else (lambda arrays: arrays)
    with pytest.raises(ValueError, match=r"of shape \(None, 2\) for input 'b'\. Received: \(32, 3\)"):
        model.fit(
            list(good.values()), numbers(columns=1), verbose=0, callbacks=[keras_bn.Recalibrate((as_given(wrong),))]
        )
    model.fit(list(good.values()), numbers(columns=1), verbose=0, callbacks=[keras_bn.Recalibrate((as_given(good),))])


def test_a_last_axis_of_one_may_be_there_or_not_as_in_keras():
    model = small_model(keras.Input((1,), name="x"))
    x = numbers(columns=1)
    model.fit(x, x, verbose=0, callbacks=[keras_bn.Recalibrate(x[:, 0])])
    picture = keras.Input((3, 4), name="x")
    model = keras.Model(picture, keras.layers.Dense(1)(keras.layers.BatchNormalization()(picture)))
    model.compile("sgd", "mse")
    x = numbers(columns=12).reshape(40, 3, 4)
    model.fit(x, x[..., :1], verbose=0, callbacks=[keras_bn.Recalibrate(x[..., None])])


def _structure(kind):
    """Inputs in a structure, with the arrays and without a word of Keras's about them."""
    a, b, c = (keras.Input((4,), name=name) for name in "abc")
    x, y, z = numbers() - 1, numbers() * 2, numbers() + 5
    made = {
        "nested dictionary": ({"pairs": {"p": a, "q": b}, "c": c}, {"pairs": {"p": x, "q": y}, "c": z}),
        "nested list": ([a, [b, c]], [x, [y, z]]),
        "list of dictionaries": ([{"p": a, "q": b}, c], [{"p": x, "q": y}, z]),
        "nested tuple": ((a, (b, c)), (x, (y, z))),
        "list of tuples": ([(a, b), c], [(x, y), z]),
        "tuple": ([a, b, c], (x, y, z)),
    }
    inputs, arrays = made[kind]
    together = keras.layers.BatchNormalization(name="norm")(keras.layers.Concatenate()([a, b, c]))
    model = keras.Model(inputs, keras.layers.Dense(1)(together))
    return model, arrays, np.concatenate([x, y, z], axis=1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "beside"),
    [
        ("tuple", "alone"),  # Within another one it is a batch.
        ("nested tuple", "alone"),
        *itertools.product(
            ["nested dictionary", "nested list", "list of dictionaries", "list of tuples"],
            ["alone", "in a tuple", "with targets", "as batches"],
        ),
    ],
)
def test_arrays_in_the_structure_of_the_inputs_are_taken_as_predict_takes_them(kind, beside):
    model, arrays, together = _structure(kind)
    model.predict(arrays, verbose=0)
    halves = [(keras.tree.map_structure(lambda a, h=half: a[h::2], arrays),) for half in (0, 1)]
    data = {"alone": arrays, "in a tuple": (arrays,), "with targets": (arrays, together), "as batches": halves}[beside]
    assert keras_bn.health(model, data, verbose=0).layers[0].kl > 0.1
    measured = keras_bn.measure(model, data, verbose=0)["norm"]
    assert np.all(measured.count == 40)
    keras_bn.recalibrate(model, data, verbose=0)
    np.testing.assert_allclose(model.get_layer("norm").moving_mean, together.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.get_layer("norm").moving_variance, together.var(0), rtol=1e-5)


def test_lists_of_batches_stay_batches_whatever_is_in_them():
    x = numbers()
    one, several = small_model(), small_model(*(keras.Input((4,), name=name) for name in "ab"))
    batches = [
        (one, [(x[:30], x[:30]), (x[30:], x[30:])]),
        (one, [x[:30], x[30:]]),
        (one, [{"x": x[:30]}, {"x": x[30:]}]),
        (one, [[x[:30], x[:30]], [x[30:], x[30:]]]),  # A batch in a list is one in a tuple, as in Keras.
        (several, [({"a": x[:30], "b": x[:30]},), ({"a": x[30:], "b": x[30:]},)]),
        (several, [{"a": x[:30], "b": x[:30]}, {"a": x[30:], "b": x[30:]}]),
        (several, [([x[:30], x[:30]], x[:30]), ([x[30:], x[30:]], x[30:])]),
    ]
    for model, data in batches:
        report = keras_bn.recalibrate(model, data, tolerance=1e3, verbose=0)
        assert (report.layers[0].batches, report.layers[0].count) == (2, 40)


@pytest.mark.filterwarnings("error")  # Keras's, of a tuple in the place of an array.
def test_a_tuple_whose_first_part_fits_is_inputs_and_targets():
    x = numbers()
    model = small_model()
    for data in ((x,), (x, x)):
        assert keras_bn.measure(model, data, verbose=0)["norm"].count.max() == 40
    several = small_model(*(keras.Input((4,), name=name) for name in "ab"))
    assert keras_bn.measure(several, ([x, x], x), verbose=0)["norm"].count.max() == 40


@pytest.mark.parametrize("kind", ["one array", "three of two", "data set"])
def test_one_array_for_several_inputs_is_told_what_a_tuple_is(kind):
    x = numbers()
    model = small_model(*(keras.Input((4,), name=name) for name in "ab"))
    data = {"one array": x, "three of two": (x, x, x[:, 0]), "data set": tf.data.Dataset.from_tensors((x, x))}[kind]
    text = (
        r"^`data` must have an array for each of the 2 inputs of the model, in a list or dictionary; a tuple is "
        r"`\(inputs, targets, sample_weight\)` or shorter\. Received: one array of shape \(\d+, 4\)\.$"
    )
    with pytest.raises(ValueError, match=text):
        keras_bn.recalibrate(model, data, verbose=0)
    callback = keras_bn.Recalibrate(data)
    with pytest.raises(ValueError, match=text.replace("\\d+", r"(\d+|None)")):
        model.fit([x, x], x[:, :1], verbose=0, callbacks=[callback])


@pytest.mark.parametrize("use", [keras_bn.recalibrate, keras_bn.measure, keras_bn.health])
def test_a_placeholder_is_no_data(use):
    with pytest.raises(TypeError, match=r"`data` must be an array.*Received: data=<KerasTensor"):
        use(small_model(), keras.Input((4,)), verbose=0)


@pytest.mark.parametrize("beside", ["alone", "with weights", "in a dictionary"])
def test_sparse_tensors_are_split_into_batches_too(beside):
    dense = numbers() * (np.arange(160).reshape(40, 4) % 3 > 0)
    sparse, weights = tf.sparse.from_dense(dense), np.arange(40) % 2
    model = small_model(keras.Input((4,), name="x", sparse=True))
    data = {"alone": sparse, "with weights": (sparse, None, weights), "in a dictionary": {"x": sparse}}[beside]
    expected = (dense, None, weights) if beside == "with weights" else dense
    ours, theirs = (keras_bn.measure(model, given, batch_size=7, verbose=0)["norm"] for given in (data, expected))
    np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours.count, theirs.count)


def _two_norms():
    layers = [keras.layers.BatchNormalization(name="first"), keras.layers.Dense(3), keras_bn.BatchNormalization()]
    return keras.Sequential([keras.Input((4,)), *layers])


def _measured_and_applied(model, data, **options):
    keras_bn.apply_statistics(model, keras_bn.measure(model, data, verbose=0))


@pytest.mark.parametrize(
    ("use", "argument"), [(keras_bn.recalibrate, "data"), (_measured_and_applied, "measured")], ids=["at once", "apart"]
)
@pytest.mark.parametrize("data", ["one row", "one that counts", "one of weight 0.5"])
def test_of_one_value_a_channel_a_warning_names_the_layers(use, argument, data):
    x, one = numbers(), np.arange(40) == 3
    given = {"one row": x[:1], "one that counts": (x, None, one), "one of weight 0.5": (x, None, one * 0.5)}[data]
    model = _two_norms()
    with pytest.warns(
        UserWarning, match=rf"`{argument}` should have more than one value.*single one at \['first', 'batch_n"
    ):
        use(model, given, verbose=0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("use", [keras_bn.recalibrate, _measured_and_applied], ids=["at once", "apart"])
def test_of_values_that_are_all_the_same_nothing_is_said(use):
    model = _two_norms()
    use(model, np.ones((2, 4), "float32"), verbose=0)
    np.testing.assert_array_equal(model.get_layer("first").moving_variance, np.zeros(4))
