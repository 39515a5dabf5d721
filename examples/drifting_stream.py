"""A camera whose pictures drift: the server tells how far they are, the model is given their statistics, and swapped.

`python -m examples.drifting_stream [--quick]`, in a checkout.
"""

import argparse
import contextlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
from keras_bn_serving.client import Client

import keras_bn
from models import data

NAME = "camera"
THRESHOLD = 0.1  # nats, of the layer that is farthest: several times what pictures like those of the training have.


def network() -> keras.Model:
    """A small CNN."""
    layers = [keras.Input((28, 28, 1), name="image"), keras_bn.BatchNormalization(name="bn_image")]
    for number, width in enumerate((16, 32, 64), start=1):
        layers.append(keras.layers.Conv2D(width, 3, strides=2, padding="same", use_bias=False))
        layers.append(keras_bn.BatchNormalization(activation="relu", name=f"bn_{number}"))
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10, activation="softmax", name="label")]
    return keras.Sequential(layers)


def seen(images: np.ndarray, hour: int) -> np.ndarray:
    """What the camera makes of them: from the third hour on its lens fogs, and light comes in from the side."""
    fog = min(max(hour - 2, 0) * 0.2, 0.8)
    return ((1 - fog) * images + fog * 0.7).astype("float32")


@contextlib.contextmanager
def serving(base_path: Path) -> Iterator[Client]:
    """The embedded server on a free port; TensorFlow Serving with the same flags would do."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = [f"--model_name={NAME}", f"--model_base_path={base_path}", f"--rest_api_port={port}", "--port=0"]
    server = subprocess.Popen([sys.executable, "-m", "keras_bn_serving", *flags, "--log_level=error"])
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            client.wait_until_ready(NAME, timeout=300)
            yield client
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder or .npz with Fashion-MNIST (default: what is found)")
    parser.add_argument("--quick", action="store_true", help="few pictures, to see that it runs")
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    images = data.load(options.data)
    count, each = (4000, 200) if options.quick else (20_000, 1000)
    model = network()
    model.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(
        images.x_train[:count], images.y_train[:count], batch_size=64, epochs=2 if options.quick else 4, verbose=2
    )
    keras_bn.recalibrate(model, images.x_train[:count], batch_size=500, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        exported = keras_bn.export(model, f"{folder}/{NAME}")
        version = int(exported.path.name)
        with serving(exported.path.parent) as client:
            print("\nhour   version   drift (kl, at the layer)      accuracy")
            for hour in range(8):
                chunk = slice(hour * each, (hour + 1) * each)
                pictures, labels = seen(images.x_test[chunk], hour), images.y_test[chunk]
                farthest = max(client.drift(NAME, pictures, batch_size=100), key=lambda row: row["kl"])
                answers = np.asarray(client.predict(NAME, pictures))  # One output, so no dictionary of them.
                accuracy = np.mean(answers.argmax(1) == labels)  # Which the one who watches does not know.
                print(
                    f"{hour:4}   {version:7}   {farthest['kl']:8.3f}  {farthest['layer']:<16} {accuracy:9.3f}",
                    flush=True,
                )
                if farthest["kl"] > THRESHOLD:
                    # The statistics of the pictures as they come now; no label is needed, and no weight changes.
                    keras_bn.recalibrate(model, pictures, batch_size=500, verbose=0)
                    version = int(keras_bn.export(model, exported.path.parent).path.name)
                    client.wait_until_ready(NAME, timeout=300, version=version)
                    print(f"       drift above {THRESHOLD}: version {version} has the statistics of these pictures")


if __name__ == "__main__":
    main()
