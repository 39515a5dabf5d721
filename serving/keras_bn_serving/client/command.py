"""keras-bn ask, or python -m keras_bn_serving.client: asks a running server about a file or numbers."""

import argparse
import base64
import json
import math
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from keras_bn_serving.client import Client, pictures
from keras_bn_serving.errors import ServingError

_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp")
_FILES = (".npy", ".npz", ".json", *_PICTURES)
_FLOATS = ("DT_FLOAT", "DT_DOUBLE", "DT_HALF", "DT_BFLOAT16")
_PICTURE_SIGNATURE = "image_bytes"
_TOP = 5
_HELP = """
INPUT is one of
  picture.png, .jpg, .gif, .bmp, .webp  one picture, upright: to a signature image_bytes where the model has one;
                                        else scaled to the model's input, or as large as it is where that takes
                                        any size; 0 to 255 for integers, 0 to 1 for floats
  examples.npy, examples.npz            a batch or one example; .npz for several inputs, by their names
  examples.json                         what goes under `inputs`, or a whole request with `inputs` or `instances`
  0.5 -1 2                              numbers: as many as one example takes, or several examples
  (nothing)                             the model's versions and signatures
"""


class _InputError(Exception):
    """The input does not fit; the message is for the person who typed it."""


class _UsageError(Exception):
    """The command line cannot be understood."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message[:1].upper()}{message[1:].rstrip('.')}. See --help.")


def main(arguments: Sequence[str] | None = None, program: str = "python -m keras_bn_serving.client") -> int:
    """Runs the command; returns the exit code.

    Args:
        arguments: What follows the command's name; the process's where left out.
        program: That name, for the help.
    """
    try:
        options = _make_parser(program).parse_args(arguments)
    except _UsageError as error:
        return _fail(error, 2)
    try:
        # Read when gRPC is imported: what it logs of a server that is not there is said by the error.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        with Client(options.url, timeout=options.timeout) as client:
            _ask(client, options)
    except (ServingError, _InputError, ValueError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("Interrupted.", 130)
    return 0


def _make_parser(program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        description="Asks a running server, this one or TensorFlow Serving, about a file or numbers.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="a file or numbers, see below")
    parser.add_argument("--url", default="http://127.0.0.1:8501", help="http or grpc://host:port, default: %(default)s")
    parser.add_argument("--model_name", default="default", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--model_version", type=int, metavar="NUMBER", help="default: the newest")
    parser.add_argument("--signature_name", metavar="NAME", help="default: serving_default, or image_bytes")
    parser.add_argument("--timeout", type=_seconds, default=60.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print all outputs as JSON, not the likeliest classes")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    longest = int(threading.TIMEOUT_MAX)
    if not 0 < seconds <= longest:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, at most {longest}. Received: {text!r}.")
    return seconds


def _fail(error: Exception | str, code: int) -> int:
    print("Error: " + " ".join(str(error).split()), file=sys.stderr)
    return code


def _ask(client: Client, options: argparse.Namespace) -> None:
    # Before the server is asked, which may not be there: a wrong name is a wrong name.
    content = _read(options.inputs)
    described = client.metadata(options.model_name, version=options.model_version)
    # Without `__saved_model_init_op`, which is not to be asked.
    signatures = {name: signature for name, signature in described.items() if not name.startswith("__")}
    if content is None:
        _print_model(client.status(options.model_name), signatures)
        return
    name = options.signature_name or "serving_default"
    if options.signature_name is None and isinstance(content, Path) and _takes_bytes(signatures):
        name = _PICTURE_SIGNATURE
    if name not in signatures:
        raise _InputError(f"The model has no signature {name!r}. It has: {', '.join(sorted(signatures))}.")
    signature = signatures[name]
    answer = client.predict(
        options.model_name,
        _fitting(content, signature["inputs"]),
        version=options.model_version,
        signature_name=name,
    )
    outputs = answer if isinstance(answer, dict) else {next(iter(signature["outputs"])): answer}
    print(json.dumps(_plain(outputs), indent=1) if options.json else "\n".join(_lines(outputs)))


def _read(inputs: list[str]) -> Any:
    """Numbers as a list of their texts, a picture as its path, any other file as its content, None for nothing."""
    if not inputs:
        return None
    if all(_is_number(text) for text in inputs):
        return inputs
    path = Path(inputs[0])
    if len(inputs) > 1:
        raise _InputError(f"INPUT must be one file, or numbers. Received: {' '.join(inputs)}.")
    suffix = path.suffix.lower()
    if suffix not in _FILES:
        raise _InputError(f"{path}: the name must end in {', '.join(_FILES[:-1])} or {_FILES[-1]}.")
    if not path.is_file():
        raise _InputError(f"{path}: there is no such file.")
    if suffix in _PICTURES:
        return path
    try:
        if suffix == ".json":
            return _values(json.loads(path.read_text()))
        content = np.load(path, allow_pickle=False)
        return content if isinstance(content, np.ndarray) else dict(content)
    except Exception as error:  # zipfile, zlib and numpy have their own.
        # NumPy takes whatever is none of its files for a pickle, which is never read here.
        reason: Any = "it is none" if "pickle" in str(error) else error
        if str(error).startswith("Object arrays"):
            reason = "it holds Python objects, which are never read; save an array of numbers or strings"
        raise _InputError(f"{path} cannot be read as {suffix}: {reason}") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _values(document: Any) -> Any:
    """What a JSON file says should go under `inputs`: itself, or what a whole request has there."""
    document = _decoded(document)
    if isinstance(document, dict) and "inputs" in document:
        return document["inputs"]
    if isinstance(document, dict) and "instances" in document:
        rows = document["instances"]
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            return {name: [row.get(name) for row in rows] for name in rows[0]}
        return rows
    return document


def _decoded(document: Any) -> Any:
    """JSON with its base64 objects as the bytes they stand for."""
    if isinstance(document, list):
        return [_decoded(item) for item in document]
    if isinstance(document, dict):
        if document.keys() == {"b64"}:
            return base64.b64decode(document["b64"], validate=True)
        return {name: _decoded(item) for name, item in document.items()}
    return document


def _takes_bytes(signatures: dict[str, Any]) -> bool:
    inputs = signatures.get(_PICTURE_SIGNATURE, {}).get("inputs", {})
    return [info["dtype"] for info in inputs.values()] == ["DT_STRING"]


def _fitting(content: Any, infos: dict[str, Any]) -> Any:
    """What was read, as the inputs of a signature take it."""
    if isinstance(content, dict):
        if len(infos) == 1 and len(content) == 1:
            return next(iter(content.values()))
        return content
    if len(infos) != 1:
        raise _InputError(
            f"The signature has the inputs {', '.join(sorted(infos))}: give a .npz or .json file with these names."
        )
    (info,) = infos.values()
    if isinstance(content, Path):
        return [pictures.encoded(content)] if info["dtype"] == "DT_STRING" else _picture(content, info)
    if isinstance(content, list) and content and all(isinstance(item, str) for item in content):
        return content if info["dtype"] == "DT_STRING" else _numbers(content, info)
    sizes = _sizes(info)
    one_example = isinstance(content, np.ndarray) and sizes is not None and content.ndim == len(sizes) - 1
    return content[None] if one_example else content


def _picture(path: Path, info: dict[str, Any]) -> np.ndarray:
    sizes = _sizes(info)
    if not pictures.takes_picture(sizes):
        raise _InputError(f"The input is no picture: {_describe(info)}.")
    batch = pictures.as_batch(path, sizes)
    return batch / np.float32(255) if info["dtype"] in _FLOATS else batch


def _numbers(texts: list[str], info: dict[str, Any]) -> Any:
    try:
        numbers = np.array([float(text) if info["dtype"] in _FLOATS else int(text) for text in texts])
    except ValueError:
        raise _InputError(f"The input takes {_describe(info)}. Received: {' '.join(texts)}.") from None
    sizes = _sizes(info)
    if sizes is None:
        return numbers
    if not sizes and len(numbers) == 1:
        return numbers[0]
    example = sizes[1:]
    known = math.prod(size for size in example if size >= 0)
    if not sizes or not known or example.count(-1) > 1 or len(numbers) % known:
        raise _InputError(
            f"The input takes {_describe(info)}, {known} numbers an example. Received: {len(numbers)} numbers; "
            "a .npy or .json file says which shape they have."
        )
    return numbers.reshape(1 if -1 in example else -1, *example)


def _print_model(versions: list[Any], signatures: dict[str, Any]) -> None:
    for version in versions:
        print(f"version {version.version}: {version.state} {version.error_message}".rstrip())
    for name, signature in sorted(signatures.items()):
        for kind in ("inputs", "outputs"):
            for key, info in sorted(signature[kind].items()):
                print(f"{name} {kind[:-1]} {key}: {_describe(info)}")


def _lines(outputs: dict[str, np.ndarray]) -> list[str]:
    """The likeliest classes of each example, or where the outputs are no classes, what they are."""
    examples = _classes(outputs)
    if not examples:
        return [f"{name}: {json.dumps(value)}" for name, value in _plain(outputs).items()]
    lines = []
    for number, classes in enumerate(examples):
        if len(examples) > 1:
            lines.append(f"example {number}:")
        width = max(len(label) for label, _ in classes)
        lines += [f"{label:<{width}}  {score:.4f}" for label, score in classes]
    return lines


def _classes(outputs: dict[str, np.ndarray]) -> list[list[tuple[str, float]]]:
    if {"top_labels", "top_scores"} <= outputs.keys():
        labels, scores = _plain(outputs["top_labels"]), outputs["top_scores"].tolist()
        return [list(zip(*pair, strict=True)) for pair in zip(labels, scores, strict=True)]
    (probabilities, *others) = outputs.values()
    if others or probabilities.dtype.kind != "f" or probabilities.ndim != 2 or probabilities.shape[1] < 2:
        return []
    if not (probabilities.min(initial=0) >= 0 and np.allclose(probabilities.sum(1), 1, atol=1e-2)):
        return []
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :_TOP]
    return [[(f"class {column}", row[column]) for column in top] for row, top in zip(probabilities, best, strict=True)]


def _sizes(info: dict[str, Any]) -> list[int] | None:
    """The sizes of an input, -1 for any; None where not even the rank is known."""
    shape = info["tensor_shape"]
    return None if shape.get("unknown_rank") else [int(dim["size"]) for dim in shape.get("dim", [])]


def _describe(info: dict[str, Any]) -> str:
    sizes = _sizes(info)
    shape = "any" if sizes is None else ", ".join(map(str, sizes))
    return f"{info['dtype'].removeprefix('DT_').lower()} [{shape}]"


def _plain(value: Any) -> Any:
    """Arrays as lists, bytes as text, or where they are none as TensorFlow Serving's JSON has them."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(value).decode()}
