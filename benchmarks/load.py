"""What loads a server and how it answers then: wrk over REST, h2load over gRPC, as Debian ships them."""

import contextlib
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

TOOLS = ("wrk", "h2load")
_RATE = re.compile(r"Requests/sec:\s+([\d.]+)")
_ERRORS = re.compile(r"Non-2xx or 3xx responses: (\d+)|Socket errors: (.*)")
_QUANTILE = re.compile(r"^\s+(50|99)%\s+([\d.]+)(us|ms|s)\s*$", re.MULTILINE)
_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


class Measured(NamedTuple):
    """What a load generator saw."""

    requests_per_second: float
    p50_milliseconds: float
    p99_milliseconds: float


class Server(NamedTuple):
    """One of those that are compared.

    Attributes:
        name: As in the table.
        process: Its number.
        rest: Where it is asked over REST.
        grpc: Host and port over gRPC; empty where it has none, or another protocol.
        body: What the files with its REST body end in.
    """

    name: str
    process: int
    rest: str
    grpc: str = ""
    body: str = "json"


def missing_tools() -> list[str]:
    """Those of `TOOLS` that this machine has not."""
    return [tool for tool in TOOLS if not shutil.which(tool)]


def ask_by_wrk(server: Server, body: Path, connections: int, seconds: float) -> Measured:
    """Posts `body` over so many connections, each waiting for its answer."""
    script = body.with_suffix(".lua")
    script.write_text(
        f'local file = io.open("{body}", "rb")\n'
        'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\nwrk.body = file:read("*a")\n'
    )
    result = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "60s", "--latency",
         "-s", str(script), server.rest],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    failed = _ERRORS.search(result)
    rate = _RATE.search(result)
    if failed or not rate:
        raise RuntimeError(f"{server.name} has failed under load: {result}")
    if not float(rate[1]):
        # No answer in all that time counts as one at its very end: in favour of the server that gave none.
        return Measured(1 / seconds, seconds * 1e3, seconds * 1e3)
    quantiles = {percent: float(number) * _MILLISECONDS[unit] for percent, number, unit in _QUANTILE.findall(result)}
    return Measured(float(rate[1]), quantiles["50"], quantiles["99"])


def ask_by_h2load(server: Server, body: Path, connections: int, seconds: float) -> Measured:
    """Calls Predict with the frame in `body` over so many connections, one call at a time on each."""
    log = body.with_suffix(".log")
    log.unlink(missing_ok=True)
    result = subprocess.run(
        ["h2load", f"-c{connections}", "-m1", f"-D{max(1, round(seconds))}", f"-d{body}",
         f"--log-file={log}", "-Hcontent-type: application/grpc", "-Hte: trailers",
         f"http://{server.grpc}/tensorflow.serving.PredictionService/Predict"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    # A line a request: start in microseconds since the epoch, HTTP status, microseconds until the answer.
    lines = [line.split("\t") for line in log.read_text().splitlines()]
    if not lines or any(status != "200" for _, status, _ in lines):
        raise RuntimeError(f"{server.name} has failed under load: {result}")
    times = np.array([float(microseconds) for _, _, microseconds in lines]) / 1e3
    return Measured(
        len(times) / max(1, round(seconds)), float(np.quantile(times, 0.5)), float(np.quantile(times, 0.99))
    )


def settle(server: Server) -> None:
    """Waits until a server is idle: one that does not notice that its clients are gone still answers them."""
    deadline = time.monotonic() + 60
    used = -1
    while time.monotonic() < deadline:
        now = _ticks(server.process)
        if used >= 0 and now - used <= 1:
            return
        used = now
        time.sleep(0.2)
    raise RuntimeError(f"{server.name} is still busy a minute after the load has ended.")


def _ticks(process: int) -> int:
    """Processor time that a process and those that it started have used."""
    root = Path(f"/proc/{process}")
    own = sum(map(int, (root / "stat").read_text().rpartition(")")[2].split()[11:13]))
    children = []
    for task in (root / "task").iterdir():
        # Threads come and go while they are counted.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children += map(int, (task / "children").read_text().split())
    return own + sum(map(_ticks, children))
