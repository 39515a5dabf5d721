"""python -m tests.pythons 3.10: the path of that Python, on PATH or below ~/.pyenv."""

import shutil
import subprocess
import sys
from pathlib import Path


def path_of(version: str) -> str | None:
    """The interpreter of a version such as 3.10; None where there is none that runs."""
    candidates = [shutil.which(f"python{version}"), *(Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python")]
    for candidate in filter(None, candidates):
        # A shim of pyenv's is there also for versions that are not switched on.
        asked = subprocess.run(
            [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
        )
        if asked.returncode == 0 and asked.stdout.strip() == version:
            return str(candidate)
    return None


if __name__ == "__main__":
    found = path_of(sys.argv[1])
    if found is None:
        sys.exit(f"python{sys.argv[1]} is not to be found on PATH or below ~/.pyenv/versions.")
    print(found)
