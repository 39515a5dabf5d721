"""The configuration messages that the `tensorflow-serving-api` package leaves out."""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, wrappers_pb2

_Field = descriptor_pb2.FieldDescriptorProto
_PACKAGE = "tensorflow.serving"
_FILE = "serving/text_protos.proto"
_WRAPPED = ".google.protobuf."
# For each message, its fields in the order of their numbers: name, type, and whether it repeats.
_MESSAGES: dict[str, list[tuple[str, int | str, bool]]] = {
    "BatchingParameters": [
        ("max_batch_size", _WRAPPED + "Int64Value", False),
        ("batch_timeout_micros", _WRAPPED + "Int64Value", False),
        ("max_enqueued_batches", _WRAPPED + "Int64Value", False),
        ("num_batch_threads", _WRAPPED + "Int64Value", False),
        ("thread_pool_name", _WRAPPED + "StringValue", False),
        ("allowed_batch_sizes", _Field.TYPE_INT64, True),
        ("pad_variable_length_inputs", _Field.TYPE_BOOL, False),
        ("enable_large_batch_splitting", _WRAPPED + "BoolValue", False),
        ("max_execution_batch_size", _WRAPPED + "Int64Value", False),
    ],
    "PrometheusConfig": [("enable", _Field.TYPE_BOOL, False), ("path", _Field.TYPE_STRING, False)],
    "MonitoringConfig": [("prometheus_config", f".{_PACKAGE}.PrometheusConfig", False)],
    "SSLConfig": [
        ("server_key", _Field.TYPE_STRING, False),
        ("server_cert", _Field.TYPE_STRING, False),
        ("custom_ca", _Field.TYPE_STRING, False),
        ("client_verify", _Field.TYPE_BOOL, False),
    ],
}


def _make_classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name=_FILE, package=_PACKAGE, syntax="proto3", dependency=[wrappers_pb2.DESCRIPTOR.name]
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind, repeated) in enumerate(fields, start=1):
            one = message.field.add(
                name=field, number=number, label=_Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            )
            if isinstance(kind, str):
                one.type, one.type_name = _Field.TYPE_MESSAGE, kind
            else:
                one.type = kind
    # A pool of our own: a later tensorflow-serving-api may bring these messages itself.
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }


_classes = _make_classes()
BatchingParameters = _classes["BatchingParameters"]
MonitoringConfig = _classes["MonitoringConfig"]
SSLConfig = _classes["SSLConfig"]
