"""python -m tests.release FOLDER: builds sdist and wheel, checks and installs them, and prints the release notes."""

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests import wheel

CHANGELOG = wheel.ROOT / "CHANGELOG.md"
VERSION = wheel.ROOT / "keras_bn/_version.py"


def version() -> str:
    """Of the package, from the one place that says it, which is also what setup.cfg reads."""
    return re.findall(r'^__version__ = "([^"]+)"$', VERSION.read_text(), re.MULTILINE)[0]


def notes(changelog: str, version: str) -> str:
    """The changelog's section of a version, without its heading.

    Raises:
        ValueError: There is none, or nothing is in it.
    """
    sections = re.split(r"^## +(\S+).*\n", changelog, flags=re.MULTILINE)
    named = dict(zip(sections[1::2], sections[2::2], strict=True))
    text = named.get(version, "").strip()
    if not text:
        received = f"sections of {', '.join(named) or 'no version'}{', this one empty' * (version in named)}"
        raise ValueError(
            f"CHANGELOG.md must have a section `## {version}` that says what changed, as keras_bn/_version.py has that "
            f"version. Received: {received}."
        )
    return text


def place(packages: Sequence[Path], folder: Path) -> None:
    """Leaves these files alone in `folder`, which is made anew: a copy of a temporary folder is its owner's to read."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for package in packages:
        shutil.copy2(package, folder)


def main() -> None:
    """The command. Ends at the first thing that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what is in it is replaced")
    parser.add_argument("--pythons", nargs="*", default=wheel.VERSIONS, help="to install the wheel for, where they are")
    options = parser.parse_args()
    number = version()
    try:
        text = notes(CHANGELOG.read_text(), number)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    folder = options.folder.absolute()
    with tempfile.TemporaryDirectory() as made:
        wheel.build(Path(made))
        wheel.repair(Path(made))
        packages = sorted(Path(made).iterdir(), key=lambda path: path.suffix)
        wrong = [path.name for path in packages if not path.name.startswith(f"keras_bn-{number}")]
        if wrong:
            parser.exit(1, f"error: keras_bn/_version.py says {number}, and the build made {', '.join(wrong)}.\n")
        print(wheel.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, packages)]), flush=True)
        for package in packages:
            # Of the sdist every Python makes the same.
            here = [".".join(map(str, sys.version_info[:2]))]
            wheel.check_all(package, here if package.suffix == ".gz" else options.pythons)
        # Only what went through all of it is left to be uploaded.
        place(packages, folder)
    print("\n".join(["", *(str(folder / package.name) for package in packages), "", f"# keras_bn {number}", "", text]))


if __name__ == "__main__":
    main()
