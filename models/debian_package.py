"""Fetch a Debian package and unpack it into a folder, without root and without touching the machine's package lists."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from tqdm import tqdm


class FetchError(Exception):
    """The package could not be fetched; the message says why in one line."""


def fetch(package: str, folder: str | os.PathLike) -> Path:
    """Download `package` with apt-get and unpack it, all of it or nothing.

    The machine's own package lists are tried first. Where they are empty or out of date, apt-get reads new ones into a
    temporary folder, which needs no root.

    Args:
        package: Name of the Debian package, for example `"dataset-fashion-mnist"`.
        folder: Where the package's files go, as `folder/usr/share/...`. Its parent is created; if `folder` is there
            already, it is left alone.

    Returns:
        `folder` as a `Path`.

    Raises:
        FetchError: apt-get or dpkg is missing, or the package cannot be downloaded or unpacked.
    """
    folder = Path(folder)
    if folder.is_dir():
        return folder
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise FetchError(f"`{tool}` is not on this machine")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch_name:
        scratch = Path(scratch_name)
        archive = _download(package, scratch)
        unpacked = scratch / "unpacked"
        _run(["dpkg", "-x", str(archive), str(unpacked)], scratch)
        try:
            unpacked.rename(folder)
        except OSError:
            # Another process unpacked the same package meanwhile.
            if not folder.is_dir():
                raise
    return folder


def _download(package: str, scratch: Path) -> Path:
    """The package's `.deb` inside `scratch`."""
    # The sandbox: as root, apt-get would hand the download to a user who may not enter this folder.
    apt_get = ["apt-get", *_options({"Acquire::Retries": 2, "APT::Sandbox::User": "root"})]
    try:
        return _download_with(apt_get, package, scratch)
    except FetchError:
        apt_get += _options(_own_package_lists(scratch))
    # An unreachable third-party repository fails the update although Debian's own was read: the download decides.
    update = subprocess.run([*apt_get, "update"], env=_ENVIRONMENT, capture_output=True, text=True, check=False)
    try:
        return _download_with(apt_get, package, scratch)
    except FetchError as error:
        trouble = _last_line(update.stderr)
        raise FetchError(f"{error} (apt-get update: {trouble})" if trouble else str(error)) from error


def _own_package_lists(scratch: Path) -> dict[str, object]:
    """Settings that make apt-get keep its lists and caches below `scratch`."""
    lists, cache = scratch / "lists", scratch / "cache"
    for folder in (lists / "partial", cache / "archives" / "partial"):
        folder.mkdir(parents=True)
    return {
        "Dir::State": scratch,
        "Dir::State::Lists": lists,
        "Dir::Cache": cache,
        "Acquire::Languages": "none",
    }


def _options(settings: dict[str, object]) -> list[str]:
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def _download_with(apt_get: list[str], package: str, scratch: Path) -> Path:
    """Run `apt-get download` under one progress bar that watches the file grow."""
    # Prints: 'address' file_name size hash
    listing = _run([*apt_get, "download", "--print-uris", package], scratch).split()
    if len(listing) < 3 or not listing[2].isdecimal():
        raise FetchError(f"apt-get names no download for `{package}`")
    target, size = scratch / listing[1], int(listing[2])
    with (
        (scratch / "download.log").open("w+") as log,
        # disable=None: no bar where nobody watches (stderr is not a terminal).
        tqdm(total=size, desc=package, unit="B", unit_scale=True, disable=None) as bar,
        subprocess.Popen(
            [*apt_get, "download", package],
            cwd=scratch,
            env=_ENVIRONMENT,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        while process.poll() is None:
            time.sleep(0.1)
            bar.update(_size(target) - bar.n)
        bar.update(_size(target) - bar.n)
        if process.returncode or not target.is_file():
            log.seek(0)
            raise FetchError(_last_line(log.read()))
    return target


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=_ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FetchError(_last_line(done.stderr) or f"`{' '.join(command[:2])}` ended with code {done.returncode}")
    return done.stdout


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _last_line(text: str) -> str:
    """The last error that apt-get or dpkg printed, without its prefix."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E:", "dpkg"))] or lines
    return errors[-1].removeprefix("E:").removeprefix("W:").strip() if errors else ""


# apt-get's messages are read, so they must be the untranslated ones.
_ENVIRONMENT = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
