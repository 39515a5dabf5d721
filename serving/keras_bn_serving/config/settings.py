"""Configuration files about the engine and about encryption."""

import grpc

from keras_bn_serving.config.files import read_message
from keras_bn_serving.config.text_protos import BatchingParameters, SSLConfig
from keras_bn_serving.engine.grouping import BatchingOptions
from keras_bn_serving.engine.machine import usable_cores
from keras_bn_serving.errors import InvalidArgumentError

_DEFAULTS = {
    "max_batch_size": 1000,
    "batch_timeout_micros": 0,
    "max_enqueued_batches": 10,
    "num_batch_threads": usable_cores(),
}


def read_batching(path: str) -> BatchingOptions:
    """Reads `BatchingParameters`; TensorFlow Serving's defaults where no file is named.

    Raises:
        ServingError: If the file cannot be read, or says something that cannot be done.
    """
    values = dict(_DEFAULTS)
    sizes: tuple[int, ...] = ()
    pad, run_size = False, 0
    if path:
        message = read_message(path, BatchingParameters())
        values.update({name: getattr(message, name).value for name in values if message.HasField(name)})
        sizes, pad = tuple(message.allowed_batch_sizes), message.pad_variable_length_inputs
        if message.enable_large_batch_splitting.value:
            run_size = message.max_execution_batch_size.value
            if not 0 < run_size <= values["max_batch_size"]:
                raise InvalidArgumentError(
                    f"{path}: with enable_large_batch_splitting, `max_execution_batch_size` must be from 1 to "
                    f"max_batch_size ({values['max_batch_size']}). Received: {run_size}."
                )
    for name, value in values.items():
        least = 0 if name == "batch_timeout_micros" else 1
        if value < least:
            raise InvalidArgumentError(f"{path}: `{name}` must be at least {least}. Received: {value}.")
    largest = "max_execution_batch_size" if run_size else "max_batch_size"
    last = run_size or values["max_batch_size"]
    if sizes and (list(sizes) != sorted(set(sizes)) or sizes[-1] != last or sizes[0] < 1):
        raise InvalidArgumentError(
            f"{path}: `allowed_batch_sizes` must rise and end with {largest} ({last}). Received: {list(sizes)}."
        )
    return BatchingOptions(
        values["max_batch_size"],
        values["batch_timeout_micros"] / 1e6,
        values["max_enqueued_batches"],
        values["num_batch_threads"],
        run_size,
        sizes,
        pad,
        strict=True,
    )


def read_credentials(path: str) -> grpc.ServerCredentials | None:
    """Reads an `SSLConfig`; `None` where no file is named.

    Raises:
        ServingError: If the file cannot be read or has no key and certificate.
    """
    if not path:
        return None
    message = read_message(path, SSLConfig())
    if not message.server_key or not message.server_cert:
        raise InvalidArgumentError(f"{path}: `server_key` and `server_cert` are required, each in PEM.")
    return grpc.ssl_server_credentials(
        [(message.server_key.encode(), message.server_cert.encode())],
        message.custom_ca.encode() or None,
        message.client_verify,
    )
