"""`python -m models.pretrained`: make the shipped network of a finished training, evaluate it, export it."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from models import data, lock, pretrained
from models.console import number, positive, start_tensorflow


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Exits with 1 where files are missing or wrong, and where the card's numbers are not reached."""
    parser = argparse.ArgumentParser(
        prog="python -m models.pretrained",
        description="The trained network that is shipped: make its files, check its card, export it for a server.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _make_parser(commands.add_parser("make", help="make the shipped files from a finished training"))
    _remake_parser(commands.add_parser("remake", help="make the shipped files anew of the shipped network"))
    _evaluate_parser(commands.add_parser("evaluate", help="compute the card's numbers anew and compare"))
    _export_parser(commands.add_parser("export", help="write a SavedModel for a server"))
    flags = vars(parser.parse_args(arguments))
    command = flags.pop("command")
    try:
        if flags.get("data_source"):
            data.check(flags["data_source"])
        start_tensorflow()
        command(**flags)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


def _make_parser(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Recalibrates the network of a finished training on its training images, and writes it, without the "
        "optimizer, with its card, pictures and examples."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of `python -m models.train`")
    _data(parser)
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=pretrained.FOLDER, help="default: %(default)s")
    cores = f"{os.cpu_count()} CPU cores"
    parser.add_argument("--machine", default=cores, help=f"what it was trained on, for the card (default: {cores})")
    parser.add_argument("--minutes", type=positive, help="what the training took; by default the sum of the log")
    parser.set_defaults(command=_make)


def _make(run: Path, data_source: str | None, output: Path, machine: str, minutes: float | None) -> None:
    from models.pretrained import making

    with lock.held(output):
        _print_made(making.make(run, data.load(data_source), output, machine, minutes), output)


def _print_made(card: dict, output: Path) -> None:
    size = (output / pretrained.NETWORK).stat().st_size
    print(f"Test accuracy: {card['accuracy']:.4f} ({card['accuracy_before_recalibration']:.4f} before recalibration)")
    print(f"Written: {output / pretrained.NETWORK} ({size:,} bytes), {output / pretrained.CARD}")


def _remake_parser(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Recalibrates the shipped network once more, on its training images as it saw them, and writes its card, "
        "pictures and examples anew; its training is not needed."
    )
    _data(parser)
    parser.add_argument("--folder", type=Path, default=pretrained.FOLDER, help="default: %(default)s")
    parser.set_defaults(command=_remake)


def _remake(data_source: str | None, folder: Path) -> None:
    from models.pretrained import making

    with lock.held(folder):
        _print_made(making.remake(data.load(data_source), folder), folder)


def _evaluate_parser(parser: argparse.ArgumentParser) -> None:
    parser.description = "Classifies all test images with the shipped network and compares with its card."
    _data(parser)
    parser.add_argument("--folder", type=Path, default=pretrained.FOLDER, help="default: %(default)s")
    parser.set_defaults(command=_evaluate)


def _evaluate(data_source: str | None, folder: Path) -> None:
    from models.pretrained import evaluation

    numbers = evaluation.evaluate(pretrained.load(folder), data.load(data_source))
    for name, one in numbers["accuracy_per_class"].items():
        print(f"{name:<12} {one:.4f}")
    print(f"{'all':<12} {numbers['accuracy']:.4f} on {numbers['test_images']:,} test images")
    differences = evaluation.differences(numbers, pretrained.load_card(folder))
    if differences:
        raise ValueError(f"the card says something else: {'; '.join(differences)}")
    print("As the card says.")


def _export_parser(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a version that TensorFlow Serving and the embedded server load: folded, with names of classes, "
        "encoded pictures, warm-up and drift; what was written is checked against the network."
    )
    parser.add_argument("model_base_path", metavar="FOLDER", help="of the model's versions, such as models/fashion_cnn")
    parser.add_argument("--version", type=number(int, 0), help="by default the next one there")
    parser.add_argument("--folder", type=Path, default=pretrained.FOLDER, help="default: %(default)s")
    parser.set_defaults(command=_export)


def _export(model_base_path: str, version: int | None, folder: Path) -> None:
    from keras_bn import export

    exported = export(
        pretrained.load(folder),
        model_base_path,
        version,
        labels=data.CLASS_NAMES,
        preprocess=pretrained.preprocess,
        warmup=pretrained.load_examples(folder),
        accuracy=pretrained.load_card(folder)["accuracy"],
    )
    print(f"Written and checked: {exported.path} ({', '.join(exported.signatures)})")


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="PATH",
        dest="data_source",
        help="folder of IDX files or .npz; by default Fashion-MNIST is found",
    )


if __name__ == "__main__":
    main()
