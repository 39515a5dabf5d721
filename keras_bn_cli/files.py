"""What the command reads and writes: models, data, versions."""

import contextlib
import hashlib
import importlib
import json
import os
import re
import sys
import textwrap
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from keras_bn_serving.sizes import exact_size_text

from keras_bn_cli.shell import check_free, library, tell, warnings_in_a_line

CARD = "assets.extra/keras_bn.json"
WARMUP = "assets.extra/tf_serving_warmup_requests"
MODEL_SUFFIXES = (".keras", ".h5", ".hdf5")


class Model(NamedTuple):
    """MODEL and how it is to be loaded."""

    path: Path
    modules: Sequence[str]
    trust: bool

    @contextlib.contextmanager
    def loaded(self, keep_compiled: bool = False) -> Iterator[Any]:
        """The model, for work whose progress, and whatever else is printed in it, goes to stderr.

        Args:
            keep_compiled: Whether loss and optimizer are loaded too, where they can be.
        """
        if self.path.suffix.lower() not in MODEL_SUFFIXES:
            raise ValueError(f"MODEL must be a {', '.join(MODEL_SUFFIXES)} file. Received: {self.path}.")
        if self.path.suffix.lower() == ".keras" and not zipfile.is_zipfile(self.path):
            raise ValueError(f"MODEL must be a whole .keras file, which is a zip file. Received: {self.path}.")
        with contextlib.redirect_stdout(sys.stderr), warnings_in_a_line():
            library()  # A file names our layer, Keras has to know it.
            import keras

            with keras.saving.custom_object_scope(_custom_objects(self.modules)):
                yield self._load(keras.models.load_model, keep_compiled)

    def _load(self, load_model: Callable[..., Any], keep_compiled: bool) -> Any:
        problem = None
        if keep_compiled:
            try:
                return load_model(self.path, compile=True, safe_mode=not self.trust)
            except Exception as error:  # Whatever the constructors of losses and optimizers raise.
                problem = error
        try:
            model = load_model(self.path, compile=False, safe_mode=not self.trust)
        except Exception as error:
            raise ValueError(f"{self.path} cannot be loaded: {_advice(error)}") from error
        if problem is not None:
            tell(f"Loss and optimizer of {self.path} do not load, the new file is without them: {_advice(problem)}")
        return model


class Data(NamedTuple):
    """--data and how it is to be read."""

    path: Path
    array_name: str | None
    divide_by: float | None = None
    batch_size: int = 32

    def for_model(self, model: Any) -> Any:
        """The examples as `model` takes them: an array, or arrays in the structure of its inputs."""
        import keras

        examples = self.by_name(model)
        if not isinstance(examples, dict) or not getattr(model, "inputs", None):
            return examples
        return keras.tree.map_structure(lambda tensor: examples[tensor.name], model.input)

    def by_name(self, model: Any) -> Any:
        """The examples as an array, or for several inputs of `model` arrays by name."""
        inputs = getattr(model, "inputs", None) or []
        return self.read({tensor.name: tuple(tensor.shape[1:]) for tensor in inputs})

    def read(self, shapes: dict[str, Any]) -> Any:
        """The examples for inputs of some names, each with the shape of one example or None.

        Returns:
            An array; or for several inputs, arrays by name: all there are, where `shapes` has none.
        """
        import numpy as np

        try:
            content = np.load(self.path, allow_pickle=False)
            arrays = {"": content} if isinstance(content, np.ndarray) else dict(content)
        except Exception as error:  # zipfile, zlib and numpy have their own.
            # NumPy takes whatever is none of its files for a pickle, which is never read here.
            reason: Any = "it is neither" if "pickle" in str(error) else error
            if str(error).startswith("Object arrays"):
                reason = "it holds Python objects, which are never read; save an array of numbers"
            raise ValueError(f"{self.path} cannot be read as .npy or .npz of numbers: {reason}.") from error
        strangers = sorted(name for name, content in arrays.items() if not isinstance(content, np.ndarray))
        if strangers:
            raise ValueError(
                f"{self.path} cannot be read as .npy or .npz of numbers: it is an archive with {strangers[0]!r}, which "
                "is no array."
            )
        if len(shapes) > 1:
            if not shapes.keys() <= arrays.keys() or self.divide_by is not None or self.array_name is not None:
                raise ValueError(
                    f"{self.path} must hold an array for each input, {sorted(shapes)}, without --array and "
                    f"--divide-by. Received: {sorted(filter(None, arrays)) or 'one array'}."
                )
            chosen = {name: arrays[name] for name in shapes}
        elif not shapes and len(arrays) > 1 and self.divide_by is None and self.array_name is None:
            chosen = arrays  # A model of an own class, which does not tell what it takes.
        else:
            if "" in arrays and self.array_name is not None:
                raise ValueError(
                    f"--array must be left out for a .npy file, which has one array. Received: {self.path}."
                )
            if "" not in arrays and self.array_name not in arrays and (self.array_name is not None or len(arrays) != 1):
                raise ValueError(
                    f"--array must be one of {sorted(arrays)}, those in {self.path}. Received: {self.array_name}."
                )
            array = arrays[self.array_name] if self.array_name in arrays else next(iter(arrays.values()))
            chosen = {next(iter(shapes), ""): array}
        for name, array in chosen.items():
            self._check(array, shapes.get(name))
        if len({len(array) for array in chosen.values()}) > 1:
            lengths = {name: len(array) for name, array in chosen.items()}
            raise ValueError(f"The arrays in {self.path} must be of one length. Received: {lengths}.")
        if len(chosen) > 1:
            return chosen
        return array if self.divide_by is None else (array / self.divide_by).astype("float32")

    def _check(self, array: Any, shape: tuple[int | None, ...] | None) -> None:
        if array.ndim == 0 or not len(array):
            raise ValueError(f"{self.path} must hold examples along its first axis. Received: shape {array.shape}.")
        if shape is None:
            return
        # A last axis of size 1 may be left out: Keras adds it.
        fitting = [shape, shape[:-1]] if shape and shape[-1] == 1 else [shape]
        if not any(
            len(sizes) == array.ndim - 1
            and all(a is None or a == b for a, b in zip(sizes, array.shape[1:], strict=True))
            for sizes in fitting
        ):
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{self.path} must hold examples of shape ({sizes}). Received: {array.shape[1:]}.")


def lines_of(path: Path) -> list[str]:
    """The names in a file of labels."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--labels must be a text file in UTF-8. Received: {path}.") from error
    blank = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if blank or not lines:
        where = f"of which line {blank[0]} is blank" if blank else "which is empty"
        raise ValueError(f"--labels must have the name of a class in each line. Received: {path}, {where}.")
    return lines


def first(examples: Any, count: int) -> Any:
    import keras

    return keras.tree.map_structure(lambda array: array[:count], examples)


def save(model: Any, path: Path, overwrite: bool) -> None:
    """Writes a model in the format that the name says."""
    with written_whole(path, overwrite) as temporary:
        if path.suffix.lower() == ".keras":
            model.save(temporary)
        else:
            temporary.write_bytes(_as_hdf5(model))


@contextlib.contextmanager
def written_whole(path: Path, overwrite: bool) -> Iterator[Path]:
    """A name to write to beside `path`, which becomes `path` when all is written; else `path` is left as it was."""
    # Of its own name, so that no other process writes into it.
    temporary = path.with_name(f".{path.stem}.writing-{uuid.uuid4().hex}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        check_free(path, str(path), overwrite)  # Another may have been faster.
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _as_hdf5(model: Any) -> bytes:
    """Made in memory: where a disk is full while HDF5 writes to it, its library ends the process."""
    import h5py

    class InMemory(h5py.File):
        """Keras takes an open file, and asks what it is called."""

        def __str__(self) -> str:
            return "model.h5"

    with InMemory("model.h5", "w", driver="core", backing_store=False) as file:
        model.save(file)
        file.flush()
        return bytes(file.id.get_file_image())


def card_of(version: Path) -> Any:
    """What a version says of itself, once its files are known to be those that were written."""
    card = version / CARD
    if not card.exists():
        versions = sorted((child for child in version.iterdir() if child.name.isdecimal()), key=lambda p: int(p.name))
        hint = f", which has versions: give {versions[-1]}" if versions else ""
        raise ValueError(
            f"The folder must be a version that keras_bn exported, with {CARD}. Received: {version}{hint}."
        )
    try:
        content = json.loads(card.read_text())
    except ValueError as error:
        raise ValueError(f"{card} is broken; export the version anew. It is no JSON: {error}.") from error
    if not isinstance(content, dict) or not content.keys() >= {"signatures", "folding"}:
        raise ValueError(f"{card} is broken; export the version anew. It is no card that keras_bn wrote.")
    # Versions of an earlier export say nothing of their files, but for the one that all have.
    for name, written in {"saved_model.pb": {}, **content.get("files", {})}.items():
        _check_file(version / name, written)
    _check_records(version / WARMUP)
    return content


def _check_file(path: Path, written: Mapping[str, Any]) -> None:
    """That a file of a version is there, and as it was written."""
    advice = "copy the version anew from where it was exported, or export it again."
    if not path.is_file():
        raise ValueError(f"{path} is missing; {advice}")
    size, wanted = path.stat().st_size, written.get("size")
    if wanted is not None and size != wanted:
        raise ValueError(
            f"{path} is broken; {advice} It has {exact_size_text(size)} and was written with {exact_size_text(wanted)}."
        )
    wanted = written.get("sha256")
    if wanted is not None and hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
        raise ValueError(f"{path} is broken; {advice} Its SHA-256 sum is not the one it was written with.")


def _check_records(path: Path) -> None:
    """That warm-up requests, which anybody may have written, end where a record ends."""
    if not path.is_file():
        return
    size, end = path.stat().st_size, 0
    with path.open("rb") as file:
        while end < size:
            file.seek(end)
            # In front of a record its length and a sum of that, behind it a sum.
            length = int.from_bytes(file.read(8), "little")
            if end + 12 + length + 4 > size:
                raise ValueError(
                    f"{path} is broken, no server warms up with it; export the version anew or remove the file. "
                    f"It has {exact_size_text(size)} and ends within the record at {end:,}."
                )
            end += 12 + length + 4


def _custom_objects(modules: Sequence[str]) -> dict[str, Any]:
    sys.path.insert(0, os.getcwd())
    objects: dict[str, Any] = {}
    for name in modules:
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:  # Whatever a module of somebody's does.
            file = Path(name)
            where = "" if file.parent == Path() else f", started in {file.parent}"
            hint = f" Did you mean --import {file.stem}{where}?" if file.suffix == ".py" else ""
            raise ValueError(
                f"--import must name a module that can be imported, not a file. Received: {name}: {error}.{hint}"
            ) from error
        objects.update({key: value for key, value in vars(module).items() if callable(value) and key[0] != "_"})
    return objects


def _advice(error: Exception) -> str:
    """What Keras says is in the way of loading, and which option is the way out."""
    # Keras nests what is wrong in the configurations of all that it is in.
    text = str(error).split("Exception encountered:")[-1].split("Full object config")[0]
    text = textwrap.shorten(text, 300)
    if "safe_mode" in text or "Lambda" in text:
        return "it holds Python code (a Lambda layer), which only --trust runs."
    if "No model config found" in text:
        return 'it holds weights only; `model.save("model.keras")` saves the whole model.'
    unknown = re.search(r"Unknown layer: '(\w+)'", text)
    if unknown is not None and _is_operation(unknown[1]):
        return (
            f"it needs {unknown[1]!r}. Operations of `keras.ops` are in no .h5 file: save the model as .keras. "
            "Where it is a class of your own, --import MODULE names the module that has it."
        )
    if "Could not locate" in text or "Unknown" in text:
        return f"{text} --import MODULE names the module that has it."
    return text or type(error).__name__


def _is_operation(name: str) -> bool:
    """Whether a class of Keras's is called that which can stand in a graph and is no layer."""
    import keras

    classes = [keras.Operation]
    for known in classes:  # Grows meanwhile.
        classes += [below for below in known.__subclasses__() if not issubclass(below, keras.Layer)]
    return any(known.__name__ == name and known.__module__.startswith("keras.") for known in classes)
