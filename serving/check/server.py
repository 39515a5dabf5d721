"""Runs the command line of TensorFlow Serving's image on this machine, by a real server or by the embedded one."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from . import MODEL, ROOT, CheckError
from .files import command_line, environment, run

_SECONDS_TO_LOAD = 120
# TensorFlow Serving tries a version that does not load again, a minute apart: its first word is enough.
_LOAD_FAILED = re.compile(r"Loading servable: .*? failed: (.*)")


class Process(Protocol):
    """A server's process, wherever it runs."""

    @property
    def log(self) -> str:
        """What it has printed."""

    @property
    def ended(self) -> bool:
        """Whether it has."""

    def stop(self, number: signal.Signals, seconds: float = 30) -> int:
        """Sends a signal and waits; the exit code."""


class Server(NamedTuple):
    """A server that has loaded its model."""

    rest_port: int
    grpc_port: int
    process: Process


class _LocalProcess:
    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def stop(self, number: signal.Signals, seconds: float = 30) -> int:
        self._process.send_signal(number)
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise CheckError(f"the server goes on {seconds:g} s after {number.name}") from None


def export(base_path: Path) -> str:
    """Exports the pretrained network as version 1; the TensorFlow that did.

    Raises:
        CheckError: It does not export, or the SavedModel and its card do not name one TensorFlow.
    """
    done = subprocess.run(
        [sys.executable, "-m", "models.pretrained", "export", str(base_path), "--version", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CheckError(done.stderr.strip()[-2000:])
    return exporter_version(base_path / "1")


def exporter_version(version: Path) -> str:
    """The TensorFlow that wrote a SavedModel, as it and its card say.

    Raises:
        CheckError: They say different things.
    """
    from tensorflow.core.protobuf import saved_model_pb2

    saved_model = saved_model_pb2.SavedModel.FromString((version / "saved_model.pb").read_bytes())
    card = json.loads((version / "assets.extra/keras_bn.json").read_text())["versions"]["tensorflow"]
    named = {graph.meta_info_def.tensorflow_version for graph in saved_model.meta_graphs} | {card}
    if len(named) != 1:
        raise CheckError(f"the SavedModel and its card name several TensorFlows: {sorted(named)}")
    return named.pop()


def check_not_newer(exported: str, binary: Path) -> str:
    """That a server's binary holds no older TensorFlow than the one that exported; what it says of itself.

    A server takes a newer graph as long as it knows the graph's operations and attributes: all that a graph itself says
    against servers is `GraphDef.versions.min_consumer`, which has been 12 since 2016. So a newer one may load, fail to
    load, or fail when it is asked; TensorFlow promises that older graphs work, and no more.

    Raises:
        CheckError: It does, or does not say.
    """
    said = run([str(binary), "--version"])
    library = re.search(r"^TensorFlow Library: (\S+)", said, re.MULTILINE)
    if library is None:
        raise CheckError(f"{binary} --version says no `TensorFlow Library: ...`: {said[:200]}")
    if _number(library[1]) < _number(exported):
        raise CheckError(
            f"{binary} holds TensorFlow {library[1]}, the network was exported with {exported}: install what "
            f"serving/constraints pins for it"
        )
    return ", ".join(said.splitlines())


def _number(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


@contextlib.contextmanager
def running(binary: Path | None, base_path: Path) -> Iterator[Server]:
    """Runs the image's command line in its environment until the block ends, with paths mapped and ports that are free.

    Args:
        binary: Of the server; None for the embedded one.
        base_path: Of the model.

    Raises:
        CheckError: It ends, or the model is not AVAILABLE in time.
    """
    _, *flags = command_line(ROOT, "serving")
    program = [sys.executable, "-m", "keras_bn_serving"] if binary is None else [str(binary)]
    rest_port, grpc_port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config"
        shutil.copytree(ROOT / "serving/config", config)
        models = config / "models.config"
        models.write_text(models.read_text().replace(f"/models/{MODEL}", str(base_path)))
        flags = [flag.replace("=/config/", f"={config}/") for flag in flags]
        log = Path(folder) / "log"
        with log.open("wb") as output:
            started = subprocess.Popen(
                [*program, *flags, f"--port={grpc_port}", f"--rest_api_port={rest_port}"],
                cwd=ROOT / "serving",
                env=os.environ | environment(ROOT, "serving"),
                stdout=output,
                stderr=output,
            )
        process = _LocalProcess(started, log)
        try:
            wait_until_available(process, rest_port)
            yield Server(rest_port, grpc_port, process)
        finally:
            started.kill()
            started.wait()


def wait_until_available(process: Process, rest_port: int) -> None:
    """Waits until the health check of the images is content.

    Raises:
        CheckError: The server ends, says that it cannot load, or takes too long.
    """
    end = time.monotonic() + _SECONDS_TO_LOAD
    while subprocess.run(
        [str(ROOT / "serving/model-available"), MODEL, str(rest_port)], capture_output=True, check=False
    ).returncode:
        failed = _LOAD_FAILED.search(process.log)
        if failed:
            raise CheckError(f"the model does not load: {failed[1]}")
        if process.ended or time.monotonic() > end:
            state = "has ended" if process.ended else f"has no version AVAILABLE after {_SECONDS_TO_LOAD} s"
            raise CheckError(f"the server {state}: {process.log[-2000:]}")
        time.sleep(0.5)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.5)
    return False
