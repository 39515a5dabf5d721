"""The commands, their options and what they print."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from keras_bn_cli.files import MODEL_SUFFIXES, Data, Model, card_of, first, lines_of, save, written_whole
from keras_bn_cli.options import (
    FILE,
    FILE_OR_VERSION,
    array_option,
    json_option,
    output_option,
    overwrite_option,
    takes_data,
    takes_model,
)
from keras_bn_cli.printing import print_card, print_report
from keras_bn_cli.shell import (
    Commands,
    PassesOn,
    Positive,
    check_folder,
    check_output,
    library,
    tell,
    verbose,
    what_to_install,
)

ABOVE_LIMIT = 3
PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


def _print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if not asked or ctx.resilient_parsing:
        return
    keras_bn = library()
    click.echo(f"keras-bn {keras_bn.__version__}")
    click.echo(keras_bn.compiled())
    ctx.exit()


@click.group(
    cls=Commands,
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
      keras-bn health model.keras --data train.npz
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


@main.command(short_help="Health of the normalizations.")
@takes_model(FILE)
@takes_data(required=False)
@click.option(
    "--picture",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also draws it, into a .png, .svg or .pdf; needs matplotlib, which 'keras-bn[models]' brings.",
)
@click.option("--overwrite", is_flag=True, help="Replace a --picture that is there.")
@json_option
def health(model: Model, data: Data | None, picture: Path | None, overwrite: bool, as_json: bool) -> None:
    """Shows the health of every normalization.

    With --data, also how far its statistics are from that data, and which layers are behind a gap between
    training and validation.
    """
    if overwrite and picture is None:
        raise click.UsageError("--overwrite needs --picture.")
    if picture is not None:
        if data is None:
            raise click.UsageError("--picture needs --data: it draws how far the two are apart.")
        check_output(picture, PICTURE_SUFFIXES, "--picture", overwrite)
        if importlib.util.find_spec("matplotlib") is None:
            raise click.ClickException(
                "--picture needs matplotlib: python -m pip install matplotlib, or 'keras-bn[models]'"
            )
    with model.loaded() as loaded:
        examples = None if data is None else data.for_model(loaded)
        batch_size = 32 if data is None else data.batch_size
        report = library().health(loaded, examples, batch_size=batch_size, verbose=verbose())
        if picture is not None:
            with written_whole(picture, overwrite) as temporary:
                report.save_picture(temporary)
    print_report(report, as_json)


@main.command(short_help="Exact statistics of the whole data set.")
@takes_model(FILE)
@takes_data(required=True)
@output_option
@overwrite_option
@click.option("--method", type=click.Choice(["pooled", "algorithm2"]), default="pooled", show_default=True)
@click.option("--order", type=click.Choice(["sequential", "joint"]), default="sequential", show_default=True)
@click.option("--steps", type=click.IntRange(min=1), help="Takes so many batches only.  [default: all]")
@click.option(
    "--layers",
    multiple=True,
    metavar="NAME",
    help="Measures this normalization only; once for each of several.  [default: all]",
)
@click.option(
    "--tolerance",
    type=Positive(),
    help="Stops once the standard errors of mean and variance are below it; for shuffled data.  [default: all batches]",
)
@json_option
def recalibrate(
    model: Model, data: Data, output: Path, overwrite: bool, layers: Sequence[str], as_json: bool, **options: Any
) -> None:
    """Replaces the moving statistics by those of the whole data set, exactly."""
    check_output(output, MODEL_SUFFIXES, "--output", overwrite)
    with model.loaded(keep_compiled=True) as loaded:
        report = library().recalibrate(
            loaded,
            data.for_model(loaded),
            layers=layers or None,
            batch_size=data.batch_size,
            verbose=verbose(),
            **options,
        )
        save(loaded, output, overwrite)
    print_report(report, as_json)


@main.command(short_help="Normalizations into their neighbours, with proof.")
@takes_model(FILE)
@takes_data(required=False)
@output_option
@overwrite_option
@click.option(
    "--tolerance", type=Positive(), help="Largest relative error allowed.  [default: 1e-4; 2e-2 in half precision]"
)
@json_option
def fold(model: Model, data: Data | None, output: Path, overwrite: bool, tolerance: Any, as_json: bool) -> None:
    """Absorbs normalizations into the layers beside them, and proves that nothing changed.

    It is proved on random inputs, and with --data on the first batch of that too.
    """
    check_output(output, MODEL_SUFFIXES, "--output", overwrite)
    with model.loaded() as loaded:
        check = None if data is None else first(data.for_model(loaded), data.batch_size)
        folded = library().fold(loaded, check, tolerance)
        save(folded.model, output, overwrite)
    print_report(folded.report, as_json)


@main.command(short_help="The next version for TensorFlow Serving.")
@takes_model(FILE)
@click.argument("model_base_path", type=click.Path(path_type=Path))
@click.option("--version", type=click.IntRange(min=0), help="Number of the version.  [default: the next]")
@click.option("--fold/--no-fold", default=True, show_default=True, help="Absorb normalizations.")
@click.option(
    "--drift/--no-drift", default=True, show_default=True, help="Answer how far a batch is from the training data."
)
@click.option("--labels", type=FILE, help="Text file with the name of a class in each line.")
@click.option("--pixels/--no-pixels", default=False, help="Take uint8 pixels and encoded pictures, divided by 255.")
@click.option("--warmup", type=FILE, help=".npy or .npz file of some examples a server warms up with.")
@array_option
@click.option("--accuracy", type=click.FloatRange(0, 1), help="For the card of the version.")
@click.option("--jit-compile", is_flag=True, help="Let XLA compile it; the server has to allow that.")
@click.option("--overwrite", is_flag=True, help="Replace a --version that is there.")
@json_option
def export(
    model: Model,
    model_base_path: Path,
    labels: Path | None,
    pixels: bool,
    warmup: Path | None,
    array_name: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Writes the next version below MODEL_BASE_PATH, for TensorFlow Serving, and checks it."""
    check_folder(model_base_path, "MODEL_BASE_PATH")
    if array_name is not None and warmup is None:
        raise click.UsageError("--array needs --warmup.")
    if options["overwrite"] and options["version"] is None:
        raise click.UsageError("--overwrite needs --version.")
    names = None if labels is None else lines_of(labels)
    with model.loaded() as loaded:
        if pixels:
            _check_takes_pixels(loaded)
        examples = None if warmup is None else Data(warmup, array_name).by_name(loaded)
        if pixels and examples is not None and examples.dtype != "uint8":
            raise ValueError(
                f"--warmup must hold uint8 pictures with --pixels. Received: {examples.dtype} in {warmup}."
            )
        exported = library().export(
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
        print_card(exported.path, as_json=False)


@main.command(short_help="What an exported version offers.")
@click.argument("version", type=FILE_OR_VERSION)
@json_option
def inspect(version: Path, as_json: bool) -> None:
    """Shows what an exported version offers: its signatures, its accuracy, what was folded.

    VERSION is the numbered folder that export wrote.
    """
    if version.is_file():
        raise click.BadParameter(
            "It must be the folder of an exported version; keras-bn health tells of a model file. "
            f"Received: {version}.",
            param_hint="'VERSION'",
        )
    print_card(version, as_json)


@main.command(short_help="How far data is from the training data.")
@takes_model(FILE_OR_VERSION)
@takes_data(required=True)
@click.option("--limit", type=Positive(), help="Exit with 3 if the KL of any layer is above it.")
@json_option
def drift(model: Model, data: Data, limit: Any, as_json: bool) -> None:
    """Tells how far data is from what the normalizations were trained on.

    MODEL is a model file or the folder of an exported version. All examples are pooled, whatever the batch size.
    """
    if model.path.is_dir():
        inputs = card_of(model.path)["signatures"]["serving_default"]["inputs"]
        examples = data.read({name: tuple(spec["shape"][1:]) for name, spec in inputs.items()})
        rows = library().drift(model.path, examples, data.batch_size)
    else:
        with model.loaded() as loaded:
            rows = library().drift(loaded, data.for_model(loaded), data.batch_size)
    if as_json:
        known = [{name: None if value != value else value for name, value in row.items()} for row in rows]
        click.echo(json.dumps({"layers": known}, indent=2))
    else:
        from keras_bn.tables import table

        click.echo(table(["layer", "mean shift", "variance ratio", "KL"], [list(row.values()) for row in rows]))
    above = [row["layer"] for row in rows if limit is not None and not row["kl"] <= limit]
    if above:
        tell(f"KL above {limit:g}: {', '.join(above)}")
        raise click.exceptions.Exit(ABOVE_LIMIT)


@main.command(cls=PassesOn, short_help="Serves exported versions, with TensorFlow Serving's flags.")
@click.pass_context
def serve(ctx: click.Context) -> None:
    """Serves SavedModels over TensorFlow Serving's protocol."""
    with what_to_install():
        from keras_bn_serving.__main__ import main as run
    ctx.exit(run(ctx.args, ctx.command_path))


@main.command(cls=PassesOn, short_help="Asks a server about a picture, a file or numbers.")
@click.pass_context
def ask(ctx: click.Context) -> None:
    """Asks a running server, this one or TensorFlow Serving."""
    with what_to_install():
        from keras_bn_serving.client.command import main as run
    ctx.exit(run(ctx.args, ctx.command_path))


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
