"""keras-bn ask against a real server: what a person types, and what is printed."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from keras_bn_serving.client import command
from PIL import ExifTags, Image

from tests.serving.servers import ROOT, RunningServer, environment

PIXELS = np.array([[0, 255], [127, 1]], np.uint8)


@pytest.fixture
def ask(server: RunningServer, capsys: pytest.CaptureFixture[str]):
    """Asks in this process; returns what was printed."""

    def run(*arguments: object, code: int = 0, url: str = server.url) -> str:
        assert command.main([f"--url={url}", *map(str, arguments)]) == code
        printed = capsys.readouterr()
        assert printed.err.count("\n") == (1 if code else 0), printed.err
        return printed.err if code else printed.out

    return run


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    Image.fromarray(PIXELS).save(tmp_path / "shoe.png")
    np.save(tmp_path / "batch.npy", PIXELS.reshape(1, 2, 2, 1))
    np.save(tmp_path / "example.npy", PIXELS.reshape(2, 2, 1))
    np.savez(tmp_path / "batch.npz", image=PIXELS.reshape(1, 2, 2, 1))
    rows = PIXELS.reshape(1, 2, 2, 1).tolist()
    (tmp_path / "inputs.json").write_text(json.dumps(rows))
    (tmp_path / "request.json").write_text(json.dumps({"inputs": {"image": rows}}))
    (tmp_path / "rows.json").write_text(json.dumps({"instances": [{"image": rows[0]}]}))
    return {path.name: path for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "name",
    ["shoe.png", "batch.npy", "example.npy", "batch.npz", "inputs.json", "request.json", "rows.json"],
)
def test_a_file_of_any_kind_is_asked_about(ask, files, name: str):
    assert json.loads(ask("--model_name=image", "--json", files[name]))["mean"] == [95.75]


@pytest.mark.parametrize("name", ["turned.png", "turned.webp"])
def test_a_picture_is_asked_about_upright(ask, tmp_path: Path, name: str):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # What the sensor saw is to be turned clockwise.
    Image.fromarray(PIXELS).save(tmp_path / name, exif=exif, lossless=True)
    scaled = json.loads(ask("--model_name=image", "--json", tmp_path / name))["scaled"]
    np.testing.assert_allclose(np.squeeze(scaled) * 255, np.rot90(PIXELS, -1), rtol=1e-6)


def test_encoded_pictures_are_sent_as_signatures_decode_them(ask, tmp_path: Path):
    def sent(name: str, **options: object) -> bytes:
        Image.fromarray(PIXELS).save(tmp_path / name, **options)
        (text,) = json.loads(ask("--model_name=strings", "--json", tmp_path / name))["raw_bytes"]
        return base64.b64decode(text["b64"])

    assert sent("shoe.gif") == (tmp_path / "shoe.gif").read_bytes()
    decoded = Image.open(io.BytesIO(sent("shoe.webp", lossless=True)))
    assert decoded.format == "PNG"
    np.testing.assert_array_equal(np.asarray(decoded)[..., 0], PIXELS)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ([-1, -1, -1, 3], (1, 4, 6, 3)),
        ([-1, 2, -1, 1], (1, 2, 3, 1)),
        ([-1, -1, 3, 1], (1, 2, 3, 1)),
        ([-1, -1, -1], (1, 4, 6)),
        ([-1, 2, 2, 3], (1, 2, 2, 3)),
    ],
)
def test_a_picture_has_the_size_that_the_model_asks_for_or_its_own(sizes: list[int], shape, tmp_path: Path):
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "red.png")
    info = {"dtype": "DT_FLOAT", "tensor_shape": {"dim": [{"size": str(size)} for size in sizes]}}
    batch = command._fitting(tmp_path / "red.png", {"image": info})
    assert batch.shape == shape
    if sizes[-1] == 3:
        np.testing.assert_array_equal(batch[0, 0, 0], [1, 0, 0])


def test_numbers_are_asked_about(ask):
    assert ask("--model_name=half_plus_two", "1.0", "-2", "5") == "y: [3.5, 2.0, 5.5]\n"
    assert ask("--model_name=half_plus_two", "--", "-1e1") == "y: [-2.0]\n"


def test_numbers_fill_the_examples_of_an_input(ask):
    assert json.loads(ask("--model_name=image", "--json", *PIXELS.ravel(), *PIXELS.ravel()))["mean"] == [95.75] * 2


def test_several_inputs_go_by_name(ask, tmp_path: Path):
    np.savez(tmp_path / "both.npz", a=np.float32([[1, 2]]), b=np.int32([3]))
    assert json.loads(ask("--model_name=multi", "--json", tmp_path / "both.npz")) == {"s": [[4.0, 5.0]], "t": [6]}


def test_json_may_hold_bytes(ask, tmp_path: Path):
    (tmp_path / "bytes.json").write_text('{"inputs": [{"b64": "YWI="}]}')
    assert json.loads(ask("--model_name=strings", "--json", tmp_path / "bytes.json"))["length"] == [2]


def test_without_input_the_model_is_described(ask):
    printed = ask("--model_name=image")
    assert "version 1: AVAILABLE" in printed
    assert "serving_default input image: uint8 [-1, 2, 2, 1]" in printed
    assert "__saved_model_init_op" not in printed


def test_classes_with_names_are_printed_with_them():
    outputs = {
        "probabilities": np.float32([[0.1, 0.9]]),
        "top_labels": np.array([[b"shoe", b"ankle boot"]], object),
        "top_scores": np.float32([[0.9, 0.1]]),
    }
    assert command._lines(outputs) == ["shoe        0.9000", "ankle boot  0.1000"]


def test_classes_without_names_are_printed_by_number_best_first():
    outputs = {"probabilities": np.float32([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]])}
    assert command._lines(outputs) == [
        *("example 0:", "class 2  0.7000", "class 1  0.2000", "class 0  0.1000"),
        *("example 1:", "class 0  0.5000", "class 1  0.3000", "class 2  0.2000"),
    ]


def test_numbers_that_are_no_probabilities_are_printed_as_they_are():
    assert command._lines({"y": np.float32([[1, 2]])}) == ["y: [[1.0, 2.0]]"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model_name=nobody", "1"], "Servable not found for request: Latest(nobody)"),
        (["--model_name=image", "--signature_name=nope", "1"], "no signature 'nope'. It has: serving_default."),
        (["--model_name=image", "1", "2", "3"], "4 numbers an example. Received: 3 numbers"),
        (["--model_name=image", "0.5", "1", "2", "3"], "The input takes uint8 [-1, 2, 2, 1]. Received: 0.5 1 2 3."),
        (["--model_name=multi", "1"], "The signature has the inputs a, b: give a .npz or .json file"),
        (["--model_name=image", "shoe.txt"], "the name must end in .npy, .npz, .json,"),
        (["--model_name=image", "nowhere.png"], "nowhere.png: there is no such file."),
        (["--model_name=image", "1", "shoe.png"], "INPUT must be one file, or numbers. Received: 1 shoe.png."),
        (["--url=ftp://x", "1"], "Received: url='ftp://x'"),
    ],
)
def test_a_mistake_is_one_line(ask, arguments: list[str], words: str):
    assert words in ask(*arguments, code=1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.npy", b""),
        ("x.npz", b"PK"),
        ("x.json", b"{"),
        ("x.json", b"\xff"),
        ("x.json", b'{"b64": 1}'),
        ("x.png", b"x"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(ask, tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in ask("--model_name=image", tmp_path / name, code=1)


def test_who_interrupts_is_told_so_in_a_line(ask, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_ask", interrupt)
    assert ask("1", code=130) == "Error: Interrupted.\n"


@pytest.mark.parametrize(
    "arguments", [["--modl_name=x"], ["--timeout=0"], ["--timeout=1e300"], ["--model_version=one", "1"]]
)
def test_a_misspelled_command_line_is_one_line_and_code_2(ask, arguments: list[str]):
    assert arguments[0].split("=")[0] in ask(*arguments, code=2)


def test_over_grpc_stderr_stays_empty(server: RunningServer):
    url = f"--url=grpc://{server.grpc_target}"
    asked = subprocess.run(
        [sys.executable, "-m", "keras_bn_serving.client", url, "--model_name=half_plus_two", "2"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, "y: [4.0]\n", "")


def test_where_no_server_of_models_answers_it_is_asked_whether_the_port_is_right(ask, server: RunningServer):
    grpc_url = f"grpc://{server.url.removeprefix('http://')}"
    for url, right in ((f"http://{server.grpc_target}", "REST"), (grpc_url, "gRPC")):
        said = ask("1", "--timeout=5", url=url, code=1)
        assert said.startswith("Error: UNAVAILABLE: ")
        assert said.endswith(f"Is a server there, and is this its port for {right}?\n")
