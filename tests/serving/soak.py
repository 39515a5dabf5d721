"""A server under everything at once, for minutes: `python -m tests.serving.soak --seconds 600` says how it fared."""

import argparse
import asyncio
import json
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.serving import saved_models
from tests.serving.servers import ROOT, RunningServer, running_server

REST_CLIENTS, GRPC_CLIENTS = 32, 8
SWAP_SECONDS, RELOAD_SECONDS, KILL_SECONDS, BIG_SECONDS = 5, 20, 1, 3
BIG_VALUES = 400_000


@dataclass
class Outcome:
    """What a soak saw.

    Attributes:
        answers: By kind.
        failures: What should not have failed, and did.
        swaps: Versions that were copied into place.
        refused: Reloads that were refused, as they have to be.
        killed: Clients that left in the middle.
        health_ms: How long `/healthz` took, in milliseconds, each time.
        memory: The server's resident memory in bytes, each second.
    """

    answers: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    swaps: int = 0
    refused: int = 0
    killed: int = 0
    health_ms: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def p99_ms(self) -> float:
        """The 99th percentile of `health_ms`."""
        return float(np.percentile(self.health_ms, 99))

    def growth(self) -> int:
        """Bytes that the last quarter has on average more than the second minute (a short soak's second quarter)."""
        quarter = max(len(self.memory) // 4, 1)
        start = min(60, quarter)
        early, late = self.memory[start : start + min(60, quarter)], self.memory[-quarter:]
        return int(np.mean(late) - np.mean(early))


def build(base: Path) -> Path:
    """Writes the models and returns the file that configures them: `swapped` adds its version, `big` answers much."""
    import tensorflow as tf

    saved_models.half_plus(base / "swapped", 1, 1.0)
    saved_models.half_plus(base / "template", 1, 1.0)
    numbers = (lambda x: {"y": tf.reshape(x, [-1, 1]) * tf.ones([1, BIG_VALUES])}, [tf.TensorSpec([None], tf.float32)])
    saved_models.export(base / "big" / "1", {"serving_default": numbers})
    path = base / "models.config"
    path.write_text(configuration(base, "swapped", "big"))
    return path


def configuration(base: Path, *names: str) -> str:
    """The text of a configuration of these models."""
    configs = " ".join(
        f'config {{ name: "{name}" base_path: "{base / name}" model_platform: "tensorflow" }}' for name in names
    )
    return f"model_config_list {{ {configs} }}"


def soak(seconds: float) -> Outcome:
    """Runs a server for so long under clients, slow copies, refused reloads, killed clients and big answers."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        config = build(base)
        flags = (f"--model_config_file={config}", "--file_system_poll_wait_seconds=0.5", "--enable_model_management")
        with running_server(*flags) as server:
            done = threading.Event()
            load = subprocess.Popen(
                [sys.executable, "-m", "tests.serving.soak", "--load", server.url, server.grpc_target],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            jobs: list[tuple[Callable[[RunningServer, Path, Outcome], None], float]] = [
                (_swap, SWAP_SECONDS), (_reload, RELOAD_SECONDS), (_kill, KILL_SECONDS), (_look, 0.2), (_weigh, 1),
            ]  # fmt: skip
            threads = [
                threading.Thread(target=_repeat, args=(job, every, done, server, base, outcome)) for job, every in jobs
            ]
            for thread in threads:
                thread.start()
            done.wait(seconds)
            done.set()
            for thread in threads:
                thread.join()
            said, _ = load.communicate("stop\n", timeout=120)
            loaded = json.loads(said.splitlines()[-1])
            outcome.answers.update(loaded["answers"])
            outcome.failures += loaded["failures"]
            if server.process.poll() is not None:
                outcome.failures.append(f"the server ended with {server.process.returncode}")
    return outcome


def _repeat(
    job: Callable[[RunningServer, Path, Outcome], None],
    every: float,
    done: threading.Event,
    server: RunningServer,
    base: Path,
    outcome: Outcome,
) -> None:
    while not done.wait(every):
        try:
            job(server, base, outcome)
        except Exception as error:
            outcome.failures.append(f"{job.__name__}: {error!r}")


def _swap(server: RunningServer, base: Path, outcome: Outcome) -> None:
    """Copies the next version into place, file by file and slowly, the graph first; removes old ones."""
    number = outcome.swaps + 2
    made = saved_models.half_plus(base / "template", number, float(number))
    target = base / "swapped" / str(number)
    target.mkdir()
    files = sorted((path for path in made.rglob("*") if path.is_file()), key=lambda path: path.name != "saved_model.pb")
    for path in files:
        place = target / path.relative_to(made)
        place.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes()
        with place.open("wb") as file:
            for half in (content[: len(content) // 2], content[len(content) // 2 :]):
                file.write(half)
                file.flush()
                time.sleep(0.1)
    shutil.rmtree(made)
    outcome.swaps += 1
    old = base / "swapped" / str(number - 3)
    if old.exists():
        shutil.rmtree(old)


def _reload(server: RunningServer, base: Path, outcome: Outcome) -> None:
    """Asks for a configuration whose model is not there."""
    import grpc
    from google.protobuf import text_format
    from tensorflow_serving.apis import model_management_pb2, model_service_pb2_grpc

    request = model_management_pb2.ReloadConfigRequest()
    text_format.Parse(configuration(base, "big", "nowhere"), request.config)
    with grpc.insecure_channel(server.grpc_target) as channel:
        try:
            model_service_pb2_grpc.ModelServiceStub(channel).HandleReloadConfigRequest(request, timeout=60)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            outcome.refused += 1
        else:
            raise ValueError("a reload was taken whose model is not there")


def _kill(server: RunningServer, base: Path, outcome: Outcome) -> None:
    """A client that is killed: in the middle of its body, or while a big answer is made or sent."""
    host, port = server.url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        body = b'{"instances": [1.0, 2.0]}'
        head = b"POST /v1/models/big:predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
        whole = random.random() < 0.5
        connection.sendall(head + (body if whole else body[:10]))
        if whole:
            time.sleep(random.uniform(0, 0.5))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    outcome.killed += 1


def _look(server: RunningServer, base: Path, outcome: Outcome) -> None:
    """Asks for `/healthz`, over a connection of its own, and times it."""
    host, port = server.url.removeprefix("http://").rsplit(":", 1)
    start = time.perf_counter()
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    outcome.health_ms.append((time.perf_counter() - start) * 1000)
    if not answer.startswith(b"HTTP/1.1 200"):
        raise ValueError(f"/healthz answers {answer!r}")


def _weigh(server: RunningServer, base: Path, outcome: Outcome) -> None:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    outcome.memory.append(pages * 4096)


async def load(url: str, grpc_target: str, stop: asyncio.Event) -> tuple[Counter[str], list[str]]:
    """The clients, until `stop` is set; returns answers by kind, and what failed."""
    from keras_bn_serving.client import AsyncClient, Retry

    answers: Counter[str] = Counter()
    failures: list[str] = []

    async def keep(kind: str, ask: Callable[[], Awaitable[None]], pause: float = 0.0) -> None:
        while not stop.is_set():
            try:
                await ask()
                answers[kind] += 1
            except Exception as error:
                failures.append(f"{kind}: {error!r}")
            await asyncio.sleep(pause)

    def asks(client: AsyncClient) -> Callable[[], Awaitable[None]]:
        async def ask() -> None:
            x = random.random()
            version = float((await client.predict("swapped", np.float32([x])))[0]) - x / 2
            if not (version > 0.99 and abs(version - round(version)) < 1e-3):
                raise ValueError(f"wrong answer: {version + x / 2} to {x}")

        return ask

    # Once: what fails would be seen, and not be tried again.
    once = Retry(attempts=1)
    async with AsyncClient(url, retry=once) as rest, AsyncClient(f"grpc://{grpc_target}", retry=once) as rpc:

        async def ask_big() -> None:
            shape = (await rest.predict("big", np.float32([1.0]))).shape
            if shape != (1, BIG_VALUES):
                raise ValueError(f"wrong answer: shape {shape}")

        await asyncio.gather(
            *(keep("REST", asks(rest), 0.05) for _ in range(REST_CLIENTS)),
            *(keep("gRPC", asks(rpc), 0.05) for _ in range(GRPC_CLIENTS)),
            keep("big", ask_big, BIG_SECONDS),
        )
    return answers, failures


async def _load_until_told(url: str, grpc_target: str) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    threading.Thread(target=lambda: (sys.stdin.readline(), loop.call_soon_threadsafe(stop.set)), daemon=True).start()
    answers, failures = await load(url, grpc_target, stop)
    print(json.dumps({"answers": answers, "failures": failures}))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.serving.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="default: %(default)s")
    parser.add_argument("--load", nargs=2, metavar=("URL", "TARGET"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.load:
        asyncio.run(_load_until_told(*flags.load))
        return
    outcome = soak(flags.seconds)
    print(json.dumps({**vars(outcome), "p99_ms": outcome.p99_ms(), "growth": outcome.growth()}))


if __name__ == "__main__":
    main()
