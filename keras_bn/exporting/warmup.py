"""Warm-up requests, as TensorFlow Serving reads them before it serves a version."""

from collections.abc import Mapping
from pathlib import Path

import tensorflow as tf

FILE = "assets.extra/tf_serving_warmup_requests"


def require() -> None:
    """Raises ImportError, with what to install, where requests can not be written."""
    try:
        from tensorflow_serving.apis import prediction_log_pb2  # noqa: F401
    except ImportError as error:
        raise ImportError("`warmup` needs tensorflow-serving-api: pip install 'keras-bn[serving]'") from error


def write(
    folder: Path,
    model_name: str,
    examples: Mapping[str, tf.Tensor],
    signatures: list[str],
) -> None:
    """Writes a request for one example and a request for all of them, for each signature.

    Args:
        folder: of the version.
        model_name: that the server knows the model by.
        examples: by input name.
        signatures: those to ask for.
    """
    from tensorflow_serving.apis import model_pb2, predict_pb2, prediction_log_pb2

    (folder / FILE).parent.mkdir(exist_ok=True)
    rows = len(next(iter(examples.values())))
    with tf.io.TFRecordWriter(str(folder / FILE)) as writer:
        for signature in signatures:
            tensors = {"image_bytes": encoded(examples)} if signature == "image_bytes" else dict(examples)
            for count in sorted({1, rows}):
                request = predict_pb2.PredictRequest(
                    model_spec=model_pb2.ModelSpec(name=model_name, signature_name=signature),
                    inputs={name: tf.make_tensor_proto(value[:count]) for name, value in tensors.items()},
                )
                log = prediction_log_pb2.PredictLog(request=request)
                writer.write(prediction_log_pb2.PredictionLog(predict_log=log).SerializeToString())


def encoded(examples: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """The pictures of the one input, as PNG files."""
    (pictures,) = examples.values()
    return tf.map_fn(tf.io.encode_png, pictures, fn_output_signature=tf.string)
