"""Makes versions ready to serve: loads them, more than once if asked to, and warms them up."""

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow_serving.apis import prediction_log_pb2

from keras_bn_serving.codec.tensor_proto import to_array
from keras_bn_serving.engine import examples
from keras_bn_serving.engine.assets import WARMUP_FILE, read_records
from keras_bn_serving.engine.grouping import BatchingOptions, run_one
from keras_bn_serving.engine.servable import LoadOptions, Servable
from keras_bn_serving.engine.signatures import check_names, check_types
from keras_bn_serving.errors import Code, InvalidArgumentError, ServingError

_log = logging.getLogger(__name__)
_MOST_RECORDS = 1000


@dataclass(frozen=True)
class Loader:
    """Loads a version.

    Attributes:
        options: How TensorFlow runs it.
        warm_up: Whether to run the requests that the version brings for that.
        warm_up_iterations: How often to run each.
        retries: How often to try again if loading fails.
        retry_wait_seconds: How long to wait before that.
        stopping: Set once there is no use in trying again.
        batching: How requests are grouped: warm-up requests keep the same rules.
        on_warm_up: Told of every warm-up: the model's name, how it ended, and the seconds that it took.
    """

    options: LoadOptions = field(default_factory=LoadOptions)
    warm_up: bool = True
    warm_up_iterations: int = 1
    retries: int = 0
    retry_wait_seconds: float = 60.0
    stopping: threading.Event = field(default_factory=threading.Event)
    batching: BatchingOptions | None = None
    on_warm_up: Callable[[str, str, float], None] = lambda name, status, seconds: None

    def __call__(self, name: str, version: int, path: str) -> Servable:
        """Returns the version, loaded and warm.

        Raises:
            ServingError: If it cannot be loaded or its warm-up fails.
        """
        for left in range(self.retries, -1, -1):
            try:
                return self._load(name, path)
            except ServingError as error:
                if not left:
                    raise
                _log.warning("model %s version %d, %d tries left: %s", name, version, left, error.message)
                if self.stopping.wait(self.retry_wait_seconds):
                    raise
        raise InvalidArgumentError(f"`retries` must be at least 0. Received: retries={self.retries}.")

    def _load(self, name: str, path: str) -> Servable:
        servable = Servable(path, self.options, name)
        file = os.path.join(path, WARMUP_FILE)
        if self.warm_up and os.path.exists(file):
            started, status = time.monotonic(), Code.UNKNOWN
            try:
                _run_all(servable, file, self.warm_up_iterations, self.batching)
                status = Code.OK
            except BaseException as error:
                status = error.code if isinstance(error, ServingError) else status
                servable.close()
                raise
            finally:
                self.on_warm_up(name, status.name, time.monotonic() - started)
        return servable


def _run_all(servable: Servable, file: str, iterations: int, batching: BatchingOptions | None) -> None:
    count = 0
    try:
        for count, record in enumerate(read_records(file), start=1):
            if count > _MOST_RECORDS:
                raise InvalidArgumentError(f"Number of warmup records exceeds the maximum ({_MOST_RECORDS}) in {file}")
            log = prediction_log_pb2.PredictionLog.FromString(record)
            for _ in range(iterations):
                _run(servable, log, batching)
    except (tf.errors.OpError, DecodeError) as error:
        raise ServingError(f"Cannot read record {count + 1} of {file}: {error}", Code.DATA_LOSS) from error
    except ServingError as error:
        raise ServingError(f"Warm-up request {count} of {file} failed: {error.message}", error.code) from error


def _run(servable: Servable, log: prediction_log_pb2.PredictionLog, batching: BatchingOptions | None) -> None:
    kind = log.WhichOneof("log_type")
    if kind == "predict_log":
        request = log.predict_log.request
        inputs = {name: to_array(value, name) for name, value in request.inputs.items()}
        signature = servable.signature(request.model_spec.signature_name)
        check_names(signature, inputs)
        check_types(signature, inputs)
        run_one(servable, signature, inputs, tuple(request.output_filter), batching)
    elif kind in ("classify_log", "regress_log"):
        one = getattr(log, kind).request
        signature = examples.find_signature(servable, one.model_spec.signature_name)
        run_one(servable, signature, examples.serialize(one.input), (), batching)
    elif kind == "multi_inference_log":
        many = log.multi_inference_log.request
        for task in many.tasks:
            signature = examples.find_signature(servable, task.model_spec.signature_name)
            run_one(servable, signature, examples.serialize(many.input), (), batching)
    else:
        raise InvalidArgumentError(f"Unsupported log_type for warmup: {kind}")
