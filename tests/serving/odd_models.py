"""SavedModels of kinds that are met seldom: every output type, many inputs, signatures that cannot classify."""

from pathlib import Path
from typing import Any

import tensorflow as tf

from tests.serving.saved_models import export

NAMES = ("outputs", "several", "verdicts", "named")
_FLOATS = tf.TensorSpec([None], tf.float32, name="x")
_TYPES = (
    *("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"),
    *("half", "bfloat16", "complex64", "complex128"),
)


def build_all(base: Path) -> None:
    """Writes every model below `base`, in the way of `<model>/<version>`."""
    export(base / "outputs" / "1", _outputs())
    export(base / "several" / "1", _several())
    _build(base / "verdicts" / "1", _verdicts)
    _build(base / "named" / "1", _named)


def _outputs() -> dict[str, Any]:
    def casts(dtype: str) -> Any:
        return (lambda x: {"y": tf.cast(x, dtype)}, [_FLOATS])

    def table(x: tf.Tensor) -> dict[str, tf.Tensor]:
        text = tf.strings.as_string(x)
        return {"f": tf.cast(x, tf.float32) / 7, "i": tf.cast(x, tf.int64) * 3, "b": x > 0, "s": text, "s_bytes": text}

    return {
        **{dtype: casts(dtype) for dtype in _TYPES},
        "serving_default": (lambda x: {"y": x / 3}, [tf.TensorSpec([None], tf.float64, name="x")]),
        "table": (table, [tf.TensorSpec([None, None], tf.int32, name="x")]),
        "scalars": (
            lambda x: {"f": x / 7, "s_bytes": tf.strings.as_string(x)}, [tf.TensorSpec([], tf.float64, name="x")]
        ),
        "nothing": (lambda x: {"y": x[:0]}, [_FLOATS]),
    }  # fmt: skip


def _several() -> dict[str, Any]:
    doubles = [tf.TensorSpec([None], tf.float64, name=name) for name in "pq"]
    return {
        "serving_default": (
            lambda a, b, c, d: {"a2": a * 2, "b2": b + 1, "c2": tf.strings.join([c, "!"]), "d2": ~d},
            [
                tf.TensorSpec([None], tf.float32, name="a"),
                tf.TensorSpec([None, 2], tf.int64, name="b"),
                tf.TensorSpec([None], tf.string, name="c"),
                tf.TensorSpec([None], tf.bool, name="d"),
            ],
        ),
        "two": (lambda p, q: {"r": p + q}, doubles),
    }


def _verdicts() -> dict[str, Any]:
    """Signatures over examples with a feature of each kind, most of them not what classify or regress can take."""
    features = {
        "x": tf.io.FixedLenFeature([], tf.float32, default_value=0.5),
        "n": tf.io.FixedLenFeature([], tf.int64, default_value=3),
        "s": tf.io.FixedLenFeature([], tf.string, default_value=b"q"),
    }
    v1 = tf.compat.v1
    examples, numbers = v1.placeholder(tf.string, [None], name="examples"), v1.placeholder(tf.float32, [None])
    parsed = tf.io.parse_example(examples, features)
    x, n, s = parsed["x"], parsed["n"], parsed["s"]
    scores, classes = tf.stack([x, 1 - x], 1), tf.stack([s, s], 1)
    inputs = {"inputs": examples}
    classify = {
        "serving_default": {"classes": classes, "scores": scores},
        "scores_only": {"scores": scores},
        "classes_only": {"classes": classes},
        "three": {"classes": classes, "scores": scores, "more": x},
        "other_outputs": {"a": classes, "b": scores},
        "flat_scores": {"scores": x},
        "flat_classes": {"classes": s},
        "double_scores": {"scores": tf.cast(scores, tf.float64)},
        "float_classes": {"classes": scores},
        "twice": {"scores": tf.concat([scores, scores], 0)},
        "uneven": {"classes": tf.concat([classes, classes], 1), "scores": scores},
        "scalar_scores": {"scores": tf.reduce_sum(x)},
        "no_classes": {"classes": classes[:, :0]},
    }
    regress = {
        "number": {"outputs": x * 2},
        "column": {"outputs": x[:, None]},
        "table": {"outputs": scores},
        "double": {"outputs": tf.cast(x, tf.float64)},
        "numbers_twice": {"outputs": tf.concat([x, x], 0)},
        "sum": {"outputs": tf.reduce_sum(x)},
        "other_output": {"o": x},
        "two_outputs": {"outputs": x, "o": x},
        "integer": {"outputs": tf.cast(n, tf.float32)},
        "logarithm": {"outputs": tf.math.log(x)},
    }
    signatures = {
        **{key: _signature(inputs, outputs, "classify") for key, outputs in classify.items()},
        **{key: _signature(inputs, outputs, "regress") for key, outputs in regress.items()},
        "other_input": _signature({"ex": examples}, {"scores": scores}, "classify"),
        "other_input_number": _signature({"ex": examples}, {"outputs": x}, "regress"),
        "two_inputs": _signature({"inputs": examples, "o": numbers}, {"scores": scores}, "classify"),
        "two_inputs_number": _signature({"inputs": examples, "o": numbers}, {"outputs": x}, "regress"),
        "floats": _signature({"inputs": numbers}, {"outputs": numbers * 2}, "regress"),
        "defaults": _signature({"p": numbers, "q": (other := v1.placeholder(tf.float32, [None]))},
                               {"r": numbers + other}, "predict"),
    }  # fmt: skip
    signatures["defaults"].defaults["q"].CopyFrom(tf.make_tensor_proto([1.0, 2.0]))
    return signatures


def _named() -> dict[str, Any]:
    a, b = tf.compat.v1.placeholder(tf.float32, [None]), tf.compat.v1.placeholder(tf.string, [None])
    both = {"näme": a, "b": b}
    return {
        "ünï ☃": _signature({"näme": a}, {"öut": a + 1}, "predict"),
        "serving_default": _signature(both, {'öut "q"': a + 1, "b_bytes": b + "x"}, "predict"),
        "odd": _signature({"näme": a}, {"öut": a + 1}, "other"),
    }


def _signature(inputs: dict[str, tf.Tensor], outputs: dict[str, tf.Tensor], method: str) -> Any:
    info = tf.compat.v1.saved_model.utils.build_tensor_info
    return tf.compat.v1.saved_model.signature_def_utils.build_signature_def(
        {name: info(tensor) for name, tensor in inputs.items()},
        {name: info(tensor) for name, tensor in outputs.items()},
        f"tensorflow/serving/{method}",
    )


def _build(folder: Path, make: Any) -> None:
    """Saves signatures that only a graph of version 1 can have."""
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        builder = v1.saved_model.Builder(str(folder))
        builder.add_meta_graph_and_variables(session, ["serve"], signature_def_map=make())
        builder.save()
