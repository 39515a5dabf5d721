"""Worker processes of one cluster on this machine, each with the `TF_CONFIG` that Kubeflow, Ray or Vertex would set."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600
MOST_RUNS = 5


def clusters(count: int) -> list[str]:
    """The `TF_CONFIG` of each worker."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    return [
        json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}}) for i in range(count)
    ]


def run(program: Path, count: int, folder: Path, *arguments: str) -> None:
    """Runs `program FOLDER ARGUMENTS` in `folder` as that many workers, until all are through.

    What they print goes to files there.

    Raises:
        RuntimeError: One of them failed; with the end of what it said.
    """
    configs = clusters(count) if count > 1 else [None]
    with ThreadPoolExecutor(count) as pool:
        codes = list(pool.map(lambda index: _code_of(program, folder, arguments, index, configs[index]), range(count)))
    if any(codes):
        said = "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in sorted(folder.glob("worker_*.log")))
        raise RuntimeError(f"workers ended with {codes}: {said}")


def run_as_pods(program: Path, count: int, folder: Path, *arguments: str) -> list[list[int]]:
    """As `run`, but each worker is run again by itself where it ends with 128 or more, which a signal counts as.

    Returns:
        How each ended, time after time.
    """
    configs = clusters(count)

    def codes_of(index: int) -> list[int]:
        codes = [128]
        while codes[-1] >= 128 and len(codes) < MOST_RUNS:
            code = _code_of(program, folder, arguments, index, configs[index])
            codes.append(128 - code if code < 0 else code)
        return codes[1:]

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(codes_of, range(count)))


def _code_of(program: Path, folder: Path, arguments: Sequence[str], index: int, config: str | None) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "serving")))
    if config:
        environment["TF_CONFIG"] = config
    with (folder / f"worker_{index}.log").open("w") as log:
        command = [sys.executable, str(program), str(folder), *arguments]
        ended = subprocess.run(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=SECONDS
        )
    return ended.returncode
