"""The README's three uses, run as they are printed; the folder that they leave their files in is the working one."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
READY_SECONDS = 180


def blocks(language: str) -> list[str]:
    """What the README has in that language."""
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def three_uses() -> str:
    """Adds the layer, exports, serves and asks in Python, by the command and by curl; returns what the last two say."""
    *before, query = blocks("python")
    serve, ask = (block for block in blocks("sh") if "digits" in block)
    names: dict[str, object] = {}
    for block in before:
        exec(compile(block, "README.md", "exec"), names)
    port = str(_free_port())
    with _running(serve.replace("8501", port)):
        exec(compile(query.replace("8501", port), "README.md", "exec"), names)
        return _shell(ask.replace("8501", port))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def _environment() -> dict[str, str]:
    """The commands beside this Python first, and no path that would find a checkout."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": path}


@contextlib.contextmanager
def _running(command: str) -> Iterator[None]:
    """A server's command, from its `Ready` to the end of the block."""
    log = Path("server.log")
    with log.open("w") as output:
        server = subprocess.Popen(["sh", "-c", f"exec {command}"], stdout=output, stderr=output, env=_environment())
    try:
        deadline = time.monotonic() + READY_SECONDS
        while "Ready" not in log.read_text():
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command}: {log.read_text()}")
            time.sleep(0.1)
        yield
    finally:
        server.terminate()
        server.wait(60)


def _shell(commands: str) -> str:
    done = subprocess.run(
        ["sh", "-e", "-c", commands], capture_output=True, text=True, env=_environment(), timeout=READY_SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"{commands}: {done.stderr}")
    return done.stdout
