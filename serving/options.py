"""The flags of `python -m serving`, named as tensorflow_model_server names them."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

_TRUE = {"true": True, "1": True, "t": True, "yes": True, "y": True}
_FALSE = {"false": False, "0": False, "f": False, "no": False, "n": False}


class UsageError(Exception):
    """A command line that cannot be understood; the message is one line for the person who typed it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message[:1].upper() + message[1:])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line.

    Raises:
        UsageError: For an unknown flag, naming the nearest one, or for a bad value.
    """
    parser = _make_parser()
    options, unknown = parser.parse_known_args(arguments)
    for argument in unknown:
        name = argument.split("=")[0]
        known = [flag for action in parser._actions for flag in action.option_strings]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]}?" if nearest else " See --help for all flags."
        raise UsageError(f"Unknown flag {name}.{hint}")
    if not options.model_base_path and not options.model_config_file:
        raise UsageError("Name a model by --model_base_path=FOLDER, or several by --model_config_file=FILE.")
    return options


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m serving",
        description="Serves SavedModels over TensorFlow Serving's protocol.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    models = parser.add_argument_group("which models")
    models.add_argument("--model_name", default="default", help="name of the one model", metavar="NAME")
    models.add_argument("--model_base_path", default="", help="folder of its numbered versions", metavar="FOLDER")
    models.add_argument(
        "--file_system_poll_wait_seconds", type=_number(float, 0), default=1.0, metavar="SECONDS",
        help="time between looks at the folders; 0 looks once",
    )  # fmt: skip
    models.add_argument("--model_config_file", default="", metavar="FILE", help="text proto that lists the models")
    _add_switch(models, "--allow_version_labels_for_unavailable_models", False, "let a label name an unloaded version")
    rest = parser.add_argument_group("where and how to answer")
    rest.add_argument("--address", default="127.0.0.1", help="address to listen on", metavar="HOST")
    rest.add_argument("--rest_api_port", type=_number(int, 0, 65535), default=8501, help="0 takes a free port")
    rest.add_argument(
        "--rest_api_timeout_in_ms", type=_number(int, 1), default=30000, metavar="MS", help="time for one answer"
    )
    engine = parser.add_argument_group("how TensorFlow runs")
    for name in ("intra", "inter"):
        engine.add_argument(
            f"--tensorflow_{name}_op_parallelism", type=_number(int, 0), default=0, metavar="THREADS",
            help="0 lets TensorFlow choose",
        )  # fmt: skip
    add("--version", action="store_true", help="print the version and exit")
    return parser


def _add_switch(group: Any, name: str, default: bool, help: str) -> None:
    group.add_argument(name, type=boolean, nargs="?", const=True, default=default, metavar="BOOL", help=help)


def _number(kind: type, least: float, most: float | None = None) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        span = f"at least {least}" if most is None else f"from {least} to {most}"
        what = "a whole number" if kind is int else "a number"
        problem = argparse.ArgumentTypeError(f"must be {what}, {span}. Received: {text!r}.")
        try:
            value = kind(text)
        except ValueError:
            raise problem from None
        if not value >= least or (most is not None and value > most):
            raise problem
        return value

    return read


def boolean(text: str) -> bool:
    """Reads the value of a flag that is on or off."""
    value = {**_TRUE, **_FALSE}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"must be true or false. Received: {text!r}.")
    return value
