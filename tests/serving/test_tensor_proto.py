"""Tensors in messages: which fields hold them, held to TensorFlow's own encoding and decoding."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from keras_bn_serving.codec import data_types
from keras_bn_serving.codec.tensor_proto import to_array, write_array
from keras_bn_serving.errors import InvalidArgumentError
from tensorflow.core.framework import tensor_pb2, types_pb2

# What Tensor::AsProtoField sets, by element type.
FIELDS = {
    "float32": "float_val", "float64": "double_val", "int8": "int_val", "int16": "int_val", "int32": "int_val",
    "int64": "int64_val", "uint8": "int_val", "uint16": "int_val", "uint32": "uint32_val", "uint64": "uint64_val",
    "bool": "bool_val", "half": "half_val", "bfloat16": "half_val", "complex64": "scomplex_val",
    "complex128": "dcomplex_val", "float8_e5m2": "float8_val", "float8_e4m3fn": "float8_val", "int4": "int_val",
    "uint4": "int_val", "qint8": "int_val", "quint8": "int_val", "qint16": "int_val", "quint16": "int_val",
    "qint32": "int_val", "string": "string_val",
}  # fmt: skip
QUANTIZED = [name for name in FIELDS if name.startswith("q")]
# What `tf.io.serialize_tensor` has no kernel for.
SMALL = ("float8_e5m2", "float8_e4m3fn", "int4", "uint4")
PLAIN = [name for name in FIELDS if name not in QUANTIZED]


def some_values(type_name: str, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    dtype = np.dtype(tf.as_dtype(type_name).as_numpy_dtype)
    if type_name == "string":
        array = np.empty(size, object)
        array[:] = [b"\xff" * n for n in range(size)]
        return array.reshape(shape)
    if dtype.names:
        return np.arange(size).astype(dtype[0]).view(dtype).reshape(shape)
    numbers = np.arange(size) - (0 if dtype.kind in "ub" or type_name in ("uint4",) else size // 2)
    return (numbers * (1 + 0.5j) if dtype.kind == "c" else numbers).astype(dtype).reshape(shape)


def from_array(array: np.ndarray) -> tensor_pb2.TensorProto:
    message = tensor_pb2.TensorProto()
    write_array(message, array)
    return message


def test_names_numbers_and_numpys_types_are_tensorflows():
    for name, number in data_types.NUMBERS.items():
        # Those that an older TensorFlow has not yet are left out.
        if number in types_pb2.DataType.values():
            assert types_pb2.DataType.Name(number) == f"DT_{name.upper()}"
            if name not in ("resource", "variant"):
                assert data_types.numpy_type(name) == np.dtype(tf.as_dtype(number).as_numpy_dtype)
                assert data_types.number_of(data_types.numpy_type(name)) == number


@pytest.mark.parametrize("name", ["resource", "variant", "float9"])
def test_types_that_no_array_has_have_no_type_of_numpy(name: str):
    with pytest.raises(KeyError):
        data_types.numpy_type(name)


@pytest.mark.parametrize("type_name", FIELDS)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (), (0, 2)])
def test_values_stand_in_the_field_of_their_type_and_nothing_else_is_set(type_name: str, shape: tuple[int, ...]):
    message = from_array(some_values(type_name, shape))
    values = set() if 0 in shape else {FIELDS[type_name]}
    assert {field.name for field, _ in message.ListFields()} == {"dtype", "tensor_shape"} | values
    assert message.dtype == tf.as_dtype(type_name).as_datatype_enum
    assert [dim.size for dim in message.tensor_shape.dim] == list(shape)


@pytest.mark.parametrize("type_name", FIELDS)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (), (0, 2), (200,)])
def test_what_is_written_is_read_back(type_name: str, shape: tuple[int, ...]):
    array = some_values(type_name, shape)
    back = to_array(from_array(array), "x")
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tolist() == array.tolist()


@pytest.mark.parametrize("type_name", PLAIN)
def test_tensorflow_reads_what_is_written(type_name: str):
    array = some_values(type_name, (2, 3))
    np.testing.assert_array_equal(tf.io.parse_tensor(from_array(array).SerializeToString(), type_name), array)


@pytest.mark.parametrize("type_name", [name for name in PLAIN if name not in SMALL])
def test_contents_as_bytes_are_read(type_name: str):
    array = some_values(type_name, (2, 3))
    message = tensor_pb2.TensorProto.FromString(tf.io.serialize_tensor(array).numpy())
    assert message.tensor_content or type_name == "string"
    assert to_array(message, "x").tolist() == array.tolist()


@pytest.mark.parametrize("type_name", [name for name in FIELDS if name != "string"])
def test_fewer_values_than_the_shape_holds_repeat_the_last_and_no_values_are_zeros(type_name: str):
    array = some_values(type_name, (3,))
    message = from_array(array)
    message.tensor_shape.dim[0].size = 5
    assert to_array(message, "x").tolist() == [*array.tolist(), array.tolist()[-1], array.tolist()[-1]]
    message.tensor_shape.dim[0].size = 2
    assert to_array(message, "x").tolist() == array.tolist()[:2]
    empty = tensor_pb2.TensorProto(dtype=message.dtype, tensor_shape=message.tensor_shape)
    assert to_array(empty, "x").tolist() == np.zeros(2, array.dtype).tolist()


def read(text: str) -> np.ndarray:
    return to_array(text_format.Parse(text, tensor_pb2.TensorProto()), "x")


@pytest.mark.parametrize(("values", "expected"), [
    ('string_val: "a"', [b"a", b"a", b"a"]),
    ('string_val: "a" string_val: "b" string_val: "c" string_val: "d"', [b"a", b"b", b"c"]),
    ("", [b"", b"", b""]),
    (r'tensor_content: "\001\000\002a\377b"', [b"a", b"", b"\xffb"]),
    (r'tensor_content: "\001\201\000\001abc"', [b"a", b"b", b"c"]),
])  # fmt: skip
def test_strings_come_one_by_one_or_in_one_piece_with_their_lengths_before_them(values: str, expected: list[bytes]):
    assert read(f"dtype: DT_STRING tensor_shape {{ dim {{ size: 3 }} }} {values}").tolist() == expected


def test_strings_longer_than_a_byte_can_say_come_in_one_piece():
    content = b"\xac\x02\x01" + b"y" * 300 + b"z"
    shape = {"dim": [{"size": 2}]}
    message = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, tensor_shape=shape, tensor_content=content)
    assert to_array(message, "x").tolist() == [b"y" * 300, b"z"]


def test_integers_wrap_and_a_half_complex_number_counts_for_nothing():
    shape = "tensor_shape { dim { size: 2 } }"
    assert read(f"dtype: DT_INT8 {shape} int_val: 300 int_val: -129").tolist() == [44, 127]
    assert read(f"dtype: DT_HALF {shape} half_val: 15360 half_val: {65536 + 16384}").tolist() == [1.0, 2.0]
    assert read(f"dtype: DT_COMPLEX64 {shape} scomplex_val: [1, 2, 3]").tolist() == [1 + 2j, 1 + 2j]
    assert read(f"dtype: DT_FLOAT {shape} int_val: 3").tolist() == [0.0, 0.0]


def test_a_rank_said_to_be_unknown_is_that_of_the_sizes_given():
    assert read("dtype: DT_FLOAT tensor_shape { unknown_rank: true dim { size: 2 } } float_val: 1").tolist() == [1, 1]
    assert read("dtype: DT_FLOAT tensor_shape { unknown_rank: true } float_val: 1").shape == ()


def test_a_tensor_without_elements_may_carry_anything():
    assert read('dtype: DT_FLOAT tensor_shape { dim { size: 0 } } tensor_content: "abc"').shape == (0,)
    assert read('dtype: DT_STRING tensor_shape { dim { size: 0 } } tensor_content: "abc"').shape == (0,)


@pytest.mark.parametrize("text", [
    "tensor_shape { dim { size: 1 } } float_val: 1",
    "dtype: DT_FLOAT_REF float_val: 1",
    "dtype: DT_RESOURCE",
    "dtype: DT_FLOAT tensor_shape { dim { size: -1 } } float_val: 1",
    "dtype: DT_FLOAT tensor_shape { dim { size: 1000000000 } } float_val: 1",
    "dtype: DT_FLOAT tensor_shape { dim { size: 4611686018427387904 } dim { size: 8 } dim { size: 0 } }",
    "dtype: DT_STRING tensor_shape { dim { size: 4611686018427387904 } dim { size: 8 } dim { size: 0 } }",
    'dtype: DT_FLOAT tensor_shape { dim { size: 1 } } tensor_content: "abc"',
    'dtype: DT_FLOAT tensor_shape { dim { size: 1 } } tensor_content: "abcdefgh"',
    r'dtype: DT_BOOL tensor_shape { dim { size: 3 } } tensor_content: "\000\001\002"',
    r'dtype: DT_STRING tensor_shape { dim { size: 2 } } tensor_content: "\001"',
    r'dtype: DT_STRING tensor_shape { dim { size: 2 } } tensor_content: "\001\001a"',
    r'dtype: DT_STRING tensor_shape { dim { size: 2 } } tensor_content: "\001\001abc"',
    r'dtype: DT_STRING tensor_shape { dim { size: 1 } } tensor_content: "\200\200\200\200\200\001"',
    "dtype: DT_FLOAT tensor_shape {" + "dim { size: 1 }" * 300 + "}",
], ids=["no type", "reference", "resource", "negative", "huge", "huge and empty", "huge and empty strings", "short",
        "long", "no truth value", "a length is missing", "string too short", "string too long", "no end",
        "dimensions"])  # fmt: skip
def test_what_does_not_fit_together_is_refused_by_name(text: str):
    with pytest.raises(InvalidArgumentError, match=r"^INVALID_ARGUMENT: tensor parsing error: x$"):
        read(text)


@pytest.mark.parametrize("type_name", ["DT_FLOAT", "DT_STRING"])
def test_an_empty_tensor_of_sizes_that_only_tensorflow_takes_is_refused_with_its_shape(type_name: str):
    sizes = "".join(f"dim {{ size: {size} }}" for size in (2**62, 0, 8))
    with pytest.raises(InvalidArgumentError, match=rf"`x` has no entries, .* Received: shape \[{2**62},0,8\]\.$"):
        read(f"dtype: {type_name} tensor_shape {{ {sizes} }}")


def test_types_of_arrays_are_those_of_models():
    assert to_array(from_array(np.ones(1, ml_dtypes.bfloat16)), "x").dtype == ml_dtypes.bfloat16
