"""How many predictions a second the embedded server gives, beside its peers and the bare call.

The peers: FastAPI as people write it first (`model.predict`) and with the exported signature, LitServe and MLServer
with the same signature, and a real TensorFlow Serving where TF_SERVING_BINARY names its `tensorflow_model_server`. Load
comes from wrk (REST) and h2load (gRPC), as Debian ships them: apt-get install wrk nghttp2-client. All servers run and
one is loaded at a time, in turn, so that a drift of the machine hits all; each gives the bare call's answer first.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import load, measuring
from models.console import count, positive

ROOT = Path(__file__).parents[1]
NAME = "fashion_cnn"
CONNECTIONS = (1, 8, 32)
IMAGES = (1, 32)
OURS, BARE, REAL = "ours", "bare call", "TensorFlow Serving"
PEERS = {
    "FastAPI predict": "predict",
    "FastAPI signature": "signature",
    "LitServe": "litserve",
    "MLServer": "mlserver",
}
QUESTION = ("protocol", "images", "connections")
COLUMNS = (*QUESTION, "server", "requests/s", "p50 ms", "p99 ms", "ours, times as many")
# Protocol, images, connections, beside whom, and how many times as many requests there should be.
AIMS = (("REST", 1, 32, "FastAPI signature", 4.0), ("REST", 32, 8, BARE, 0.9))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument(
        "--seconds",
        type=positive,
        default=3.0,
        help="length of one measurement, default: %(default)s",
    )
    parser.add_argument("--rounds", type=count, default=3, help="measurements of each kind, default: %(default)s")
    parser.add_argument("--connections", type=count, nargs="+", default=CONNECTIONS)
    parser.add_argument("--images", type=count, nargs="+", default=IMAGES, help="images a request")
    parser.add_argument("--protocols", nargs="+", default=("REST", "gRPC"), choices=("REST", "gRPC"))
    parser.add_argument("--without", nargs="*", default=[], choices=PEERS.values(), help="peers to leave out")
    parser.add_argument("--keep", action="store_true", help="keep the rows of an earlier run not measured now")
    options = parser.parse_args(arguments)
    missing = load.missing_tools()
    if missing:
        print(f"error: {' and '.join(missing)} not found: apt-get install wrk nghttp2-client", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        rows = _compare(Path(folder), options)
    if options.keep:
        rows = measuring.with_earlier("serving", rows, QUESTION)
        rows = sorted(rows, key=lambda row: (row["protocol"] != "REST", row["images"], row["connections"]))
    measuring.save("serving", rows, COLUMNS)
    _draw(rows)
    for row in rows:
        for *question, server, aim in AIMS:
            if [row[key] for key in QUESTION] == question and row["server"] == server:
                print(
                    f"{row['images']} images, {row['connections']} connections: {row['ours, times as many']:.2f} times "
                    f"as many requests as {server}; the aim is {aim}"
                )
    return 0


def _draw(rows: list[dict[str, Any]]) -> None:
    questions = {tuple(row[key] for key in QUESTION): {} for row in rows}
    for row in rows:
        questions[tuple(row[key] for key in QUESTION)][row["server"]] = row["requests/s"]
    measuring.bars(
        "serving",
        [dict(zip(QUESTION, question, strict=True)) | rates for question, rates in questions.items()],
        lambda row: f"{row['protocol']}, {row['images']} images, {row['connections']} connections",
        list(dict.fromkeys(row["server"] for row in rows)),
        "requests a second (median)",
    )


def _compare(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    _peers("build", str(folder))
    names = [OURS, *(name for name, kind in PEERS.items() if kind not in options.without)]
    if os.environ.get("TF_SERVING_BINARY"):
        names.append(REAL)
    rows = []
    with contextlib.ExitStack() as stack:
        bodies = {count: _write_bodies(folder, count) for count in options.images}
        bare = {count: stack.enter_context(_bare(folder, count)) for count in options.images}
        servers = [stack.enter_context(_running(name, folder)) for name in names]
        for server, count in itertools.product(servers, options.images):
            _check_answer(server, bodies[count])
        questions = list(itertools.product(options.protocols, options.images, options.connections))
        for question in measuring.progress(questions, "serving"):
            protocol, count, connections = question
            asked = [server for server in servers if protocol == "REST" or server.grpc]
            for row in _measure(asked, protocol, bodies[count], connections, bare[count], options):
                rows.append(dict(zip(QUESTION, question, strict=True)) | row)
    return rows


def _measure(
    servers: list[load.Server],
    protocol: str,
    body: Path,
    connections: int,
    bare_rate: Callable[[float], float],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    def ask(server: load.Server, seconds: float) -> load.Measured:
        if protocol == "REST":
            measured = load.ask_by_wrk(server, body.with_suffix(f".{server.body}"), connections, seconds)
        else:
            measured = load.ask_by_h2load(server, body.with_suffix(".grpc"), connections, seconds)
        load.settle(server)
        return measured

    for server in servers:
        ask(server, 1.0)
    seen: dict[str, list[Sequence[float]]] = {name: [] for name in (*(server.name for server in servers), BARE)}
    for _ in range(options.rounds):
        seen[BARE].append((bare_rate(options.seconds / 2),))
        for server in servers:
            seen[server.name].append(ask(server, options.seconds))
    rows = []
    for name, rounds in seen.items():
        medians = map(statistics.median, zip(*rounds, strict=True))
        row = {"server": name, **dict(zip(("requests/s", "p50 ms", "p99 ms"), medians, strict=False))}
        if name != OURS:
            # Of each round by itself: what the machine did to one of a pair it did to both.
            pairs = zip(seen[OURS], rounds, strict=True)
            row["ours, times as many"] = statistics.median(mine[0] / its[0] for mine, its in pairs)
        rows.append(row)
    return rows


def _check_answer(server: load.Server, body: Path) -> None:
    """Waits until a server answers, and compares its answer with the bare call's."""
    request = urllib.request.Request(
        server.rest, body.with_suffix(f".{server.body}").read_bytes(), {"Content-Type": "application/json"}
    )
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
            break
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    given = answer["predictions"] if "predictions" in answer else answer["outputs"][0]["data"]
    expected = np.load(body.with_suffix(".answer.npy"))
    np.testing.assert_allclose(np.reshape(given, expected.shape), expected, rtol=1e-4, atol=1e-5, err_msg=server.name)


def _write_bodies(folder: Path, count: int) -> Path:
    """Writes the same question in every form; the answer is beside it.

    Returns:
        The path without the end that says which form.
    """
    images = np.random.default_rng(count).integers(0, 256, (count, 28, 28, 1), np.uint8)
    np.save(folder / f"images{count}.npy", images)
    _peers("bodies", str(folder), str(count))
    return folder / f"body{count}"


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
def _running(name: str, folder: Path) -> Iterator[load.Server]:
    if name == REAL:
        with _running_real(folder) as server:
            yield server
        return
    command = (
        [sys.executable, "-m", "keras_bn_serving", f"--model_name={NAME}", f"--model_base_path={folder / 'export'}",
         "--rest_api_port=auto"]
        if name == OURS
        else [sys.executable, "-m", "benchmarks.serving_peers", "serve", str(folder), PEERS[name]]
    )  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        text = ""
        for line in process.stdout or ():
            text += line
            if line.startswith("Ready"):
                break
        rest = re.search(r"REST at (\S+)", text)
        if rest is None:
            raise RuntimeError(f"{name} did not start: {text}")
        grpc = re.search(r"gRPC at grpc://(\S+)", text)
        url = f"{rest[1]}/v1/models/{NAME}:predict" if name == OURS else rest[1]
        body = "v2.json" if name == "MLServer" else "json"
        yield load.Server(name, process.pid, url, grpc[1] if grpc else "", body)
    finally:
        process.terminate()
        process.wait()
        # LitServe's own processes outlive the one that was told.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _running_real(folder: Path) -> Iterator[load.Server]:
    rest, grpc = measuring.free_port(), measuring.free_port()
    flags = [
        f"--model_name={NAME}",
        f"--model_base_path={folder / 'export'}",
        f"--rest_api_port={rest}",
        f"--port={grpc}",
    ]
    with open(folder / "tensorflow_model_server.log", "wb") as log:
        process = subprocess.Popen([os.environ["TF_SERVING_BINARY"], *flags], stdout=log, stderr=log)
    try:
        yield load.Server(REAL, process.pid, f"http://127.0.0.1:{rest}/v1/models/{NAME}:predict", f"127.0.0.1:{grpc}")
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
