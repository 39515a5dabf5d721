"""Starting the server's command: what it says when it cannot serve, and what it needs to say it."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from keras_bn_serving.client import Client

from tests.serving.servers import ROOT, environment, run_to_the_end, running_server


def assert_one_clear_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert result.returncode != 0
    assert lines[0].startswith("Error: ")
    for word in words:
        assert word in lines[0]


def test_a_missing_base_path_is_one_line(tmp_path: Path):
    result = run_to_the_end("--model_name=m", f"--model_base_path={tmp_path / 'nowhere'}", "--wait_for_models=false")
    assert_one_clear_line(result, str(tmp_path / "nowhere"), "does not exist")


def test_an_empty_base_path_is_one_line(tmp_path: Path):
    result = run_to_the_end("--model_name=m", f"--model_base_path={tmp_path}", "--wait_for_models=false")
    assert_one_clear_line(result, str(tmp_path), "no version", "folder with a number")


def test_a_saved_model_without_a_numbered_folder_is_one_line(models_folder: Path):
    folder = models_folder / "multi" / "1"
    result = run_to_the_end("--model_name=m", f"--model_base_path={folder}")
    assert_one_clear_line(result, str(folder), "move it into a numbered folder")


def test_a_corrupt_saved_model_is_one_line(tmp_path: Path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"this is no SavedModel")
    result = run_to_the_end("--model_name=m", f"--model_base_path={tmp_path}", "--rest_api_port=auto")
    assert_one_clear_line(result, "m version 1 cannot be served", str(tmp_path / "1"))


def test_a_version_folder_without_a_saved_model_is_one_line(tmp_path: Path):
    (tmp_path / "1").mkdir()
    result = run_to_the_end("--model_name=m", f"--model_base_path={tmp_path}", "--rest_api_port=auto")
    assert_one_clear_line(result, "Could not find SavedModel .pb or .pbtxt", str(tmp_path / "1"))


def test_who_interrupts_before_the_server_listens_is_told_so_in_a_line(tmp_path: Path):
    (tmp_path / "1").mkdir()
    program = f"""if True:
        import sys

        class Interrupted:
            def find_spec(name, path=None, target=None):
                if name == "tensorflow":
                    raise KeyboardInterrupt

        sys.meta_path.insert(0, Interrupted)
        from keras_bn_serving.__main__ import main
        sys.exit(main(["--model_base_path={tmp_path}", "--rest_api_port=auto"]))
    """
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (130, "Error: Interrupted.\n")


def test_a_taken_port_is_one_line(models_folder: Path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run_to_the_end(f"--model_base_path={models_folder / 'multi'}", f"--rest_api_port={port}")
    assert_one_clear_line(result, str(port), "Address already in use")


def test_an_address_that_is_none_of_this_machine_is_one_line(tmp_path: Path):
    (tmp_path / "1").mkdir()
    result = run_to_the_end(f"--model_base_path={tmp_path}", "--rest_api_port=auto", "--address=203.0.113.1")
    assert_one_clear_line(result, "Cannot listen on 203.0.113.1, any port: ")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model_bas_path=/m"], ["Unknown flag --model_bas_path", "--model_base_path"]),
        (["--nope"], ["Unknown flag --nope. See --help for all flags."]),
        (["--model_base_path=/m", "--rest_api_port=x"], ["--rest_api_port", "from 0 to 65535", "'x'"]),
        (["--model_base_path=/m", "--rest_api_port=70000"], ["--rest_api_port", "from 0 to 65535", "'70000'"]),
        ([], ["--model_base_path", "--model_config_file"]),
        (["--model_config_file=/nowhere"], ["/nowhere", "No such file"]),
    ],
)
def test_a_bad_command_line_is_one_line(flags: list[str], words: list[str]):
    assert_one_clear_line(run_to_the_end(*flags), *words)


def test_a_config_file_with_a_mistake_is_one_line_that_says_where(tmp_path: Path):
    path = tmp_path / "models.config"
    path.write_text("model_config_list {\n  config { nam: 'x' }\n}\n")
    assert_one_clear_line(run_to_the_end(f"--model_config_file={path}"), str(path), "2:", "nam")


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "keras_bn_serving", "--help"],
        ["-m", "keras_bn_serving", "--version"],
        ["-m", "keras_bn_serving.client", "--help"],
    ],
)
def test_help_and_version_do_without_tensorflow(arguments: list[str]):
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['x', *{arguments[2:]!r}]\n"
        f"try:\n    runpy.run_module({arguments[1]!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert ("TensorFlow" if "--version" in arguments else "--model_name") in result.stdout


def test_the_server_says_what_it_serves_and_where_and_stops_when_told(models_folder: Path):
    with running_server("--model_name=half", f"--model_base_path={models_folder / 'half_plus_two'}") as server:
        assert "Serving half, version 2" in server.summary
        assert re.search(r"REST at http://127\.0\.0\.1:\d+", server.summary)
        with Client(server.url) as client:
            assert client.predict("half", [1.0, 2.0]).tolist() == [3.5, 4.0]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0
