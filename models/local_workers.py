"""Workers of a training as processes of this machine: started together, and again from the last epoch when one dies."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from models import run_folder

# How a worker ends that lost another one: 128 and more say to Kubeflow that it is worth trying again (SIGUSR1).
TRY_AGAIN = 138
# What cannot become better: a mistake in the command, missing data.
_MISTAKES = (1, 2)
_ATTEMPTS = 3
_GRACE_SECONDS = 5.0


def run(command: Sequence[str], count: int, folder: Path) -> int:
    """Run `command` in `count` processes that find each other by `TF_CONFIG`, until the training is through.

    The first is the chief and prints here; what the others print is in `worker_1.log` and so on in `folder`. When one
    dies, the others are ended and all are started again, as long as an epoch came to its end in three attempts.

    Args:
        command: Of a worker; run again it goes on where it was.
        count: How many.
        folder: Of the run.

    Returns:
        The exit code: 0, or that of the worker that ended the training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        epochs, attempts = _epochs(folder), 0
        while True:
            codes = _run_once(command, count, folder)
            if not any(codes):
                return 0
            number, code = _culprit(codes)
            _say(_ending(number, code, folder))
            if code in (*_MISTAKES, 128 + signal.SIGINT):
                return code
            epochs, attempts = (_epochs(folder), 1) if _epochs(folder) > epochs else (epochs, attempts + 1)
            if attempts == _ATTEMPTS:
                _say(f"No epoch came to its end in {_ATTEMPTS} attempts.")
                return code if code > 0 else 128 - code
            _say("All are started again, after the last whole epoch.")
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_once(command: Sequence[str], count: int, folder: Path) -> list[int | None]:
    """The exit codes of the workers, once all are through or one has failed; None for one that was ended here."""
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(_worker(command, environment, log)) for environment, log in _parts(count, folder)
        ]
        while True:
            codes = [worker.poll() for worker in workers]
            if any(codes):
                break
            if None not in codes:
                return codes
            time.sleep(0.1)
        # Others fail because one did, sometimes before it is through itself: wait for the one that can say why.
        deadline = time.monotonic() + _GRACE_SECONDS
        while None in codes and time.monotonic() < deadline:
            time.sleep(0.1)
            codes = [worker.poll() for worker in workers]
        return codes


def _parts(count: int, folder: Path) -> Iterator[tuple[dict[str, str], Path | None]]:
    """For each worker what its environment has besides, and where it writes; None for here."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for index in range(count):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        yield {"TF_CONFIG": json.dumps(config)}, _log(folder, index) if index else None


@contextlib.contextmanager
def _worker(command: Sequence[str], environment: dict[str, str], log: Path | None) -> Iterator[subprocess.Popen]:
    with contextlib.ExitStack() as stack:
        output = None if log is None else stack.enter_context(log.open("w"))
        worker = subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output)
        try:
            yield worker
        finally:
            worker.terminate()
            try:
                worker.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


def _culprit(codes: Sequence[int | None]) -> tuple[int, int]:
    """Which worker ended the training, and its exit code: a mistake before a death, that before who lost another."""
    ended = [(number, code) for number, code in enumerate(codes) if code]
    return min(ended, key=lambda one: (one[1] not in _MISTAKES, one[1] == TRY_AGAIN))


def _ending(number: int, code: int, folder: Path) -> str:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    if not number:
        return f"Worker 0, the chief, {how}."
    lines = _log(folder, number).read_text().strip().splitlines()
    return f"Worker {number} {how}; {_log(folder, number)} ends with: {lines[-1] if lines else '(nothing)'}"


def _log(folder: Path, index: int) -> Path:
    return folder / f"worker_{index}.log"


def _epochs(folder: Path) -> int:
    """How many came to their end."""
    log = folder / run_folder.LOG
    return len(log.read_text().splitlines()) - 1 if log.exists() else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _exit_on_signal(number: int, _) -> None:
    raise SystemExit(128 + number)
