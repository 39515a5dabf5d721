"""A ResNet of PyTorch's becomes a Keras model: weights by name, folded, exported, served, the same answers.

`python -m examples.from_pytorch [--quick]`; needs PyTorch, a CPU build is enough: `pip install torch`.
"""

import argparse
import importlib.util
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
from keras import layers
from keras_bn_serving.client import Client

import keras_bn

WIDTHS, CLASSES, SIZE = (16, 32, 64), 10, 32


def torch_resnet():
    """A network as one finds them: three stages of one residual block, a head."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, before: int, width: int, stride: int):
            super().__init__()
            self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.down = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            return torch.relu(self.bn2(self.conv2(y)) + self.down(x))

    torch.manual_seed(0)
    blocks = [Block(before, width, 2) for before, width in zip((3, *WIDTHS), WIDTHS, strict=False)]
    network = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], CLASSES))
    with torch.no_grad():
        for weight in network.parameters():  # As after a training: no gamma is 1, no beta 0.
            weight += 0.1 * torch.randn_like(weight)
        for _ in range(20):  # And statistics that are not 0 and 1.
            network(torch.randn(32, 3, SIZE, SIZE) + 1)
    return network.eval()


def keras_resnet() -> keras.Model:
    """The same in Keras: layers have PyTorch's names, epsilon is PyTorch's, and so is the padding, on both sides."""

    def normalized(x, name: str, norm: str, width: int, size: int, stride: int, activation=None):
        x = layers.ZeroPadding2D(size // 2)(x) if size > 1 else x
        x = layers.Conv2D(width, size, stride, use_bias=False, name=name)(x)
        return keras_bn.BatchNormalization(epsilon=1e-5, momentum=0.9, activation=activation, name=norm)(x)

    x = image = keras.Input((SIZE, SIZE, 3), name="image")
    for number, width in enumerate(WIDTHS):
        y = normalized(x, f"{number}.conv1", f"{number}.bn1", width, 3, 2, "relu")
        y = normalized(y, f"{number}.conv2", f"{number}.bn2", width, 3, 1)
        x = layers.ReLU()(layers.Add()([y, normalized(x, f"{number}.down.0", f"{number}.down.1", width, 1, 2)]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(CLASSES, name="5")(x))


def load(model: keras.Model, state: dict[str, np.ndarray]) -> None:
    """Every weight by its name; one that no layer has is an error, and so is a layer that finds none."""
    left = {name for name in state if not name.endswith("num_batches_tracked")}
    for layer in model.layers:
        if isinstance(layer, keras_bn.BatchNormalization):
            keras_bn.load_torch_weights(layer, state, layer.name)
        elif isinstance(layer, layers.Conv2D):  # (out, in, height, width) becomes (height, width, in, out).
            layer.set_weights([state[f"{layer.name}.weight"].transpose(2, 3, 1, 0)])
        elif isinstance(layer, layers.Dense):
            layer.set_weights([state[f"{layer.name}.weight"].T, state[f"{layer.name}.bias"]])
        left -= {name for name in left if name.startswith(f"{layer.name}.")}
    if left:
        raise ValueError(f"`state` must have entries of layers only. Received: {sorted(left)} besides.")


def ask(base_path: Path, pictures: np.ndarray) -> np.ndarray:
    """What the embedded server answers; TensorFlow Serving with the same flags would do."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--model_name=resnet", f"--model_base_path={base_path}", f"--rest_api_port={port}", "--port=0"]
    server = subprocess.Popen([sys.executable, "-m", "keras_bn_serving", *flags, "--log_level=error"])
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            client.wait_until_ready("resnet")
            return client.predict("resnet", pictures)
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer pictures")
    count = 8 if parser.parse_args().quick else 256
    if importlib.util.find_spec("torch") is None:
        sys.exit("This example needs PyTorch; a CPU build is enough: pip install torch")
    import torch

    network, model = torch_resnet(), keras_resnet()
    load(model, {name: value.numpy() for name, value in network.state_dict().items()})
    pictures = np.random.default_rng(1).normal(1, 1, (count, SIZE, SIZE, 3)).astype("float32")
    with torch.no_grad():
        expected = network(torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())).numpy()
    folded, report = keras_bn.fold(model, check=pictures[:8])
    print(report)
    with tempfile.TemporaryDirectory() as folder:
        exported = keras_bn.export(model, f"{folder}/resnet")
        served = ask(exported.path.parent, pictures)
    print("Largest difference to PyTorch, of outputs up to", f"{np.abs(expected).max():.2f}")
    outputs = {
        "Keras": model.predict(pictures, verbose=0),
        "folded": folded.predict(pictures, verbose=0),
        "served": served,
    }
    for name, output in outputs.items():
        print(f"  {name:<8} {np.abs(output - expected).max():.1e}")


if __name__ == "__main__":
    main()
