"""The keras-bn command: what the library does, on files; and the server and its client."""

import contextlib
import functools
import importlib
import importlib.util
import json
import math
import os
import sys
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

ABOVE_LIMIT = 3
CARD = "assets.extra/keras_bn.json"
MODEL_SUFFIXES = (".keras", ".h5", ".hdf5")
PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


class _Commands(click.Group):
    """Commands whose mistakes end in one line on stderr, also those that nobody has thought of."""

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            code = super().main(args, prog_name, standalone_mode=False, **extra) or 0
        except click.Abort:
            code = _fail("Interrupted.", 130)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "keras-bn"
            code = _fail(f"{error.format_message()} See {path} --help.", error.exit_code)
        except click.ClickException as error:
            code = _fail(error.format_message(), error.exit_code)
        if standalone_mode:
            sys.exit(code)
        return code

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if ctx.params["traceback"]:
                raise
            kind = "" if isinstance(error, ValueError | TypeError | OSError) else f"{type(error).__name__}: "
            raise click.ClickException(f"{kind}{error}") from error


class _PassesOn(click.Command):
    """A command whose arguments, --help among them, are read by what it calls."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = args
        return args


class _Positive(click.FloatRange):
    """A number above 0 that is finite."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not finite.", param, ctx)
        return number


def _print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if not asked or ctx.resilient_parsing:
        return
    library = _library()
    click.echo(f"keras-bn {library.__version__}")
    click.echo(library.compiled())
    ctx.exit()


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Shows it.")
@click.option("--traceback", is_flag=True, help="Shows where an error comes from.")
@click.pass_context
def main(ctx: click.Context, traceback: bool) -> None:
    """Looks after the batch normalizations of a Keras model, from training to serving.

    \b
    A usual way to go, with a trained model and its training images:
      keras-bn inspect model.keras --data train.npz
      keras-bn recalibrate model.keras --data train.npz -o exact.keras
      keras-bn export exact.keras served/fashion --labels labels.txt
      keras-bn drift served/fashion/1 --data new.npz
      keras-bn serve --model_name=fashion --model_base_path=$PWD/served/fashion
      keras-bn ask --model_name=fashion shoe.png

    MODEL is a .keras, .h5 or .hdf5 file of model.save(), or where it says so the folder of an exported
    version. Data is a .npy file, or a .npz file with one array or with --array NAME; for a model of several
    inputs a .npz file with arrays of their names. The first axis are the examples.

    Results go to stdout, progress and what is wrong to stderr.

    \b
    Exit codes: 0 done, 1 could not be done, 2 the command was misspelled, 3 drift above --limit.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


class _Model(NamedTuple):
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
        with contextlib.redirect_stdout(sys.stderr), _warnings_in_a_line():
            _library()  # A file names our layer, Keras has to know it.
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
            _tell(f"Loss and optimizer of {self.path} do not load, the new file is without them: {_advice(problem)}")
        return model


def _takes_model(exists: click.Path) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        @click.argument("path", metavar="MODEL", type=exists)
        @click.option("--import", "modules", multiple=True, metavar="MODULE", help="Module with custom layers.")
        @click.option("--trust", is_flag=True, help="Runs code that the file holds (Lambda layers).")
        @functools.wraps(command)
        def wrapped(path: Path, modules: Sequence[str], trust: bool, **rest: Any) -> Any:
            return command(model=_Model(path, modules, trust), **rest)

        return wrapped

    return decorate


class _Data(NamedTuple):
    """--data and how it is to be read."""

    path: Path
    array_name: str | None
    divide_by: float | None = None
    batch_size: int = 32

    def for_model(self, model: Any) -> Any:
        """The examples as `model` takes them: an array, or arrays in the structure of its inputs."""
        import keras

        examples = self.by_name(model)
        if not isinstance(examples, dict):
            return examples
        return keras.tree.map_structure(lambda tensor: examples[tensor.name], model.input)

    def by_name(self, model: Any) -> Any:
        """The examples as an array, or for several inputs of `model` arrays by name."""
        inputs = getattr(model, "inputs", None) or []
        return self.read({tensor.name: tuple(tensor.shape[1:]) for tensor in inputs})

    def read(self, shapes: dict[str, Any]) -> Any:
        """The examples for inputs of some names, each with the shape of one example or None.

        Returns:
            An array; or for several inputs, arrays by name.
        """
        import numpy as np

        try:
            content = np.load(self.path, allow_pickle=False)
            arrays = {"": content} if isinstance(content, np.ndarray) else dict(content)
        except Exception as error:  # zipfile, zlib and numpy have their own.
            raise ValueError(f"{self.path} cannot be read as .npy or .npz: {error}") from error
        if len(shapes) > 1:
            if not shapes.keys() <= arrays.keys() or self.divide_by is not None or self.array_name is not None:
                raise ValueError(
                    f"{self.path} must hold an array for each input, {sorted(shapes)}, without --array and "
                    f"--divide-by. Received: {sorted(filter(None, arrays)) or 'one array'}."
                )
            chosen = {name: arrays[name] for name in shapes}
        else:
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


def _fits(shape: Sequence[int], sizes: Sequence[int | None]) -> bool:
    return len(shape) == len(sizes) and all(b is None or a == b for a, b in zip(shape, sizes, strict=True))


def _takes_data(required: bool) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        @click.option("--data", type=_FILE, required=required, help=".npy or .npz file of examples.")
        @_array_option
        @click.option("--divide-by", type=_Positive(), help="Divides the data first, by 255 for pixels as they are.")
        @click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
        @functools.wraps(command)
        def wrapped(data: Path | None, array_name: Any, divide_by: Any, batch_size: int, **rest: Any) -> Any:
            given = None if data is None else _Data(data, array_name, divide_by, batch_size)
            return command(data=given, **rest)

        return wrapped

    return decorate


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FILE_OR_VERSION = click.Path(exists=True, path_type=Path)
_array_option = click.option("--array", "array_name", help="Name of the array in a .npz file that has several.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Prints JSON in the place of tables.")
_output_option = click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="New .keras or .h5 file."
)


@main.command(short_help="Health of the normalizations, or what a version offers.")
@_takes_model(_FILE_OR_VERSION)
@_takes_data(required=False)
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), help="Also draws it, into a .png or .svg.")
@_json_option
def inspect(model: _Model, data: _Data | None, picture: Path | None, as_json: bool) -> None:
    """Shows the health of every normalization, or what an exported version offers.

    With --data, also how far its statistics are from that data, and which layers are behind a gap between
    training and validation.
    """
    if model.path.is_dir():
        if data is not None or picture is not None:
            raise click.UsageError("--data and --picture are for a model file, and MODEL is a folder.")
        _print_card(model.path, as_json)
        return
    if picture is not None:
        if data is None:
            raise click.UsageError("--picture needs --data: it draws how far the two are apart.")
        _check_output(picture, PICTURE_SUFFIXES, "--picture")
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("--picture needs matplotlib: python -m pip install matplotlib")
    with model.loaded() as loaded:
        examples = None if data is None else data.for_model(loaded)
        batch_size = 32 if data is None else data.batch_size
        report = _library().health(loaded, examples, batch_size=batch_size, verbose=_verbose())
        if picture is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            report.save_picture(picture)
    _print(report, as_json)


@main.command(short_help="Exact statistics of the whole data set.")
@_takes_model(_FILE)
@_takes_data(required=True)
@_output_option
@click.option("--method", type=click.Choice(["pooled", "algorithm2"]), default="pooled", show_default=True)
@click.option("--order", type=click.Choice(["sequential", "joint"]), default="sequential", show_default=True)
@_json_option
def recalibrate(model: _Model, data: _Data, output: Path, method: str, order: str, as_json: bool) -> None:
    """Replaces the moving statistics by those of the whole data set, exactly."""
    _check_output(output, MODEL_SUFFIXES, "--output")
    with model.loaded(keep_compiled=True) as loaded:
        report = _library().recalibrate(
            loaded,
            data.for_model(loaded),
            method=method,
            order=order,
            batch_size=data.batch_size,
            verbose=_verbose(),
        )
        _save(loaded, output)
    _print(report, as_json)


@main.command(short_help="Normalizations into their neighbours, with proof.")
@_takes_model(_FILE)
@_takes_data(required=False)
@_output_option
@click.option(
    "--tolerance", type=_Positive(), help="Largest relative error allowed.  [default: 1e-4; 2e-2 in half precision]"
)
@_json_option
def fold(model: _Model, data: _Data | None, output: Path, tolerance: Any, as_json: bool) -> None:
    """Absorbs normalizations into the layers beside them, and proves that nothing changed.

    It is proved on random inputs, and with --data on the first batch of that too.
    """
    _check_output(output, MODEL_SUFFIXES, "--output")
    with model.loaded() as loaded:
        check = None if data is None else _first(data.for_model(loaded), data.batch_size)
        folded = _library().fold(loaded, check, tolerance)
        _save(folded.model, output)
    _print(folded.report, as_json)


@main.command(short_help="The next version for TensorFlow Serving.")
@_takes_model(_FILE)
@click.argument("model_base_path", type=click.Path(path_type=Path, file_okay=False))
@click.option("--version", type=click.IntRange(min=0), help="Number of the version.  [default: the next]")
@click.option("--fold/--no-fold", default=True, show_default=True, help="Absorb normalizations.")
@click.option(
    "--drift/--no-drift", default=True, show_default=True, help="Answer how far a batch is from the training data."
)
@click.option("--labels", type=_FILE, help="Text file with the name of a class in each line.")
@click.option("--pixels/--no-pixels", default=False, help="Take uint8 pixels and encoded pictures, divided by 255.")
@click.option("--warmup", type=_FILE, help=".npy or .npz file of some examples a server warms up with.")
@_array_option
@click.option("--accuracy", type=click.FloatRange(0, 1), help="For the card of the version.")
@click.option("--jit-compile", is_flag=True, help="Let XLA compile it; the server has to allow that.")
@click.option("--overwrite", is_flag=True, help="Replace a --version that is there.")
@_json_option
def export(
    model: _Model,
    model_base_path: Path,
    labels: Path | None,
    pixels: bool,
    warmup: Path | None,
    array_name: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Writes the next version below MODEL_BASE_PATH, for TensorFlow Serving, and checks it."""
    _check_folder(model_base_path, "MODEL_BASE_PATH")
    names = None if labels is None else _lines_of(labels)
    with model.loaded() as loaded:
        if pixels:
            _check_takes_pixels(loaded)
        examples = None if warmup is None else _Data(warmup, array_name).by_name(loaded)
        if pixels and examples is not None and examples.dtype != "uint8":
            raise ValueError(
                f"--warmup must hold uint8 pictures with --pixels. Received: {examples.dtype} in {warmup}."
            )
        exported = _library().export(
            loaded,
            model_base_path,
            labels=names,
            preprocess=_pixels_to_floats if pixels else None,
            warmup=examples,
            **options,
        )
    if as_json:
        folding = None if exported.folding is None else exported.folding.to_dict()
        facts = {"path": str(exported.path), "version": exported.version, "signatures": exported.signatures}
        click.echo(json.dumps({**facts, "errors": exported.errors._asdict(), "folding": folding}, indent=2))
    else:
        _print_card(exported.path, as_json=False)


@main.command(short_help="How far data is from the training data.")
@_takes_model(_FILE_OR_VERSION)
@_takes_data(required=True)
@click.option("--limit", type=_Positive(), help="Exit with 3 if the KL of any layer is above it.")
@_json_option
def drift(model: _Model, data: _Data, limit: Any, as_json: bool) -> None:
    """Tells how far data is from what the normalizations were trained on.

    MODEL is a model file or the folder of an exported version. All examples are pooled, whatever the batch size.
    """
    if model.path.is_dir():
        inputs = _card(model.path)["signatures"]["serving_default"]["inputs"]
        examples = data.read({name: tuple(spec["shape"][1:]) for name, spec in inputs.items()})
        rows = _library().drift(model.path, examples, data.batch_size)
    else:
        with model.loaded() as loaded:
            rows = _library().drift(loaded, data.for_model(loaded), data.batch_size)
    if as_json:
        known = [{name: None if value != value else value for name, value in row.items()} for row in rows]
        click.echo(json.dumps({"layers": known}, indent=2))
    else:
        from keras_bn.tables import table

        click.echo(table(["layer", "mean shift", "variance ratio", "KL"], [list(row.values()) for row in rows]))
    above = [row["layer"] for row in rows if limit is not None and not row["kl"] <= limit]
    if above:
        _tell(f"KL above {limit:g}: {', '.join(above)}")
        raise click.exceptions.Exit(ABOVE_LIMIT)


@main.command(cls=_PassesOn, short_help="Serves exported versions, with TensorFlow Serving's flags.")
@click.pass_context
def serve(ctx: click.Context) -> None:
    """Serves SavedModels over TensorFlow Serving's protocol."""
    with _what_to_install():
        from keras_bn_serving.__main__ import main as run
    ctx.exit(run(ctx.args, ctx.command_path))


@main.command(cls=_PassesOn, short_help="Asks a server about a picture, a file or numbers.")
@click.pass_context
def ask(ctx: click.Context) -> None:
    """Asks a running server, this one or TensorFlow Serving."""
    with _what_to_install():
        from keras_bn_serving.client.command import main as run
    ctx.exit(run(ctx.args, ctx.command_path))


@contextlib.contextmanager
def _what_to_install() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"{error.name} is not installed: python -m pip install 'keras-bn[serving]'"
        ) from error


def _fail(message: str, code: int) -> int:
    _tell(f"Error: {message}")
    return code


def _tell(message: str) -> None:
    """One line for a person, who may be reading the result elsewhere."""
    click.echo(" ".join(message.split()), err=True)


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.filterwarnings("ignore", module=r"keras\.|tensorflow\.|h5py")
        # The layer's point at the line that calls it, which is often one of Keras's.
        warnings.filterwarnings("default", "keras_bn", UserWarning)
        yield
    for warning in caught:
        _tell(f"Warning: {warning.message}")


def _verbose() -> int:
    """A progress bar is for a person who looks on."""
    return int(sys.stderr.isatty())


def _library() -> Any:
    """keras_bn, imported without what TensorFlow and Keras say that is none of a person's business."""
    from keras_bn_serving.quiet import import_tensorflow

    import_tensorflow()
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    import keras_bn

    return keras_bn


def _custom_objects(modules: Sequence[str]) -> dict[str, Any]:
    sys.path.insert(0, os.getcwd())
    objects: dict[str, Any] = {}
    for name in modules:
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:  # Whatever a module of somebody's does.
            raise ValueError(f"--import must name a module that can be imported. Received: {name}: {error}") from error
        objects.update({key: value for key, value in vars(module).items() if callable(value) and key[0] != "_"})
    return objects


def _advice(error: Exception) -> str:
    """What Keras says is in the way of loading, and which option is the way out."""
    # Keras nests what is wrong in the configurations of all that it is in.
    text = str(error).split("Exception encountered:")[-1].split("Full object config")[0]
    text = textwrap.shorten(text, 300)
    if "safe_mode" in text or "Lambda" in text:
        return "it holds Python code (a Lambda layer), which only --trust runs."
    if "Could not locate" in text or "Unknown" in text:
        return f"{text} --import MODULE names the module that has it."
    return text or type(error).__name__


def _check_output(path: Path, suffixes: Sequence[str], option: str) -> None:
    if path.suffix.lower() not in suffixes:
        raise click.UsageError(f"{option} must end in {', '.join(suffixes)}. Received: {path}.")
    _check_folder(path.parent, option)


def _check_folder(folder: Path, option: str) -> None:
    """That a folder is there or can be made."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        problem = "cannot be written to" if there.is_dir() else "is no folder"
        raise click.UsageError(f"{option} must be where a file can be written. Received: {folder}; {there} {problem}.")


def _lines_of(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--labels must be a text file in UTF-8. Received: {path}.") from error


def _first(examples: Any, count: int) -> Any:
    import keras

    return keras.tree.map_structure(lambda array: array[:count], examples)


def _check_takes_pixels(model: Any) -> None:
    shapes = [tuple(tensor.shape) for tensor in getattr(model, "inputs", None) or []]
    if shapes and (len(shapes) != 1 or len(shapes[0]) != 4):
        raise ValueError(
            "--pixels must be left out for a model that does not take one batch of pictures, of rank 4. "
            f"Received: inputs of shapes {shapes}."
        )


def _pixels_to_floats(pictures: Any) -> Any:
    import tensorflow as tf

    return tf.cast(pictures, tf.float32) / 255.0


def _save(model: Any, path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.writing{path.suffix}")
    try:
        model.save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _print(report: Any, as_json: bool) -> None:
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else f"{report}")


def _card(version: Path) -> Any:
    card = version / CARD
    if not card.exists():
        versions = sorted((child for child in version.iterdir() if child.name.isdecimal()), key=lambda p: int(p.name))
        hint = f", which has versions: give {versions[-1]}" if versions else ""
        raise ValueError(f"MODEL must be a version that keras_bn exported, with {CARD}. Received: {version}{hint}.")
    return json.loads(card.read_text())


def _print_card(version: Path, as_json: bool) -> None:
    card = _card(version)
    if as_json:
        click.echo(json.dumps(card, indent=2))
        return
    click.echo(f"{version}: model {card['model']}, {card['parameters']:,} parameters, {card['created']}")
    click.echo(", ".join(f"{name} {number}" for name, number in card["versions"].items()))
    for name, signature in card["signatures"].items():
        click.echo(f"{name}:")
        for direction in ("inputs", "outputs"):
            for tensor, spec in signature[direction].items():
                shape = ", ".join("any" if size is None else str(size) for size in spec["shape"])
                click.echo(f"  {direction[:-1]:<6}  {tensor}: {spec['dtype']} ({shape})")
    if card["accuracy"] is not None:
        click.echo(f"accuracy: {card['accuracy']:.4f}")
    if card["folding"] is not None:
        folding = card["folding"]
        click.echo(
            f"folding: {folding['absorbed']} of {len(folding['normalizations'])} normalizations absorbed, "
            f"relative error {folding['relative_error']:.3g}"
        )
