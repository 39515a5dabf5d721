"""python -m keras_bn_serving.client: asks a running server about a picture, a JSON file or a NumPy file."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_bn_serving.client import Client
from keras_bn_serving.errors import ServingError

_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp")
_BYTES_SIGNATURES = ("DT_STRING",)


class _InputError(Exception):
    """The file does not fit; the message is for the person who named it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m keras_bn_serving.client", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "file",
        nargs="?",
        help="a picture, scaled to the model's input (numbers from 0 to 255 for an integer input, from 0 to 1 for a "
        "float one); a .npy array that is a batch; or a .json file with what goes under `inputs`. Without a file: the "
        "model's versions and signatures",
    )
    parser.add_argument("--url", default="http://127.0.0.1:8501", help="default: %(default)s")
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--model_version", type=int, help="default: the newest")
    parser.add_argument("--signature_name", default="serving_default", help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds, default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        with Client(options.url, timeout=options.timeout) as client:
            _ask(client, options)
    except (ServingError, _InputError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _ask(client: Client, options: argparse.Namespace) -> None:
    metadata = client.metadata(options.model_name, version=options.model_version)
    if options.file is None:
        for each in client.status(options.model_name):
            print(f"version {each.version}: {each.state} {each.error_message}".rstrip())
        for name, signature in sorted(metadata.items()):
            for kind in ("inputs", "outputs"):
                for key, info in sorted(signature[kind].items()):
                    print(f"{name} {kind[:-1]} {key}: {_describe(info)}")
        return
    signature = metadata.get(options.signature_name)
    if signature is None:
        raise _InputError(f"The model has no signature {options.signature_name!r}. It has: {', '.join(metadata)}.")
    inputs = _read(Path(options.file), signature["inputs"])
    answer = client.predict(
        options.model_name, inputs, version=options.model_version, signature_name=options.signature_name
    )
    outputs = answer if isinstance(answer, dict) else {next(iter(signature["outputs"])): answer}
    print(json.dumps({name: _plain(array) for name, array in outputs.items()}, indent=1))


def _read(path: Path, infos: dict[str, Any]) -> Any:
    if path.suffix.lower() == ".npy":
        return np.load(path)
    if path.suffix.lower() == ".json":
        return json.loads(path.read_text())
    if path.suffix.lower() not in _PICTURES:
        raise _InputError(f"{path}: the name must end in .npy, .json or one of {', '.join(_PICTURES)}.")
    if len(infos) != 1:
        raise _InputError(f"A picture can go into one input only. The signature has: {', '.join(infos)}.")
    (info,) = infos.values()
    if info["dtype"] in _BYTES_SIGNATURES:
        return [path.read_bytes()]
    return _picture(path, info)


def _picture(path: Path, info: dict[str, Any]) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise _InputError("Reading a picture needs pillow: python -m pip install pillow") from error
    shape = [int(dim["size"]) for dim in info["tensor_shape"]["dim"]]
    channels = shape[3] if len(shape) == 4 else 1
    if len(shape) not in (3, 4) or channels not in (1, 3) or min(shape[1:3]) < 1:
        raise _InputError(f"The input is no picture: {_describe(info)}.")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB").resize((shape[2], shape[1])))
    batch = pixels.reshape(1, *shape[1:])
    return batch / np.float32(255) if info["dtype"] in ("DT_FLOAT", "DT_DOUBLE") else batch


def _describe(info: dict[str, Any]) -> str:
    shape = info["tensor_shape"]
    sizes = "any" if shape["unknown_rank"] else ", ".join(dim["size"] for dim in shape["dim"])
    return f"{info['dtype'].removeprefix('DT_').lower()} [{sizes}]"


def _plain(array: np.ndarray) -> Any:
    if array.dtype == object:
        return [item.decode(errors="replace") if isinstance(item, bytes) else item for item in array.tolist()]
    return array.tolist()
