"""Train a reference network: `python -m models.train`; after an interruption, the same command goes on."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from models import data
from models.console import start_tensorflow
from models.settings import Settings


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Exits with 0 when the network is trained, 2 on a wrong flag, 1 on missing data, 130 on Ctrl-C."""
    parser = _parser()
    flags = vars(parser.parse_args(arguments))
    source, output, restart = flags.pop("data"), flags.pop("output"), flags.pop("restart")
    try:
        settings = Settings(**flags)
    except ValueError as error:
        parser.error(str(error))
    folder = Path(output) if output else Path("runs") / settings.network
    start_tensorflow()
    from models import training

    try:
        images = data.load(source)
        model = training.train(settings, images, folder, restart=restart)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nInterrupted. The same command goes on after the last whole epoch.\n")
    accuracy = training.accuracy(model, images.x_test, images.y_test)
    print(f"Test accuracy: {accuracy:.4f} on {len(images.x_test):,} images")
    print(f"Saved: {folder / 'model.keras'} ({model.count_params():,} weights); log: {folder / 'log.csv'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.train",
        description="Train a reference network on Fashion-MNIST with keras_bn.BatchNormalization. After an "
        "interruption, the same command goes on and ends with the weights it would have had without one.",
    )
    files = parser.add_argument_group("files")
    files.add_argument("--data", metavar="PATH", help="folder of IDX files or .npz; by default Fashion-MNIST is found")
    files.add_argument("--output", metavar="FOLDER", help="of this run; by default runs/<network>")
    files.add_argument("--restart", action="store_true", help="forget what --output holds and start anew")
    run = parser.add_argument_group("settings of the run")
    for field in dataclasses.fields(Settings):
        options = dict(field.metadata)
        if field.default not in (None, False):
            options["help"] += f" (default: {field.default})"
        run.add_argument(f"--{field.name}", default=field.default, **options)
    return parser


if __name__ == "__main__":
    main()
