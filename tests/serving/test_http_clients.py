"""HTTP as clients really speak it: other protocols offered, whole URLs, old versions, methods of all kinds."""

import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.serving import fuzzing
from tests.serving.servers import RunningServer
from tests.serving.test_robustness import address_of, exchange, post

PREDICT = "/v1/models/half_plus_two:predict"
BODY = b'{"instances": [1.0, 2.0]}'
LENGTH = b"Content-Length: %d" % len(BODY)
ANSWER = {"predictions": [3.5, 4.0]}
UPGRADES = {
    "h2c": [b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk"],
    "websocket": [b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"],
    "TLS": [b"Connection: Upgrade", b"Upgrade: TLS/1.2"],
}
JAVA = """
import java.net.URI;
import java.net.http.*;

public class Ask {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        for (int turn = 0; turn < 2; turn++) {
            HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0]))
                .POST(HttpRequest.BodyPublishers.ofString(arguments[1])).build();
            HttpResponse<String> response = client.send(request, HttpResponse.BodyHandlers.ofString());
            String body = response.body().replace("\\n", "");
            System.out.println(response.statusCode() + " " + response.version() + " " + body);
        }
    }
}
"""
NODE = """
const [url, body] = process.argv.slice(1);
fetch(url, {method: "POST", body}).then(async (response) => console.log(response.status, await response.text()));
"""


def run(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


@pytest.mark.parametrize("options", [
    ["--http2"], ["--http1.0"], ["--http1.1", "-H", "Expect: 100-continue"], ["-H", "Transfer-Encoding: chunked"],
], ids=["http2", "1.0", "expect", "chunked"])  # fmt: skip
def test_curl_gets_its_answer(server: RunningServer, options: list[str]):
    assert json.loads(run("curl", "-sS", *options, "-d", BODY.decode(), server.url + PREDICT)) == ANSWER


def test_curl_gets_its_answer_where_the_server_is_its_proxy(server: RunningServer):
    url = "http://elsewhere.example" + PREDICT
    assert json.loads(run("curl", "-sS", "--proxy", server.url, "-d", BODY.decode(), url)) == ANSWER


def test_curl_may_ask_for_the_head_alone(server: RunningServer):
    head = run("curl", "-sS", "-I", server.url + "/v1/models/half_plus_two")
    assert head.startswith("HTTP/1.1 400 ")
    assert "content-length: 0" not in head.lower()


def test_javas_client_which_offers_http2_at_every_request_gets_its_answers(server: RunningServer, tmp_path: Path):
    source = tmp_path / "Ask.java"
    source.write_text(JAVA)
    lines = run("java", str(source), server.url + PREDICT, BODY.decode()).splitlines()
    assert lines == ['200 HTTP_1_1 {    "predictions": [3.5, 4.0    ]}'] * 2


def test_nodes_fetch_gets_its_answer(server: RunningServer):
    status, _, text = run("node", "-e", NODE, server.url + PREDICT, BODY.decode()).partition(" ")
    assert (status, json.loads(text)) == ("200", ANSWER)


@pytest.mark.parametrize("offer", UPGRADES)
def test_an_offer_of_another_protocol_is_passed_over_and_the_body_is_read(server: RunningServer, offer: str):
    one = post(BODY, *UPGRADES[offer], LENGTH)
    status, body = exchange(server, one)
    assert (status, json.loads(body)) == (200, ANSWER)
    # What follows on the connection is read as HTTP/1.1 too.
    answers = fuzzing.exchange(address_of(server), one + b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" + one)
    assert answers.count(b"HTTP/1.1 200 OK\r\n") == 3


def test_an_offer_with_a_chunked_body_that_comes_in_pieces_is_read(server: RunningServer):
    head = post(b"", *UPGRADES["h2c"], b"Transfer-Encoding: chunked")
    pieces = [head, b"5\r\n{", b'"ins\r\n12\r\ntances": [1.0, 2]}\r\n0\r\nX-Checksum: 1\r\n', b"\r\n"]
    with socket.create_connection(address_of(server), timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == ANSWER


@pytest.mark.parametrize(("target", "status", "words"), [
    (b"http://a.example:80/v1/models/half_plus_two:predict", 200, b"3.5"),
    (b"https://user:word@a.example/v1/models/half_plus_two:predict", 200, b"3.5"),
    (b"http://a.example/v1/models/half_plus_two:predict?x=1", 400, b"Malformed request: POST /v1/models/half_plus_two"),
    (b"http://a.example", 404, b"<TITLE>404 Not Found</TITLE>"),
    (b"http://a.example?x=1", 404, b"<TITLE>404 Not Found</TITLE>"),
    (b"/V1/Models/half_plus_two:predict", 200, b"3.5"),
    (b"/v1/models/half%zztwo:predict", 400, b"<TITLE>400 Bad Request</TITLE>"),
    (b"/v1/models/half|two:predict", 400, b"<TITLE>400 Bad Request</TITLE>"),
    (b"/v1/models/h\xc3\xa4lf:predict", 400, b"Not an HTTP request: Invalid char in url path"),
    (b"//v1/models/half_plus_two:predict", 404, b"<TITLE>404 Not Found</TITLE>"),
])  # fmt: skip
def test_a_target_may_be_a_whole_url_and_must_be_one_or_a_path(
    server: RunningServer, target: bytes, status: int, words: bytes
):
    request = post(BODY, LENGTH).replace(b"/v1/models/half_plus_two:predict", target, 1)
    got, answer = exchange(server, request)
    assert got == status
    assert words in answer


@pytest.mark.parametrize(("request_bytes", "status"), [
    (b"HEAD /v1/models/half_plus_two HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 404),
    (b"OPTIONS /v1/models/multi HTTP/1.1\r\nHost: a\r\nOrigin: http://b\r\n\r\n", 200),
    (b"OPTIONS /v1/models/multi HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"TRACE /v1/models/multi HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    (b"FOO /v1/models/multi HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    (b"get /v1/models/multi HTTP/1.0\r\n\r\n", 501),
    (b"CONNECT a.example:80 HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    (post(BODY, b"Expect: nothing", LENGTH), 417),
    (b"GET /v1/models/multi HTTP/1.1\r\nHost: a\r\nExpect: nothing\r\n\r\n", 200),
])  # fmt: skip
def test_other_methods_and_wishes_are_answered_as_tensorflow_serving_does(
    server: RunningServer, request_bytes: bytes, status: int
):
    assert exchange(server, request_bytes)[0] == status


def test_an_old_client_is_not_told_to_go_on(server: RunningServer):
    request = post(BODY, b"Expect: 100-continue", LENGTH).replace(b"HTTP/1.1", b"HTTP/1.0")
    assert fuzzing.exchange(address_of(server), request).startswith(b"HTTP/1.1 200 OK\r\n")
