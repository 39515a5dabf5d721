"""The demo from end to end on a few real images, and that it fails where it must."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import keras
import numpy as np
import pytest
from PIL import Image

import keras_bn
from models import data, demo, networks, pictures
from tests.sessions import assert_served_in_batches


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(url):
    address = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((address.hostname, address.port)) == 0


@pytest.fixture(scope="module")
def few_images(fashion_mnist, tmp_path_factory):
    path = tmp_path_factory.mktemp("few") / "few.npz"
    parts = {"x_train": 1000, "y_train": 1000, "x_test": 300, "y_test": 300}
    np.savez(path, **{name: getattr(fashion_mnist, name)[:count] for name, count in parts.items()})
    return path


@pytest.fixture(scope="module")
def shown(few_images, tmp_path_factory):
    """What the demo printed, and its folder."""
    folder = tmp_path_factory.mktemp("demo")
    flags = f"--data {few_images} --output {folder} --width 4 --epochs 1 --least_accuracy 0".split()
    done = subprocess.run(
        [sys.executable, "-m", "models.demo", *flags], capture_output=True, text=True, check=False, cwd=demo.ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_the_demo_shows_accuracy_agreement_and_a_picture(shown):
    printed, folder = shown
    accuracy = re.search(r"^Accuracy of the answers +(\d\.\d{4}) ", printed, re.MULTILINE)
    difference = re.search(r"^Largest difference to model.predict +(\S+) ", printed, re.MULTILINE)
    assert 0 < float(accuracy[1]) <= 1
    assert float(difference[1]) <= 1e-5
    with Image.open(folder / "answers.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(2**24)) > 100


def test_the_server_is_stopped_afterwards(shown):
    printed, _ = shown
    url = re.search(r"^http://\S+", printed, re.MULTILINE)[0]
    assert not listens(url)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")
def test_the_printed_lines_work_when_pasted(shown, fashion_mnist):
    printed, folder = shown
    start, ask = (line.strip() for line in printed.splitlines()[-2:])
    port = str(free_port())
    start = start.removesuffix(" &") + " > /dev/null &"
    script = f"{start}\n{ask}\ncode=$?\nkill $!\nexit $code\n".replace("8501", port)
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False, cwd=demo.ROOT)
    assert done.returncode == 0, done.stderr
    (prediction,) = json.loads(done.stdout)["predictions"]
    model = keras.models.load_model(folder / "recalibrated.keras")
    expected = model.predict(fashion_mnist.x_test[:1], verbose=0)[0]
    np.testing.assert_allclose(prediction["probabilities"], expected, atol=1e-5)
    best = int(np.argmax(expected))
    assert prediction["top_labels"][0] == data.CLASS_NAMES[best]


def test_the_demo_shows_accuracy_before_and_after_recalibration_and_the_drift(shown):
    printed, folder = shown
    card = json.loads((folder / "served" / "fashion_cnn" / "1" / "assets.extra" / "keras_bn.json").read_text())
    for when in ("before", "after"):
        assert re.search(rf"^Accuracy {when} recalibration +0\.\d{{4}}$", printed, re.MULTILINE)
    after = float(re.search(r"^Accuracy after recalibration +(\S+)$", printed, re.MULTILINE)[1])
    assert card["accuracy"] == pytest.approx(after, abs=1e-4)
    drifts = np.array(re.findall(r"^block_\d_bn" + r" +(-?\d+\.\d{3})" * 6 + "$", printed, re.MULTILINE), float)
    assert drifts.shape == (5, 6)
    usual, inverted = drifts[0, 2], drifts[0, 5]
    assert inverted > 10 * usual


def test_requests_of_1_to_64_rows_may_run_together_on_every_signature_of_the_export(shown, fashion_mnist):
    _, folder = shown
    images = {"image": fashion_mnist.x_test[:64]}
    served = folder / "served" / "fashion_cnn" / "1"
    assert_served_in_batches(served, {"serving_default": images, "batch_norm_drift": images})


def test_the_server_is_stopped_when_something_goes_wrong_meanwhile(tmp_path):
    keras_bn.export(networks.sigmoid_mlp(width=4), tmp_path / "served")
    seen = []

    def fail_while_serving():
        with demo.serving("mlp", tmp_path / "served", tmp_path / "log") as url:
            seen.extend([url, listens(url)])
            raise RuntimeError("meanwhile")

    with pytest.raises(RuntimeError, match="meanwhile"):
        fail_while_serving()
    assert seen[1]
    assert not listens(seen[0])


def test_a_server_that_does_not_start_is_reported_with_its_own_words(tmp_path):
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(demo.DemoError, match=r"the server ended with code 1: .*empty"),
        demo.serving("nothing", tmp_path / "empty", tmp_path / "log"),
    ):
        pytest.fail("there is nothing to serve")


@pytest.mark.parametrize(
    ("accuracy", "difference", "message"),
    [
        (0.9099, 0.0, r"accuracy of the answers is 0\.9099, less than 0\.91"),
        (float("nan"), 0.0, "less than"),
        (0.92, 2e-5, r"differs from model\.predict by 2\.0e-05, more than 1e-05"),
        (0.92, float("nan"), "more than"),
    ],
)
def test_answers_that_are_not_good_enough_are_refused(accuracy, difference, message):
    with pytest.raises(demo.DemoError, match=message):
        demo.check(accuracy, difference, least_accuracy=0.91)


@pytest.mark.parametrize("strange", [0.1, 0.2, float("nan")])
def test_a_drift_that_does_not_tell_strange_images_is_refused(strange):
    with pytest.raises(demo.DemoError, match=r"not above that of test images, 0\.2"):
        demo.check_drift([{"kl": 0.1}, {"kl": 0.2}], [{"kl": strange}, {"kl": 0.05}])


def test_answers_at_the_bar_are_good_enough():
    demo.check(0.91, 1e-5, least_accuracy=0.91)


def test_the_demo_ends_with_one_line_and_a_code_where_the_data_is_missing():
    done = subprocess.run(
        [sys.executable, "-m", "models.demo", "--data", "nowhere"],
        capture_output=True,
        text=True,
        check=False,
        cwd=demo.ROOT,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 1
    assert re.fullmatch(r"python -m models\.demo: error: `source` must be .* Received: nowhere\n", done.stderr)


def test_the_picture_shows_wrong_answers_in_red(tmp_path):
    images = np.zeros((2, 28, 28, 1))
    answers = np.eye(10)[[3, 3]]
    colours = []
    for labels in ([3, 3], [3, 4]):
        pictures.save_answers(tmp_path / "answers.png", images, labels, answers, list("abcdefghij"))
        pixels = np.asarray(Image.open(tmp_path / "answers.png").convert("RGB")).reshape(-1, 3)
        red = np.array([int(pictures.WRONG[at : at + 2], 16) for at in (1, 3, 5)])
        colours.append((pixels == red).all(axis=1).any())
    assert colours == [False, True]
