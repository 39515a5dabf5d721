"""A seeded source of requests of wrong shapes and types for a signature, for REST and for gRPC."""

import base64
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tensorflow.core.framework import tensor_pb2, types_pb2
from tensorflow_serving.apis import predict_pb2

_MOST_ENTRIES = 3000
_HUGE = (1000, 20_000, 70_000)
_STRANGERS: tuple[Any, ...] = ("text", None, True, {"b64": "AAAA"}, {"a": 1}, {}, [], 1e39, -1, 2**70, 0.5)
_PICTURE = b"GIF89a"
_BYTES = {1: 4, 2: 8, 3: 4, 4: 1, 5: 2, 6: 1, 9: 8, 10: 1, 14: 2, 17: 2, 19: 2, 22: 4, 23: 8}


class Malformed(NamedTuple):
    """One request, twice.

    Attributes:
        kind: In which way it is wrong: "shape", "ragged", "values", "names", "type". By chance a shape may be right.
        shapes: What each input was given, where that is a whole array.
        body: For `POST /v1/models/NAME:predict`.
        request: For `PredictionService.Predict`; the model's name is still to be set.
    """

    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    body: bytes
    request: predict_pb2.PredictRequest


def malformed(
    signature_name: str, inputs: Mapping[str, Mapping[str, Any]], seed: int, count: int
) -> Iterator[Malformed]:
    """Yields `count` requests for a signature.

    Args:
        signature_name: Its name.
        inputs: What it takes, as the metadata of a model has it:
            `{"image": {"dtype": "DT_UINT8", "tensor_shape": {"dim": [{"size": "-1"}, ...], "unknown_rank": False}}}`.
        seed: The same seed yields the same requests.
        count: How many.
    """
    chance = random.Random(f"{seed} {signature_name}")
    for _ in range(count):
        kind = chance.choices(("shape", "ragged", "values", "names", "type"), (12, 3, 3, 1, 2))[0]
        # Two that are huge broadcast to more than a machine holds, which only a limit of memory could refuse.
        huge = chance.choice(sorted(inputs)) if inputs else ""
        shapes = {name: _shape(chance, _expected(info), name == huge) for name, info in inputs.items()}
        types = {name: types_pb2.DataType.Value(info["dtype"]) for name, info in inputs.items()}
        values = {name: _nested(shape, _entry(types[name], shape)) for name, shape in shapes.items()}
        messages = {name: _message(chance, types[name], shape) for name, shape in shapes.items()}
        name = chance.choice(sorted(inputs)) if inputs else ""
        if kind == "ragged" and inputs:
            values[name] = _ragged(chance, values[name])
            messages[name].tensor_content = messages[name].tensor_content[:-1] or b"\x00"
        elif kind == "values" and inputs:
            values[name] = _with_stranger(chance, values[name])
            # For what is too large for memory, yet can be counted, TensorFlow Serving waits for ten seconds each.
            (size,) = chance.choices((-1, 7, 2**62, 2**31), (8, 8, 8, 1))
            messages[name].tensor_shape.dim.add(size=size)
        elif kind == "names":
            values[chance.choice(("", "other", "x" * 300))] = values.pop(name, 1)
            messages["other"] = messages.pop(name, tensor_pb2.TensorProto())
        elif kind == "type" and inputs:
            values[name] = chance.choice(_STRANGERS)
            messages[name] = _message(chance, chance.choice([*sorted(_BYTES), 7, 0, 99]), shapes[name])
        request = predict_pb2.PredictRequest(inputs=messages)
        request.model_spec.signature_name = signature_name
        whole = shapes if kind == "shape" else {}
        yield Malformed(kind, whole, _body(chance, signature_name, values), request)


def _expected(info: Mapping[str, Any]) -> list[int] | None:
    shape = info["tensor_shape"]
    return None if shape.get("unknown_rank") else [int(dim["size"]) for dim in shape.get("dim", ())]


def _shape(chance: random.Random, expected: Sequence[int] | None, huge: bool) -> tuple[int, ...]:
    """Returns a shape that is near the expected one, or any of up to six axes; with one that is huge, if it may be."""
    sizes = [chance.randint(1, 3) if size < 0 else size for size in expected or ()]
    how = chance.randrange(5) if sizes else 4
    if how == 0:
        sizes[chance.randrange(len(sizes))] = 0
    elif how == 1:
        sizes[chance.randrange(len(sizes))] += chance.choice((-1, 1, 2))
    elif how == 2:
        sizes = (
            sizes[: chance.randrange(len(sizes))] if chance.random() < 0.5 else sizes[chance.randrange(len(sizes)) :]
        )
    elif how == 3:
        sizes = [1] * chance.randint(0, 6)
        if sizes:
            sizes[chance.randrange(len(sizes))] = chance.choice(_HUGE if huge else _HUGE[:1])
    else:
        sizes = [chance.choice((0, 1, 1, 2, 3, 5)) for _ in range(chance.randint(0, 6))]
    # One axis may be huge, all together may not: what is sent has to be written.
    while math.prod(sizes) > max(_MOST_ENTRIES, *sizes) if sizes else False:
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        sizes[largest] //= 2
    return tuple(max(size, 0) for size in sizes)


def _entry(data_type: int, shape: Sequence[int]) -> Any:
    if data_type == types_pb2.DT_STRING:
        # What is huge is so by its entries, not by the twentyfold of bytes that base64 takes in JSON.
        few = math.prod(shape) <= _MOST_ENTRIES
        return {"b64": base64.b64encode(_PICTURE).decode()} if few else _PICTURE.decode()
    return data_type == types_pb2.DT_BOOL or 1


def _nested(shape: Sequence[int], entry: Any) -> Any:
    if not shape:
        return entry
    inner = _nested(shape[1:], entry)
    return [inner] * shape[0]


def _ragged(chance: random.Random, value: Any) -> Any:
    """Returns nested lists of which one somewhere has another length or depth than its neighbours."""
    if not isinstance(value, list) or not value:
        return chance.choice(([1, [1]], [[1], [1, 1]], [[], [1]], [[[1]], [1]]))
    at = chance.randrange(len(value))
    if isinstance(value[at], list) and chance.random() < 0.7:
        return [*value[:at], _ragged(chance, value[at]), *value[at + 1 :]]
    return [*value[:at], chance.choice(([], [value[at]], value)), *value[at:]]


def _with_stranger(chance: random.Random, value: Any) -> Any:
    if not isinstance(value, list) or not value:
        return chance.choice(_STRANGERS)
    at = chance.randrange(len(value))
    return [*value[:at], _with_stranger(chance, value[at]), *value[at + 1 :]]


def _message(chance: random.Random, data_type: int, shape: Sequence[int]) -> tensor_pb2.TensorProto:
    message = tensor_pb2.TensorProto(dtype=data_type)
    for size in shape:
        message.tensor_shape.dim.add(size=size)
    entries = math.prod(shape)
    if data_type == types_pb2.DT_STRING:
        message.string_val.extend([_PICTURE] * entries)
    elif chance.random() < 0.8:
        message.tensor_content = bytes(entries * _BYTES.get(data_type, 1))
    elif data_type == types_pb2.DT_FLOAT:
        message.float_val.extend([1.0] * chance.choice((0, 1, entries, entries + 1)))
    elif data_type == types_pb2.DT_INT64:
        message.int64_val.extend([1] * chance.choice((0, 1, entries, entries + 1)))
    else:
        message.int_val.extend([1] * chance.choice((0, 1, entries, entries + 1)))
    return message


def _body(chance: random.Random, signature_name: str, values: Mapping[str, Any]) -> bytes:
    document: dict[str, Any] = {"signature_name": signature_name}
    single = next(iter(values.values())) if len(values) == 1 and chance.random() < 0.8 else None
    if chance.random() < 0.5:
        document["inputs"] = values if single is None else single
    elif single is not None:
        document["instances"] = single
    else:
        lists = [value for value in values.values() if isinstance(value, list)]
        rows = min(map(len, lists), default=0)
        document["instances"] = [
            {name: value[row] if isinstance(value, list) else value for name, value in values.items()}
            for row in range(rows)
        ]
    return json.dumps(document).encode()
