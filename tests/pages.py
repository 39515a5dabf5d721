"""The code blocks of README and docs, run as they are printed: `python tests/pages.py PAGE`, in an empty folder.

Blocks of Python run one after the other in one process, and share their names; commands run between them, in the same
folder. A server's command is started, and the page goes on once it says that it is ready. The ports of the pages are
replaced by free ones. Stands by itself, so that an installed wheel can be tried with it.
"""

import contextlib
import linecache
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PORTS = ("8500", "8501")
SECONDS = 300
SERVE = "keras-bn serve "
LANGUAGES = ("python", "sh", "js")

_DOCKER = "needs a Docker daemon; `make docker-check` checks what Docker runs"
_CLUSTER = "needs a cluster; `make docker-check` holds the resources to their schemas"
_INSTALLED = "tests/wheel.py does it, with the wheel: what is installed is what is tried here"
_SCALE = "tests/test_scale.py runs it, and looks at what it leaves"
# Blocks that are not run, by their beginning, and why.
NOT_RUN = {
    "pip install": _INSTALLED,
    "python -m pip install": _INSTALLED,
    "python -m venv": _INSTALLED,
    "python -m examples.": "takes minutes; tests/test_examples.py runs each with --quick",
    "make demo": "takes minutes; tests/models/test_demo.py runs the demo on a part of the data",
    "docker ": _DOCKER,
    "kubectl ": _CLUSTER,
}
# Pages of which no block is run here, and why.
LEFT = {"docs/scale.md": _SCALE}


class Block(NamedTuple):
    """A block of a page.

    Attributes:
        page: path below the root.
        line: where it begins.
        language: what the page says it is; empty where it says nothing.
        code: without the fence.
    """

    page: str
    line: int
    language: str
    code: str

    @property
    def title(self) -> str:
        """The first line, by which it is known."""
        return self.code.lstrip("\n").split("\n", 1)[0].rstrip()

    @property
    def reason(self) -> str | None:
        """Why it is not run, None where it is."""
        reasons = (why for start, why in NOT_RUN.items() if self.title.startswith(start))
        return next(reasons, LEFT.get(self.page))


class Ran(NamedTuple):
    """What a page left.

    Attributes:
        names: of its Python.
        printed: what each block of commands wrote, by title.
    """

    names: dict[str, Any]
    printed: dict[str, str]


def blocks(page: str, *languages: str) -> list[Block]:
    """The blocks of a page, of some languages or all."""
    text = (ROOT / page).read_text()
    found = [
        Block(page, text[: match.start(2)].count("\n") + 1, match[1], match[2])
        for match in re.finditer(r"^```([^\n`]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]
    return [block for block in found if not languages or block.language in languages]


def run(page: str) -> Ran:
    """Runs the blocks of a page in the working folder, but those that say why not."""
    ran = Ran({"__name__": "__main__"}, {})
    ports = {port: str(_free_port()) for port in PORTS}
    with contextlib.ExitStack() as servers:
        for block in blocks(page, *LANGUAGES):
            if block.reason is not None:
                continue
            code = with_ports(block, ports)
            if block.language == "python":
                _execute(code, f"{page}:{block.line}", ran.names)
            elif block.language == "js":
                _run(["node", "--input-type=module", "--eval", code])
            elif block.title.startswith(SERVE):
                servers.enter_context(_running(code))
            else:
                ran.printed[block.title] = _run(["sh", "-e", "-c", code])
    return ran


def with_ports(block: Block, ports: Mapping[str, str]) -> str:
    """The code of a block with other ports; a server gets both, as 8500 is what it takes for gRPC unless told.

    Args:
        block: of a page.
        ports: by the port that pages name.
    """
    code = re.sub("|".join(PORTS), lambda port: ports[port[0]], block.code)
    if block.title.startswith(SERVE) and "--port=" not in code:
        return f"{code.rstrip()} --port={ports['8500']}"
    return code


def environment() -> dict[str, str]:
    """The commands beside this Python come first."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def _execute(code: str, name: str, names: dict[str, Any]) -> None:
    # AutoGraph reads the sources of functions, as it could if the block were a file.
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    exec(compile(code, name, "exec"), names)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextlib.contextmanager
def _running(command: str) -> Iterator[None]:
    """A server's command, from its `Ready` to the end of the page."""
    log = Path("server.log")
    with log.open("w") as output:
        server = subprocess.Popen(["sh", "-c", f"exec {command}"], stdout=output, stderr=output, env=environment())
    try:
        deadline = time.monotonic() + SECONDS
        while "Ready" not in log.read_text():
            if server.poll() is not None:
                raise RuntimeError(f"{command}: ended with {server.returncode}: {log.read_text()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{command}: not ready after {SECONDS} s: {log.read_text()}")
            time.sleep(0.1)
        yield
    finally:
        server.terminate()
        server.wait(60)


def _run(command: Sequence[str]) -> str:
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} has to be installed.")
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"{command[-1]}\n{done.stdout}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    # This folder holds names that packages of the world have too.
    sys.path[0] = ""
    for title, said in run(sys.argv[1]).printed.items():
        print(f"$ {title}\n{said}")
