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

_PREFIX = ".exporting-"  # No integer: servers pass it by.


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
    model_base_path.mkdir(parents=True, exist_ok=True)
    folder = model_base_path / f"{_PREFIX}{uuid.uuid4().hex}"
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):  # It holds the version now, or someone else's file.
                path.rmdir()


def _sweep(model_base_path: Path) -> None:
    """Deletes what exports that were killed have left, once it is a day old and can be no one's work any more."""
    for left in model_base_path.glob(f"{_PREFIX}*"):
        if time.time() - left.stat().st_mtime > 24 * 3600:
            shutil.rmtree(left, ignore_errors=True)


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
