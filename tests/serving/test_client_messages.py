"""The client's own declarations of TensorFlow Serving's messages, held to the published ones."""

import inspect
import subprocess
import sys
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto
from keras_bn_serving.client import AsyncClient, Client, messages
from tensorflow.core.example import example_pb2, feature_pb2
from tensorflow.core.framework import tensor_pb2, tensor_shape_pb2, types_pb2
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    input_pb2,
    model_pb2,
    predict_pb2,
    regression_pb2,
    status_pb2,
)

from tests.serving.servers import ROOT, RunningServer

PUBLISHED = (
    classification_pb2, example_pb2, feature_pb2, get_model_metadata_pb2, get_model_status_pb2, input_pb2,
    meta_graph_pb2, model_pb2, predict_pb2, regression_pb2, status_pb2, tensor_pb2, tensor_shape_pb2,
)  # fmt: skip
# Numbers on the wire, whatever their names: strings that need not be text, an enum.
SAME_WIRE = {FieldDescriptor.TYPE_ENUM: FieldDescriptor.TYPE_INT32}


def published(name: str) -> Any:
    if name == "Dim":
        return tensor_shape_pb2.TensorShapeProto.Dim.DESCRIPTOR
    return next(
        module.DESCRIPTOR.message_types_by_name[name]
        for module in PUBLISHED
        if name in module.DESCRIPTOR.message_types_by_name
    )


def is_repeated(field: FieldDescriptor) -> bool:
    """Whether it is a list: older versions of protobuf have no property for that, newer ones warn of `label`."""
    message = DescriptorProto()
    field.containing_type.CopyToProto(message)
    return (
        next(each.label for each in message.field if each.number == field.number) == FieldDescriptorProto.LABEL_REPEATED
    )


def wire(field: FieldDescriptor) -> tuple[Any, ...]:
    kind = SAME_WIRE.get(field.type, field.type)
    of = field.message_type
    entry = of is not None and of.GetOptions().map_entry
    value = wire(of.fields_by_name["value"]) if entry else of.name if of is not None else None
    return field.name, field.number, kind, is_repeated(field), value


@pytest.mark.parametrize("name", messages._MESSAGES)
def test_fields_have_the_numbers_and_types_of_the_published_messages(name: str):
    theirs = published(name).fields_by_number
    for number, field in messages.message(name).DESCRIPTOR.fields_by_number.items():
        if number not in theirs:
            # A TensorFlow that is older than the field.
            assert name in ("SignatureDef", "TensorProto")
            continue
        assert wire(field) == wire(theirs[number])
        assert bool(field.containing_oneof) == bool(theirs[number].containing_oneof)


def test_values_of_enums_have_the_published_names():
    ours = messages._ENUMS["DataType"]
    assert {name: ours.get(name) for name, number in types_pb2.DataType.items() if number < 100} == {
        name: number for name, number in types_pb2.DataType.items() if number < 100
    }
    assert messages._ENUMS["State"] == dict(get_model_status_pb2.ModelVersionStatus.State.items())
    assert messages.state_name(30) == "AVAILABLE"
    assert messages.state_name(7) == "7"


def test_asking_over_grpc_imports_no_tensorflow(server: RunningServer):
    program = f"""
import sys
from keras_bn_serving.client import Client
with Client("grpc://{server.grpc_target}") as client:
    print(client.predict("half_plus_two", [2.0], label="stable"), client.status("multi")[0].state)
    print(client.classify("examples", [{{"x": 0.25}}])[0][0][0], sorted(client.metadata("multi"))[1:])
print([name for name in sys.modules if name.split(".")[0] in ("tensorflow", "keras", "tensorflow_serving")])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "serving", capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == "[3.] AVAILABLE", done.stderr
    assert done.stdout.splitlines()[1] == "yes ['serving_default']"
    assert done.stdout.splitlines()[2] == "[]"


@pytest.mark.parametrize(
    "name", ["predict", "drift", "classify", "regress", "status", "metadata", "wait_until_ready", "close"]
)
def test_both_clients_have_the_same_operations_with_the_same_types(name: str):
    blocking, awaited = getattr(Client, name), getattr(AsyncClient, name)
    assert inspect.iscoroutinefunction(awaited)
    assert inspect.signature(blocking) == inspect.signature(awaited)
    assert inspect.signature(blocking).return_annotation is not inspect.Signature.empty
    assert inspect.signature(blocking).return_annotation is not Any
