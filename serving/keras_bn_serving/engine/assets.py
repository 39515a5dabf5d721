"""What a version brings beside its graph: examples of what it takes, which are its warm-up requests, and its card."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow_serving.apis import prediction_log_pb2

from keras_bn_serving.codec.tensor_proto import to_array
from keras_bn_serving.engine.signatures import Signature, check_names, check_types
from keras_bn_serving.errors import DataLossError, InvalidArgumentError

WARMUP_FILE = os.path.join("assets.extra", "tf_serving_warmup_requests")
_CARD_FILE = os.path.join("assets.extra", "keras_bn.json")
# For a person to choose from.
_MOST_ROWS = 12
_MOST_BYTES = 2**20
_MOST_FILE_BYTES = 2**26
# Its length and two sums.
_AROUND_RECORD = 8 + 4 + 4


def read_card(path: str) -> dict[str, Any] | None:
    """Reads what `keras_bn.export` says about a version; `None` where it was exported otherwise.

    Raises:
        DataLossError: If it cannot be read.
    """
    file = os.path.join(path, _CARD_FILE)
    if not os.path.exists(file):
        return None
    try:
        with open(file, encoding="utf-8") as text:
            card = json.load(text)
    except (OSError, ValueError) as error:
        raise DataLossError(f"Cannot read {file}: {error}") from error
    if not isinstance(card, dict):
        raise DataLossError(f"Cannot read {file}: it must hold an object. Received: {type(card).__name__}.")
    return card


def read_examples(path: str, signatures: Mapping[str, Signature]) -> dict[str, dict[str, np.ndarray]]:
    """Reads rows that a version can be asked with: of the warm-up request that has the most, for each signature.

    Args:
        path: The version's folder.
        signatures: Its signatures, by name.

    Returns:
        By signature and input name arrays of as many rows, twelve and a mebibyte at most. What has no rows, or numbers
        that JSON does not know, is left out.

    Raises:
        DataLossError: If the requests cannot be read.
    """
    file = os.path.join(path, WARMUP_FILE)
    found: dict[str, dict[str, np.ndarray]] = {}
    if not os.path.exists(file) or os.path.getsize(file) > _MOST_FILE_BYTES:
        return found
    try:
        for record in read_records(file):
            request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
            name = request.model_spec.signature_name or "serving_default"
            if name not in signatures:
                continue
            rows = _rows(request, signatures[name])
            if len(rows) and _count(rows) > _count(found.get(name, {})):
                found[name] = rows
    except (tf.errors.OpError, DecodeError, InvalidArgumentError) as error:
        raise DataLossError(f"Cannot read {file}: {error}") from error
    return found


def read_records(file: str) -> Iterator[bytes]:
    """The records of a file of TFRecords.

    TensorFlow's reader takes a file that ends within the twelve bytes in front of a record for one that ends before
    them; here nothing may be left.

    Raises:
        tf.errors.DataLossError: If a record is broken, or not whole.
    """
    end = 0
    for record in tf.compat.v1.io.tf_record_iterator(file):
        yield record
        end += _AROUND_RECORD + len(record)
    left = os.path.getsize(file) - end
    if left:
        message = f"truncated record at {end}: {left} bytes are left, fewer than are in front of a record"
        raise tf.errors.DataLossError(None, None, message)


def _rows(request: Any, signature: Signature) -> dict[str, np.ndarray]:
    inputs = {name: to_array(value, name) for name, value in request.inputs.items()}
    check_names(signature, inputs)
    check_types(signature, inputs)
    lengths = {len(array) if array.ndim else 0 for array in inputs.values()}
    if len(lengths) != 1 or not all(_is_in_json(array) for array in inputs.values()):
        return {}
    count = min(lengths.pop(), _MOST_ROWS)
    while count and sum(_size(array[:count]) for array in inputs.values()) > _MOST_BYTES:
        count -= 1
    return {name: array[:count] for name, array in inputs.items()} if count else {}


def _count(rows: Mapping[str, np.ndarray]) -> int:
    return max((len(array) for array in rows.values()), default=0)


def _size(array: np.ndarray) -> int:
    return sum(map(len, array.ravel())) if array.dtype == object else array.nbytes


def _is_in_json(array: np.ndarray) -> bool:
    return array.dtype.kind in "biuO" or (array.dtype in (np.float32, np.float64) and bool(np.isfinite(array).all()))
