"""python -m tests.lower_bounds: pip's constraints for the oldest packages that setup.cfg allows."""

import re
from configparser import ConfigParser
from pathlib import Path

SETTINGS = Path(__file__).resolve().parent.parent / "setup.cfg"


def constraints() -> list[str]:
    """`name==x.y.*` for each `name>=x.y` that an installation with [serving] needs, and for what else needs click."""
    config = ConfigParser()
    config.read(SETTINGS)
    lines = f"{config['options']['install_requires']}\n{config['options.extras_require']['serving']}".split("\n")
    # The newest one does not run with the oldest click.
    lines += [line for line in config["options.extras_require"]["test"].split("\n") if "check-jsonschema" in line]
    bounds = [re.match(r"([\w-]+)>=([\d.]+)", line) for line in lines if line and not line.startswith("#")]
    if not all(bounds):
        raise ValueError(f"Every requirement must be name>=version. Received: {lines}.")
    return [f"{bound[1]}=={bound[2]}.*" for bound in bounds if bound]


if __name__ == "__main__":
    print("\n".join(constraints()))
