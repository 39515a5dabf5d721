"""Every argument of every public function with values of every kind: what is wrong is said of that argument."""

import inspect
import itertools
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn
from keras_bn.names import shown

_X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")


class _Refuses(keras.layers.Layer):
    """An object of a class that has nothing to do with any argument."""


WRONG = {
    "None": None,
    "word": "wrong",
    "empty word": "",
    "bytes": b"wrong",
    "negative": -1,
    "zero": 0,
    "fraction": 1.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "True": True,
    "False": False,
    "huge": 10**30,
    "number of NumPy": np.float32(1),
    "empty list": [],
    "list of None": [None],
    "list of words": ["a", "b"],
    "list of numbers": [1, 2],
    "ragged list": [[1.0, 2.0], [3.0]],
    "empty tuple": (),
    "empty dictionary": {},
    "dictionary of numbers": {"a": 1},
    "dictionary of None": {"inputs": None},
    "set": {1},
    "object": object(),
    "function": lambda *_: None,
    "class": keras.layers.Dense,
    "layer": _Refuses(name="refuses"),
    "no rows": _X[:0],
    "too wide": np.zeros((3, 7), "float32"),
    "too flat": np.zeros(4, "float32"),
    "array of NaN": np.full((8, 4), np.nan, "float32"),
    "array of words": np.array([["a"] * 4] * 8),
    "array of objects": np.array([[None] * 4] * 8, object),
    "array of complex numbers": np.ones((8, 4), "complex64"),
}
NUMBERS = {"zero", "fraction", "huge", "number of NumPy"}
NOTHING, FLAGS = {"None"}, {"True", "False", "zero"}
# What Keras itself says before a layer of anybody's is asked: that it is no tensor.
NO_TENSORS = set(WRONG) - {
    *("None", "empty list", "empty tuple", "empty dictionary", "list of None", "dictionary of None"),
    *("number of NumPy", "no rows", "too wide", "too flat", "array of NaN", "array of words"),
    "array of complex numbers",
}


def _model(layer=None):
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense"), layer or _norm(), _last()])


def _norm():
    return keras_bn.BatchNormalization(name="norm")


def _last():
    return keras.layers.Dense(2, activation="softmax", name="last")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Right values for each argument, and which wrong-looking ones are right too."""
    model, stock = _model(), _model(keras.layers.BatchNormalization(name="norm"))
    folder = tmp_path_factory.mktemp("wrong")
    version = keras_bn.export(model, folder / "version").path
    paths = (folder / f"served{n}" for n in itertools.count())
    entries = {"running_mean": np.zeros(3), "running_var": np.ones(3)}
    data = {"data": (_X, set()), "steps": (None, NOTHING | {"huge"}), "batch_size": (4, {"huge"})}
    layers, verbose = {"layers": (None, NOTHING)}, {"verbose": (0, FLAGS)}
    how = {"method": ("pooled", set()), "order": ("sequential", set()), "tolerance": (None, NOTHING | NUMBERS)}
    return {
        "drift": (keras_bn.drift, {"model": (model, set()), "inputs": (_X, set()), "batch_size": (4, {"huge"})}),
        "drift of a version": (
            lambda version, inputs, batch_size: keras_bn.drift(version, inputs, batch_size),
            {"version": (version, {*WRONG}), "inputs": (_X, set()), "batch_size": (4, {"huge"})},
        ),
        "recalibrate": (keras_bn.recalibrate, {"model": (model, set()), **data, **how, **layers, **verbose}),
        "measure": (keras_bn.measure, {"model": (model, set()), **data, **layers, **verbose}),
        "health": (
            keras_bn.health,
            {"model": (model, set()), **data, "data": (_X, NOTHING | {"array of NaN"}), **verbose},
        ),
        # Of data only the first batch says what it is, and that is looked at when training begins.
        "Recalibrate": (
            keras_bn.Recalibrate,
            {
                **{**data, "data": (_X, set(WRONG) - {"None", "word", "fraction", "no rows", "empty list", "object"})},
                **{**how, **layers, "layers": (None, NOTHING | {"list of words"}), **verbose, "when": ("end", set())},
            },
        ),
        "fold": (
            keras_bn.fold,
            {"model": (model, set()), "check": (_X, NOTHING), "tolerance": (None, NOTHING | NUMBERS - {"zero"})},
        ),
        "convert": (keras_bn.convert, {"model": (stock, set()), "check": (_X, NOTHING)}),
        "revert": (keras_bn.revert, {"model": (model, set()), "check": (_X, NOTHING)}),
        "freeze": (keras_bn.freeze, {"model_or_layer": (_model(), set())}),
        "unfreeze": (keras_bn.unfreeze, {"model_or_layer": (_model(), set())}),
        "use_statistics": (
            keras_bn.use_statistics,
            {"model_or_layer": (_model(), set()), "statistics": ("auto", set())},
        ),
        "apply_statistics": (
            lambda model, measured: keras_bn.apply_statistics(model, measured),
            {
                "model": (model, set()),
                "measured": (keras_bn.measure(model, _X, verbose=0), set()),
            },
        ),
        "Moments": (
            keras_bn.Moments,
            {
                "count": (2.0, NUMBERS | {"too flat"}),
                "mean": (np.ones(4), {"too flat"}),
                "m2": (np.ones(4), {"too flat"}),
                "unit": (1.0, NUMBERS | {"too flat"}),
            },
        ),
        "load_torch_weights": (
            keras_bn.load_torch_weights,
            {
                "layer": (model.get_layer("norm"), set()),
                "state_dict": (entries, set()),
                "prefix": ("", {"empty word"}),
                # Another than the layer's, which is said of the layer.
                "epsilon": (1e-3, NUMBERS),
            },
        ),
        "load_tf_keras_weights": (
            keras_bn.load_tf_keras_weights,
            {"layer": (model.get_layer("norm"), set()), "legacy_layer": (model.get_layer("norm"), set())},
        ),
        "BatchNormalization": (
            lambda inputs, training, mask: _norm()(inputs, training=training, mask=mask),
            {
                "inputs": (_X, NO_TENSORS | {"no rows", "too wide", "array of NaN"}),
                "training": (True, NOTHING | FLAGS | {"number of NumPy", "array of objects"}),
                "mask": (None, NOTHING | FLAGS | {"fraction", "number of NumPy", "array of objects"}),
            },
        ),
        "export": (
            lambda model_base_path=None, **options: keras_bn.export(
                model_base_path=next(paths) if model_base_path is folder else model_base_path, **options
            ),
            {
                "model": (model, set()),
                "model_base_path": (folder, {"word"}),
                "version": (None, NOTHING | {"zero"}),
                **{name: (name in ("fold", "drift"), FLAGS) for name in ("fold", "jit_compile", "overwrite", "drift")},
                "labels": (None, NOTHING | {"list of words"}),
                "preprocess": (None, NOTHING),
                "warmup": (_X, NOTHING),
                "accuracy": (None, NOTHING | {"zero", "number of NumPy"}),
                "recalibration": (None, NOTHING),
                "tolerance": (None, NOTHING | NUMBERS - {"zero"}),
            },
        ),
    }


# Keras 3.12 fails at it before it asks the layer.
OF_KERAS = (
    {("BatchNormalization", f"{kind} of None") for kind in ("list", "dictionary")}
    if keras.__version__.startswith("3.12.")
    else set()
)
# Around what a layer says Keras puts lines of its own.
IN_LINES = {"BatchNormalization"}
NAMES = (
    *("drift", "drift of a version", "recalibrate", "measure", "health", "Recalibrate", "fold", "convert", "revert"),
    *("freeze", "unfreeze", "use_statistics", "apply_statistics", "load_torch_weights", "load_tf_keras_weights"),
    *("BatchNormalization", "export", "Moments"),
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_is_said_of_the_argument(name, made, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    function, arguments = made[name]
    right = {argument: value for argument, (value, _) in arguments.items()}
    for argument, (_, allowed) in arguments.items():
        for kind, wrong in WRONG.items():
            if kind in allowed or (name, kind) in OF_KERAS:
                continue
            try:
                function(**{**right, argument: wrong})
            except Exception as error:
                raised, said = error, str(error)
            else:
                raised, said = None, "nothing"
            where = f"{name}({argument}={kind}): {type(raised).__name__}: {said}"
            assert isinstance(raised, ValueError | TypeError), where
            assert f"`{argument}`" in said, where
            assert "Received" in said, where
            assert "unavailable>" not in said, where
            if name not in IN_LINES:
                assert "\n" not in said, where
                assert len(said) < 600, where


def test_every_public_function_and_argument_is_in_the_table(made):
    covered = {name.split()[0] for name in NAMES}
    # `compiled` takes nothing, and the arguments of the layer have their own table.
    assert set(keras_bn.__all__) - covered == {"__version__", "compiled"}
    for name in sorted(covered - {"BatchNormalization", "apply_statistics"}):
        parameters = inspect.signature(getattr(keras_bn, name)).parameters.values()
        named = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        assert named == set(made[name][1]), name


@pytest.mark.parametrize("kind", ["float", "out of range"])
def test_numbers_that_an_input_of_integers_would_alter_are_refused(kind, tmp_path):
    x = keras.Input((4,), dtype="uint8", name="ids")
    model = keras.Model(x, keras_bn.BatchNormalization(name="norm")(keras.layers.Embedding(256, 2)(x)))
    wrong = np.full((3, 4), 1.5) if kind == "float" else np.full((3, 4), 300)
    text = "must be whole numbers from 0 to 255 for input 'ids', which takes uint8. Received: dtype"
    with pytest.raises(ValueError, match=f"`warmup` {text}"):
        keras_bn.export(model, tmp_path, warmup=wrong)
    version = keras_bn.export(model, tmp_path, warmup=np.ones((3, 4))).path
    for function, argument in (
        (keras_bn.recalibrate, "data"),
        (keras_bn.drift, "inputs"),
        (keras_bn.fold, "check"),
        (lambda _, inputs: keras_bn.drift(version, inputs), "inputs"),
    ):
        with pytest.raises(ValueError, match=f"`{argument}` {text}"):
            function(model, wrong)


def test_numbers_in_lists_are_taken_for_arrays(tmp_path):
    model = _model()
    rows = _X.astype("float64").tolist()
    version = keras_bn.export(model, tmp_path).path
    expected = keras_bn.drift(version, _X)
    assert keras_bn.drift(version, rows) == keras_bn.drift(version, {"inputs": rows}) == expected
    assert keras_bn.drift(model, rows) == keras_bn.drift(model, _X)
    assert keras_bn.fold(model, check=rows).report.absorbed == 1


def test_tensors_of_wider_integers_are_taken_as_arrays_of_them_are():
    inputs = keras.Input((2,), dtype="int32")
    model = keras.Model(inputs, keras_bn.BatchNormalization()(keras.layers.CategoryEncoding(9)(inputs)))
    x = np.array([[1, 2], [3, 8]])
    for examples in (x, tf.constant(x, "int64")):
        keras_bn.fold(model, check=examples)
    with pytest.raises(ValueError, match=r"whole numbers .* which takes int32. Received: dtype int64, with values"):
        keras_bn.fold(model, check=tf.constant(x * 10**12, "int64"))


@pytest.mark.parametrize(
    ("given", "received"),
    [
        (1e-3, r"0\.001 of type float"),
        (True, "True of type bool"),
        ("x.npy", "'x.npy' of type str"),
        (pathlib.Path("x.npy"), r"\w+Path\('x.npy'\) of type \w+Path"),
        (np.float32(3), r".*3.0.* of type float32"),
        (tf.constant(3), ".*3.* of type EagerTensor"),
        (len, "<built-in function len> of type .*"),
        (tf.data.Dataset.range(3).batch(2), "<_BatchDataset .* of type _BatchDataset"),
        (iter([np.zeros((2, 3))]), "<list_iterator object .* of type list_iterator"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("inputs", [1, 2])
def test_what_holds_no_examples_is_called_no_array(given, received, inputs, tmp_path):
    takes = [keras.Input((3,), name=f"x{number}") for number in range(inputs)]
    model = keras.Model(takes, keras_bn.BatchNormalization()(keras.layers.Concatenate()([*takes, takes[0]])))
    advice = r"; of a data set take a batch, `next\(iter\(dataset\)\)`, and of that the inputs"
    is_stream = isinstance(given, tf.data.Dataset) or hasattr(given, "__next__")
    text = rf"must be arrays of numbers, .* along the first axis{advice if is_stream else ''}\. Received: {received}\.$"
    with pytest.raises(TypeError, match=f"^`check` {text}"):
        keras_bn.fold(model, given)
    with pytest.raises(TypeError, match=f"^`check` {text}"):
        keras_bn.convert(model, given)
    with pytest.raises(TypeError, match=f"^`warmup` {text}"):
        keras_bn.export(model, tmp_path, warmup=given)


def test_warmup_with_targets_is_refused_in_words_and_a_list_of_the_one_input_is_taken(tmp_path):
    model = keras.Sequential([keras.Input((3,), name="x"), keras_bn.BatchNormalization()])
    x = np.ones((4, 3), "float32")
    for second in (np.arange(4), x):
        with pytest.raises(
            ValueError, match=r"an array for the one input 'x', without targets.*a tuple of 2, .*\(4, 3\)"
        ):
            keras_bn.export(model, tmp_path, warmup=(x, second))
    for warmup in ([x], list(x)):
        keras_bn.export(model, tmp_path, warmup=warmup)


def test_a_layer_of_integers_is_refused_and_inputs_of_integers_are_taken():
    for dtype in ("int32", "bool", "uint8"):
        with pytest.raises(ValueError, match=f"`dtype` must be one of floating point.* Received: dtype='{dtype}'"):
            keras_bn.BatchNormalization(dtype=dtype)
        x = keras.Input((4,), dtype=dtype)
        assert keras_bn.BatchNormalization()(x).dtype == "float32"


@pytest.mark.parametrize("weights", [[-1, 1, 1], [-0.5, 1, 1], [np.nan, 1, 1], [np.inf, 1, 1]])
def test_weights_below_0_or_not_finite_are_refused_where_they_are_seen(weights):
    mask = np.array(weights)
    with pytest.raises(ValueError, match=r"`mask` must be booleans, or numbers that are finite and not below 0"):
        keras_bn.BatchNormalization()(np.ones((3, 4), "float32"), training=True, mask=mask)


def _log_model():
    """Makes a NaN of an example with a negative sum, and finite numbers of a NaN in the last place."""
    x = keras.Input((4,))
    known = keras.layers.Lambda(
        lambda v: tf.where(tf.math.is_nan(v) & [False, False, False, True], tf.zeros_like(v), v)
    )(x)
    y = keras_bn.BatchNormalization()(keras.layers.Dense(1, kernel_initializer="ones")(known))
    return keras.Model(x, keras.layers.Lambda(lambda v: tf.math.log(v))(y))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_examples_that_are_not_finite_are_named_where_something_is_proved_on_them(value, tmp_path):
    x = np.ones((8, 4), "float32")
    x[[2, 5], 1] = value
    ours, stock = _log_model(), keras_bn.revert(_log_model())
    for argument, use in (
        ("check", lambda: keras_bn.fold(ours, x)),
        ("check", lambda: keras_bn.revert(ours, x)),
        ("check", lambda: keras_bn.convert(stock, x)),
        ("warmup", lambda: keras_bn.export(ours, tmp_path, warmup=x)),
        ("warmup", lambda: keras_bn.export(ours, tmp_path, warmup=x, fold=False)),
    ):
        with pytest.raises(
            ValueError, match=rf"`{argument}` must be finite: .*example 2 \(.*\) with {value}, and 1 more such"
        ):
            use()


def test_of_several_inputs_the_one_that_is_not_finite_is_named():
    a, b = keras.Input((2,), name="a"), keras.Input((2,), name="b")
    model = keras.Model([a, b], keras_bn.BatchNormalization()(keras.layers.Add()([a, b])))
    x = np.ones((3, 2), "float32")
    with pytest.raises(ValueError, match=r"example 1 \(counted from 0\) of input 1, counted from 0, with nan\."):
        keras_bn.fold(model, [x, np.where(np.arange(3)[:, None] == 1, np.nan, x)])


def test_finite_examples_of_which_the_model_makes_none_are_counted(tmp_path):
    x = np.ones((8, 4), "float32")
    x[[1, 2, 6]] = -1
    model = _log_model()
    report = keras_bn.fold(model, x).report
    assert report.not_finite == report.to_dict()["not_finite"] == 3
    assert "Of 3 examples the model made numbers that are not finite" in str(report)
    for argument, use in (
        ("check", lambda: keras_bn.revert(model, x)),
        ("warmup", lambda: keras_bn.export(model, tmp_path, warmup=x)),
    ):
        with pytest.warns(UserWarning, match=f"`{argument}` should be examples of .* Received: 3 of which it does"):
            use()


def test_a_nan_that_the_model_takes_for_a_missing_value_may_be_given(tmp_path):
    x = np.ones((8, 4), "float32")
    x[:, 3] = np.nan
    report = keras_bn.fold(_log_model(), x).report
    assert report.not_finite == 0
    assert "not finite" not in str(report)


def test_labels_that_are_blank_are_refused_and_those_of_one_name_warned_of(tmp_path):
    model = _model()
    for blank in ("", "  "):
        with pytest.raises(ValueError, match=f"`labels` must be .* not blank.* Received: '{blank}' for class 1, "):
            keras_bn.export(model, tmp_path, labels=["a", blank])
    with pytest.warns(UserWarning, match=r"Received: 'crane' for classes \[0, 1\]"):
        keras_bn.export(model, tmp_path, labels=["crane", "crane"])


@pytest.mark.parametrize("several", [lambda x: [x, 100 * x], lambda x: (x, x[:, 0]), lambda x: [x, x, x]])
def test_a_list_of_batches_is_not_taken_for_the_inputs_of_a_model_of_one(several, tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras_bn.BatchNormalization()])
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    allowed = "must be an array for each of the 1 inputs of the model; .* Received: [23] arrays."
    with pytest.raises(ValueError, match=f"`inputs` {allowed}"):
        keras_bn.drift(model, several(x))
    with pytest.raises(ValueError, match=f"`check` {allowed}"):
        keras_bn.fold(model, check=several(x))


def test_a_negative_variance_is_named_by_what_cannot_compute_with_it(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras_bn.BatchNormalization(name="norm")])
    model.layers[0].moving_variance.assign([-1.0, 1.0])
    for use in (lambda: keras_bn.fold(model), lambda: keras_bn.export(model, tmp_path)):
        with pytest.raises(ValueError, match=r"`model` must have variances .*norm/moving_variance' with a negative"):
            use()


def test_an_export_that_folding_makes_too_inexact_names_the_way_out(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras_bn.BatchNormalization()])
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    with pytest.raises(ValueError, match=r"`tolerance` must be above .* `fold=False` exports the normalizations as"):
        keras_bn.export(model, tmp_path, warmup=x, tolerance=0.0)


def test_paths_and_labels_that_no_file_can_have_are_refused(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, "softmax"), keras_bn.BatchNormalization()])
    with pytest.raises(ValueError, match="`model_base_path` must be a path, which has no zero bytes"):
        keras_bn.export(model, f"{tmp_path}/a\0b")
    with pytest.raises(ValueError, match=r"`labels` must be text, which half of a surrogate pair is not. .* class 1"):
        keras_bn.export(model, tmp_path, labels=["a", "\ud800"])


@pytest.mark.parametrize(
    ("entry", "value"), [("running_var", [1.0, -1.0]), ("running_mean", [0.0, np.nan]), ("weight", [np.inf, 1.0])]
)
def test_weights_of_other_layers_are_finite_and_variances_not_negative(entry, value):
    layer = keras_bn.BatchNormalization(epsilon=1e-5)
    layer.build((None, 2))
    entries = {"weight": np.ones(2), "bias": np.zeros(2), "running_mean": np.zeros(2), "running_var": np.ones(2)}
    with pytest.raises(ValueError, match="weights to take over must be finite, and variances not negative"):
        keras_bn.load_torch_weights(layer, {**entries, entry: np.array(value)})
    assert layer.moving_variance.numpy().tolist() == [1, 1]


def test_what_came_is_told_in_one_short_line():
    cases = {
        "'momentum'": "momentum",
        "array([1., 2.])": np.array([1.0, 2.0]),
        "<ndarray of shape (24, 4), float32>": np.zeros((24, 4), "float32"),
        "<EagerTensor of shape (24, 4), int32>": tf.zeros((24, 4), tf.int32),
        "<SparseTensor of shape (24, 4), float32>": tf.sparse.from_dense(tf.ones((24, 4))),
        f"[{'0, ' * 66}0...": [0] * 1000,
    }
    for text, value in cases.items():
        assert shown(value) == text
    assert "\n" not in shown([np.zeros((24, 4)), {"a": np.zeros((24, 4))}])
