"""python -m docs.figures [NAME ...]: draws the figures of the pages, each from a run, a log or a result."""

import argparse
from pathlib import Path

from docs.figures import answers, layer, speed

FOLDER = Path(__file__).resolve().parent.parent
FIGURES = {
    "start": answers.start,
    "answer": answers.pretrained_network,
    "momentum": layer.momentum,
    "digits": layer.digits,
    "fast": speed.fast,
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)}; all where none is given")
    names = parser.parse_args().names
    for unknown in set(names) - set(FIGURES):
        parser.error(f"NAME must be of {', '.join(FIGURES)}. Received: {unknown}.")
    for name in names or FIGURES:
        path = FOLDER / f"{name}.png"
        FIGURES[name]().savefig(path, dpi=110)
        print(path.relative_to(FOLDER.parent))


if __name__ == "__main__":
    main()
