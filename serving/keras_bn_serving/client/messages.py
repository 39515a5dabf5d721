"""The messages of TensorFlow Serving's gRPC protocol that the client needs, declared without TensorFlow."""

import functools
import re
from typing import Any

from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory, wrappers_pb2

from keras_bn_serving.codec.data_types import NUMBERS

# Fields as name, type, number; `*` before a type is repeated, `map` is from strings, `/kind` names the oneof.
_MESSAGES = {
    "Dim": "size int64 1, name string 2",
    "TensorShapeProto": "dim *Dim 2, unknown_rank bool 3",
    "TensorProto": "dtype DataType 1, tensor_shape TensorShapeProto 2, version_number int32 3, tensor_content bytes 4, "
    "float_val *float 5, double_val *double 6, int_val *int32 7, string_val *bytes 8, scomplex_val *float 9, "
    "int64_val *int64 10, bool_val *bool 11, dcomplex_val *double 12, half_val *int32 13, uint32_val *uint32 16, "
    "uint64_val *uint64 17, float8_val bytes 18",
    "TensorInfo": "name string 1 /encoding, dtype DataType 2, tensor_shape TensorShapeProto 3",
    "SignatureDef": "inputs map:TensorInfo 1, outputs map:TensorInfo 2, method_name string 3, "
    "defaults map:TensorProto 4",
    "SignatureDefMap": "signature_def map:SignatureDef 1",
    "BytesList": "value *bytes 1",
    "FloatList": "value *float 1",
    "Int64List": "value *int64 1",
    "Feature": "bytes_list BytesList 1 /kind, float_list FloatList 2 /kind, int64_list Int64List 3 /kind",
    "Features": "feature map:Feature 1",
    "Example": "features Features 1",
    "ModelSpec": "name string 1, version .google.protobuf.Int64Value 2 /choice, signature_name string 3, "
    "version_label string 4 /choice",
    "ExampleList": "examples *Example 1",
    "ExampleListWithContext": "examples *Example 1, context Example 2",
    "Input": "example_list ExampleList 1 /kind, example_list_with_context ExampleListWithContext 2 /kind",
    "PredictRequest": "model_spec ModelSpec 1, inputs map:TensorProto 2, output_filter *string 3",
    "PredictResponse": "outputs map:TensorProto 1, model_spec ModelSpec 2",
    "ClassificationRequest": "model_spec ModelSpec 1, input Input 2",
    "Class": "label string 1, score float 2",
    "Classifications": "classes *Class 1",
    "ClassificationResult": "classifications *Classifications 1",
    "ClassificationResponse": "result ClassificationResult 1, model_spec ModelSpec 2",
    "RegressionRequest": "model_spec ModelSpec 1, input Input 2",
    "Regression": "value float 1",
    "RegressionResult": "regressions *Regression 1",
    "RegressionResponse": "result RegressionResult 1, model_spec ModelSpec 2",
    "GetModelStatusRequest": "model_spec ModelSpec 1",
    "StatusProto": "error_code int32 1, error_message string 2",
    "ModelVersionStatus": "version int64 1, state State 2, status StatusProto 3",
    "GetModelStatusResponse": "model_version_status *ModelVersionStatus 1",
    "GetModelMetadataRequest": "model_spec ModelSpec 1, metadata_field *string 2",
    "GetModelMetadataResponse": "model_spec ModelSpec 1, metadata map:.google.protobuf.Any 2",
}
_ENUMS = {
    "DataType": {"DT_INVALID": 0, **{f"DT_{name.upper()}": number for name, number in NUMBERS.items()}},
    "State": {"UNKNOWN": 0, "START": 10, "LOADING": 20, "AVAILABLE": 30, "UNLOADING": 40, "END": 50},
}
_PACKAGE = "keras_bn_serving.client"
_FIELD = re.compile(r"(\w+) (\*?|map:)([\w.]+) (\d+)(?: /(\w+))?")
_Kind = descriptor_pb2.FieldDescriptorProto


@functools.cache
def message(name: str) -> Any:
    """Returns the class of a message."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{_PACKAGE}.{name}"))


def state_name(number: int) -> str:
    """Returns what the state of a version is called."""
    return {number: name for name, number in _ENUMS["State"].items()}.get(number, str(number))


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    file = descriptor_pb2.FileDescriptorProto(name="keras_bn_serving/client.proto", package=_PACKAGE, syntax="proto3")
    for known in (any_pb2, wrappers_pb2):
        pool.AddSerializedFile(known.DESCRIPTOR.serialized_pb)
        file.dependency.append(known.DESCRIPTOR.name)
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, number in values.items():
            enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        declared = file.message_type.add(name=name)
        for field in fields.split(", "):
            _declare(declared, field)
    pool.Add(file)
    return pool


def _declare(declared: descriptor_pb2.DescriptorProto, text: str) -> None:
    match = _FIELD.fullmatch(text)
    if match is None:
        raise ValueError(f"not a field: {text}")
    name, many, kind, number, oneof = match.groups()
    field = declared.field.add(name=name, number=int(number), label=_Kind.LABEL_OPTIONAL)
    if many == "map:":
        entry = declared.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=_Kind.LABEL_OPTIONAL, type=_Kind.TYPE_STRING)
        _set_type(entry.field.add(name="value", number=2, label=_Kind.LABEL_OPTIONAL), kind)
        _set_type(field, f".{_PACKAGE}.{declared.name}.{entry.name}")
    else:
        _set_type(field, kind)
    if many:
        field.label = _Kind.LABEL_REPEATED
    if oneof:
        names = [each.name for each in declared.oneof_decl]
        if oneof not in names:
            declared.oneof_decl.add(name=oneof)
            names.append(oneof)
        field.oneof_index = names.index(oneof)


def _set_type(field: descriptor_pb2.FieldDescriptorProto, kind: str) -> None:
    if kind in _ENUMS:
        field.type, field.type_name = _Kind.TYPE_ENUM, f".{_PACKAGE}.{kind}"
    elif kind in _MESSAGES or kind.startswith("."):
        field.type = _Kind.TYPE_MESSAGE
        field.type_name = kind if kind.startswith(".") else f".{_PACKAGE}.{kind}"
    else:
        field.type = getattr(_Kind, f"TYPE_{kind.upper()}")
