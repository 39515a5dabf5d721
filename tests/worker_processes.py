"""Worker processes of one cluster on this machine, each with the `TF_CONFIG` that Kubeflow, Ray or Vertex would set."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 400


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
    environment = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "serving")))
    configs = clusters(count) if count > 1 else [""]
    logs = [folder / f"worker_{index}.log" for index in range(count)]
    with contextlib.ExitStack() as stack:
        workers = [
            subprocess.Popen(
                [sys.executable, program, folder, *arguments],
                cwd=folder,
                env=environment | ({"TF_CONFIG": config} if config else {}),
                stdout=stack.enter_context(log.open("w")),
                stderr=subprocess.STDOUT,
            )
            for config, log in zip(configs, logs, strict=True)
        ]
        try:
            codes = [worker.wait(SECONDS) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
    if any(codes):
        said = "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in logs)
        raise RuntimeError(f"workers ended with {codes}: {said}")
