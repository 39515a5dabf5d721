"""The health check of the images: 0 only where a version is AVAILABLE, and never late."""

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time

import pytest

from tests.serving.servers import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("timeout") or not shutil.which("bash"), reason="needs coreutils, bash")
NO_VERSION = {"model_version_status": []}


def check(port, name="fashion_cnn", seconds=5):
    began = time.monotonic()
    done = subprocess.run(
        ["bash", ROOT / "serving/model-available", name, str(port), str(seconds)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    return done, time.monotonic() - began


def status(state):
    return {"model_version_status": [{"version": "1", "state": state, "status": {"error_code": "OK"}}]}


@contextlib.contextmanager
def answering(answer):
    """A socket on a free port; `answer` is called with every connection, in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(20)

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        answer(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(20)


def http(body, code="200 OK"):
    def answer(connection):
        request = b""
        # bash sends its lines one by one; closing before the last would reset the connection.
        while not request.endswith(b"\r\n\r\n"):
            request += connection.recv(4096)
        text = json.dumps(body, indent=1)
        connection.sendall(f"HTTP/1.0 {code}\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())

    return answer


def test_a_model_that_the_embedded_server_serves_is_available(server):
    done, _ = check(server.url.rpartition(":")[2], "half_plus_two")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_model_that_the_embedded_server_does_not_have_is_not(server):
    done, _ = check(server.url.rpartition(":")[2], "other")
    assert done.returncode == 1
    assert "no version of other is AVAILABLE" in done.stderr


@pytest.mark.parametrize("state", ["START", "LOADING", "UNLOADING", "END"])
def test_a_version_in_another_state_is_not_available_though_the_server_answers_200(state):
    with answering(http(status(state))) as port:
        assert check(port)[0].returncode == 1


def test_one_available_version_beside_one_that_ends_is_enough():
    versions = [status(state)["model_version_status"][0] for state in ("END", "AVAILABLE")]
    with answering(http({"model_version_status": versions})) as port:
        assert check(port)[0].returncode == 0


def test_a_server_without_any_version_is_not_available():
    with answering(http(NO_VERSION)) as port:
        assert check(port)[0].returncode == 1


def test_an_error_that_names_the_state_is_not_the_state():
    with answering(http({"error": "Servable AVAILABLE not found"}, "404 Not Found")) as port:
        assert check(port)[0].returncode == 1


def test_a_server_that_is_down_is_not_available():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert check(closed.getsockname()[1])[0].returncode == 1


def test_a_server_that_hangs_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as never_accepts:
        done, seconds = check(never_accepts.getsockname()[1], seconds=0.5)
    assert done.returncode == 1
    assert seconds < 5


def test_a_server_that_answers_a_byte_now_and_then_is_given_up_in_time():
    def drip(connection):
        with contextlib.suppress(OSError):
            for _ in range(100):
                connection.sendall(b"x\n")
                time.sleep(0.1)

    with answering(drip) as port:
        done, seconds = check(port, seconds=0.5)
    assert done.returncode == 1
    assert seconds < 5


def test_the_command_says_how_it_is_used():
    done = subprocess.run(
        ["bash", ROOT / "serving/model-available"], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 2
    assert done.stderr == "usage: model-available NAME [PORT [SECONDS]]\n"
