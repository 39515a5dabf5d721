"""Workers of a training as processes of this machine: started together, and again from the last epoch when one dies."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from models import lock, run_folder

# How a worker ends that lost another one: 128 and more say to Kubeflow that it is worth trying again (SIGUSR1).
TRY_AGAIN = 138
# What cannot become better: a mistake in the command, missing data.
_MISTAKES = (1, 2)
_ATTEMPTS = 3
_GRACE_SECONDS = 5.0
_STDIN = 0
# In the environment of a worker: the process that started it.
_LAUNCHER = "KERAS_BN_MODELS_LAUNCHER"


def run(command: Sequence[str], count: int, folder: Path, restart: bool = False) -> int:
    """Run `command` in `count` processes that find each other by `TF_CONFIG`, until the training is through.

    The first is the chief and prints here; what the others print is in `worker_1.log` and so on in `folder`, until the
    training is through. When one dies, the others are ended and all are started again, as long as an epoch came to its
    end in three attempts. None outlives this process, if it calls `end_with_launcher`.

    Args:
        command: Of a worker; run again it goes on where it was.
        count: How many.
        folder: Of the run, held meanwhile.
        restart: Forget the run that `folder` holds before.

    Returns:
        The exit code: 0, or that of the worker that ended the training.

    Raises:
        ValueError: Another process is at work in `folder`.
    """
    before = signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        with lock.held(folder) as descriptor:
            if restart:
                run_folder.forget(folder)
            return _run(command, count, folder, () if descriptor is None else (descriptor,))
    finally:
        signal.signal(signal.SIGTERM, before)


def launcher() -> int | None:
    """The process whose `run` started this one as a worker; None for none."""
    process = os.environ.get(_LAUNCHER)
    return int(process) if process else None


def end_with_launcher() -> None:
    """End this process as soon as the one is gone whose `run` started it, however that ended."""
    if launcher() is not None:
        threading.Thread(target=_end_after_launcher, daemon=True).start()


def _end_after_launcher() -> None:
    try:
        # Nobody writes to it: it ends with the only process that could.
        while os.read(_STDIN, 1):
            continue
        _say("Who started this worker is gone.")
    finally:
        os._exit(TRY_AGAIN)


def _run(command: Sequence[str], count: int, folder: Path, kept_open: Sequence[int]) -> int:
    epochs, attempts = _epochs(folder), 0
    while True:
        codes = _run_once(command, count, folder, kept_open)
        if not any(codes):
            for index in range(1, count):
                _log(folder, index).unlink(missing_ok=True)
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


def _run_once(command: Sequence[str], count: int, folder: Path, kept_open: Sequence[int]) -> list[int | None]:
    """The exit codes of the workers, once all are through or one has failed; None for one that was ended here."""
    with _started(command, count, folder, kept_open) as workers:
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
def _started(
    command: Sequence[str], count: int, folder: Path, kept_open: Sequence[int]
) -> Iterator[list[subprocess.Popen]]:
    workers: list[subprocess.Popen] = []
    # Only this process can write to it: at its end a worker sees that this one is gone.
    reader, writer = os.pipe()
    try:
        for environment, log in _parts(count, folder):
            with contextlib.nullcontext() if log is None else log.open("w") as output:
                worker = subprocess.Popen(
                    command,
                    env=os.environ | environment | {_LAUNCHER: str(os.getpid())},
                    stdin=reader,
                    stdout=output,
                    stderr=output,
                    pass_fds=kept_open,
                )
            workers.append(worker)
        yield workers
    except (KeyboardInterrupt, SystemExit):
        _say(f"The {count} workers are being stopped.")
        raise
    finally:
        _stop(workers)
        os.close(reader)
        os.close(writer)


def _stop(workers: Sequence[subprocess.Popen]) -> None:
    """End those that are left: all are asked, and killed where they do not hear, or where Ctrl-C comes once more."""
    try:
        for worker in workers:
            worker.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _culprit(codes: Sequence[int | None]) -> tuple[int, int]:
    """Which worker ended the training, and its exit code: a mistake before a death, that before who lost another."""
    ended = [(number, code) for number, code in enumerate(codes) if code]
    return min(ended, key=lambda one: (one[1] not in _MISTAKES, one[1] == TRY_AGAIN))


def _ending(number: int, code: int, folder: Path) -> str:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    if not number:
        return f"Worker 0, the chief, {how}. What the others said is in {_log(folder, '*')}"
    lines = _log(folder, number).read_text().strip().splitlines()
    return f"Worker {number} {how}; {_log(folder, number)} ends with: {lines[-1] if lines else '(nothing)'}"


def _log(folder: Path, index: int | str) -> Path:
    return folder / f"worker_{index}.log"


def _epochs(folder: Path) -> int:
    """How many came to their end."""
    log = folder / run_folder.LOG
    return len(log.read_text().splitlines()) - 1 if log.exists() else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _exit_on_signal(number: int, _) -> None:
    raise SystemExit(128 + number)
