"""From nothing to an answer: train, recalibrate, export, serve, and ask over REST: `python -m models.demo`."""

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from keras_bn_serving.client import Client
from keras_bn_serving.errors import ServingError
from tqdm import tqdm

from models import data, lock, pictures
from models.console import share, start_tensorflow
from models.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
MODEL_NAME = "fashion_cnn"
LARGEST_DIFFERENCE = 1e-5
IMAGES_IN_A_REQUEST = 200


class DemoError(Exception):
    """The demo did not show what it is to show; the message says what, in one line."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command.

    Exits with 0 only if accuracy, agreement and drift are as promised, else with 1; 2 on a wrong flag, 130 on Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m models.demo",
        description="Trains fashion_cnn, replaces its moving statistics by those of all training images, folds and "
        "exports it, serves it, classifies all test images over REST, compares the answers with the labels and with "
        "the model's own, and asks how far the test images are from those it was trained on. Ends with an error where "
        "the answers are not good enough.",
    )
    add = parser.add_argument
    add("--data", metavar="PATH", help="folder of IDX files or .npz; by default Fashion-MNIST is fetched")
    add("--output", metavar="FOLDER", type=Path, default=Path(".demo"), help="for all that is made (default: .demo)")
    add("--width", type=int, default=24, help="channels of the network's first layer (default: 24)")
    add("--epochs", type=int, default=4, help="passes over the training images (default: 4)")
    add(
        "--least_accuracy",
        type=share,
        default=0.91,
        help="of the answers to the test images (default: 0.91)",
    )
    flags = parser.parse_args(arguments)
    try:
        settings = Settings(network=MODEL_NAME, width=flags.width, epochs=flags.epochs)
    except ValueError as error:
        parser.error(str(error))
    # What stops the demo from outside must stop its server too.
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        with lock.held(flags.output):
            _demo(settings, data.fetch_and_load(flags.data), flags.output, flags.least_accuracy)
    except (DemoError, ServingError, OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nInterrupted; no server is left running.\n")


def _demo(settings: Settings, images: data.ImageData, folder: Path, least_accuracy: float) -> None:
    start_tensorflow()
    from keras_bn import export, recalibrate
    from models.training import accuracy, train

    _headline(1, f"Train {settings.network} with keras_bn.BatchNormalization")
    model = train(settings, images, folder / "training", restart=True)
    _headline(2, f"Recalibrate: the statistics of all {len(images.x_train):,} training images")
    before = accuracy(model, images.x_test, images.y_test)
    recalibration = recalibrate(model, images.x_train, batch_size=500, verbose="auto" if sys.stdout.isatty() else 0)
    print(recalibration)
    model.save(folder / "recalibrated.keras")
    after = accuracy(model, images.x_test, images.y_test)
    _headline(3, "Fold, export and check")
    exported = export(
        model,
        folder / "served" / MODEL_NAME,
        labels=data.CLASS_NAMES,
        warmup=images.x_test[:8],
        accuracy=after,
        recalibration=recalibration,
    )
    print(exported.folding)
    signature = " -> ".join(", ".join(names) for names in (exported.inputs, exported.outputs))
    print(f"{exported.path}  ({signature})")
    _headline(4, "Serve")
    with serving(MODEL_NAME, exported.path.parent, folder / "server.log") as url:
        print(f"{url}/v1/models/{MODEL_NAME}")
        _headline(5, f"Classify {len(images.x_test):,} test images over REST")
        answers = classify(url, images.x_test)
        drifts = {
            "test images": drift(url, images.x_test[:IMAGES_IN_A_REQUEST]),
            "the same inverted": drift(url, 1 - images.x_test[:IMAGES_IN_A_REQUEST]),
        }

    expected = model.predict(images.x_test, batch_size=IMAGES_IN_A_REQUEST, verbose=0)
    answered = float(np.mean(answers.argmax(axis=1) == images.y_test))
    difference = float(np.abs(answers - expected).max())
    picture, question = folder / "answers.png", folder / "question.json"
    pictures.save_answers(picture, images.x_test[:16], images.y_test[:16], answers[:16], data.CLASS_NAMES)
    question.write_text(json.dumps({"instances": images.x_test[:1].tolist()}))

    print(f"\nAccuracy before recalibration        {before:.4f}")
    print(f"Accuracy after recalibration         {after:.4f}")
    print(f"Accuracy of the answers              {answered:.4f} (at least {least_accuracy:g})")
    print(f"Largest difference to model.predict  {difference:.1e} (at most {LARGEST_DIFFERENCE:g})")
    print(f"Sixteen of them as a picture         {picture}")
    print(f"\nDrift of {IMAGES_IN_A_REQUEST} images, pooled from what the signature batch_norm_drift tells of each")
    print("(mean shift in standard deviations of the training images; ratio of variances; KL divergence in nats):\n")
    print(_drift_table(drifts))
    print("\nThe server is stopped. To ask the same question, start it again and post the first test image:\n")
    for line in _commands(exported.path.parent, question):
        print(f"  {line}")
    check(answered, difference, least_accuracy)
    check_drift(drifts["test images"], drifts["the same inverted"])


def check(accuracy: float, difference: float, least_accuracy: float) -> None:
    """Whether the answers are good enough.

    Args:
        accuracy: The share of right answers.
        difference: The largest difference to the model's own probabilities.
        least_accuracy: What `accuracy` must reach.

    Raises:
        DemoError: They are not; also where a number is NaN.
    """
    if not accuracy >= least_accuracy:
        raise DemoError(f"the accuracy of the answers is {accuracy:.4f}, less than {least_accuracy:g}")
    if not difference <= LARGEST_DIFFERENCE:
        raise DemoError(f"an answer differs from model.predict by {difference:.1e}, more than {LARGEST_DIFFERENCE:g}")


def check_drift(usual: Sequence[Mapping[str, Any]], strange: Sequence[Mapping[str, Any]]) -> None:
    """Whether the drift tells strange images from usual ones.

    Args:
        usual: From `drift`, of images like those of the training.
        strange: From `drift`, of others.

    Raises:
        DemoError: It does not: the largest KL divergence of the strange ones is not above that of the usual ones.
    """
    low, high = (float(np.max([row["kl"] for row in rows])) for rows in (usual, strange))
    if not high > low:
        raise DemoError(f"the drift of inverted images is {high:.2g}, not above that of test images, {low:.2g}")


@contextmanager
def serving(model_name: str, model_base_path: Path, log: Path) -> Iterator[str]:
    """Run the embedded server on a free port, and stop it whatever happens.

    Args:
        model_name: The name that it answers to.
        model_base_path: Folder of numbered versions.
        log: File for what the server prints.

    Yields:
        Its address, `http://host:port`, when the model is available.

    Raises:
        DemoError: The server ended before it was ready.
    """
    command = [sys.executable, "-m", "keras_bn_serving", "--rest_api_port=auto", f"--model_name={model_name}"]
    command += [f"--model_base_path={model_base_path.resolve()}", "--wait_for_models=false"]
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        url = _address(server, log)
        with Client(url) as client:
            client.wait_until_ready(model_name)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def classify(url: str, images: np.ndarray) -> np.ndarray:
    """Ask the server for the class probabilities of all images, a batch at a time, under a progress bar.

    Args:
        url: Address of the server.
        images: float32 of shape `(n, 28, 28, 1)`, intensities in `[0, 1]`.

    Returns:
        Probabilities of shape `(n, classes)`.
    """
    answers = []
    with Client(url) as client, tqdm(total=len(images), unit=" images", disable=None) as bar:
        for first in range(0, len(images), IMAGES_IN_A_REQUEST):
            batch = images[first : first + IMAGES_IN_A_REQUEST]
            answers.append(client.predict(MODEL_NAME, batch)["probabilities"])
            bar.update(len(batch))
    return np.concatenate(answers)


def drift(url: str, images: np.ndarray) -> list[dict[str, Any]]:
    """Ask the server how far images are, all of them together, from what the network was trained on.

    Args:
        url: Address of the server.
        images: As in `classify`.

    Returns:
        For each normalization `layer`, `mean_shift`, `variance_ratio` and `kl`.
    """
    with Client(url) as client:
        return client.drift(MODEL_NAME, images)


def _drift_table(drifts: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = [" " * 16 + "".join(f"{name:>30}" for name in drifts)]
    for rows in zip(*drifts.values(), strict=True):
        cells = [f"{row['mean_shift']:>10.3f}{row['variance_ratio']:>10.3f}{row['kl']:>10.3f}" for row in rows]
        lines.append(f"{rows[0]['layer']:<16}" + "".join(cells))
    return "\n".join(lines)


def _commands(model_base_path: Path, question: Path) -> list[str]:
    """The lines of a shell that start the server and ask it."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    server = [str(python), "-m", "keras_bn_serving", "--rest_api_port=8501", f"--model_name={MODEL_NAME}"]
    url = f"http://127.0.0.1:8501/v1/models/{MODEL_NAME}:predict"
    ask = ["curl", "--silent", "--retry", "30", "--retry-connrefused", "--data", f"@{question}", url]
    return [shlex.join([*server, f"--model_base_path={model_base_path}"]) + " &", shlex.join(ask)]


def _address(server: subprocess.Popen, log: Path) -> str:
    while server.poll() is None:
        found = re.search(r"^REST at (http://\S+)$", log.read_text(), re.MULTILINE)
        if found:
            return found[1]
        time.sleep(0.1)
    lines = log.read_text().splitlines()
    raise DemoError(f"the server ended with code {server.returncode}: {lines[-1] if lines else 'it printed nothing'}")


def _headline(number: int, text: str) -> None:
    print(f"\n{number}/5  {text}", flush=True)


def _exit_on_signal(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
