"""How the command talks: results on stdout, all else on stderr, every mistake in one line."""

import contextlib
import difflib
import math
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click


class Commands(click.Group):
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
        except (click.Abort, KeyboardInterrupt):
            code = fail("Interrupted.", 130)
        except _Ended as end:
            code = fail(*end.args)
        except click.NoSuchOption as error:
            path = error.ctx.command_path if error.ctx else "keras-bn"
            code = fail(f"No such option: {error.option_name}.{_near(error)} See {path} --help.", error.exit_code)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "keras-bn"
            code = fail(f"{error.format_message()} See {path} --help.", error.exit_code)
        except click.ClickException as error:
            code = fail(error.format_message(), error.exit_code)
        if standalone_mode:
            sys.exit(code)
        return code

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _interrupted_in_a_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _interrupted_in_a_line():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if ctx.params["traceback"]:
                raise
            kind = "" if isinstance(error, ValueError | TypeError | OSError) else f"{type(error).__name__}: "
            raise click.ClickException(f"{kind}{_said_by(error)}") from error


def _said_by(error: Exception) -> str:
    """The text of an error; of one of TensorFlow's, whose texts are pages, the line that says it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    if not type(error).__module__.startswith("tensorflow"):
        return str(error)
    from keras_bn.examples import reason

    return reason(error)


def _near(error: click.NoSuchOption) -> str:
    """Compared without the dashes, which all have, and which make any two short names alike."""
    names = [name.lstrip("-") for name in error.possibilities or ()]
    near = difflib.get_close_matches(error.option_name.lstrip("-"), names, 1)
    return f" Did you mean --{near[0]}?" if near else ""


class _Ended(BaseException):
    """Ends the process, which takes back on its way out what it is writing: for whom, and with which code."""


@contextlib.contextmanager
def _interrupted_in_a_line() -> Iterator[None]:
    """Before click hears of Ctrl-C, to which it is worth an empty line more."""
    try:
        yield
    except KeyboardInterrupt:
        raise _Ended("Interrupted.", 130) from None


@contextlib.contextmanager
def ended_in_order() -> Iterator[None]:
    """Around work that leaves something behind where it is killed: SIGTERM and SIGHUP end it as Ctrl-C does."""

    def end(number: int, frame: Any) -> None:
        raise _Ended("Terminated.", 143)

    changed = {}
    try:
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP.
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # Under `nohup` it is not.
                changed[number] = signal.signal(number, end)
        yield
    finally:
        for number, before in changed.items():
            signal.signal(number, before)


class PassesOn(click.Command):
    """A command whose arguments, --help among them, are read by what it calls."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = args
        return args


class Positive(click.FloatRange):
    """A number above 0 that is finite."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not finite.", param, ctx)
        return number


@contextlib.contextmanager
def what_to_install() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"{error.name} is not installed: python -m pip install 'keras-bn[serving]'"
        ) from error


def fail(message: str, code: int) -> int:
    tell(f"Error: {message}")
    return code


def tell(message: str) -> None:
    """One line for a person, who may be reading the result elsewhere."""
    click.echo(" ".join(message.split()), err=True)


@contextlib.contextmanager
def warnings_in_a_line() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.filterwarnings("ignore", module=r"keras\.|tensorflow\.|h5py")
        # The layer's point at the line that calls it, which is often one of Keras's.
        warnings.filterwarnings("default", "keras_bn", UserWarning)
        yield
    for warning in caught:
        tell(f"Warning: {warning.message}")


def verbose() -> int:
    """A progress bar is for a person who looks on."""
    return int(sys.stderr.isatty())


def library() -> Any:
    """keras_bn, imported without what TensorFlow and Keras say that is none of a person's business."""
    from keras_bn_serving.quiet import import_tensorflow

    import_tensorflow()
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    import keras_bn

    return keras_bn


def check_output(path: Path, suffixes: Sequence[str], option: str, overwrite: bool) -> None:
    """Before the work: that a file of that name can be written, and takes the place of none by mistake."""
    if path.suffix.lower() not in suffixes:
        raise click.UsageError(f"{option} must end in {', '.join(suffixes)}. Received: {path}.")
    check_free(path, option, overwrite)
    check_folder(path.parent, option)


def check_free(path: Path, option: str, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise click.UsageError(f"{option} must be a file that is not there yet, or pass --overwrite. Received: {path}.")


def check_folder(folder: Path, option: str) -> None:
    """That a folder is there or can be made."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        problem = "is no folder"
        if there.is_dir():
            problem = "is on a file system that is read-only" if _is_read_only(there) else "cannot be written to"
        raise click.UsageError(
            f"{option} must be where a file can be written; give another folder. Received: {folder}; {there} {problem}."
        )


def _is_read_only(folder: Path) -> bool:
    return hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & os.ST_RDONLY)  # Windows has none.
