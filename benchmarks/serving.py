"""How many predictions a second the embedded server gives, beside FastAPI and the bare call.

Load comes from wrk (REST) and h2load (gRPC), as Debian ships them: apt-get install wrk nghttp2-client.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
NAME = "fashion_cnn"
CONNECTIONS = (1, 8, 32)
IMAGES = (1, 32)
PEERS = {"FastAPI, model.predict": "predict", "FastAPI, signature, orjson": "signature"}
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
    rest: str
    grpc: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of one measurement, default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind, default: %(default)s")
    parser.add_argument("--connections", type=int, nargs="+", default=CONNECTIONS)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES, help="images a request")
    parser.add_argument("--without", nargs="*", default=[], choices=[*PEERS.values(), "grpc"], help="leave out")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "serving.json")
    options = parser.parse_args(arguments)
    missing = [tool for tool in ("wrk", "h2load") if not shutil.which(tool)]
    if missing:
        print(f"error: {' and '.join(missing)} not found: apt-get install wrk nghttp2-client", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        results = _compare(Path(folder), options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": _machine(), "results": results}, indent=1) + "\n")
    print(f"written to {options.output}")
    return 0


def _compare(folder: Path, options: argparse.Namespace) -> list[dict[str, object]]:
    subprocess.run([sys.executable, "-m", "benchmarks.serving_peers", "build", str(folder)], cwd=ROOT, check=True)
    bodies = {count: _write_bodies(folder, count) for count in options.images}
    results: list[dict[str, object]] = []
    for count in options.images:
        rate = _bare_rate(folder, count, options.seconds)
        results.append(
            {"server": "the bare call, in process", "protocol": "none", "images": count, "requests_per_second": rate}
        )
        print(f"{count:3} images, bare call: {rate:8.1f} requests/s", flush=True)
    names = ["ours", *(name for name, kind in PEERS.items() if kind not in options.without)]
    # One server runs at a time: on a small machine two would only measure each other.
    for name in names:
        with _running(name, folder) as server:
            for protocol in ("REST", "gRPC") if server.grpc and "grpc" not in options.without else ("REST",):
                for count in options.images:
                    for connections in options.connections:
                        measured = _measure(server, protocol, bodies[count], connections, options)
                        row = {"server": name, "protocol": protocol, "images": count, "connections": connections}
                        results.append(row | measured._asdict())
                        print(
                            f"{count:3} images, {connections:3} connections, {name} ({protocol}): "
                            f"{measured.requests_per_second:8.1f} requests/s, p50 {measured.p50_milliseconds:.1f} ms, "
                            f"p99 {measured.p99_milliseconds:.1f} ms",
                            flush=True,
                        )
    _print_ratios(results)
    return results


def _print_ratios(results: list[dict[str, object]]) -> None:
    def rate(server: str, images: int, connections: int | None, protocol: str = "REST") -> float | None:
        for row in results:
            same = (row["server"], row["images"], row.get("connections")) == (server, images, connections)
            if same and (connections is None or row["protocol"] == protocol):
                return float(str(row["requests_per_second"]))
        return None

    signature = next(name for name, kind in PEERS.items() if kind == "signature")
    bars = [
        (1, 32, rate(signature, 1, 32), "FastAPI calling the signature", 4.0),
        (32, 8, rate("the bare call, in process", 32, None), "the bare call", 0.9),
    ]
    for images, connections, other, name, aim in bars:
        ours = rate("ours", images, connections)
        if ours and other:
            print(f"{images} images, {connections} connections: {ours / other:.2f} times {name}; the aim is {aim}")


def _measure(
    server: Server, protocol: str, bodies: dict[str, Path], connections: int, options: argparse.Namespace
) -> Measured:
    load = _wrk if protocol == "REST" else _h2load
    load(server, bodies, connections, 1.0)
    rounds = [load(server, bodies, connections, options.seconds) for _ in range(options.rounds)]
    return Measured(*(statistics.median(values) for values in zip(*rounds, strict=True)))


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
    subprocess.run(
        [sys.executable, "-m", "benchmarks.serving_peers", "bodies", str(folder), str(count)], cwd=ROOT, check=True
    )
    return {"json": folder / f"body{count}.json", "grpc": folder / f"body{count}.grpc"}


def _bare_rate(folder: Path, count: int, seconds: float) -> float:
    command = [sys.executable, "-m", "benchmarks.serving_peers", "bare", str(folder), str(count), str(seconds)]
    return float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


@contextlib.contextmanager
def _running(name: str, folder: Path) -> Iterator[Server]:
    command = (
        [sys.executable, "-m", "serving", f"--model_name={NAME}", f"--model_base_path={folder / 'export'}",
         "--rest_api_port=0"]
        if name == "ours"
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
        yield Server(name, rest[1], f"http{grpc[1]}" if grpc else "")
    finally:
        process.terminate()
        process.wait()


def _machine() -> dict[str, object]:
    import importlib.metadata

    return {
        "processors": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "tensorflow": importlib.metadata.version("tensorflow"),
    }


if __name__ == "__main__":
    sys.exit(main())
