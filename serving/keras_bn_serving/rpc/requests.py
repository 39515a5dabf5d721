"""What a gRPC predict request says, checked in TensorFlow Serving's order and words."""

from collections.abc import Iterable, Mapping

import numpy as np
from tensorflow.core.framework import tensor_pb2
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import inference_pb2, predict_pb2

from keras_bn_serving.codec.tensor_proto import to_array
from keras_bn_serving.engine.examples import CLASSIFY, REGRESS, check_classify, check_regress
from keras_bn_serving.engine.repository import Lease
from keras_bn_serving.engine.servable import DEFAULT_SIGNATURE
from keras_bn_serving.errors import InvalidArgumentError, UnimplementedError


def decode_inputs(
    definition: meta_graph_pb2.SignatureDef, request: predict_pb2.PredictRequest
) -> dict[str, np.ndarray]:
    """Returns the arrays of a request by input name, with the signature's own values for inputs that it leaves out.

    Raises:
        InvalidArgumentError: If names are missing or unknown, a tensor does not fit together, or an output that is
            asked for is not there, or asked for twice.
    """
    sent: Mapping[str, tensor_pb2.TensorProto] = request.inputs
    defaults: Mapping[str, tensor_pb2.TensorProto] = definition.defaults
    if len(sent) > len(definition.inputs) or (len(sent) < len(definition.inputs) and not defaults):
        raise InvalidArgumentError(
            f"input size does not match signature: {len(sent)}!={len(definition.inputs)} len({_set(sent)}) != "
            f"len({_set(definition.inputs)}). Sent extra: {_set(sent.keys() - definition.inputs.keys())}. "
            f"Missing but required: {_set(definition.inputs.keys() - sent.keys())}."
        )
    inputs = {}
    for name in sorted(definition.inputs):
        if name not in sent and name not in defaults:
            raise InvalidArgumentError(
                f"Signature input alias: {name}(feed name: {definition.inputs[name].name}) not found in request and "
                f"no default value provided. Inputs expected to be in the request {_set(sent)}, or default input "
                f"alias set: {_list(defaults)}"
            )
        inputs[name] = to_array(sent[name] if name in sent else defaults[name], name)
    used = sent.keys() & inputs.keys()
    if len(used) != len(sent):
        raise InvalidArgumentError(
            f"Inputs contains invalid name. Used request inputs: {_list(used)}, request input: {_list(sent)}"
        )
    _check_output_filter(definition, request.output_filter)
    return inputs


def check_tasks(tasks: Iterable[inference_pb2.InferenceTask], lease: Lease) -> None:
    """Raises a ServingError unless the tasks of a MultiInferenceRequest are of one model, and each can be done."""
    signatures: set[str] = set()
    for task in tasks:
        if not task.model_spec.name:
            raise InvalidArgumentError("Found ModelSpec with an empty model name.")
        if task.model_spec.name != lease.model_name:
            raise InvalidArgumentError("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
        signature = task.model_spec.signature_name or DEFAULT_SIGNATURE
        if signature in signatures:
            raise InvalidArgumentError(f"Duplicate evaluation of signature: {signature}")
        signatures.add(signature)
        if signature not in lease.servable.signatures:
            raise InvalidArgumentError(f"Requested signature not found in model graph: {signature}")
        if task.method_name not in (CLASSIFY, REGRESS):
            raise UnimplementedError(f"Unsupported signature method_name: {task.method_name}")
        check = check_classify if task.method_name == CLASSIFY else check_regress
        check(lease.servable.meta_graph.signature_def[signature])


def _check_output_filter(definition: meta_graph_pb2.SignatureDef, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name not in definition.outputs:
            raise InvalidArgumentError(
                f"output tensor alias not found in signature: {name} Outputs expected to be in the set "
                f"{_set(definition.outputs)}."
            )
        if name in seen:
            raise InvalidArgumentError(f"duplicate output tensor alias: {name}")
        seen.add(name)


def _list(names: Iterable[str]) -> str:
    return ",".join(sorted(names))


def _set(names: Iterable[str]) -> str:
    return "{" + _list(names) + "}"
