"""JSON examples, as classify and regress take them, to tf.train.Example."""

from collections.abc import Callable
from typing import Any

from tensorflow.core.example import example_pb2, feature_pb2
from tensorflow_serving.apis import input_pb2

from keras_bn_serving.codec import document as json_document
from keras_bn_serving.codec.document import JsonObject
from keras_bn_serving.codec.tensor import (
    c_string,
    decode_base64,
    decode_object,
    decode_signature_name,
    is_base64,
    type_name,
)
from keras_bn_serving.errors import InvalidArgumentError

_KINDS = {"bytes_list": "bytes", "float_list": "float", "int64_list": "int64"}
_INT64 = range(-(2**63), 2**63)


def decode_examples(body: bytes, go_on: Callable[[], None] = lambda: None) -> tuple[str, input_pb2.Input]:
    """Reads the body of a classify or regress request.

    Args:
        body: The JSON text.
        go_on: Called now and then; what it raises ends the reading.

    Returns:
        The signature's name, empty where none was given, and the examples.

    Raises:
        InvalidArgumentError: If the body is not of that form.
    """
    document = decode_object(body, go_on)
    signature_name = decode_signature_name(document)
    message = input_pb2.Input()
    target: Any = message.example_list
    for context in document.find("context"):
        target = message.example_list_with_context
        _fill_example(context, target.context)
    found = document.find("examples")
    if not found:
        raise _malformed(document, "When method is classify, key 'examples' is expected and was not found")
    if not isinstance(found[0], list) or isinstance(found[0], JsonObject):
        raise _malformed(document, "Expecting 'examples' value to be an list/array")
    if not found[0]:
        raise _malformed(document, "'examples' value is an empty array")
    for value in found[0]:
        go_on()
        _fill_example(value, target.examples.add())
    return signature_name, message


def _fill_example(value: Any, example: example_pb2.Example) -> None:
    if not isinstance(value, JsonObject):
        raise InvalidArgumentError(f"Example must be JSON object but got JSON {type_name(value)}")
    for key, content in value:
        name = c_string(key)
        feature = feature_pb2.Feature()
        is_list = isinstance(content, list) and not isinstance(content, JsonObject)
        for item in content if is_list else [content]:
            _add_value(item, name, feature)
        if _is_unicode(name):
            # A name that is none is that of no model's feature: TensorFlow would read past it.
            example.features.feature[name].CopyFrom(feature)


def _add_value(value: Any, name: str, feature: feature_pb2.Feature) -> None:
    converted: Any = value
    if isinstance(value, str):
        kind, converted = "bytes_list", value.encode(errors="surrogateescape")
    elif is_base64(value):
        kind, converted = "bytes_list", decode_base64(value)
    elif value is None or isinstance(value, list):
        raise InvalidArgumentError(f"Feature: {name} has element with unexpected JSON type: {type_name(value)}")
    elif isinstance(value, float):
        kind = "float_list"
    else:
        kind, converted = "int64_list", int(value)
        if value not in _INT64:
            raise InvalidArgumentError(f"Feature: {name} has uint64_t element. Only int64_t is supported.")
    if feature.WhichOneof("kind") not in (None, kind):
        held = _KINDS[feature.WhichOneof("kind")]
        raise InvalidArgumentError(f"Unexpected element type in feature: {name} expecting type: {held}")
    getattr(feature, kind).value.append(converted)


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _malformed(value: Any, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"JSON Value: {json_document.dump(value)} {problem}")
