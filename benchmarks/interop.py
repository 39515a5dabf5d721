"""Who else can run what is exported, and with which digits? `python -m benchmarks.interop`."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from benchmarks import measuring

PAGE = Path(__file__).resolve().parent.parent / "docs" / "interop.md"
NETWORKS = ("fashion_cnn", "mobilenet_v2")
FORMS = ("stock", "unfolded", "folded")
BATCH = 4
HEAD = """# Who else runs what is exported

Largest difference between what each of these answers and what Keras's `predict` does, divided by the largest value
that `predict` answers; in brackets how many operations the converted graph has, where a converter tells. *stock* is
the network with Keras's own layers, written by `model.export`; *unfolded* and *folded* are the same with ours,
written by `keras_bn.export(fold=False)` and `keras_bn.export()`. Unfolded, ours subtracts the mean by an operation of
its own, which keeps the digits far from zero and which ONNX converters do not merge with the convolution before it;
LiteRT and OpenVINO do. For few operations everywhere, fold, as `export` does by default. fashion_cnn is the trained
one of `models/pretrained`; MobileNetV2 (96x96x3, alpha 0.35) has random weights and statistics, and answers logits.

`python -m benchmarks.interop` wrote this page; `pip install 'keras-bn[interop]'` brings the tools.
"""


class Written(NamedTuple):
    """A network in one of `FORMS`: the Keras model, and the SavedModel that was written of it."""

    model: Any
    path: Path


class Answer(NamedTuple):
    """What a tool answers, and of how many operations its graph is, where it tells."""

    values: np.ndarray
    operations: int | None = None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interop", description=__doc__)
    choices = {"networks": NETWORKS, "tools": tuple(TOOLS)}
    for name, values in choices.items():
        parser.add_argument(
            f"--{name}", nargs="+", choices=values, default=values, metavar=name.upper(), help=", ".join(values)
        )
    parser.add_argument("--output", type=Path, default=PAGE, help="the page (default: docs/interop.md)")
    flags = parser.parse_args()
    parts = [HEAD]
    for network in flags.networks:
        with tempfile.TemporaryDirectory() as folder, prepared(network, Path(folder)) as (x, want, written):
            rows = [
                {"tool": tool, **{form: cell(tool, one, x, want) for form, one in written.items()}}
                for tool in measuring.progress(flags.tools, network)
            ]
        parts.append(f"## {network}\n\n{measuring.table(rows, ('tool', *FORMS))}\n")
    machine = ", ".join(f"{name} {version}" for name, version in versions().items())
    flags.output.parent.mkdir(exist_ok=True)
    flags.output.write_text("\n".join([*parts, f"Versions: {machine}\n"]))
    print(flags.output.read_text())


@contextlib.contextmanager
def prepared(network: str, folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, Written]]]:
    """Inputs, what `predict` answers, and the network in each of `FORMS`, while the folder is there."""
    import keras_bn

    model, x = _fashion_cnn() if network == "fashion_cnn" else _mobilenet_v2()
    stock = keras_bn.revert(model)
    stock.export(folder / "stock", verbose=False)
    unfolded = keras_bn.export(model, folder / "unfolded", fold=False)
    folded = keras_bn.export(model, folder / "folded")
    yield (
        x,
        model.predict(x, verbose=0),
        {
            "stock": Written(stock, folder / "stock"),
            "unfolded": Written(model, unfolded.path),
            "folded": Written(keras_bn.fold(model).model, folded.path),
        },
    )


def cell(tool: str, written: Written, x: np.ndarray, want: np.ndarray) -> str:
    """What stands in the table: the difference, or why there is none."""
    try:
        answer = TOOLS[tool](written, x)
    except ImportError as error:
        return f"not installed: {error.name}"
    except Exception as error:  # Whatever a converter raises is what a person would see.
        return " ".join(f"{type(error).__name__}: {error}".split())[:160].replace("|", "/")
    size = "" if answer.operations is None else f" ({answer.operations})"
    return f"{difference(answer.values, want):.1e}{size}"


def difference(got: np.ndarray, want: np.ndarray) -> float:
    """max |got - want| / max |want|."""
    return float(np.abs(np.asarray(got, "float64") - want).max() / np.abs(want).max())


def versions() -> dict[str, str]:
    """Of the packages that are compared."""
    import importlib.metadata as metadata

    names = ("tensorflow", "keras", "ai-edge-litert", "tf2onnx", "onnx", "onnxruntime", "openvino")
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _fashion_cnn() -> tuple[Any, np.ndarray]:
    from models import pretrained

    return pretrained.load(), (pretrained.load_examples()[:BATCH] / 255.0).astype("float32")


def _mobilenet_v2() -> tuple[Any, np.ndarray]:
    import keras

    import keras_bn

    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    options = {"alpha": 0.35, "weights": None, "classes": 10, "classifier_activation": None}
    model = keras_bn.convert(keras.applications.MobileNetV2((96, 96, 3), **options))
    for layer in model.layers:
        if isinstance(layer, keras_bn.BatchNormalization):
            size = (4, layer.moving_mean.shape[0])
            gamma, beta, mean, variance = rng.uniform(0.5, 1.5, size).astype("float32")
            layer.set_weights([gamma, beta - 1.0, mean - 1.0, variance])
    return model, rng.uniform(-1, 1, (BATCH, 96, 96, 3)).astype("float32")


def _by_tfsm_layer(written: Written, x: np.ndarray) -> Answer:
    import keras

    answer = keras.layers.TFSMLayer(written.path, call_endpoint="serving_default")(x)
    return Answer(np.asarray(_only(answer)))


def _by_session(written: Written, x: np.ndarray) -> Answer:
    import tensorflow as tf

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        loaded = tf.compat.v1.saved_model.load(session, ["serve"], str(written.path))
        signature = loaded.signature_def["serving_default"]
        fed, fetched = _only(signature.inputs).name, _only(signature.outputs).name
        return Answer(session.run(fetched, {fed: x}))


def _by_saved_model_cli(written: Written, x: np.ndarray) -> Answer:
    input_name = _names(written)[0]
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", x)
        command = [sys.executable, "-m", "tensorflow.python.tools.saved_model_cli", "run", "--dir", written.path]
        options = ["--tag_set", "serve", "--signature_def", "serving_default", "--outdir", folder]
        subprocess.run(
            [*command, *options, "--inputs", f"{input_name}={folder}/x.npy"],
            check=True,
            capture_output=True,
        )
        (path,) = (path for path in Path(folder).glob("*.npy") if path.name != "x.npy")
        return Answer(np.load(path))


def _by_c_api(written: Written, x: np.ndarray) -> Answer:
    """TF_LoadSessionFromSavedModel and TF_SessionRun, of the library inside the wheel."""
    import tensorflow as tf

    library = ctypes.CDLL(next(str(path) for path in Path(tf.sysconfig.get_lib()).glob("libtensorflow_cc.so.*")))

    def call(name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(library, name)
        function.restype = result
        return function(*arguments)

    class Output(ctypes.Structure):
        _fields_ = (("operation", ctypes.c_void_p), ("index", ctypes.c_int))

    pointer = ctypes.c_void_p
    status, graph = pointer(call("TF_NewStatus", pointer)), pointer(call("TF_NewGraph", pointer))

    def check() -> None:
        if call("TF_GetCode", ctypes.c_int, status):
            raise RuntimeError(call("TF_Message", ctypes.c_char_p, status).decode())

    options = pointer(call("TF_NewSessionOptions", pointer))
    tags, path = (ctypes.c_char_p * 1)(b"serve"), str(written.path).encode()
    session = pointer(call("TF_LoadSessionFromSavedModel", pointer, options, None, path, tags, 1, graph, None, status))
    check()
    signature = _signature(written)
    places = []
    for info in (_only(signature.inputs), _only(signature.outputs)):
        name, index = info.name.split(":")
        operation = call("TF_GraphOperationByName", pointer, graph, name.encode())
        places.append((Output * 1)(Output(operation, int(index))))
    dims = (ctypes.c_int64 * x.ndim)(*x.shape)
    float_type = 1
    fed = pointer(call("TF_AllocateTensor", pointer, float_type, dims, x.ndim, ctypes.c_size_t(x.nbytes)))
    ctypes.memmove(call("TF_TensorData", pointer, fed), np.ascontiguousarray(x).ctypes.data, x.nbytes)
    feeds, answers = (ctypes.c_void_p * 1)(fed), (ctypes.c_void_p * 1)()
    nothing = (None, 0, None)
    call("TF_SessionRun", None, session, None, places[0], feeds, 1, places[1], answers, 1, *nothing, status)
    check()
    answer = pointer(answers[0])
    shape = [call("TF_Dim", ctypes.c_int64, answer, axis) for axis in range(call("TF_NumDims", ctypes.c_int, answer))]
    data = ctypes.cast(call("TF_TensorData", pointer, answer), ctypes.POINTER(ctypes.c_float))
    values = np.ctypeslib.as_array(data, shape).copy()
    for tensor in (fed, answer):
        call("TF_DeleteTensor", None, tensor)
    call("TF_DeleteSession", None, session, status)
    for name, thing in (("Graph", graph), ("SessionOptions", options), ("Status", status)):
        call(f"TF_Delete{name}", None, thing)
    return Answer(values)


def _by_tflite(written: Written, x: np.ndarray, **options: Any) -> Answer:
    import tensorflow as tf

    with _quiet():
        content = tf.lite.TFLiteConverter.from_saved_model(str(written.path), **options).convert()
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError:
            from tensorflow.lite.python.interpreter import Interpreter
        interpreter = Interpreter(model_content=content)
    input_name, output_name = _names(written)
    runner = interpreter.get_signature_runner("serving_default")
    # Without `signature_keys` the first graph is any of the signatures'.
    operations = len(interpreter._get_ops_details()) if options else None
    return Answer(runner(**{input_name: x})[output_name], operations)


def _by_tflite_signature(written: Written, x: np.ndarray) -> Answer:
    return _by_tflite(written, x, signature_keys=["serving_default"])


def _by_tf2onnx(written: Written, x: np.ndarray) -> Answer:
    import onnxruntime  # noqa: F401 (asked for before the conversion)
    import tf2onnx  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        options = ["--signature_def", "serving_default", "--opset", "18", "--output", f"{folder}/model.onnx"]
        done = subprocess.run(
            [sys.executable, "-m", "tf2onnx.convert", "--saved-model", written.path, *options],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return _run_onnx(f"{folder}/model.onnx", x)


def _by_keras_onnx(written: Written, x: np.ndarray) -> Answer:
    import onnxruntime  # noqa: F401 (asked for before the conversion)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        written.model.export(f"{folder}/model.onnx", format="onnx", verbose=False)
        return _run_onnx(f"{folder}/model.onnx", x)


def _run_onnx(path: str, x: np.ndarray) -> Answer:
    import onnx
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (values,) = session.run(None, {session.get_inputs()[0].name: x})
    return Answer(values, len(onnx.load(path).graph.node))


def _by_openvino(written: Written, x: np.ndarray) -> Answer:
    import openvino

    model = openvino.convert_model(str(written.path))
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return Answer(compiled(x)[0], len(model.get_ops()))


def _signature(written: Written) -> Any:
    from tensorflow.core.protobuf import saved_model_pb2

    message = saved_model_pb2.SavedModel()
    message.ParseFromString((written.path / "saved_model.pb").read_bytes())
    return message.meta_graphs[0].signature_def["serving_default"]


def _names(written: Written) -> tuple[str, str]:
    signature = _signature(written)
    (input_name,), (output_name,) = signature.inputs, signature.outputs
    return input_name, output_name


def _only(values: Any) -> Any:
    (value,) = values.values()
    return value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what converters print, also those that print past Python."""
    with open(os.devnull, "w") as nowhere:
        earlier = os.dup(1), os.dup(2)
        try:
            for number in (1, 2):
                os.dup2(nowhere.fileno(), number)
            yield
        finally:
            for number, copy in zip((1, 2), earlier, strict=True):
                os.dup2(copy, number)
                os.close(copy)


TOOLS: dict[str, Callable[[Written, np.ndarray], Answer]] = {
    "keras.layers.TFSMLayer": _by_tfsm_layer,
    "TensorFlow 1 Session": _by_session,
    "saved_model_cli run": _by_saved_model_cli,
    "C API": _by_c_api,
    "LiteRT, default conversion": _by_tflite,
    "LiteRT, signature_keys": _by_tflite_signature,
    "ONNX Runtime, tf2onnx": _by_tf2onnx,
    "ONNX Runtime, model.export": _by_keras_onnx,
    "OpenVINO": _by_openvino,
}


if __name__ == "__main__":
    main()
