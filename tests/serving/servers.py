"""Starts real server processes for tests and stops them."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class RunningServer(NamedTuple):
    """A server that has said that it is ready."""

    url: str
    grpc_target: str
    process: subprocess.Popen[str]
    summary: str


def command(*flags: str) -> list[str]:
    """The command line of a server."""
    return [sys.executable, "-m", "keras_bn_serving", *flags]


def environment() -> dict[str, str]:
    """The environment without what would make TensorFlow quiet: the server has to see to that itself."""
    return {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}


@contextlib.contextmanager
def running_server(*flags: str) -> Iterator[RunningServer]:
    """Runs a server on a free port until the block ends."""
    process = subprocess.Popen(
        command("--rest_api_port=auto", *flags), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        summary = ""
        assert process.stdout is not None
        for line in process.stdout:
            summary += line
            if line.startswith("Ready"):
                break
        found = re.search(r"REST at (http://\S+)", summary)
        assert found is not None, f"the server did not start: {summary} exit code {process.wait()}"
        grpc_target = re.search(r"gRPC at grpcs?://(\S+)", summary)
        assert grpc_target is not None, summary
        yield RunningServer(found[1], grpc_target[1], process, summary)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        finally:
            process.kill()
            process.stdout.close()


def run_to_the_end(*flags: str) -> subprocess.CompletedProcess[str]:
    """Runs a server that is expected to give up."""
    return subprocess.run(command(*flags), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
