"""Which operations stand in which graphs, and what can be done with those graphs: save, load, convert, compile."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

import keras_bn
from keras_bn import ops
from keras_bn.ops import native, where
from tests.reference import Reference, assert_close

needs_library = pytest.mark.skipif(not keras_bn.compiled(), reason="installed without a C++ compiler")

TRAINING = ["KerasBn>NormalizeBatch", "KerasBn>NormalizeBatchGrad"]


def _layer(channels=4, **options):
    layer = keras_bn.BatchNormalization(**options)
    layer.build([None, channels])
    return layer


def _training_step(layer):
    def step(x):
        with tf.GradientTape() as tape:
            y = layer(x, training=True)
        return tape.gradient(y, layer.gamma._value)

    return step


def _held(graph_def):
    """The types of the operations in a graph and in the functions it calls, ours and the fused one."""
    nodes = (graph_def.node, *(function.node_def for function in graph_def.library.function))
    found = {node.op for part in nodes for node in part}
    return sorted(name for name in found if name.startswith(("KerasBn>", "FusedBatchNorm")))


def _traced(function, shape=(8, 4), dtype=tf.float32, **options):
    spec = tf.TensorSpec(shape, dtype)
    return _held(tf.function(function, autograph=False, **options).get_concrete_function(spec).graph.as_graph_def())


@needs_library
@pytest.mark.parametrize("shape", [(8, 4), (None, 4), (1_000_000, 4)], ids=str)
def test_graph_that_trains_holds_the_compiled_operations_whatever_its_size(shape):
    assert _traced(_training_step(_layer()), shape) == TRAINING


@pytest.mark.parametrize("shape", [(8, 4), (None, 4)], ids=str)
def test_graph_that_infers_holds_plain_operations_whatever_is_known_of_its_shape(shape):
    layer = _layer()
    assert _traced(lambda x: layer(x, training=False), shape) == []


def test_graph_for_xla_holds_plain_operations():
    layer = _layer()
    assert _traced(_training_step(layer), jit_compile=True) == []
    assert _traced(lambda x: layer(x, training=False), jit_compile=True) == []
    assert _traced(_training_step(_layer(kernel="native")), jit_compile=True) == []


def test_kernel_says_what_a_graph_that_trains_holds():
    assert _traced(_training_step(_layer(kernel="plain"))) == []
    assert _traced(_training_step(_layer(kernel="fused"))) == ["FusedBatchNormGradV3", "FusedBatchNormV3"]
    assert _traced(_training_step(_layer(dtype="float64")), dtype=tf.float64) == []
    for options in ({"virtual_batch_size": 4}, {"synchronized": True}):
        assert _traced(_training_step(_layer(**options))) == []


@needs_library
def test_graph_of_a_cluster_holds_no_compiled_operations(monkeypatch):
    elsewhere = [tf.config.LogicalDevice(f"/job:worker/task:{i}/device:CPU:0", "CPU") for i in range(2)]
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: elsewhere)
    assert _traced(_training_step(_layer())) == ["FusedBatchNormGradV3", "FusedBatchNormV3"]


@needs_library
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "jit_compile"])
@pytest.mark.parametrize("call", ["predict", "evaluate", "fit"])
def test_loops_of_keras_infer_with_the_compiled_operation(call, jit_compile, monkeypatch):
    normalized = []

    def normalize(*arguments):
        normalized.append(arguments)
        return ops.plain.normalize(*arguments)

    monkeypatch.setattr(native, "normalize", normalize)
    model = keras.Sequential([keras.Input((4,)), keras_bn.BatchNormalization(), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=jit_compile)
    if call == "fit":
        keras_bn.freeze(model)
    x, y = np.ones((50, 4), "float32"), np.ones((50, 1), "float32")
    model.predict(x, verbose=0) if call == "predict" else getattr(model, call)(x, y, verbose=0)
    assert bool(normalized) != jit_compile


@needs_library
def test_eager_calls_take_the_compiled_operations_unless_they_are_told_not_to(monkeypatch):
    taken = []

    class Watching:
        def __getattr__(self, name):
            taken.append(name)
            return getattr(library, name)

    library = native._library
    monkeypatch.setattr(native, "_library", Watching())
    x = tf.random.normal([8, 4])
    for layer in (_layer(), _layer(kernel="plain")):
        layer(x, training=True)
        layer(x, training=False)
    assert taken == ["keras_bn_normalize_batch", "keras_bn_normalize"]


@needs_library
def test_statistics_that_are_given_are_differentiated_as_plain_ones():
    rng = np.random.default_rng(0)
    x, dy = (tf.constant(rng.normal(size=(2, 3, 5)), tf.float32) for _ in range(2))
    vectors = [tf.constant(rng.uniform(1, 2, 3), tf.float32) for _ in range(4)]

    def derivatives(kernel):
        with tf.GradientTape() as outer:
            outer.watch([x, *vectors])
            with tf.GradientTape() as inner:
                inner.watch([x, *vectors])
                y = ops.normalize(x, *vectors, axes=[1], epsilon=1e-3, kernel=kernel)
            first = inner.gradient(y, [x, *vectors], output_gradients=dy)
            norm = tf.add_n([tf.reduce_sum(value**2) for value in first])
        return *first, *outer.gradient(norm, [x, *vectors[:3]])

    for got, want in zip(derivatives("auto"), derivatives("plain"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"zero_debias": True}, {"unbiased_variance": True}], ids=str
)
@pytest.mark.parametrize("kernel", ["auto", "fused"])
@pytest.mark.parametrize("size", [16, None], ids=["known batch", "unknown batch"])
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "float16"])
def test_graph_learns_what_a_plain_one_learns(dtype, size, kernel, options):
    rng = np.random.default_rng(0)
    batches = tf.cast(rng.normal(2, 3, (4, 16, 6)), "float16" if "16" in dtype else "float32")
    results = []
    for layer in [_layer(6, kernel=kernel, dtype=dtype, **options) for kernel in (kernel, "plain")]:
        step = tf.function(_training_step(layer), input_signature=[tf.TensorSpec([size, 6], batches.dtype)])
        results.append([step(x) for x in batches] + [layer.moving_mean, layer.moving_variance])
    for got, want in zip(*results, strict=True):
        assert_close(got, np.asarray(want, "float64"), "float16" if dtype == "float16" else "float32", scale=50)


@pytest.mark.parametrize("kernel", ["auto", "fused"])
def test_gradients_through_loops_and_branches_equal_plain_ones(kernel):
    x = tf.random.stateless_normal([16, 3], [0, 1], mean=2.0)
    gamma, beta = tf.constant([1.0, 2, 0.5]), tf.constant([0.0, 1, 2])

    def gradients(kernel):
        def normalize(x):
            return ops.normalize_batch(x, gamma, beta, axes=[1], epsilon=1e-3, kernel=kernel).y

        @tf.function
        def run(x):
            with tf.GradientTape() as tape:
                tape.watch([x, gamma, beta])
                y = tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, normalize(y) ** 3), [0, x])[1]
                y = tf.cond(tf.reduce_sum(x) > 0, lambda: normalize(y) ** 2 * x, lambda: y)
            return tape.gradient(y, [x, gamma, beta])

        return run(x)

    for got, want in zip(gradients(kernel), gradients("plain"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def _moved(x, direction, step):
    return np.asarray(x, "float64") + step * np.asarray(direction)


@pytest.mark.parametrize("kernel", ["auto", "fused", "plain"])
@pytest.mark.parametrize("mode", ["eager", "graph", "called"])
def test_forward_mode_and_jacobians_equal_those_of_the_oracle(mode, kernel):
    if (mode, kernel) == ("called", "fused"):
        pytest.skip("TensorFlow's fused operation has no forward mode within a function that is called")
    x, direction = (tf.random.stateless_normal([5, 3], [0, seed]) for seed in (1, 2))
    gamma, beta = tf.constant([1.0, 2, 0.5]), tf.constant([0.0, 1, 2])

    def normalize(x):
        return ops.normalize_batch(x, gamma, beta, axes=[1], epsilon=1e-3, kernel=kernel).y

    if mode == "called":
        normalize = tf.function(normalize)

    def derivatives():
        with tf.autodiff.ForwardAccumulator(x, direction) as forward:
            y = normalize(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            z = normalize(x)
        return forward.jvp(y), tape.jacobian(z, x)

    jvp, jacobian = (derivatives if mode == "eager" else tf.function(derivatives, autograph=False))()

    def along(direction):
        ends = [Reference(_moved(x, direction, step), -1, gamma, beta).y for step in (1e-6, -1e-6)]
        return (ends[0] - ends[1]) / 2e-6

    units = np.eye(15).reshape(15, 5, 3)
    want = np.stack([along(unit) for unit in units], -1).reshape(5, 3, 5, 3)
    np.testing.assert_allclose(jvp, along(direction), atol=1e-4)
    np.testing.assert_allclose(jacobian, want, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("outer", ["eager", "graph"])
def test_forward_mode_passes_through_a_function_that_is_called(outer, training):
    layer = _layer(3)
    layer.gamma.assign([1.0, 2, 0.5])
    x, direction = (tf.random.stateless_normal([5, 3], [0, seed]) for seed in (1, 2))
    call = tf.function(lambda x: layer(x, training=training), autograph=False)

    def hessian_vector_product():
        with tf.autodiff.ForwardAccumulator(x, direction) as forward:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = call(x)
                loss = tf.reduce_sum(y**3)
            gradient = tape.gradient(loss, x)
        return forward.jvp(y), forward.jvp(gradient)

    jvp, product = (hessian_vector_product if outer == "eager" else tf.function(hessian_vector_product))()

    def exact(step):
        oracle = Reference(_moved(x, direction, step), -1, np.asarray(layer.gamma))
        if training:
            return oracle.y, oracle.gradients(3 * oracle.y**2)[0]
        y = oracle.inference(np.zeros(3), np.ones(3))
        return y, 3 * y**2 * np.asarray(layer.gamma) / np.sqrt(1.001)

    for got, *ends in zip((jvp, product), exact(1e-6), exact(-1e-6), strict=True):
        want = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-4 * np.abs(want).max())


@pytest.mark.parametrize("kernel", ["auto", "fused", "plain"])
def test_gradient_of_a_function_that_is_called_is_differentiated_again(kernel):
    layer = _layer(kernel=kernel)
    rng = np.random.default_rng(0)
    x, dy, direction = (tf.constant(rng.normal(size=(8, 4)), "float32") for _ in range(3))
    layer.gamma.assign(rng.normal(1, 0.3, 4))
    train = tf.function(lambda x: layer(x, training=True), autograph=False)
    with tf.GradientTape() as second:
        second.watch(x)
        with tf.GradientTape() as first:
            first.watch(x)
            y = train(x)
        dx = first.gradient(y, x, output_gradients=dy)
    d_x = second.gradient(dx, x, output_gradients=direction)

    def exact(step):
        return Reference(_moved(x, direction, step), -1, np.asarray(layer.gamma)).gradients(np.asarray(dy))[0]

    assert_close(dx, exact(0), "float32", scale=2)
    # The second derivatives are symmetric: those by x, along `direction`, are the change of the gradient that way.
    np.testing.assert_allclose(d_x, (exact(1e-6) - exact(-1e-6)) / 2e-6, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", ["step", "fit"])
def test_gradient_penalty_of_an_open_batch_is_compiled_by_xla(way):
    layer = keras_bn.BatchNormalization()
    layer.build([None, 3])

    def penalty(x):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                score = tf.reduce_sum(layer(x, training=True) ** 3)
            norm = tf.reduce_sum(inner.gradient(score, x) ** 2)
        return outer.gradient(norm, [layer.gamma.value, layer.beta.value])

    x = tf.constant(np.random.default_rng(0).normal(size=(6, 3)), tf.float32)
    want = penalty(x)
    if way == "step":
        got = tf.function(penalty, [tf.TensorSpec([None, 3])], jit_compile=True)(x)
        for value, other in zip(got, want, strict=True):
            np.testing.assert_allclose(value, other, rtol=1e-3, atol=1e-3)
        return

    class Penalized(keras.Sequential):
        def train_step(self, data):
            gradients = penalty(data)
            return {"penalty": tf.add_n([tf.reduce_sum(value) for value in gradients])}

    model = Penalized([keras.Input((3,)), layer])
    model.compile(jit_compile=True)
    history = model.fit(x.numpy(), batch_size=6, verbose=0)
    np.testing.assert_allclose(history.history["penalty"], sum(np.sum(value) for value in want), rtol=1e-3)


@needs_library
def test_function_that_was_traced_by_itself_needs_plain_layers_within_xla():
    x = tf.random.normal([8, 4])
    for kernel in ("auto", "plain"):
        traced = tf.function(_training_step(_layer(kernel=kernel)), autograph=False)
        want = traced(x)
        compiled = tf.function(lambda x, traced=traced: traced(x), jit_compile=True)
        if kernel == "auto":
            with pytest.raises(tf.errors.OpError, match='needs layers made with kernel="plain"'):
                compiled(x)
        else:
            np.testing.assert_allclose(compiled(x), want, atol=1e-5)


_CLUSTERED = """if True:
    import numpy as np, tensorflow as tf, keras_bn
    layer = keras_bn.BatchNormalization()
    layer.build([None, 4])
    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.nn.relu(layer(2 * x + 1, training=True)) * x + 1
        return y, tape.gradient(y, x)
    for _ in range(3):
        y, gradient = step(tf.random.normal([8, 4]))
    print(np.all(np.isfinite(y)), np.all(np.isfinite(gradient)))
"""


def test_clusters_that_xla_finds_by_itself_go_around_the_compiled_operations():
    flags = {"TF_XLA_FLAGS": "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit --tf_xla_min_cluster_size=1"}
    ran = subprocess.run(
        [sys.executable, "-c", _CLUSTERED], check=True, capture_output=True, text=True, env=os.environ | flags
    )
    assert ran.stdout.split() == ["True", "True"]


_ALONE = """if True:
    import sys
    import numpy as np, tensorflow as tf
    {imports}
    module = tf.saved_model.load(sys.argv[1])
    np.save(sys.argv[2], [module.step(tf.constant(np.load(sys.argv[3]))) for _ in range(2)])
"""


@pytest.mark.parametrize(("kernel", "imports"), [("auto", "import keras_bn"), ("plain", ""), ("auto", "")])
def test_saved_training_step_is_loaded_where_the_package_is_imported_or_its_layers_are_plain(kernel, imports, tmp_path):
    layer = _layer(kernel=kernel)
    module = tf.Module()
    module.step = tf.function(_training_step(layer), input_signature=[tf.TensorSpec([None, 4])])
    module.variables_of_layer = [variable._value for variable in layer.weights]
    tf.saved_model.save(module, str(tmp_path / "step"))
    x = np.random.default_rng(0).normal(3, 2, (8, 4)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    program = _ALONE.format(imports=imports)
    command = [sys.executable, "-c", program, tmp_path / "step", tmp_path / "y.npy", tmp_path / "x.npy"]
    ran = subprocess.run(command, capture_output=True, text=True)
    if kernel == "auto" and not imports and keras_bn.compiled():
        assert "Op type not registered 'KerasBn>NormalizeBatch'" in ran.stderr
        return
    assert ran.returncode == 0, ran.stderr
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), [module.step(x) for _ in range(2)], atol=1e-5)


@pytest.mark.parametrize("kernel", ["auto", "plain"])
def test_saved_function_is_differentiable_twice_where_it_is_loaded(kernel, tmp_path):
    layer = _layer(kernel=kernel)
    module = tf.Module()
    spec = [tf.TensorSpec([None, 4])]
    module.train = tf.function(lambda x: layer(x, training=True), input_signature=spec)
    module.infer = tf.function(lambda x: layer(x, training=False), input_signature=spec)
    module.variables_of_layer = [variable._value for variable in layer.weights]
    tf.saved_model.save(module, str(tmp_path / "saved"))
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    x, dy = (tf.random.stateless_normal([8, 4], [0, seed]) for seed in (1, 2))

    def derivatives(call):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = call(x) ** 2
            first = inner.gradient(y, x, output_gradients=dy)
        return first, outer.gradient(first, x)

    for name in ("infer", "train"):
        for got, want in zip(derivatives(getattr(loaded, name)), derivatives(getattr(module, name)), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("size", [8, None])
def test_converters_find_plain_operations(size):
    layer = _layer()
    infer = tf.function(lambda x: layer(x, training=False)).get_concrete_function(tf.TensorSpec([size, 4]))
    x = tf.random.normal([8, 4])
    np.testing.assert_array_equal(convert_variables_to_constants_v2(infer)(x)[0], infer(x))
    model = tf.lite.TFLiteConverter.from_concrete_functions([infer], layer).convert()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        interpreter = tf.lite.Interpreter(model_content=model)
    assert {operation["op_name"] for operation in interpreter._get_ops_details()} >= {"SUB", "MUL", "ADD"}


@pytest.mark.parametrize("loop", ["fit", "evaluate", "predict"])
def test_network_is_exported_with_plain_operations_after_each_loop_of_keras(loop, tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras_bn.BatchNormalization(), keras.layers.Dense(2)])
    model.compile("sgd", "mse", jit_compile=False)
    x, y = np.ones((8, 4), "float32"), np.zeros((8, 2))
    model.predict(x, verbose=0) if loop == "predict" else getattr(model, loop)(x, y, verbose=0)
    for save in (model.export, lambda path: tf.saved_model.save(model, path)):
        save(str(tmp_path / "model"))
        saved = saved_model_pb2.SavedModel.FromString((Path(tmp_path) / "model" / "saved_model.pb").read_bytes())
        assert _held(saved.meta_graphs[0].graph_def) == []


@pytest.mark.parametrize("kernel", ["auto", "fused", "plain"])
def test_batch_of_one_in_a_graph_is_said_once(kernel, capfd):
    layer = _layer(kernel=kernel)
    call = tf.function(lambda x: layer(x, training=True), input_signature=[tf.TensorSpec([None, 4])])
    for size in (1, 2, 1):
        call(tf.ones([size, 4]))
    assert capfd.readouterr().err.count(ops.SINGLE_VALUE) == 1


def test_training_in_new_shapes_leaves_nothing_behind_in_the_library():
    layer, x = _layer(), np.ones((8, 4), "float32")
    infer = tf.function(lambda x: layer(x, training=False), autograph=False)
    for size in range(2, 6):
        layer(x[:size], training=True)
        infer(x[:size])
    caches = [
        value.cache_info().currsize
        for module in (ops, native, where, ops.plain, ops.fused, ops.layouts)
        for value in vars(module).values()
        if hasattr(value, "cache_info")
    ]
    assert max(caches) <= 1
