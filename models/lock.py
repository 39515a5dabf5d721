"""A folder that one process at a time may write to."""

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
# Workers whose launcher was killed have the lock until they have seen it.
_PATIENCE_SECONDS = 3.0


@contextlib.contextmanager
def held(folder: Path, launcher: int | None = None) -> Iterator[int | None]:
    """Hold `folder`, made where it is missing, against all other processes that ask so for it.

    The lock ends with the process, however that ends, so that the same command goes on. Where the file system has no
    locks, that is said on stderr and the folder is not held.

    Args:
        folder: To be written to.
        launcher: The process that started this one and may hold `folder` for it.

    Yields:
        The descriptor of the lock, for processes that this one starts and that hold it too; None where there is none.

    Raises:
        ValueError: Another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"`output` must be a folder, or nothing yet. Received: {folder}, which cannot be made: {error.strerror}"
        ) from error
    path = folder / LOCK
    descriptor = _lock(folder, path, launcher)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _lock(folder: Path, path: Path, launcher: int | None) -> int | None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        holder = _try(descriptor, folder)
        if holder is None and _is_still(path, descriptor):
            os.truncate(descriptor, 0)
            os.write(descriptor, _named(os.getpid()).encode())
            return descriptor
        os.close(descriptor)
        if launcher is not None and holder == _named(launcher):
            return None
        if holder is not None and time.monotonic() > deadline:
            raise ValueError(
                f"`output` must be a folder that no other process writes to. Received: {folder}, where "
                f"{holder or 'another one'} is at work. Wait until that one is through, or choose another `--output`."
            )
        time.sleep(0.05)


def _try(descriptor: int, folder: Path) -> str | None:
    """None where the lock is this process's now, or cannot be had by any; else who has it."""
    try:
        if fcntl is None:
            raise OSError("this system has no locks")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, 1000, 0).decode()
    except OSError as error:
        print(f"{folder} cannot be locked ({error}): let no other process write to it.", file=sys.stderr)
    return None


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the file is the one that others will open; who held it before has removed it with the lock."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _named(process: int) -> str:
    return f"process {process} on {platform.node()}"
