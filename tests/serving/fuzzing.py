"""A seeded source of broken requests, and a sender that holds the server to its promises about them."""

import gzip
import random
import re
import socket
from collections import Counter
from collections.abc import Iterator

BODIES = [
    ("half_plus_two:predict", b'{"instances": [1.0, 2.5, -3e2]}'),
    ("half_plus_two/versions/1:predict", b'{"signature_name": "serving_default", "inputs": {"x": [[1], [2]]}}'),
    ("half_plus_two/labels/stable:predict", b'{"inputs": 5}'),
    ("multi:predict", b'{"instances": [{"a": [1, 2], "b": 3}, {"a": [4, 5], "b": 6}]}'),
    ("multi:predict", b'{"inputs": {"a": [[1, 2], [3, 4]], "b": [3, 4]}}'),
    ("strings:predict", b'{"instances": ["a", {"b64": "aGVsbG8="}, "\\ud83d\\ude00"]}'),
    ("types:predict", b'{"signature_name": "int32", "instances": [[1, 2], [3, 2147483647]]}'),
    ("types:predict", b'{"signature_name": "bool", "inputs": [true, false]}'),
    ("image:predict", b'{"instances": [[[[0], [255]], [[127], [1]]]]}'),
    ("matrix:predict", b'{"instances": [[1, 2, 3], [4, 5, 6]]}'),
    ("examples:classify", b'{"context": {"x": 0.5}, "examples": [{}, {"x": 2.0}]}'),
    ("examples:regress", b'{"signature_name": "regress_x", "examples": [{"x": [0.25]}]}'),
]
LOOKS = ["half_plus_two", "half_plus_two/versions/1", "image/metadata", "nobody", ""]
JSON_TOKENS = [
    *(b"[", b"]", b"{", b"}", b",", b":", b'"', b"null", b"true", b"NaN", b"-Infinity", b"1e400", b"1e-400", b"0x1"),
    *(b"-", b"01", b"1.", b"\\u0000", b"\\ud800", b"\xff", b"\xef\xbb\xbf", b"\x00", b'{"b64": "QQ"}', b"[" * 200),
    *(b"99999999999999999999", b'"inputs"', b'"instances"', b'"signature_name": 1,', b" " * 2000, b"1" * 5000),
]
HEADER_LINES = [
    *(b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 1x"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Content-Encoding: gzip"),
    *(
        b"Content-Encoding: br",
        b"Expect: 100-continue",
        b"Expect: nothing",
        b"Connection: close",
        b"Connection: upgrade",
    ),
    *(b"Upgrade: h2c", b"Host: a", b"X: " + b"y" * 3000, b"X: " + b"z" * 70000, b": empty", b"no colon", b"A\x00B: c"),
]
_METHODS = (b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"PATCH")
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


def requests(seed: int, count: int) -> Iterator[bytes]:
    """Yields `count` requests, most of them broken in one way or several."""
    chance = random.Random(seed)
    for _ in range(count):
        yield _request(chance)


def send_all(address: tuple[str, int], seed: int, count: int) -> Counter[int]:
    """Sends requests, each on a connection of its own, and counts the answers by status.

    Raises:
        AssertionError: If an answer is a server error that TensorFlow Serving would not give.
        TimeoutError: If the server neither answers nor closes.
    """
    statuses: Counter[int] = Counter()
    for request in requests(seed, count):
        answer = exchange(address, request)
        found = [int(status) for status in _STATUS.findall(answer)]
        for status in found or [0]:
            statuses[status] += 1
            strange = request.split(b" ", 1)[0] not in _METHODS
            unsupported = status == 501 and (strange or b"Conversion of JSON Value" in answer)
            assert status < 500 or unsupported, (status, request, answer)
    return statuses


def exchange(address: tuple[str, int], request: bytes) -> bytes:
    """Sends bytes, says that there are no more, and returns all that comes back."""
    answer = b""
    with socket.create_connection(address, timeout=30) as connection:
        try:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                answer += piece
        except (ConnectionResetError, BrokenPipeError):
            # The server has closed before it had read everything, as it may.
            return answer
    return answer


def _request(chance: random.Random) -> bytes:
    place, body = chance.choice(BODIES)
    headers = [b"Host: localhost"]
    for _ in range(chance.choice([0, 1, 1, 2, 3])):
        body = _mutated(chance, body, JSON_TOKENS)
    line = f"POST /v1/models/{place} HTTP/1.1".encode()
    if chance.random() < 0.1:
        line, body = f"GET /v1/models/{chance.choice(LOOKS)} HTTP/1.1".encode(), b""
    if chance.random() < 0.15:
        body = gzip.compress(body)
        headers.append(b"Content-Encoding: gzip")
        if chance.random() < 0.5:
            body = _mutated(chance, body, JSON_TOKENS)
    if chance.random() < 0.15:
        headers.append(b"Transfer-Encoding: chunked")
        body = _chunked(chance, body)
    else:
        headers.append(b"Content-Length: %d" % len(body))
    if chance.random() < 0.15:
        headers.insert(chance.randrange(len(headers) + 1), chance.choice(HEADER_LINES))
    if chance.random() < 0.1:
        line = _mutated(chance, line, [b" ", b"/", b":", b"%41", b"%00", b"%ff", b"?", b"HTTP/1.0", b"HTTP/9.9", b"\r"])
    whole = b"\r\n".join([line, *headers]) + b"\r\n\r\n" + body
    if chance.random() < 0.15:
        whole = _mutated(chance, whole, [b"\r\n", b"\n", b"\r", b"\x00", b" ", b"\t"])
    if chance.random() < 0.05:
        whole += _request(chance)
    return whole


def _chunked(chance: random.Random, body: bytes) -> bytes:
    parts, at = [], 0
    while at < len(body):
        size = chance.randint(1, 40)
        piece = body[at : at + size]
        at += size
        parts.append(b"%x\r\n%s\r\n" % (len(piece), piece))
    framed = b"".join(parts) + b"0\r\n\r\n"
    return (
        _mutated(chance, framed, [b"\r\n", b"fffffffffffffffff\r\n", b"0\r\n", b";x=y"])
        if chance.random() < 0.3
        else framed
    )


def _mutated(chance: random.Random, data: bytes, tokens: list[bytes]) -> bytes:
    at = chance.randrange(len(data) + 1)
    kind = chance.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + chance.randint(1, 4) :]
    if kind == 2:
        return data[:at] + chance.choice(tokens) + data[at:]
    if kind == 3:
        end = min(len(data), at + chance.randint(1, 20))
        return data[:end] + data[at:end] + data[end:]
    if kind == 4 and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
    return data[:at] + chance.randbytes(chance.randint(1, 5)) + data[at:]
