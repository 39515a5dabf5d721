"""Arguments and options that several commands have, and what they make of them."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from keras_bn_cli.files import Data, Model
from keras_bn_cli.shell import Positive, ended_in_order


def takes_model(exists: click.Path) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        @click.argument("path", metavar="MODEL", type=exists)
        @click.option("--import", "modules", multiple=True, metavar="MODULE", help="Module with custom layers.")
        @click.option("--trust", is_flag=True, help="Runs code that the file holds (Lambda layers).")
        @functools.wraps(command)
        def wrapped(path: Path, modules: Sequence[str], trust: bool, **rest: Any) -> Any:
            with ended_in_order():
                return command(model=Model(path, modules, trust), **rest)

        return wrapped

    return decorate


def takes_data(required: bool) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        @click.option("--data", type=FILE, required=required, help=".npy or .npz file of examples.")
        @array_option
        @click.option("--divide-by", type=Positive(), help="Divides the data first, by 255 for pixels as they are.")
        @click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
        @functools.wraps(command)
        def wrapped(data: Path | None, array_name: Any, divide_by: Any, batch_size: int, **rest: Any) -> Any:
            if data is None and (array_name is not None or divide_by is not None):
                raise click.UsageError("--array and --divide-by need --data.")
            given = None if data is None else Data(data, array_name, divide_by, batch_size)
            return command(data=given, **rest)

        return wrapped

    return decorate


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FILE_OR_VERSION = click.Path(exists=True, path_type=Path)
array_option = click.option("--array", "array_name", help="Name of the array in a .npz file that has several.")
json_option = click.option("--json", "as_json", is_flag=True, help="Prints JSON in the place of tables.")
output_option = click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="New .keras or .h5 file."
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace a file that is there; MODEL itself may be named."
)
