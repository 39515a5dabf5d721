"""A ResNet of PyTorch's becomes a Keras model: weights by name, folded, exported, served, the same answers.

`python -m examples.from_pytorch [--quick]`; needs PyTorch, a CPU build is enough: `pip install torch`.
"""

import argparse
import socket
import subprocess
import sys
import tempfile

import keras
import numpy as np
from keras_bn_serving.client import Client

import keras_bn

SIZE = 32


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
    blocks = Block(3, 16, 2), Block(16, 32, 2), Block(32, 64, 2)
    network = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False)
    for weight in network.parameters():  # As after a training: no gamma is 1, no beta 0.
        weight.add_(0.1 * torch.randn_like(weight))
    for _ in range(20):  # And statistics that are not 0 and 1.
        network(torch.randn(32, 3, SIZE, SIZE) + 1)
    return network.eval()


def keras_resnet() -> keras.Model:
    """The same in Keras: layers have PyTorch's names, epsilon is PyTorch's, and so is the padding, on both sides."""

    def normalized(x, name: str, norm: str, width: int, size: int, stride: int, activation=None):
        padded = keras.layers.ZeroPadding2D(size // 2)(x)
        x = keras.layers.Conv2D(width, size, stride, use_bias=False, name=name)(padded)
        return keras_bn.BatchNormalization(epsilon=1e-5, momentum=0.9, activation=activation, name=norm)(x)

    x = image = keras.Input((SIZE, SIZE, 3), name="image")
    for number, width in enumerate((16, 32, 64)):
        y = normalized(x, f"{number}.conv1", f"{number}.bn1", width, 3, 2, "relu")
        y = normalized(y, f"{number}.conv2", f"{number}.bn2", width, 3, 1)
        x = keras.layers.ReLU()(
            keras.layers.Add()([y, normalized(x, f"{number}.down.0", f"{number}.down.1", width, 1, 2)])
        )
    return keras.Model(image, keras.layers.Dense(10, name="5")(keras.layers.GlobalAveragePooling2D()(x)))


def load(model: keras.Model, state: dict[str, np.ndarray]) -> None:
    """Every weight by its name; one that no layer has is an error, and so is a layer that finds none."""
    for layer in model.layers:
        if isinstance(layer, keras_bn.BatchNormalization):
            keras_bn.load_torch_weights(layer, state, layer.name)
        elif isinstance(layer, keras.layers.Conv2D):  # (out, in, height, width) becomes (height, width, in, out).
            layer.set_weights([state[f"{layer.name}.weight"].transpose(2, 3, 1, 0)])
        elif isinstance(layer, keras.layers.Dense):
            layer.set_weights([state[f"{layer.name}.weight"].T, state[f"{layer.name}.bias"]])
    strange = [name for name in state if name.rpartition(".")[0] not in {layer.name for layer in model.layers}]
    if strange:
        raise ValueError(f"`state` must have entries of the model's layers only. Received: {strange} besides.")


def ask(base_path: str, pictures: np.ndarray) -> np.ndarray:
    """What the embedded server answers; TensorFlow Serving with the same flags would do."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--model_name=resnet", f"--model_base_path={base_path}", f"--rest_api_port={port}", "--port=0"]
    command = [sys.executable, "-m", "keras_bn_serving", *flags, "--log_level=error"]
    with subprocess.Popen(command) as server, Client(f"http://127.0.0.1:{port}") as client:
        try:
            client.wait_until_ready("resnet", timeout=300)
            return np.asarray(client.predict("resnet", pictures))  # One output, so no dictionary of them.
        finally:
            server.terminate()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="ask about 8 pictures, not 256")
    count = 8 if parser.parse_args().quick else 256
    try:
        import torch
    except ImportError:
        sys.exit("This example needs PyTorch; a CPU build is enough: pip install torch")
    network, model = torch_resnet(), keras_resnet()
    load(model, {name: value.numpy() for name, value in network.state_dict().items()})
    pictures = np.random.default_rng(1).normal(1, 1, (count, SIZE, SIZE, 3)).astype("float32")
    expected = network(torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())).numpy()
    folded, report = keras_bn.fold(model, check=pictures[:8])
    print(report, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        keras_bn.export(model, f"{folder}/resnet")
        served = ask(f"{folder}/resnet", pictures)
    print("Largest difference to PyTorch, of outputs up to", f"{np.abs(expected).max():.2f}")
    for name, output in ("Keras", model(pictures)), ("folded", folded(pictures)), ("served", served):
        print(f"  {name:<8} {np.abs(output - expected).max():.1e}")


if __name__ == "__main__":
    main()
