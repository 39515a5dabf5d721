"""Numbered versions below a model_base_path: found, written beside the others and renamed into place."""

import contextlib
import ctypes
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from keras_bn.examples import reason

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".exporting-"  # No integer: servers pass it by.
_UNTIL_HELD, _DAY = 60, 24 * 3600


def versions_below(model_base_path: Path) -> list[int]:
    """The version numbers a server would find below `model_base_path`, ascending."""
    if not model_base_path.is_dir():
        return []
    return sorted(int(child.name) for child in model_base_path.iterdir() if child.name.isdecimal() and child.is_dir())


@contextlib.contextmanager
def temporary_sibling(model_base_path: Path) -> Iterator[Path]:
    """A new folder below `model_base_path` that no server takes for a version; gone at the end unless it was renamed.

    Raises:
        ValueError: when `model_base_path` is a file.
    """
    if model_base_path.exists() and not model_base_path.is_dir():
        raise ValueError(
            "`model_base_path` must be a folder, or a path where one can be made. "
            f"Received: model_base_path={str(model_base_path)!r}, which is a file."
        )
    _sweep(model_base_path)
    made = [path for path in (model_base_path, *model_base_path.parents) if not path.exists()]
    folder = model_base_path / f"{_PREFIX}{uuid.uuid4().hex}"
    try:
        with writing(model_base_path):
            folder.mkdir(parents=True)
        with _held(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):  # It holds the version now, or someone else's file.
                path.rmdir()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Shows others that the folder is somebody's work: a lock that ends with the process, however that ends."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # A file system without locks.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(model_base_path: Path) -> Iterator[None]:
    """Around what writes files: what TensorFlow says of a full disk is an error of the system too.

    Raises:
        OSError: naming the folder of the versions.
    """
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        problem = getattr(error, "strerror", None) or reason(error)
        raise OSError(
            f"{model_base_path} cannot be written: {problem}. Give another folder, or mend this one."
        ) from error


def _sweep(model_base_path: Path) -> None:
    """Deletes what killed exports have left: what nobody holds, or, where there are no locks, is a day old."""
    for left in model_base_path.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # Another one sweeps, too, or it is another user's.
            age = time.time() - left.stat().st_mtime
            # Between its making and its lock a folder is nobody's.
            if age > _UNTIL_HELD and _is_abandoned(left, age):
                shutil.rmtree(left, ignore_errors=True)


def _is_abandoned(left: Path, age: float) -> bool:
    if fcntl is not None:
        descriptor = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:  # A file system without locks.
            return age > _DAY
        finally:
            os.close(descriptor)
    return age > _DAY


def rename_into_place(folder: Path, model_base_path: Path, version: int | None, overwrite: bool) -> Path:
    """Gives `folder` its version number in one step: the given one, or the next that is free.

    Args:
        folder: below `model_base_path`.
        model_base_path: where the versions are.
        version: None for the next.
        overwrite: whether a version that is there changes places with `folder`, and goes with it.

    Raises:
        ValueError: when the given version is there already and shall not be overwritten.
        OSError: when the system cannot exchange two folders in one step.
    """
    if overwrite and version is not None and (model_base_path / str(version)).exists():
        _exchange(folder, model_base_path / str(version))
        return model_base_path / str(version)
    while True:
        number = version if version is not None else max(versions_below(model_base_path), default=0) + 1
        target = model_base_path / str(number)
        if not target.exists():
            try:
                os.rename(folder, target)  # Refused by the system where another process was faster.
                return target
            except OSError:
                if not target.exists():
                    raise
        check_free(model_base_path, version, overwrite=False)


def check_free(model_base_path: Path, version: int | None, overwrite: bool) -> None:
    """Says before the work what `rename_into_place` would say after it."""
    if version is not None and not overwrite and (model_base_path / str(version)).exists():
        raise ValueError(
            f"`version` must be a version that is not there yet, or pass `overwrite=True`. "
            f"Received: version={version}, with versions {versions_below(model_base_path)} in {model_base_path}."
        )


def _exchange(one: Path, other: Path) -> None:
    """Two folders change places in one step, so that there is a whole version at any moment."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(
            errno.ENOSYS, "`overwrite=True` needs Linux's renameat2; export a new version instead", str(other)
        )
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{os.strerror(code)}: exchanging folders; export a new version instead", str(other))
