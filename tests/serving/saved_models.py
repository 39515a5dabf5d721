"""The small SavedModels that the recorded answers are about, each a pure function of its inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

_DTYPES = (
    *("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"),
    *("half", "bfloat16", "complex64"),
)
_ANY_LENGTH = tf.TensorSpec([None], tf.float32, name="x")
_TABLE = tf.TensorSpec([None, None], tf.float32, name="x")


def build_all(base: Path) -> Path:
    """Writes every model below `base`, in the way of `<model>/<version>`; returns `base`."""
    for version, offset in ((1, 2.0), (2, 3.0)):
        half_plus(base / "half_plus_two", version, offset)
    for name, signatures in _one_version_models().items():
        export(base / name / "1", signatures)
    _export_examples(str(base / "examples" / "1"))
    return base


def half_plus(base: Path, version: int, offset: float) -> Path:
    """Writes a version that answers x / 2 + offset; returns its folder."""
    return export(base / str(version), {"serving_default": (lambda x: {"y": x * 0.5 + offset}, [_ANY_LENGTH])})


def export(folder: Path, signatures: dict[str, tuple[Callable[..., Any], list[tf.TensorSpec]]]) -> Path:
    """Saves functions of named tensors as signatures; returns the folder."""
    holder = tf.Module()
    holder.functions = {key: tf.function(body, input_signature=specs) for key, (body, specs) in signatures.items()}
    concrete = {key: function.get_concrete_function() for key, function in holder.functions.items()}
    tf.saved_model.save(holder, str(folder), signatures=concrete)
    return folder


def _one_version_models() -> dict[str, Any]:
    same = {
        dtype: (lambda x: {"y": tf.identity(x)}, [tf.TensorSpec([None], getattr(tf, dtype), name="x")])
        for dtype in _DTYPES
    }
    weights = [[1.0, 0.5], [2.0, 0.25], [3.0, 0.125]]
    picture = tf.TensorSpec([None, 2, 2, 1], tf.uint8, name="image")
    return {
        "multi": {
            "serving_default": (
                lambda a, b: {"s": a + tf.cast(b, tf.float32)[:, None], "t": b * 2},
                [tf.TensorSpec([None, 2], tf.float32, name="a"), tf.TensorSpec([None], tf.int32, name="b")],
            )
        },
        "strings": {
            "serving_default": (
                lambda s: {"echo": tf.identity(s), "raw_bytes": tf.identity(s), "length": tf.strings.length(s)},
                [tf.TensorSpec([None], tf.string, name="s")],
            )
        },
        "types": {**same, "serving_default": same["float32"]},
        "scalar": {"serving_default": (lambda x: {"y": x + 1.0}, [tf.TensorSpec([], tf.float32, name="x")])},
        "matrix": {
            "serving_default": (lambda x: {"y": x @ weights}, [tf.TensorSpec([None, 3], tf.float32, name="x")]),
        },
        "image": {"serving_default": (_describe_picture, [picture])},
        "totals": {
            "serving_default": (lambda x: {"row": tf.reduce_sum(x, 1)}, [_TABLE]),
            "total": (lambda x: {"total": tf.reduce_sum(x)}, [_TABLE]),
            "uneven": (lambda x: {"row": tf.reduce_sum(x, 1), "twice": tf.concat([x, x], 0)}, [_TABLE]),
        },
        "faulty": {
            "serving_default": (lambda x: {"y": 1.0 / x}, [_ANY_LENGTH]),
            "checked": (_root_of_positive, [_ANY_LENGTH]),
        },
    }


def _describe_picture(image: tf.Tensor) -> dict[str, tf.Tensor]:
    pixels = tf.cast(image, tf.float32)
    return {"scaled": pixels / 255.0, "mean": tf.reduce_mean(pixels, [1, 2, 3])}


def _root_of_positive(x: tf.Tensor) -> dict[str, tf.Tensor]:
    with tf.control_dependencies([tf.debugging.assert_greater(x, 0.0, message="x must be positive")]):
        return {"y": tf.sqrt(x)}


def _export_examples(folder: str) -> None:
    """Saves classify and regress signatures over serialized examples, which only a graph of version 1 can have."""
    v1 = tf.compat.v1
    names, make = v1.saved_model.signature_constants, v1.saved_model.signature_def_utils.build_signature_def
    with tf.Graph().as_default(), v1.Session() as session:
        serialized = v1.placeholder(tf.string, [None], name="examples")
        x = tf.io.parse_example(serialized, {"x": tf.io.FixedLenFeature([], tf.float32)})["x"]

        def info(tensor: tf.Tensor) -> Any:
            return v1.saved_model.utils.build_tensor_info(tensor)

        classify = make(
            {names.CLASSIFY_INPUTS: info(serialized)},
            {
                names.CLASSIFY_OUTPUT_CLASSES: info(tf.tile(tf.constant([["yes", "no"]]), [tf.shape(x)[0], 1])),
                names.CLASSIFY_OUTPUT_SCORES: info(tf.stack([x, 1.0 - x], axis=1)),
            },
            names.CLASSIFY_METHOD_NAME,
        )
        regress = make(
            {names.REGRESS_INPUTS: info(serialized)},
            {names.REGRESS_OUTPUTS: info(x * 2.0)},
            names.REGRESS_METHOD_NAME,
        )
        builder = v1.saved_model.Builder(folder)
        signatures = {"serving_default": classify, "regress_x": regress}
        builder.add_meta_graph_and_variables(session, ["serve"], signature_def_map=signatures)
        builder.save()
