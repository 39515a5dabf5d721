"""The keras-bn command: what the library does, on files."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

ABOVE_LIMIT = 3

_KERAS_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_MODEL = click.Path(exists=True, path_type=Path)
_ARRAYS = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="keras-bn", prog_name="keras-bn")
def main() -> None:
    """Looks after the batch normalizations of a Keras model, from training to serving.

    \b
    A usual way to go, with a trained model and its training images:
      keras-bn inspect model.keras --data train.npz
      keras-bn recalibrate model.keras --data train.npz -o exact.keras
      keras-bn export exact.keras served/fashion --labels labels.txt
      keras-bn drift served/fashion/1 --data new.npz

    MODEL is a file saved with model.save("name.keras"), or where it says so the folder of an exported
    version. Data is a .npy file, or a .npz file with one array or with --array NAME; its first axis are
    the examples.

    \b
    Exit codes: 0 done, 1 could not be done, 2 the command was misspelled, 3 drift above --limit.
    """
    # Before TensorFlow is imported, which otherwise begins with lines about the machine.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _data_options(required: bool) -> Callable[[Any], Any]:
    options = [
        click.option("--data", type=_ARRAYS, required=required, help=".npy or .npz file of examples."),
        click.option("--array", "array_name", help="Name of the array in a .npz file that has several."),
        click.option("--divide-by", type=float, help="Divides the data first, by 255 for pixels as they are."),
        click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True),
    ]

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_json_option = click.option("--json", "as_json", is_flag=True, help="Prints JSON in the place of tables.")
_output_option = click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="New .keras file."
)


@main.command(short_help="Health of the normalizations, or what a version offers.")
@click.argument("model", type=_MODEL)
@_data_options(required=False)
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), help="Also draws it, into a .png or .svg.")
@_json_option
def inspect(
    model: Path, data: Any, array_name: Any, divide_by: Any, batch_size: int, picture: Any, as_json: bool
) -> None:
    """Shows the health of every normalization, or what an exported version offers.

    With --data, also how far its statistics are from that data, and which layers are behind a gap between
    training and validation.
    """
    with _errors_in_a_line():
        if model.is_dir():
            _print_card(model, as_json)
            return
        from keras_bn import health

        examples = None if data is None else _examples(data, array_name, divide_by)
        report = health(_loaded(model), examples, batch_size=batch_size, verbose=0 if as_json else 1)
        _print(report, as_json)
        if picture is not None:
            report.save_picture(picture)


@main.command(short_help="Exact statistics of the whole data set.")
@click.argument("model", type=_KERAS_FILE)
@_data_options(required=True)
@_output_option
@click.option("--method", type=click.Choice(["pooled", "algorithm2"]), default="pooled", show_default=True)
@click.option("--order", type=click.Choice(["sequential", "joint"]), default="sequential", show_default=True)
@_json_option
def recalibrate(
    model: Path,
    data: Path,
    array_name: Any,
    divide_by: Any,
    batch_size: int,
    output: Path,
    method: str,
    order: str,
    as_json: bool,
) -> None:
    """Replaces the moving statistics by those of the whole data set, exactly."""
    with _errors_in_a_line():
        from keras_bn import recalibrate as recalibrate_model

        loaded = _loaded(model)
        report = recalibrate_model(
            loaded,
            _examples(data, array_name, divide_by),
            method=method,
            order=order,
            batch_size=batch_size,
            verbose=0 if as_json else 1,
        )
        _save(loaded, output)
        _print(report, as_json)


@main.command(short_help="Normalizations into their neighbours, with proof.")
@click.argument("model", type=_KERAS_FILE)
@_data_options(required=False)
@_output_option
@click.option(
    "--tolerance", type=float, help="Largest relative error allowed.  [default: 1e-4; 2e-2 in half precision]"
)
@_json_option
def fold(
    model: Path,
    data: Any,
    array_name: Any,
    divide_by: Any,
    batch_size: int,
    output: Path,
    tolerance: Any,
    as_json: bool,
) -> None:
    """Absorbs normalizations into the layers beside them, and proves that nothing changed.

    It is proved on random inputs, and with --data on the first batch of that too.
    """
    with _errors_in_a_line():
        from keras_bn import fold as fold_model

        check = None if data is None else _examples(data, array_name, divide_by)[:batch_size]
        folded = fold_model(_loaded(model), check, tolerance)
        _save(folded.model, output)
        _print(folded.report, as_json)


@main.command(short_help="The next version for TensorFlow Serving.")
@click.argument("model", type=_KERAS_FILE)
@click.argument("model_base_path", type=click.Path(path_type=Path))
@click.option("--version", type=click.IntRange(min=0), help="Number of the version.  [default: the next]")
@click.option("--fold/--no-fold", default=True, show_default=True, help="Absorb normalizations.")
@click.option(
    "--drift/--no-drift", default=True, show_default=True, help="Answer how far a batch is from the training data."
)
@click.option("--labels", type=_ARRAYS, help="Text file with the name of a class in each line.")
@click.option("--pixels/--no-pixels", default=False, help="Take uint8 pixels and encoded pictures, divided by 255.")
@click.option("--warmup", type=_ARRAYS, help=".npy or .npz file of some examples a server warms up with.")
@click.option("--array", "array_name", help="Name of the array in a .npz file that has several.")
@click.option("--accuracy", type=click.FloatRange(0, 1), help="For the card of the version.")
@click.option("--overwrite", is_flag=True, help="Replace a --version that is there.")
@_json_option
def export(
    model: Path,
    model_base_path: Path,
    version: Any,
    fold: bool,
    drift: bool,
    labels: Any,
    pixels: bool,
    warmup: Any,
    array_name: Any,
    accuracy: Any,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Writes the next version below MODEL_BASE_PATH, for TensorFlow Serving, and checks it."""
    with _errors_in_a_line():
        from keras_bn import export as export_model

        exported = export_model(
            _loaded(model),
            model_base_path,
            version=version,
            fold=fold,
            drift=drift,
            labels=None if labels is None else labels.read_text().splitlines(),
            preprocess=_pixels_to_floats if pixels else None,
            warmup=None if warmup is None else _examples(warmup, array_name, None),
            accuracy=accuracy,
            overwrite=overwrite,
        )
        if as_json:
            folding = None if exported.folding is None else exported.folding.to_dict()
            facts = {"path": str(exported.path), "version": exported.version, "signatures": exported.signatures}
            click.echo(json.dumps({**facts, "errors": exported.errors._asdict(), "folding": folding}, indent=2))
        else:
            _print_card(exported.path, as_json=False)


@main.command(short_help="How far data is from the training data.")
@click.argument("model", type=_MODEL)
@_data_options(required=True)
@click.option("--limit", type=float, help="Exit with 3 if the KL of any layer is above it.")
@_json_option
def drift(model: Path, data: Path, array_name: Any, divide_by: Any, batch_size: int, limit: Any, as_json: bool) -> None:
    """Tells how far data is from what the normalizations were trained on.

    MODEL is a .keras file or the folder of an exported version. The data is taken as one batch.
    """
    with _errors_in_a_line():
        from keras_bn.drift import drift_of_model, drift_of_version

        examples = _examples(data, array_name, divide_by)
        rows = drift_of_version(model, examples) if model.is_dir() else drift_of_model(_loaded(model), examples)
    if as_json:
        click.echo(json.dumps({"layers": rows}, indent=2))
    else:
        from keras_bn.tables import table

        click.echo(table(["layer", "mean shift", "variance ratio", "KL"], [list(row.values()) for row in rows]))
    above = [row["layer"] for row in rows if limit is not None and not row["kl"] <= limit]
    if above:
        click.echo(f"KL above {limit:g}: {', '.join(above)}", err=True)
        raise SystemExit(ABOVE_LIMIT)


@contextlib.contextmanager
def _errors_in_a_line() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error


def _loaded(path: Path) -> Any:
    import keras

    import keras_bn  # noqa: F401  A file names our layer, Keras has to know it.

    if path.suffix not in (".keras", ".h5"):
        raise ValueError(f"MODEL must be a .keras or .h5 file. Received: {path}.")
    return keras.models.load_model(path)


def _examples(path: Path, name: str | None, divide_by: float | None) -> Any:
    import numpy as np

    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        values = loaded
    else:
        names = loaded.files
        if name not in names and (name is not None or len(names) != 1):
            raise ValueError(f"--array must be one of {names}, those in {path}. Received: {name}.")
        values = loaded[name or names[0]]
    return values if divide_by is None else (values / divide_by).astype("float32")


def _pixels_to_floats(pictures: Any) -> Any:
    import tensorflow as tf

    return tf.cast(pictures, tf.float32) / 255.0


def _save(model: Any, path: Path) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.stem}.writing.keras")
    try:
        model.save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _print(report: Any, as_json: bool) -> None:
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else f"\n{report}")


def _print_card(version: Path, as_json: bool) -> None:
    from keras_bn.exporting import CARD

    if not (version / CARD).exists():
        raise ValueError(f"MODEL must be a version that keras_bn exported, with {CARD}. Received: {version}.")
    card = json.loads((version / CARD).read_text())
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
