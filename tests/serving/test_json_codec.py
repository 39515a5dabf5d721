"""JSON read and quoted as TensorFlow Serving does it, where no recorded answer goes."""

import math

import numpy as np
import pytest
from keras_bn_serving.codec import document
from keras_bn_serving.codec.answer import encode_predict
from keras_bn_serving.codec.examples import decode_examples
from keras_bn_serving.codec.tensor import decode_predict
from keras_bn_serving.codec.tensor_spec import TensorSpec
from keras_bn_serving.errors import InvalidArgumentError, ResourceExhaustedError


def read(body: bytes, **types: str) -> dict[str, np.ndarray]:
    return decode_predict(body, lambda name: {key: TensorSpec(value, None) for key, value in types.items()}).inputs


@pytest.mark.parametrize(("number", "text"), [
    (2.0**64, "18446744073709553000.0"), (251e30, "2.51e32"), (0.1, "0.1"), (-0.0, "-0.0"), (-1e-310, "-0.0"),
    (1e21, "1e21"), (123456.0, "123456.0"), (1e-6, "0.000001"), (1e-7, "1e-7"), (5e-308, "5e-308"),
    (1.7976931348623157e308, "1.7976931348623157e308"), (2.2250738585072014e-308, "2.2250738585072014e-308"),
    (float(2**53 + 2), "9007199254740994.0"), (1 / 3, "0.3333333333333333"), (2.0**-1000, "9.332636185032189e-302"),
])  # fmt: skip
def test_numbers_are_quoted_with_rapidjsons_digits(number: float, text: str):
    assert document.dump(number) == text


@pytest.mark.parametrize("text", [
    b'{"a": [1, 2.5, "x\\u00e9\xc3\xa9", null, true, {"b": []}], "c": -1e300, "d": 12345678901234567890}',
    b"[1, 2] tail",
    b'{"a": 1}}', b"[1, 2", b'["a\\q"]', b"[0.5e]", b"[NaN, tru]", b'"\xff\xfe" 7',
])  # fmt: skip
def test_a_text_that_is_read_piece_by_piece_is_read_as_in_one(text: bytes, monkeypatch: pytest.MonkeyPatch):
    def outcome() -> str:
        try:
            return repr(document.parse(text))
        except InvalidArgumentError as error:
            return error.message

    in_one = outcome()
    for size in (4, 7):
        monkeypatch.setattr(document, "_PIECE_BYTES", size)
        assert outcome() == in_one


def test_parsing_lets_go_now_and_then_and_can_be_given_up():
    turns: list[int] = []

    def go_on() -> None:
        turns.append(len(turns))
        if len(turns) > 5:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        document.parse(b"[" + b"[]," * 500_000 + b"[]]", go_on)
    assert len(turns) == 6


def test_digits_give_the_number_back():
    chance = np.random.default_rng(3)
    numbers = np.ldexp(chance.uniform(0.5, 1.0, 5000), chance.integers(-1000, 1000, 5000))
    for number in numbers.tolist():
        assert float(document.dump(number)) == number


def test_a_quoted_value_ends_after_the_piece_with_which_it_is_long_enough():
    assert document.dump(["x" * 300, 1]) == '["' + "x" * 300 + '"'
    assert document.dump([1] * 300) == "[" + ", ".join(["1"] * 85) + ", 1"
    # Two bytes before the end a whole piece still fits in, with the comma before it.
    assert document.dump(["x" * 251, 12345678, 9]) == '["' + "x" * 251 + '", 12345678'
    assert document.dump(["x" * 252, 12345678, 9]) == '["' + "x" * 252 + '", 12345678'
    assert document.dump(["x" * 253, 12345678, 9]) == '["' + "x" * 253 + '"'


def test_a_quoted_value_ends_before_a_number_that_is_none():
    assert document.dump([1, math.nan, 2]) == "[1, "
    assert document.dump(math.inf) == ""


def test_old_rapidjsons_infinities_and_lone_halves_are_looked_for_outside_strings_and_inside():
    parsed = document.parse(rb'[18e307, "1.8e308 \\udc00", "\udc00", 1.8e308, -2e308]')
    assert parsed == [math.inf, "1.8e308 \\udc00", "\udced\udcb0\udc80", math.inf, -math.inf]


@pytest.mark.parametrize(("text", "offset"), [
    (b'["\\udc00", "\\ud800"]', 12), (b'["\\udc00\xff", 1 2]', 14), (b"[1.8e308, 1.8e310]", 10), (b"[1.8e308 2]", 9),
])  # fmt: skip
def test_what_old_rapidjson_takes_does_not_move_the_offset_of_an_error(text: bytes, offset: int):
    with pytest.raises(InvalidArgumentError, match=f" at offset: {offset}$"):
        document.parse(text)


@pytest.mark.parametrize(("mark", "offset"), [(b"", 0), (b"\xef", 1), (b"\xef\xbb", 2), (b"\xef\xbb\xbf", 3)])
def test_the_beginning_of_a_byte_order_mark_is_passed_over(mark: bytes, offset: int):
    assert read(mark + b'{"inputs": [1, null, 2]}'.replace(b"null, ", b""), x="float")["x"].tolist() == [1, 2]
    with pytest.raises(InvalidArgumentError, match=f"Invalid value. at offset: {offset}"):
        read(mark + b"q", x="float")


@pytest.mark.parametrize(("text", "value"), [
    ("QQ==", b"A"), ("QQ", b"A"), ("QQ..", b"A"), ("QUI.", b"AB"), ("Q U\\nI=", b"AB"), ("QR==", b"A"),
])  # fmt: skip
def test_base64_may_be_padded_with_points_or_not_at_all(text: str, value: bytes):
    assert read(b'{"inputs": {"b64": "%s"}}' % text.encode(), s="string")["s"].item() == value


@pytest.mark.parametrize("text", ["Q", "QQ=", "QUI==", "-_8=", "=", "QUJD.."])
def test_base64_of_another_kind_is_refused(text: str):
    with pytest.raises(InvalidArgumentError, match="Unable to base64 decode"):
        read(b'{"inputs": {"b64": "%s"}}' % text.encode(), s="string")


@pytest.mark.parametrize("dtype", ["float", "double"])
@pytest.mark.parametrize("key", ["inputs", "instances"])
def test_zeros_and_what_is_too_small_keep_their_sign(dtype: str, key: str):
    values = read(b'{"%s": [-0.0, -1e-320, 1e-320, 1.5]}' % key.encode(), x=dtype)["x"]
    assert np.signbit(values).tolist() == [True, True, False, False]
    assert values.tolist() == [0.0, 0.0, 0.0, 1.5]


def test_names_end_at_a_zero_character():
    assert read(b'{"instances": [{"x\\u0000y": 1}]}', x="float")["x"].tolist() == [1]
    _, message = decode_examples(b'{"examples": [{"x\\u0000y": 1}]}')
    assert list(message.example_list.examples[0].features.feature) == ["x"]


def test_booleans_of_examples_are_integers():
    _, message = decode_examples(b'{"examples": [{"x": [true, 7, false]}]}')
    assert list(message.example_list.examples[0].features.feature["x"].int64_list.value) == [1, 7, 0]


def test_a_feature_whose_name_is_no_text_is_passed_over():
    _, message = decode_examples(b'{"examples": [{"\xff": 1, "x": 2}]}')
    assert list(message.example_list.examples[0].features.feature) == ["x"]


@pytest.mark.parametrize(("dtype", "name"), [("float16", "half"), ("uint16", "uint16"), ("complex64", "complex64")])
def test_types_that_json_is_not_written_for_are_refused_unless_there_are_no_values(dtype: str, name: str):
    with pytest.raises(InvalidArgumentError, match=f"Failed to write JSON value for tensor type: {name}"):
        encode_predict({"y": np.zeros(1, dtype)}, row_format=True)
    assert encode_predict({"y": np.zeros((0,), dtype)}, row_format=False) == b'{\n    "outputs": []\n}'


@pytest.mark.parametrize("dtype", ["half", "bfloat16", "complex64", "string", "uint16"])
def test_an_empty_list_is_of_any_type(dtype: str):
    assert read(b'{"inputs": []}', x=dtype)["x"].shape == (0,)


@pytest.mark.parametrize("row_format", [True, False])
def test_answers_of_more_values_than_memory_holds_as_text_are_refused(row_format: bool):
    vast = np.broadcast_to(np.float32(0), (2**12, 2**12 + 1))
    with pytest.raises(ResourceExhaustedError, match="The answer has 16781312 values; in JSON at most 16777216"):
        encode_predict({"y": vast}, row_format=row_format)


@pytest.mark.parametrize("count", [1, 100])
def test_answers_flush_numbers_that_are_too_small_to_be_normal_and_keep_their_sign(count: int):
    values = np.tile(np.array([1e-40, -1e-40, 0.0, -0.0, -2e-38, 1.0], np.float32), count)
    (text,) = encode_predict({"y": values}, False).decode().split("[")[1:]
    words = [word.rstrip(",") for word in text.split("]")[0].split()]
    assert words == ["0.0", "-0.0", "0.0", "-0.0", "-2e-38", "1.0"] * count
