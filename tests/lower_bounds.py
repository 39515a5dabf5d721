"""python -m tests.lower_bounds: pip's constraints for the oldest packages that setup.cfg allows."""

import re
from configparser import ConfigParser
from pathlib import Path

SETTINGS = Path(__file__).resolve().parent.parent / "setup.cfg"


def constraints() -> list[str]:
    """`name==x.y.*` for each `name>=x.y` that an installation with [serving] needs."""
    config = ConfigParser()
    config.read(SETTINGS)
    lines = f"{config['options']['install_requires']}\n{config['options.extras_require']['serving']}".split("\n")
    bounds = [re.match(r"([\w-]+)>=([\d.]+)", line) for line in lines if line and not line.startswith("#")]
    if not all(bounds):
        raise ValueError(f"Every requirement must be name>=version. Received: {lines}.")
    return [f"{bound[1]}=={bound[2]}.*" for bound in bounds if bound]


if __name__ == "__main__":
    print("\n".join(constraints()))
