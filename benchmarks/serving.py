"""How many predictions a second the embedded server gives, beside FastAPI and the bare call.

Load comes from wrk (REST) and h2load (gRPC), as Debian ships them: apt-get install wrk nghttp2-client. All servers
are up and one is loaded at a time, in turn, so that a drift of the machine hits all of them.
"""

import argparse
import contextlib
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import measuring

ROOT = Path(__file__).parents[1]
NAME = "fashion_cnn"
CONNECTIONS = (1, 8, 32)
IMAGES = (1, 32)
OURS, BARE = "ours", "bare call"
PEERS = {"FastAPI predict": "predict", "FastAPI signature": "signature"}
KEYS = ("protocol", "images", "connections")
COLUMNS = (
    *KEYS,
    *(f"{name} {unit}" for name in (OURS, *PEERS) for unit in ("requests/s", "p50 ms", "p99 ms")),
    f"{BARE} requests/s",
    *(f"ours / {name}" for name in (*PEERS, BARE)),
)
# Protocol, images, connections, which ratio, and how large it should be.
AIMS = (("REST", 1, 32, "ours / FastAPI signature", 4.0), ("REST", 32, 8, f"ours / {BARE}", 0.9))
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
    """One of those that are compared."""

    name: str
    process: int
    rest: str
    grpc: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement, default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind, default: %(default)s")
    parser.add_argument("--connections", type=int, nargs="+", default=CONNECTIONS)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES, help="images a request")
    parser.add_argument("--protocols", nargs="+", default=("REST", "gRPC"), choices=("REST", "gRPC"))
    parser.add_argument("--without", nargs="*", default=[], choices=PEERS.values(), help="peers to leave out")
    parser.add_argument("--keep", action="store_true", help="keep the rows of an earlier run not measured now")
    options = parser.parse_args(arguments)
    missing = [tool for tool in ("wrk", "h2load") if not shutil.which(tool)]
    if missing:
        print(f"error: {' and '.join(missing)} not found: apt-get install wrk nghttp2-client", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        rows = _compare(Path(folder), options)
    if options.keep:
        rows = measuring.with_earlier("serving", rows, KEYS)
        rows = sorted(rows, key=lambda row: (row["protocol"] != "REST", row["images"], row["connections"]))
    measuring.save("serving", rows, COLUMNS)
    rates = [f"{name} requests/s" for name in (OURS, *PEERS, BARE)]
    measuring.bars(
        "serving",
        rows,
        lambda row: f"{row['protocol']}, {row['images']} images, {row['connections']} connections",
        rates,
        "requests a second (median)",
    )
    for row in rows:
        for aim in AIMS:
            if tuple(row[key] for key in KEYS) == aim[:3] and aim[3] in row:
                print(f"{aim[1]} images, {aim[2]} connections: {aim[3]} is {row[aim[3]]:.2f}; the aim is {aim[4]}")
    return 0


def _compare(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    _peers("build", str(folder))
    names = [OURS, *(name for name, kind in PEERS.items() if kind not in options.without)]
    rows = []
    with contextlib.ExitStack() as stack:
        bodies = {count: _write_bodies(folder, count) for count in options.images}
        bare = {count: stack.enter_context(_bare(folder, count)) for count in options.images}
        servers = [stack.enter_context(_running(name, folder)) for name in names]
        questions = list(itertools.product(options.protocols, options.images, options.connections))
        for protocol, count, connections in measuring.progress(questions, "serving"):
            asked = [server for server in servers if protocol == "REST" or server.grpc]
            row = {"protocol": protocol, "images": count, "connections": connections}
            rows.append(row | _measure(asked, protocol, bodies[count], connections, bare[count], options))
    return rows


def _measure(
    servers: list[Server],
    protocol: str,
    bodies: dict[str, Path],
    connections: int,
    bare_rate: Callable[[float], float],
    options: argparse.Namespace,
) -> dict[str, float]:
    load = _wrk if protocol == "REST" else _h2load
    for server in servers:
        load(server, bodies, connections, 1.0)
        _settle(server)
    seen: dict[str, list[Measured]] = {server.name: [] for server in servers}
    bare = []
    for _ in range(options.rounds):
        bare.append(bare_rate(options.seconds / 2))
        for server in servers:
            seen[server.name].append(load(server, bodies, connections, options.seconds))
            _settle(server)
    found = {f"{BARE} requests/s": statistics.median(bare)}
    for name, rounds in seen.items():
        medians = [statistics.median(values) for values in zip(*rounds, strict=True)]
        found |= dict(zip((f"{name} requests/s", f"{name} p50 ms", f"{name} p99 ms"), medians, strict=True))
    ours = [one.requests_per_second for one in seen[OURS]]
    others = {name: [one.requests_per_second for one in rounds] for name, rounds in seen.items() if name != OURS}
    for name, rates in {**others, BARE: bare}.items():
        # Of each round by itself: what the machine did to one of a pair it did to both.
        found[f"ours / {name}"] = statistics.median(mine / rate for mine, rate in zip(ours, rates, strict=True))
    return found


def _settle(server: Server) -> None:
    """Waits until a server is idle: one that does not notice that its clients are gone still answers them."""
    fields = Path(f"/proc/{server.process}/stat")
    deadline = time.monotonic() + 60
    used = -1
    while time.monotonic() < deadline:
        now = sum(map(int, fields.read_text().rpartition(")")[2].split()[11:13]))
        if used >= 0 and now - used <= 1:
            return
        used = now
        time.sleep(0.2)
    raise RuntimeError(f"{server.name} is still busy a minute after the load has ended.")


def _wrk(server: Server, bodies: dict[str, Path], connections: int, seconds: float) -> Measured:
    script = bodies["json"].with_suffix(".lua")
    script.write_text(
        f'local file = io.open("{bodies["json"]}", "rb")\n'
        'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\nwrk.body = file:read("*a")\n'
    )
    result = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "60s", "--latency",
         "-s", str(script), f"{server.rest}/v1/models/{NAME}:predict"],
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


def _h2load(server: Server, bodies: dict[str, Path], connections: int, seconds: float) -> Measured:
    log = bodies["grpc"].with_suffix(".log")
    log.unlink(missing_ok=True)
    result = subprocess.run(
        ["h2load", f"-c{connections}", "-m1", f"-D{max(1, round(seconds))}", f"-d{bodies['grpc']}",
         f"--log-file={log}", "-Hcontent-type: application/grpc", "-Hte: trailers",
         f"{server.grpc}/tensorflow.serving.PredictionService/Predict"],
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


def _write_bodies(folder: Path, count: int) -> dict[str, Path]:
    images = np.random.default_rng(count).integers(0, 256, (count, 28, 28, 1), np.uint8)
    np.save(folder / f"images{count}.npy", images)
    _peers("bodies", str(folder), str(count))
    return {"json": folder / f"body{count}.json", "grpc": folder / f"body{count}.grpc"}


@contextlib.contextmanager
def _bare(folder: Path, count: int) -> Iterator[Callable[[float], float]]:
    """Gives a function that tells how often a second the signature runs, measured for so many seconds."""
    command = [sys.executable, "-m", "benchmarks.serving_peers", "bare", str(folder), str(count)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    questions, answers = process.stdin, process.stdout
    if questions is None or answers is None:
        raise RuntimeError("no pipes")

    def rate(seconds: float) -> float:
        print(seconds, file=questions, flush=True)
        return float(answers.readline())

    try:
        rate(0.1)
        yield rate
    finally:
        questions.close()
        process.wait()


def _peers(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.serving_peers", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


@contextlib.contextmanager
def _running(name: str, folder: Path) -> Iterator[Server]:
    command = (
        [sys.executable, "-m", "keras_bn_serving", f"--model_name={NAME}", f"--model_base_path={folder / 'export'}",
         "--rest_api_port=auto"]
        if name == OURS
        else [sys.executable, "-m", "benchmarks.serving_peers", "serve", str(folder), PEERS[name]]
    )  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        text = ""
        for line in process.stdout or ():
            text += line
            if line.startswith("Ready"):
                break
        rest = re.search(r"REST at (\S+)", text)
        if rest is None:
            raise RuntimeError(f"{name} did not start: {text}")
        grpc = re.search(r"gRPC at grpc(://\S+)", text)
        yield Server(name, process.pid, rest[1], f"http{grpc[1]}" if grpc else "")
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
